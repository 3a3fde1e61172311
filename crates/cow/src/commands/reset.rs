//! `cow reset`: drop all changes.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::{Host, Shown, ops};

use crate::error::CowError;
use crate::ui::Ui;

/// Drop all changes in a COW file
///
/// The disk is the base again, and the space is freed. This cannot be undone. If it is interrupted,
/// some of the changes are left: run it again.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The COW file
    cow: PathBuf,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        ops::reset(&Host, &self.cow)?;
        ui.note(format_args!("{}: empty", self.cow.shown()));
        Ok(ExitCode::SUCCESS)
    }
}
