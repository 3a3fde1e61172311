//! `cow`: the tool for copy-on-write images.

use std::process::ExitCode;

fn main() -> ExitCode {
    cow::cli::run(std::env::args_os().collect())
}
