//! The life of the daemon: start, the disk it serves, upgrade to another program, end.

pub(crate) mod commands;
pub mod daemon;
pub mod disk_slot;
pub mod error;
pub mod handover;
pub mod open_disk;
pub mod takeover;
pub mod upgrade;
