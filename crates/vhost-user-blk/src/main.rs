//! `vhost-user-blk`.

use std::io::Write;
use std::process::ExitCode;

use vhost_user_blk::cli::{self, Command};
use vhost_user_blk::{daemon, logger};

fn main() -> ExitCode {
    let options = match cli::parse(std::env::args_os()) {
        Ok(Command::Serve(options)) => options,
        Ok(Command::Print(text)) => {
            return match std::io::stdout().write_all(text.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Err(error) => error.exit(),
    };
    logger::init(options.log_level);
    match daemon::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not a log line: it is printed whatever the log level. If nobody can read it, the
            // status still tells.
            let _ = writeln!(std::io::stderr(), "vhost-user-blk: {error}");
            ExitCode::from(if error.is_usage() { 2 } else { 1 })
        }
    }
}
