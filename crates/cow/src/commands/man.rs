//! `cow man`: the man pages, made from the same source as --help.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::ops::OpError;

use crate::error::CowError;

/// Write the man pages of all commands into a directory
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The directory, which exists
    dir: PathBuf,
}

impl Args {
    /// `cli` is the whole command line.
    pub fn run(self, cli: clap::Command) -> Result<ExitCode, CowError> {
        let cli = cli.disable_help_subcommand(true);
        clap_mangen::generate_to(cli, &self.dir).map_err(OpError::io(&self.dir, "write into"))?;
        Ok(ExitCode::SUCCESS)
    }
}
