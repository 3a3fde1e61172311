//! The guest's and the frontend's side of vhost-user, for tests: used as a dev-dependency only.
//!
//! It depends on no crate of the project, so that it stays a second opinion: what a test compares
//! the daemon with is not made of the daemon's own code.
//!
//! - [`descriptor`], [`driver`]: descriptors, and the driver's end of a ring in any memory.
//! - [`request`]: headers of block requests.
//! - [`memory`], [`dirty_log`]: guest memory that the daemon maps, and the log of its changes.
//! - [`frontend`]: vhost-user messages as bytes.
//! - [`queue`]: a queue of any chains in such memory, and the messages about it.
//! - [`fuse`]: a file whose file system does not answer.
//! - [`loop_device`]: a block device over a file.
//! - [`ring`]: a queue with one request at a time.
//! - [`socket`]: sockets that behave oddly.
//! - [`wait`]: waiting for a condition.

pub mod descriptor;
pub mod dirty_log;
pub mod driver;
pub mod frontend;
pub mod fuse;
pub mod loop_device;
pub mod memory;
pub mod queue;
pub mod request;
pub mod ring;
pub mod socket;
pub mod wait;
