//! Who opens or writes a base while a disk stands on it.

pub(crate) mod lease;
pub mod watch;
