//! `cow merge`: a COW file and what it stands over become one raw image.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::{Disk, DiskOptions, Host, ops};

use crate::error::CowError;
use crate::size::Human;
use crate::ui::Ui;

/// Make one raw image of a COW file and its base
///
/// OUT gets the content of the disk, the last partial sector included; zeros become holes. It appears under its name only
/// when it is complete and safely on the disk: whatever happens, there is never half an image. COW and its base
/// are not changed.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The base image, instead of the path that COW names; its size and mtime must match what COW says
    #[arg(short, long, value_name = "BASE")]
    base: Option<PathBuf>,

    /// Replace OUT if it exists
    #[arg(long)]
    force: bool,

    /// The COW file
    cow: PathBuf,

    /// The new image
    out: PathBuf,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let disk = Disk::open_cow(&self.cow, self.base.as_deref(), &options)?;
        let progress = ui.progress("merge", disk.size());
        ops::merge_to(&Host, &disk, &self.out, self.force, &|bytes| progress.add(bytes))?;
        drop(progress);
        ui.note(format_args!("{}: {}", self.out.display(), Human(disk.size())));
        Ok(ExitCode::SUCCESS)
    }
}
