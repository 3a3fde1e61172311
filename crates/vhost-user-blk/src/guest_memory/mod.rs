//! Guest memory: mapped, checked, and guarded against a frontend that shortens it.

pub mod memory;
pub mod sigbus;
