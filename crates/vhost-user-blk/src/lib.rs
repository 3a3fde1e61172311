//! `vhost-user-blk`: one disk for one virtual machine, over the vhost-user protocol.
//!
//! A request's way: [`session`] sets up the rings, a worker takes requests from its ring, asks the
//! disk where the data stands, has the kernel move it, and puts the answer into the used ring.

pub mod cli;
pub mod datapath;
pub mod fault;
#[cfg(test)]
mod guest;
pub mod guest_memory;
pub mod lifecycle;
pub mod process;
pub mod session;
pub mod virtio;
