//! `cow fork`: another COW file, instantly.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::image::{BaseOptions, CreateOptions, create_cow};
use block_io::ops;
use block_io::ops::inspect::{Content, inspect};
use block_io::{CowFormat, Host, Shown};
use cow_format::Header;
use cow_format::header::{BackingFormat, NativeState};

use crate::error::CowError;
use crate::ui::Ui;

/// Make another COW file, instantly
///
/// If COW is frozen, NEW is based on it and starts from its content. If not, NEW gets the same base
/// as COW and starts from where COW started: it lacks the changes in COW (to include them, take a
/// snapshot of COW first). COW may be in use by a virtual machine; it is not changed.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The COW file
    cow: PathBuf,

    /// The new COW file, of the same kind
    new: PathBuf,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        ops::check_target(&Host, &self.new, false, &[&self.cow])?;
        let found = inspect(&Host, &self.cow, None)?;
        let Some(Content::Cow(cow)) = found.files.first().map(|top| &top.content) else {
            return Err(found.problem.map_or(CowError::NotCow(self.cow.clone()), CowError::from));
        };
        let size = Some(cow.header.geometry().virtual_size());
        let mode = found.files.first().map(|top| top.stat.mode);
        let (format, frozen) = match &cow.header {
            Header::Uml(_) => (CowFormat::Uml, false),
            Header::Native(native) => (CowFormat::Native, native.state() == NativeState::Frozen),
        };
        let backing = found.files.first().and_then(|top| top.backing.as_ref());
        let base = match (frozen, backing) {
            (true, _) => Some(BaseOptions {
                path: self.cow.clone(),
                format: BackingFormat::Native,
                digest: None,
            }),
            (false, None) => None,
            // A base that does not match COW's reference would make NEW garbage as well.
            (false, Some(backing)) if !matches!(backing.verdict, Some(Ok(()))) => {
                return Err(found
                    .problem
                    .map_or(CowError::NotCow(self.cow.clone()), CowError::from));
            }
            (false, Some(backing)) => Some(BaseOptions {
                path: backing.path.clone(),
                format: backing.format,
                digest: backing.digest,
            }),
        };
        let over = base.as_ref().map_or("nothing".into(), |base| base.path.shown().to_string());
        create_cow(
            &Host,
            &self.new,
            &CreateOptions { format, base, size, replace: false, journal_len: None, mode },
        )?;
        ui.note(format_args!("{}: over {over}", self.new.shown()));
        Ok(ExitCode::SUCCESS)
    }
}
