//! `cow resize`: another size for a disk that is not in use.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::ops::inspect::{Content, inspect};
use block_io::{Host, Shown, image};

use crate::error::CowError;
use crate::size::{Human, SizeChange};
use crate::ui::Ui;

/// Change the size of the disk in a native COW file
///
/// The added part reads as zeros. If it is interrupted, the disk has its old or its new size.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Allow the disk to shrink: data beyond the new end is lost
    #[arg(long)]
    shrink: bool,

    /// The native COW file
    file: PathBuf,

    /// The new size, or the change with + or -; in bytes or with a suffix K, M, G or T (powers of
    /// 1024)
    #[arg(allow_hyphen_values = true)]
    size: SizeChange,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let size = match self.size {
            SizeChange::To(size) => size,
            change => {
                let size = self.size_now()?;
                change.apply(size).ok_or_else(|| {
                    CowError::Usage(format!("the size, {size} bytes, cannot change by that much"))
                })?
            }
        };
        image::resize(&Host, &self.file, size, self.shrink)?;
        ui.note(format_args!("{}: {}", self.file.shown(), Human(size)));
        Ok(ExitCode::SUCCESS)
    }

    fn size_now(&self) -> Result<u64, CowError> {
        let found = inspect(&Host, &self.file, None)?;
        match (found.files.first().map(|file| &file.content), found.problem) {
            (Some(Content::Cow(cow)), _) => Ok(cow.header.geometry().virtual_size()),
            (Some(Content::Unknown), Some(problem)) => Err(problem.into()),
            _ => {
                let file = self.file.shown();
                let why = "not a COW file; truncate changes the size of a raw image";
                Err(CowError::Usage(format!("{file}: {why}")))
            }
        }
    }
}
