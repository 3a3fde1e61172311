//! The base of a new COW file, as it is named on the command line.

use std::path::{Path, PathBuf};

use block_io::image::BaseOptions;
use block_io::ops::inspect::inspect;
use block_io::ops::signature::{Signature, signature_of};
use block_io::{Host, Shown};
use clap::ValueEnum;
use cow_format::header::BackingFormat;

use crate::error::{CowError, advised_doubt};
use crate::ui::Ui;

/// The format of a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BaseFormat {
    /// The plain bytes of a disk
    Raw,
    /// COW file of User Mode Linux
    Uml,
    /// Frozen COW file of this project
    Native,
}

impl From<BaseFormat> for BackingFormat {
    fn from(format: BaseFormat) -> Self {
        match format {
            BaseFormat::Raw => BackingFormat::Raw,
            BaseFormat::Uml => BackingFormat::Uml,
            BaseFormat::Native => BackingFormat::Native,
        }
    }
}

/// The options of the commands that make a COW file over a base.
#[derive(Clone, Debug, clap::Args)]
pub struct BaseArgs {
    /// The file that the new COW file is based on
    #[arg(short, long, value_name = "BASE")]
    pub base: Option<PathBuf>,

    /// The format of BASE
    ///
    /// This is never guessed, because a guest can write anything to the start of a raw image, even
    /// the header of a COW file. It is optional for a raw image that begins like no other format. A
    /// native file must be frozen.
    #[arg(short = 'F', long, value_name = "FORMAT", value_enum, requires = "base")]
    pub base_format: Option<BaseFormat>,
}

impl BaseArgs {
    /// The base, without a digest.
    pub fn options(&self) -> Result<Option<BaseOptions>, CowError> {
        let Some(path) = &self.base else { return Ok(None) };
        let format = base_format(path, self.base_format)?;
        Ok(Some(BaseOptions { path: path.clone(), format, digest: None }))
    }
}

/// Warns if the new COW file at `cow` cannot identify its base reliably.
pub fn warn_of_base(cow: &Path, base: Option<&Path>, ui: Ui) -> Result<(), CowError> {
    let found = inspect(&Host, cow, base)?;
    if let Some(backing) = found.files.first().and_then(|top| top.backing.as_ref())
        && let Some(doubt) = &backing.doubt
    {
        ui.warn(format_args!("{}: {}", backing.path.shown(), advised_doubt(doubt)));
    }
    Ok(())
}

/// The format of a base as given; raw if none was given and the file begins like no other format.
pub fn base_format(base: &Path, said: Option<BaseFormat>) -> Result<BackingFormat, CowError> {
    if let Some(said) = said {
        return Ok(said.into());
    }
    let found = match signature_of(&Host, base) {
        None => return Ok(BackingFormat::Raw),
        Some(Signature::Qcow2) => {
            return Err(CowError::Usage(format!(
                "{}: begins like a qcow2 image: convert it to a raw image (cow convert -f qcow2 -O raw) and use \
                 that as base, or pass -F raw to use the file's own bytes as a disk",
                base.shown()
            )));
        }
        Some(Signature::Uml) => "uml",
        Some(Signature::Native) => "native",
        Some(Signature::BrokenCow) => "a broken COW file",
    };
    Err(CowError::Usage(format!(
        "{}: begins like a COW file ({found}): pass -F native or -F uml to use the disk in it, or -F raw to use \
         the file's own bytes as a disk",
        base.shown()
    )))
}
