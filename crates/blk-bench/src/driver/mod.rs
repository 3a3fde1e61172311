//! The driver's side of the device: connection, queues, guest memory.

pub mod device;
pub mod memory;
pub mod queue;
pub(crate) mod ring;
pub(crate) mod watchdog;
