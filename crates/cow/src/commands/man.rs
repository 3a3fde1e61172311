//! `cow man`: the man pages, made from the same source as --help.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::ops::OpError;
use clap::CommandFactory;

use crate::cli::Cli;
use crate::error::CowError;
use crate::ui::Ui;

/// Write the man pages of all commands into a directory
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The directory, which exists
    dir: PathBuf,
}

impl Args {
    pub fn run(self, _ui: Ui) -> Result<ExitCode, CowError> {
        let cli = Cli::command().disable_help_subcommand(true);
        clap_mangen::generate_to(cli, &self.dir).map_err(OpError::io(&self.dir, "write into"))?;
        Ok(ExitCode::SUCCESS)
    }
}
