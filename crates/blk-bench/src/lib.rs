//! A vhost-user-blk frontend without a guest.
//!
//! [`device`] connects to a backend and gives [`queue`]s; [`load`] drives them with a [`job`] and checks what it reads
//! against a [`model`]. A test that wants its own requests uses a queue by itself:
//!
//! ```no_run
//! use blk_bench::device::{Device, Options};
//! use blk_bench::queue::{Op, Request, Status, Wait};
//!
//! let mut device = Device::connect(&Options::new("/run/disk.sock"))?;
//! let mut queue = device.take_queues().remove(0);
//! let slot = queue.take_slot().expect("nothing in flight yet");
//! queue.submit(slot, Request { op: Op::Read, sector: 0, sectors: 8 });
//! queue.kick()?;
//! let mut done = Vec::new();
//! while queue.reap(&mut done)? == 0 {
//!     queue.wait(Wait::Eventfd)?;
//! }
//! assert_eq!(done[0].status, Status::Ok);
//! println!("{:?}", queue.data(&done[0].slot, 512));
//! # Ok::<(), blk_bench::error::Error>(())
//! ```
pub mod config;
pub mod device;
pub mod error;
pub mod job;
pub mod load;
pub mod memory;
pub mod model;
pub mod null;
mod null_ring;
pub mod queue;
pub mod region;
pub mod report;
mod ring;
pub mod rng;
pub mod server;
pub mod stamp;
pub mod stats;
