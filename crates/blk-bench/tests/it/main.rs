//! The integration tests of this crate, in one program: it is linked once.

mod common;
mod faults;
mod independent_driver;
mod qemu_storage_daemon;
