//! `cow rebind`: the base was copied, moved or touched, and is the same all the same.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::Host;
use block_io::image::{Proof, rebind};
use block_io::storage::Storage;

use crate::digest::digest;
use crate::error::CowError;
use crate::ui::Ui;

/// Take a base that was copied, moved or touched
///
/// A COW file knows its base by size and time of modification, and by a sample of its content. Where these differ, but the
/// content is proved the same by the digest that `create --digest` has put into the COW file, the header gets the new path,
/// time and sample. Another content is refused. A layer is known by its UUID and may be anywhere.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Take the base without proof that its content is the same: if it is not, the disk is garbage from now on
    #[arg(long)]
    trust: bool,

    /// The COW file
    cow: PathBuf,

    /// The base; if not given, the path that COW names
    new_base: Option<PathBuf>,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let base = self.new_base.as_deref();
        if self.trust {
            ui.warn(format_args!(
                "{}: its base is taken without proof that the content is the same",
                self.cow.display()
            ));
            rebind::<Host>(&Host, &self.cow, base, Proof::Trust)?;
        } else {
            let mut take = |file: &block_io::storage::file::File| {
                let progress = ui.progress("digest", file.len()?);
                digest(file, &|bytes| progress.add(bytes))
            };
            rebind(&Host, &self.cow, base, Proof::Digest(&mut take))?;
        }
        let base = base.unwrap_or(Path::new("its base"));
        ui.note(format_args!("{}: stands over {}", self.cow.display(), base.display()));
        Ok(ExitCode::SUCCESS)
    }
}
