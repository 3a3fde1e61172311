//! `cow rebind`: accepts a base that was copied, moved or touched and has the same content.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::image::{Proof, rebind};
use block_io::storage::Storage;
use block_io::{Host, Shown};

use crate::digest::digest;
use crate::error::CowError;
use crate::ui::Ui;

/// Accept a base that was copied, moved or touched
///
/// A COW file identifies its base by size, time of modification and a sample of its content. If
/// these differ but the digest that `create --digest` recorded proves that the content is the same,
/// the new path, time and sample are recorded in the header. Different content is refused. A layer
/// is identified by its UUID and may be anywhere.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Accept the base without proof that its content is the same: if it is not, the disk is
    /// garbage from now on
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
                "{}: its base is accepted without proof that the content is the same",
                self.cow.shown()
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
        ui.note(format_args!("{}: based on {}", self.cow.shown(), base.shown()));
        Ok(ExitCode::SUCCESS)
    }
}
