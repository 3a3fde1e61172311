//! Storage for the formats: real files, a simulated disk that loses power, locks, and the disk that
//! daemon and tool share.

pub mod base_watch;
mod blocking;
mod committer;
mod disk;
pub mod fault_injection;
pub mod image;
pub mod ops;
pub mod pulse;
pub mod ring;
pub mod shown;
pub mod storage;
mod sweep;
mod sync;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod threads;

pub use committer::{Committer, Flushed, Waiter};
pub use disk::{Disk, GivenFiles, Writing};
pub use image::layer::Layer;
pub use image::{CachePolicy, CowFormat, DiskError, DiskOptions, ImageError};
pub use shown::Shown;
pub use storage::file::Host;
