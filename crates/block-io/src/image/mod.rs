//! Images: opening, creating and changing one file or a chain of them.

pub(crate) mod bitmap;
pub(crate) mod chain;
mod create;
mod edit;
mod error;
pub(crate) mod identity;
pub(crate) mod layer;
pub(crate) mod open;
pub(crate) mod opened;
mod rebind;
pub(crate) mod references;
mod resize;
mod snapshot;
pub(crate) mod trust;
pub(crate) mod write;

pub use create::{BaseOptions, CreateOptions, create_cow};
pub(crate) use create::{NewCow, Unpublished, native_backing};
pub use edit::ChangeError;
pub use error::{DiskError, ImageError, Outside};
pub(crate) use open::{Chain, Source, open_chain, open_single};
pub use rebind::{Proof, rebind};
pub use references::open_within;
pub use resize::resize;
pub use snapshot::snapshot;

use std::time::Duration;

use cow_format::{CHAIN_LAYERS_MAX, Header};

/// The maximum number of files in a chain: the COW files and a base. Each costs descriptors and
/// memory; QEMU's users seldom exceed a dozen.
pub const CHAIN_DEPTH_MAX: usize = CHAIN_LAYERS_MAX + 1;

/// Whether data goes through the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// Through the page cache, which all guests of a host share.
    #[default]
    Buffered,
    /// Bypassing it (`O_DIRECT`) where the alignment allows; the rest is buffered.
    Direct,
}

/// The format of a new COW file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CowFormat {
    /// This project's native format.
    #[default]
    Native,
    /// User Mode Linux's, version 3.
    Uml,
}

impl CowFormat {
    pub(crate) fn of(header: &Header) -> Self {
        match header {
            Header::Uml(_) => CowFormat::Uml,
            Header::Native(_) => CowFormat::Native,
        }
    }
}

/// How a disk is opened.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Never write, neither to the disk nor to a header.
    pub read_only: bool,
    /// How files below the top are read.
    pub base_cache: CachePolicy,
    /// How the top is read and written.
    pub cow_cache: CachePolicy,
    /// The format of a COW file that is created because it does not exist.
    pub format: CowFormat,
    /// How long to wait for a lock: I/O that a dead process had in flight holds it until it has
    /// ended.
    pub lock_wait: Duration,
    /// Write to a file that cannot be locked. The caller guarantees that no other process does.
    pub unlocked: bool,
}

impl Default for DiskOptions {
    fn default() -> Self {
        DiskOptions {
            read_only: false,
            base_cache: CachePolicy::Buffered,
            cow_cache: CachePolicy::Buffered,
            format: CowFormat::Native,
            lock_wait: LOCK_WAIT,
            unlocked: false,
        }
    }
}

/// Longer than a killed process needs to end its I/O (25 to 57 ms with 256 MiB in flight), short
/// for a person waiting for the error.
const LOCK_WAIT: Duration = Duration::from_secs(1);
