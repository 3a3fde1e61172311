//! `cow create`: a new COW file over a base, or an image of zeros.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::image::{BaseOptions, CreateOptions, create_cow};
use block_io::ops::inspect::{Content, inspect};
use block_io::{CowFormat, Host, ops};
use clap::ValueEnum;
use cow_format::Header;
use cow_format::header::BackingFormat;

use crate::digest::digest_of;
use crate::error::CowError;
use crate::size::{Human, Size};
use crate::source::BaseFormat;
use crate::ui::Ui;

/// Make a new COW file over a base, or an image of zeros
///
/// A new COW file is empty and reads as its base, of which nothing is copied and nothing changed. From now on the base
/// must stay as it is. A COW file takes space only for what is written to it.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The file that the new COW file stands over
    #[arg(short, long, value_name = "BASE")]
    base: Option<PathBuf>,

    /// What BASE is
    ///
    /// This is never guessed, because a guest can write anything to the start of a raw image, the header of a COW file
    /// too. It need not be said for a raw image that does not begin like a COW file. A native file must be frozen.
    #[arg(short = 'F', long, value_name = "FORMAT", value_enum, requires = "base")]
    base_format: Option<BaseFormat>,

    /// What the new file is
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value = "native")]
    format: Format,

    /// Size of the disk in bytes or with a suffix K, M, G or T (powers of 1024); otherwise that of BASE
    ///
    /// What lies past the end of BASE reads as zeros.
    #[arg(long, value_name = "SIZE", required_unless_present = "base")]
    size: Option<Size>,

    /// Put a digest of BASE's content into the new file
    ///
    /// All of BASE is read for it (BLAKE3, on all cores). With it, `rebind` can later tell that a base that was copied,
    /// moved or touched is the same, and `check --base` that it has not changed.
    #[arg(long, requires = "base")]
    digest: bool,

    /// Replace FILE if it exists
    #[arg(long)]
    force: bool,

    /// The new file
    file: PathBuf,
}

/// What a new file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// COW file of this project
    Native,
    /// COW file of User Mode Linux, version 3; always over a raw image of its own size
    Uml,
    /// The bytes of a disk and nothing else; never over a base
    Raw,
}

/// The format of a base as it was said; raw if nothing was said and nothing speaks against it.
pub fn base_format(base: &Path, said: Option<BaseFormat>) -> Result<BackingFormat, CowError> {
    if let Some(said) = said {
        return Ok(said.into());
    }
    let looks_like = match inspect(&Host, base, None) {
        // What is wrong with it is said when it is opened.
        Err(_) => return Ok(BackingFormat::Raw),
        Ok(found) => match found.files.first().map(|file| &file.content) {
            Some(Content::Cow(cow)) if matches!(cow.header, Header::Uml(_)) => "uml",
            Some(Content::Cow(_)) => "native",
            Some(Content::Raw) | None => return Ok(BackingFormat::Raw),
            Some(Content::Unknown) => "a broken COW file",
        },
    };
    Err(CowError::Usage(format!(
        "{}: begins like a COW file ({looks_like}): say what it is, with -F native or -F uml to stand over the disk in \
         it, or with -F raw to take the file's own bytes for a disk",
        base.display()
    )))
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
        let (None, Some(Size(size))) = (&self.base, self.size) else {
            let why = "--base with --format raw: a raw image has no base; to copy one, use cp or cow merge";
            return Err(CowError::Usage(why.into()));
        };
        ops::create_raw(&Host, &self.file, size, self.force)?;
        ui.note(format_args!("{}: raw, {}", self.file.display(), Human(size)));
        Ok(())
    }

    fn cow(&self, format: CowFormat, ui: Ui) -> Result<(), CowError> {
        let inputs: Vec<&Path> = self.base.as_deref().into_iter().collect();
        let path = ops::check_target(&Host, &self.file, self.force, &inputs)?;
        let base = match &self.base {
            Some(base) => Some(self.base_options(base, ui)?),
            None => None,
        };
        let size = self.size.map(|Size(bytes)| bytes);
        let options = CreateOptions { format, base, size, replace: self.force };
        create_cow(&Host, &path, &options)?;
        ui.note(self.describe(format));
        Ok(())
    }

    fn base_options(&self, base: &Path, ui: Ui) -> Result<BaseOptions, CowError> {
        let format = base_format(base, self.base_format)?;
        let digest = if self.digest { Some(digest_of(base, ui)?) } else { None };
        Ok(BaseOptions { path: base.to_owned(), format, digest })
    }

    fn describe(&self, format: CowFormat) -> String {
        let format = match format {
            CowFormat::Native => "native",
            CowFormat::Uml => "uml",
        };
        let over = match &self.base {
            Some(base) => format!(" over {}", base.display()),
            None => String::new(),
        };
        let size = match self.size {
            Some(Size(bytes)) => format!(", {}", Human(bytes)),
            None => String::new(),
        };
        format!("{}: {format}{over}{size}", self.file.display())
    }
}
