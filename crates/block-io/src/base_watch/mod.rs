//! Detects processes that open or write a base while a disk uses it.

pub(crate) mod lease;
pub mod watch;
