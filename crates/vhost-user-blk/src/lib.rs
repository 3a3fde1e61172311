//! `vhost-user-blk`: one disk for one virtual machine, over the vhost-user protocol.
//!
//! The path of a request: `session` sets up the rings. A worker pops a request from its ring, asks
//! the disk where the data is, has the kernel move it, and pushes the answer into the used ring.

pub mod cli;
mod datapath;
mod fault;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(test)]
mod guest;
pub mod guest_memory;
pub mod lifecycle;
pub mod process;
mod session;
pub mod virtio;
