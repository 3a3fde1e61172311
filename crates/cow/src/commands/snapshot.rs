//! `cow snapshot`: a COW file becomes a layer that is never written again, with a new COW file on
//! top.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::{Host, Shown, image, ops};

use crate::error::CowError;
use crate::ui::Ui;

/// Freeze a COW file and make a new one on top of it
///
/// COW keeps the current state of the disk and is never written again; NEW is empty and continues
/// from there. Any number of COW files can be based on a frozen one: for the next, run it again
/// with another NEW. If it is interrupted, run it again.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The native COW file to freeze
    cow: PathBuf,

    /// The new native COW file
    new: PathBuf,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        ops::check_target(&Host, &self.new, false, &[&self.cow])?;
        image::snapshot(&Host, &self.cow, &self.new)?;
        ui.note(format_args!("{}: native over {}, now frozen", self.new.shown(), self.cow.shown()));
        Ok(ExitCode::SUCCESS)
    }
}
