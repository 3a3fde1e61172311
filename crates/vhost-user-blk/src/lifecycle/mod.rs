//! The life of the daemon: start, the disk that it serves, commands, upgrade to another program,
//! end.

mod commands;
mod confinement;
pub mod daemon;
mod disk_slot;
pub mod error;
pub(crate) mod handover;
pub mod open_disk;
pub mod takeover;
mod trusted_program;
mod upgrade;
