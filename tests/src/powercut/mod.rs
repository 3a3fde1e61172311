//! Real power cuts: the host of the daemon is itself a QEMU guest, whose disk has a volatile cache.
//!
//! The `disk` holds what was not flushed in memory, and an `nbd` server gives it to QEMU. The
//! `host` boots on it, and runs the daemon and the client of [`crate::flushed`], which reports each
//! step to the outside. QEMU is killed at a random moment; a random part of what is in the disk's
//! cache reaches its image; the host is booted again, and the model judges each sector that it
//! reads. A `series` is the history of one disk: cuts under load, in the recovery from the cut
//! before, while the daemon is killed, and while a tool works on the file.

mod disk;
mod host;
mod nbd;
mod series;

pub use disk::{Survives, VolatileDisk};
pub use host::{FileSystem, Host, Lie, Variant, dump_path};
pub use nbd::{Server, wait_until};
pub use series::{Report, Series};
