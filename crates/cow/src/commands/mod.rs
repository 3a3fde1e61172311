//! One file for each command.

pub mod check;
pub mod create;
pub mod info;
pub mod merge;
