//! `cow rebase`: another base for a COW file.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::image::BaseOptions;
use block_io::ops;
use block_io::ops::inspect::{Content, inspect};
use block_io::{Host, Shown};

use crate::base::{BaseFormat, base_format};
use crate::error::CowError;
use crate::ui::Ui;

/// Put a COW file over another base
///
/// The content of the disk stays the same: sectors that differ in the new base are first copied
/// into COW. An interruption leaves it over its old base or over the new one, with the same
/// content; run it again. With --unsafe only the reference changes, which is right only if the new
/// base has the same content as the old one; to prove that, use rebind.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The new base; "" for none, which makes COW independent
    #[arg(short, long, value_name = "BASE")]
    base: OsString,

    /// The format of BASE; optional for a raw image that does not begin like a COW file
    #[arg(short = 'F', long, value_name = "FORMAT", value_enum)]
    base_format: Option<BaseFormat>,

    /// Change the reference only; the old base need not be there
    #[arg(short = 'u', long = "unsafe")]
    only_reference: bool,

    /// The COW file
    cow: PathBuf,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let path = Path::new(&self.base);
        let base = match self.base.is_empty() {
            true => None,
            false => Some(BaseOptions {
                path: path.to_owned(),
                format: base_format(path, self.base_format)?,
                digest: None,
            }),
        };
        if self.only_reference {
            ui.warn(format_args!(
                "{}: its base is replaced without comparing the content",
                self.cow.shown()
            ));
            ops::rebase_unsafe(&Host, &self.cow, base.as_ref())?;
        } else {
            let found = inspect(&Host, &self.cow, None)?;
            let size = match found.files.first().map(|top| &top.content) {
                Some(Content::Cow(cow)) => cow.header.geometry().virtual_size(),
                _ => 0,
            };
            let progress = ui.progress("rebase", size);
            ops::rebase(&Host, &self.cow, base.as_ref(), &|bytes| progress.add(bytes))?;
        }
        ui.note(format_args!("{}: over {}", self.cow.shown(), path.shown()));
        Ok(ExitCode::SUCCESS)
    }
}
