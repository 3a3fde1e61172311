//! `cow bench`: hands over to `blk-bench`, which is beside this program or in the PATH.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use block_io::ops::OpError;

use crate::error::CowError;
use crate::ui::Ui;

/// Measure a running daemon: hands over to blk-bench
#[derive(clap::Args, Debug)]
#[command(disable_help_flag = true)]
pub struct Args {
    /// The arguments of blk-bench; see blk-bench --help
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

const PROGRAM: &str = "blk-bench";

impl Args {
    pub fn run(self, _ui: Ui) -> Result<ExitCode, CowError> {
        let beside = std::env::current_exe().ok().map(|this| this.with_file_name(PROGRAM));
        let program = beside.filter(|path| path.is_file()).unwrap_or(PathBuf::from(PROGRAM));
        // Only an error comes back.
        let err = Command::new(&program).args(&self.args).exec();
        Err(OpError::io(&program, "run")(err).into())
    }
}
