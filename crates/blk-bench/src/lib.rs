//! A vhost-user-blk frontend without a guest.
//!
//! [`driver::device`] connects to a backend and gives [`driver::queue`]s; [`load`] drives them with
//! a [`load::job`] and checks what it reads against a [`load::model`]. A test that wants its own
//! requests uses a queue by itself:
//!
//! ```no_run
//! use blk_bench::driver::device::{Device, Options};
//! use blk_bench::driver::queue::{Op, Request, Status, Wait};
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
//!
//! # Why a driver of its own
//!
//! Over the null backend ([`null`]; 2 CPUs, 4 KiB reads, one queue, eventfd completions) the
//! `virtio-driver` crate 0.6 is as fast: 3.1 million requests a second against 3.1 at depth 32,
//! 150,000 against 142,000 at depth 1, with latencies counted only by the latter. But it hides what
//! a load generator that doubts its backend must see: it ignores answers to requests that were
//! never made, does not show the length in the used ring, and waits for ever. Nor does it drive the
//! ring as a Linux guest does, with indirect descriptors and one store of `avail.idx` for many
//! requests. It stays in the tests, as a second opinion. This driver costs 0.13 µs of CPU per
//! request at depth 32, and 2.6 µs at depth 1, where each request is a sleep and a wake-up.

pub mod config;
pub mod driver;
pub mod error;
pub mod load;
pub mod null;
pub mod report;
pub mod server;
