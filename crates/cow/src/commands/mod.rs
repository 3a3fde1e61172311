//! One file for each command.

pub mod create;
pub mod merge;
