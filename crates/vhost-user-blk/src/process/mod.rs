//! The process and its system: sockets, descriptors, signals, the service manager, the log.

pub mod control;
pub(crate) mod descriptor;
pub(crate) mod fd;
pub(crate) mod log_limit;
pub mod logger;
pub(crate) mod peer;
pub mod privileges;
pub mod requirements;
pub mod sandbox;
pub(crate) mod signals;
pub(crate) mod socket;
pub(crate) mod systemd;
pub mod users;
pub(crate) mod watchdog;
