//! `cow compare`: whether two disks have the same content.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::ops;
use block_io::ops::walk::Image;

use crate::error::CowError;
use crate::output::print;
use crate::source::{FileFormat, open};
use crate::ui::Ui;

/// Say whether two disks have the same content
///
/// Where one is longer, they are the same if the rest is zeros (with --strict never). Ends with 0 if they are the same, 1
/// if they differ (it prints where first), 2 if they could not be compared.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What FIRST is; need not be said for a COW file
    #[arg(short = 'f', long, value_name = "FORMAT", value_enum)]
    first_format: Option<FileFormat>,

    /// What SECOND is; need not be said for a COW file
    #[arg(short = 'F', long, value_name = "FORMAT", value_enum)]
    second_format: Option<FileFormat>,

    /// Disks of different sizes differ
    #[arg(short, long)]
    strict: bool,

    /// A disk
    first: PathBuf,

    /// Another
    second: PathBuf,
}

/// Status when the disks differ, as qemu-img compare ends.
const STATUS_DIFFER: u8 = 1;

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let first = open(&self.first, self.first_format, ui)?;
        let second = open(&self.second, self.second_format, ui)?;
        if self.strict && first.size() != second.size() {
            print(&format!("The sizes differ: {} and {} bytes.\n", first.size(), second.size()))?;
            return Ok(ExitCode::from(STATUS_DIFFER));
        }
        let progress = ui.progress("compare", first.size().max(second.size()));
        let difference = ops::first_difference(&first, &second, &|bytes| progress.add(bytes))?;
        drop(progress);
        match difference {
            None => print("The disks are identical.\n")?,
            Some(at) => {
                print(&format!("The disks differ, first at offset {at}.\n"))?;
                return Ok(ExitCode::from(STATUS_DIFFER));
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}
