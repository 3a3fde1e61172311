//! `cow`: the tool for copy-on-write images.

mod base;
mod cli;
mod commands;
mod copying;
mod delta;
mod digest;
mod error;
mod others;
mod output;
mod qcow2;
mod size;
mod source;
mod ui;
mod uml_names;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run(std::env::args_os().collect())
}
