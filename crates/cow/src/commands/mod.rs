//! One file for each command.

pub mod apply_delta;
pub mod bench;
pub mod check;
pub mod compare;
pub mod convert;
pub mod create;
pub mod export_delta;
pub mod fork;
pub mod info;
pub mod man;
pub mod map;
pub mod measure;
pub mod merge;
pub mod rebase;
pub mod rebind;
pub mod reset;
pub mod resize;
pub mod snapshot;
