//! `cow`: the tool for copy-on-write images.

mod base;
mod cli;
mod commands;
mod copying;
mod delta;
mod dependents;
mod digest;
mod error;
mod output;
mod size;
mod source;
mod steps;
mod ui;
mod uml_names;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(std::env::args_os().collect())
}
