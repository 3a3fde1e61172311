//! What a guest has flushed must be there, whatever happens to its host.
//!
//! The client (`tests/src/bin/flush-client.rs`) plays a [`program`] on a disk and reports each
//! step; [`client_log`] reads the report, also of a client whose host has died in between; the
//! [`model`] judges the content of each sector of the disk when it is read again later.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use blk_bench::driver::queue::SECTOR_SIZE;

pub mod client_log;
pub mod model;
pub mod program;

pub use client_log::ClientLog;
pub use model::{Model, Tool};
pub use program::{DISK_SECTORS, Program};

/// Bytes from one dump of a disk to the next in a file of several.
pub const DUMP_SLOT: u64 = 64 << 20;

/// The first `sectors` sectors of dump number `slot` in `file`.
///
/// # Panics
/// If it cannot be read.
pub fn read_dump(file: &Path, slot: u64, sectors: u64) -> Vec<u8> {
    let mut content = vec![0; program::index(sectors) * SECTOR_SIZE];
    let file = File::open(file).expect("opening a dump");
    file.read_exact_at(&mut content, slot * DUMP_SLOT).expect("reading a dump");
    content
}
