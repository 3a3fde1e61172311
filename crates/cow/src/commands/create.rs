//! `cow create`: a new COW file over a base, or a new raw image.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::image::{CreateOptions, create_cow};
use block_io::{CowFormat, Host, ops};
use clap::ValueEnum;

use crate::error::CowError;
use crate::size::{Human, Size};
use crate::ui::Ui;

/// Make a new COW file over a base, or a raw image of zeros
///
/// A new COW file is empty and reads as its base, of which nothing is copied and nothing changed. From now on the base
/// must stay as it is. A COW file takes space only for what is written to it.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The image that the new COW file stands over: a raw image, whatever its first bytes look like
    #[arg(
        short,
        long,
        value_name = "BASE",
        required_if_eq("format", "uml"),
        conflicts_with = "size"
    )]
    base: Option<PathBuf>,

    /// What the new file is
    #[arg(short, long, value_name = "FORMAT", default_value = "uml", value_enum)]
    format: Format,

    /// Size of the disk, in bytes or with a suffix K, M, G or T (powers of 1024)
    #[arg(long, value_name = "SIZE", required_if_eq("format", "raw"))]
    size: Option<Size>,

    /// Replace FILE if it exists
    #[arg(long)]
    force: bool,

    /// The new file
    file: PathBuf,
}

/// What a new file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// COW file of User Mode Linux, version 3
    Uml,
    /// The bytes of the disk, without a base
    Raw,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        match (self.format, &self.base, self.size) {
            (Format::Uml, Some(base), None) => self.cow(base, ui)?,
            (Format::Raw, None, Some(Size(size))) => {
                ops::create_raw(&Host, &self.file, size, self.force)?;
                ui.note(format_args!("{}: raw, {}", self.file.display(), Human(size)));
            }
            _ => {
                return Err(CowError::Usage(
                    "--base is for a COW file, --size for a raw image".into(),
                ));
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    fn cow(&self, base: &Path, ui: Ui) -> Result<(), CowError> {
        ops::check_target(&Host, &self.file, self.force, &[base])?;
        let options =
            CreateOptions { replace: self.force, ..CreateOptions::over(CowFormat::Uml, base) };
        create_cow(&Host, &self.file, &options)?;
        ui.note(format_args!("{}: uml over {}", self.file.display(), base.display()));
        Ok(())
    }
}
