//! `cow`, the tool for copy-on-write images: all of it but `main`, so that `tests/fuzz` can run it.

mod base;
pub mod cli;
mod commands;
mod copying;
pub mod delta;
mod dependents;
mod digest;
mod error;
mod output;
mod size;
mod source;
mod steps;
mod ui;
mod uml_names;
