//! `blk-bench`: puts load on a vhost-user-blk backend.

mod cli;
mod commands;
mod parse;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use commands::Failure;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => commands::run(&args),
        Command::Info(args) => commands::info(&args),
        Command::NullBackend(args) => commands::null_backend(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => {
            eprintln!("blk-bench: {message}");
            ExitCode::from(2)
        }
        Err(Failure::Failed(message)) => {
            eprintln!("blk-bench: {message}");
            ExitCode::FAILURE
        }
    }
}
