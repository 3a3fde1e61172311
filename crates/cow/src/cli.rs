//! The command line: what is common; each command's own arguments stand beside its code.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::commands::{check, create, info, map, merge, rebind, resize, snapshot};
use crate::error::CowError;
use crate::ui::Ui;

const ABOUT: &str = "\
Handles copy-on-write disk images.

A COW file holds what one virtual machine has changed; everything else is read from a base image that many COW \
files share. There are two kinds of COW file: native, the default, and that of User Mode Linux (uml). A raw \
image is the bytes of a disk and nothing else.

A file that a virtual machine uses is locked, and refused here, except by `info`, which only looks at it.";

const EXIT_STATUS: &str = "\
Exit status: 0 after success, 1 after a failure, 2 for a wrong command line. `check` ends as qemu-img check does: \
0 if all is well, 1 if it could not check, 2 if the image is corrupt, 3 if it only holds space that nothing uses.";

/// `cow`.
#[derive(Parser, Debug)]
#[command(name = "cow", version, about = "Handles copy-on-write disk images", long_about = ABOUT, after_help = EXIT_STATUS)]
pub struct Cli {
    /// Say nothing but warnings and errors, and show no progress
    #[arg(short, long, global = true)]
    quiet: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Create(create::Args),
    Info(info::Args),
    Map(map::Args),
    Check(check::Args),
    Resize(resize::Args),
    Snapshot(snapshot::Args),
    Merge(merge::Args),
    Rebind(rebind::Args),
}

/// Status for a wrong command line.
const STATUS_USAGE: u8 = 2;
/// Status of a failure.
const STATUS_FAILURE: u8 = 1;

/// Runs the command line `args`, the program's name included.
pub fn run(args: Vec<OsString>) -> ExitCode {
    let usage_status = usage_status(&args);
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(err) => {
            // Where the terminal is gone there is nobody to tell.
            _ = err.print();
            let asked = matches!(err.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return if asked { ExitCode::SUCCESS } else { ExitCode::from(usage_status) };
        }
    };
    match cli.command.run(Ui::new(cli.quiet)) {
        Ok(status) => status,
        Err(err) => {
            eprintln!("cow: {err}");
            ExitCode::from(if matches!(err, CowError::Usage(_)) {
                usage_status
            } else {
                STATUS_FAILURE
            })
        }
    }
}

/// `check` says with status 2 that an image is corrupt: there a wrong command line is a failure to check.
fn usage_status(args: &[OsString]) -> u8 {
    let command = args.iter().skip(1).find(|arg| !arg.as_encoded_bytes().starts_with(b"-"));
    if command.is_some_and(|command| command == "check") { STATUS_FAILURE } else { STATUS_USAGE }
}

impl Command {
    fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        match self {
            Command::Create(args) => args.run(ui),
            Command::Info(args) => args.run(ui),
            Command::Map(args) => args.run(ui),
            Command::Check(args) => args.run(ui),
            Command::Resize(args) => args.run(ui),
            Command::Snapshot(args) => args.run(ui),
            Command::Rebind(args) => args.run(ui),
            Command::Merge(args) => args.run(ui),
        }
    }
}
