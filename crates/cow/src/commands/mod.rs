//! One file for each command.

pub mod check;
pub mod create;
pub mod info;
pub mod map;
pub mod merge;
pub mod rebind;
pub mod resize;
pub mod snapshot;
