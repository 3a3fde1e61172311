//! Guest memory: mapped, checked, and guarded against a frontend that shortens it.

pub mod memory;
pub(crate) mod sigbus;

/// A page of the system, in bytes: of memory and of the page cache. The daemon refuses to start
/// where it is another one.
pub(crate) const PAGE_SIZE: u64 = 4096;
