//! Storage under the formats: real files, a simulated disk that loses power, locks, and the disk that daemon and
//! tool share.

mod blocking;
mod committer;
mod disk;
pub mod disturb;
pub mod file;
mod filesystem;
pub mod image;
mod lease;
mod lock;
mod mem;
pub mod ops;
pub mod proc_fs;
pub mod pulse;
pub mod ring;
pub mod sim;
pub mod storage;
mod sweep;
pub mod watch;
mod witness;

pub use committer::{Committer, Flushed, Waiter};
pub use disk::{Disk, Layer, Writing};
pub use file::Host;
pub use image::{CachePolicy, CowFormat, DiskError, DiskOptions, OpenError};
