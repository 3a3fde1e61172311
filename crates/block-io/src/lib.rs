//! Storage under the formats: real files, a simulated disk that loses power, locks, and the disk that daemon and
//! tool share.

pub mod file;
mod lock;
mod mem;
pub mod ring;
pub mod sim;
pub mod storage;
