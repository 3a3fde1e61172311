//! The command line: what the commands share; each command's own arguments are beside its code.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use block_io::{Host, Shown};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use crate::commands::{
    apply_delta, bench, check, compare, convert, create, export_delta, fork, info, man, map,
    measure, merge, rebase, rebind, reset, resize, snapshot,
};
use crate::error::CowError;
use crate::ui::Ui;
use crate::uml_names;

const ABOUT: &str = "\
Handles copy-on-write disk images.

A COW file holds what one virtual machine has changed; everything else is read from a base image that many COW \
files share. There are two kinds of COW file: native, the default, and that of User Mode Linux (uml). A raw \
image is the bytes of a disk and nothing else.

A file that a virtual machine uses is locked, and refused here, except by `info` and `fork`, which only read it.";

const EXIT_STATUS: &str = "\
Exit status: 0 after success, 1 after a failure, 2 for a wrong command line. `check` ends as qemu-img check does: \
0 if all is well, 1 if it could not check, 2 if the image is corrupt, 3 if it only holds space that nothing uses. \
`compare` ends with 0 if the disks are the same, 1 if they differ, 2 if it could not compare.";

/// `cow`.
#[derive(Parser, Debug)]
#[command(name = "cow", version, about = "Handles copy-on-write disk images", long_about = ABOUT, after_help = EXIT_STATUS)]
pub struct Cli {
    /// Print only warnings and errors, and show no progress
    #[arg(short, long, global = true)]
    quiet: bool,

    /// Show progress even if standard error is not a terminal
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    progress: bool,

    /// Let the header of a COW file or qcow2 image name files in DIR; may be repeated
    ///
    /// What a header names is opened only if it is in the directory of the COW file, or in DIR; of a
    /// qcow2 image only in DIR. A file that is named on the command line can be anywhere.
    #[arg(long, global = true, value_name = "DIR")]
    backing_dir: Vec<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Create(create::Args),
    Info(info::Args),
    Map(map::Args),
    Measure(measure::Args),
    Check(check::Args),
    Compare(compare::Args),
    Resize(resize::Args),
    Snapshot(snapshot::Args),
    Fork(fork::Args),
    Reset(reset::Args),
    Merge(merge::Args),
    Convert(convert::Args),
    Rebase(rebase::Args),
    Rebind(rebind::Args),
    ExportDelta(export_delta::Args),
    ApplyDelta(apply_delta::Args),
    Bench(bench::Args),
    #[command(hide = true)]
    Man(man::Args),
}

/// Status for a wrong command line.
const STATUS_USAGE: u8 = 2;
/// Status of a failure.
const STATUS_FAILURE: u8 = 1;

/// Runs the command line `args`, the program's name included.
pub fn run(args: Vec<OsString>) -> ExitCode {
    let statuses = Statuses::of(&args);
    let cli = match uml_names::translate(args).and_then(Cli::try_parse_from) {
        Ok(cli) => cli,
        Err(err) => {
            // If the terminal is gone, the exit status still reports it.
            _ = err.print();
            let asked = matches!(err.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return if asked { ExitCode::SUCCESS } else { ExitCode::from(statuses.usage) };
        }
    };
    let ui = Ui::new(cli.quiet, cli.progress);
    match allow(&cli.backing_dir).and_then(|()| cli.command.run(ui)) {
        Ok(status) => status,
        Err(err) => {
            eprintln!("cow: {err}");
            let usage = matches!(err, CowError::Usage(_));
            ExitCode::from(if usage { statuses.usage } else { statuses.failure })
        }
    }
}

/// `--backing-dir`.
fn allow(dirs: &[PathBuf]) -> Result<(), CowError> {
    dirs.iter().try_for_each(|dir| {
        let wrong = |err| CowError::Usage(format!("--backing-dir: {}: {err}", dir.shown()));
        Host::allow_backing_dir(dir).map_err(wrong)
    })
}

/// Exit statuses of a command that could not do its work. As with qemu-img, 1 and 2 mean something
/// else in two commands: `check` ends so if the image is corrupt, `compare` if the disks differ.
struct Statuses {
    usage: u8,
    failure: u8,
}

impl Statuses {
    fn of(args: &[OsString]) -> Self {
        let words = args.iter().skip(1).filter_map(|arg| arg.to_str());
        let cli = Cli::command();
        match words.into_iter().find(|word| cli.find_subcommand(word).is_some()) {
            Some("check") => Statuses { usage: STATUS_FAILURE, failure: STATUS_FAILURE },
            Some("compare") => Statuses { usage: STATUS_USAGE, failure: STATUS_USAGE },
            _ => Statuses { usage: STATUS_USAGE, failure: STATUS_FAILURE },
        }
    }
}

impl Command {
    fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        match self {
            Command::Create(args) => args.run(ui),
            Command::Info(args) => args.run(ui),
            Command::Map(args) => args.run(ui),
            Command::Measure(args) => args.run(ui),
            Command::Check(args) => args.run(ui),
            Command::Compare(args) => args.run(ui),
            Command::Fork(args) => args.run(ui),
            Command::Reset(args) => args.run(ui),
            Command::ExportDelta(args) => args.run(ui),
            Command::ApplyDelta(args) => args.run(ui),
            Command::Bench(args) => args.run(ui),
            Command::Man(args) => args.run(Cli::command()),
            Command::Resize(args) => args.run(ui),
            Command::Snapshot(args) => args.run(ui),
            Command::Convert(args) => args.run(ui),
            Command::Rebase(args) => args.run(ui),
            Command::Rebind(args) => args.run(ui),
            Command::Merge(args) => args.run(ui),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
