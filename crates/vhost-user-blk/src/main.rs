//! `vhost-user-blk`.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use vhost_user_blk::cli::{self, Command, Options, Sandbox};
use vhost_user_blk::lifecycle::error::DaemonError;
use vhost_user_blk::lifecycle::open_disk::allow_backing_dirs;
use vhost_user_blk::lifecycle::{daemon, takeover};
use vhost_user_blk::process::control::{Reply, Request};
use vhost_user_blk::process::{logger, privileges, requirements};

fn main() -> ExitCode {
    let options = match cli::parse(std::env::args_os()) {
        Ok(Command::Serve(options)) => options,
        Ok(Command::Print(text)) => {
            return match std::io::stdout().write_all(text.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Ok(Command::Control(socket, request)) => return command(&socket, &request),
        Err(error) => error.exit(),
    };
    logger::init(options.log_level);
    match serve(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not a log line: it is printed at any log level. If standard error is closed, the exit
            // status remains.
            logger::print(&format!("vhost-user-blk: {error}"));
            ExitCode::from(if error.is_usage() { 2 } else { 1 })
        }
    }
}

/// Serves the disk: from the start, or in the place of this process's last program.
fn serve(options: &Options) -> Result<(), DaemonError> {
    requirements::check_page_size()?;
    if options.sandbox != Sandbox::Off {
        privileges::hide().map_err(DaemonError::system("give up privileges"))?;
    }
    allow_backing_dirs(&options.backing_dirs)?;
    match options.takeover {
        Some(handover) => takeover::run(options, handover),
        None => daemon::run(options),
    }
}

/// Sends a command to the daemon behind `socket`, and prints its answer.
fn command(socket: &Path, request: &Request) -> ExitCode {
    let reply = request
        .send(socket)
        .unwrap_or_else(|e| Reply::Failed(format!("--control: {}: {e}", socket.display())));
    let (status, printed) = match reply {
        Reply::Done(text) => (ExitCode::SUCCESS, writeln!(std::io::stdout(), "{text}")),
        Reply::Failed(text) => {
            (ExitCode::FAILURE, writeln!(std::io::stderr(), "vhost-user-blk: {text}"))
        }
    };
    if printed.is_ok() { status } else { ExitCode::FAILURE }
}
