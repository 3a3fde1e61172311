//! `vhost-user-blk`: one disk for one virtual machine, over the vhost-user protocol.
//!
//! A request's way: [`session`] sets up the rings, a worker takes requests from its ring, asks the
//! disk where the data stands, has the kernel move it, and puts the answer into the used ring.

pub mod cli;
mod cold_stream;
mod complaints;
pub mod config;
pub mod connection;
pub mod control;
pub mod daemon;
pub mod dirty_log;
pub mod fault;
#[cfg(test)]
mod guest;
pub mod handover;
pub mod hold;
pub mod holes;
pub mod inflight;
pub mod log_fd;
pub mod logger;
pub mod memory;
pub mod memory_table;
pub mod message;
pub mod notify;
pub mod prompt_write;
pub mod replay;
pub mod request;
pub mod requirements;
pub mod resident;
pub mod route;
pub mod session;
pub mod sigbus;
pub mod signals;
pub mod socket;
pub mod spin;
pub mod state;
pub mod systemd;
pub mod takeover;
pub mod upgrade;
pub mod virtqueue;
pub mod vring;
pub mod watchdog;
pub mod worker;
