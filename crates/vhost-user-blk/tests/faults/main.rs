//! The tests that need a daemon with fault points, in one program.

#[path = "../it/common/mod.rs"]
mod common;
mod fault_injection;
mod fault_points;
mod foreign_code;
mod operations;
mod stuck;
mod watchdog;
