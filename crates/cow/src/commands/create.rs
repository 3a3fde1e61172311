//! `cow create`: a new COW file over a base, or an image of zeros.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::image::{CreateOptions, create_cow};
use block_io::ops;
use block_io::{CowFormat, Host, Shown};
use clap::ValueEnum;

use crate::base::{BaseArgs, warn_of_base};
use crate::digest::digest_of;
use crate::error::CowError;
use crate::size::{Human, Size};
use crate::ui::Ui;

/// Make a new COW file over a base, or an image of zeros
///
/// A new COW file is empty and reads as its base, which is neither copied nor changed. From now on
/// the base must not change. A COW file takes space only for the data that is written to it.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  cow create -b debian.img vm1.cow       a disk that starts as debian.img
  cow create -b debian.img vm1.cow 40G   the same, larger
  cow create data.cow 100G               an empty disk")]
pub struct Args {
    #[command(flatten)]
    base: BaseArgs,

    /// The format of the new file
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value = "native")]
    format: Format,

    /// Put a digest of BASE's content into the new file
    ///
    /// All of BASE is read for it (BLAKE3, on all cores). With it, `rebind` can later prove that a
    /// base that was copied, moved or touched is the same, and `check --base` that it has not
    /// changed.
    #[arg(long, requires = "base")]
    digest: bool,

    /// Replace FILE if it exists
    #[arg(long)]
    force: bool,

    /// The new file
    file: PathBuf,

    /// Size of the disk in bytes or with a suffix K, M, G or T (powers of 1024); otherwise that of
    /// BASE
    ///
    /// The part past the end of BASE reads as zeros.
    #[arg(required_unless_present_any = ["base", "size_option"])]
    size: Option<Size>,

    /// The same as SIZE
    #[arg(long = "size", id = "size_option", value_name = "SIZE", conflicts_with = "size")]
    size_option: Option<Size>,
}

/// The format of a new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// COW file of this project
    Native,
    /// COW file of User Mode Linux, version 3; always over a raw image of its own size
    Uml,
    /// The plain bytes of a disk; never over a base
    Raw,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        match self.format {
            Format::Raw => self.raw(ui)?,
            Format::Native => self.cow(CowFormat::Native, ui)?,
            Format::Uml => self.cow(CowFormat::Uml, ui)?,
        }
        Ok(ExitCode::SUCCESS)
    }

    fn raw(&self, ui: Ui) -> Result<(), CowError> {
        let (None, Some(size)) = (&self.base.base, self.size()) else {
            let why = "--base with --format raw: a raw image has no base; to copy one, use cp or cow merge";
            return Err(CowError::Usage(why.into()));
        };
        ops::create_raw(&Host, &self.file, size, self.force)?;
        ui.note(format_args!("{}: raw, {}", self.file.shown(), Human(size)));
        Ok(())
    }

    fn cow(&self, format: CowFormat, ui: Ui) -> Result<(), CowError> {
        let inputs: Vec<&Path> = self.base.base.as_deref().into_iter().collect();
        let path = ops::check_target(&Host, &self.file, self.force, &inputs)?;
        let mut base = self.base.options()?;
        if let Some(base) = base.as_mut().filter(|_| self.digest) {
            base.digest = Some(digest_of(&base.path, ui)?);
        }
        let options = CreateOptions {
            format,
            base,
            size: self.size(),
            replace: self.force,
            journal_len: None,
            mode: None,
        };
        create_cow(&Host, &path, &options)?;
        warn_of_base(&path, self.base.base.as_deref(), ui)?;
        ui.note(self.describe(format));
        Ok(())
    }

    fn size(&self) -> Option<u64> {
        self.size.or(self.size_option).map(|Size(bytes)| bytes)
    }

    fn describe(&self, format: CowFormat) -> String {
        let format = match format {
            CowFormat::Native => "native",
            CowFormat::Uml => "uml",
        };
        let over = match &self.base.base {
            Some(base) => format!(" over {}", base.shown()),
            None => String::new(),
        };
        let size = match self.size() {
            Some(bytes) => format!(", {}", Human(bytes)),
            None => String::new(),
        };
        format!("{}: {format}{over}{size}", self.file.shown())
    }
}
