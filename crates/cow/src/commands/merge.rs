//! `cow merge`: a COW file and its base become one image, new or in place.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::ops::inspect::{FileFacts, inspect};
use block_io::storage::FileKind;
use block_io::{Disk, DiskOptions, Host, Shown, ops};

use crate::copying::CopyArgs;
use crate::dependents::{Dependents, id_of};
use crate::error::CowError;
use crate::size::Human;
use crate::ui::Ui;

/// Make one image of a COW file and its base
///
/// With OUT, a new raw image gets the content of the disk, a partial last sector included; zeros
/// become holes. It appears under its name only when it is complete and safely on the disk:
/// whatever happens, there is never half an image. COW and its base are not changed.
///
/// With --in-place, the changes in COW are written into the file below it. That file is then the
/// whole disk, and every other COW file over it becomes invalid. COW is emptied, its space is
/// freed, and it stays usable, based on the file as it is now. (A UML COW file of version 1 or 2 is
/// left as it was and no longer matches: remove it.) If it is interrupted, the disk's content is
/// safe and the same command finishes the work.
#[derive(clap::Args, Debug)]
#[command(
    visible_alias = "commit",
    after_help = "\
Examples:
  cow merge vm1.cow new.img                                  the disk as one raw image
  cow merge --in-place --yes vm1.cow                         into the file below
  cow merge --in-place --yes --drop-to debian.img vm1.cow    into the base, through all between"
)]
pub struct Args {
    /// The base image, instead of the path that COW names; size, mtime and content must match the
    /// header of COW
    #[arg(short, long, value_name = "BASE")]
    base: Option<PathBuf>,

    /// Write into the file below COW instead of a new image
    #[arg(long, conflicts_with_all = ["out", "force"])]
    in_place: bool,

    /// With --in-place: write into this file of the chain, and leave out those between
    #[arg(long, value_name = "FILE", requires = "in_place", conflicts_with = "out")]
    drop_to: Option<PathBuf>,

    /// With --in-place: do it, although other COW files become invalid
    #[arg(long, requires = "in_place", conflicts_with = "out")]
    yes: bool,

    #[command(flatten)]
    copy: CopyArgs,

    /// Replace OUT if it exists
    #[arg(long)]
    force: bool,

    /// The COW file
    cow: PathBuf,

    /// The new image; none with --in-place
    out: Option<PathBuf>,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        match &self.out {
            Some(out) => self.to_new(out, ui)?,
            None if self.in_place => self.in_place(ui)?,
            None => {
                return Err(CowError::Usage(
                    "name OUT, the new image, or pass --in-place to merge into the file below"
                        .into(),
                ));
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    fn to_new(&self, out: &Path, ui: Ui) -> Result<(), CowError> {
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let disk = Disk::open_cow(&self.cow, self.base.as_deref(), &options)?;
        let progress = ui.progress("merge", disk.size());
        let add = |bytes| progress.add(bytes);
        ops::merge_to(&Host, &disk, out, self.force, self.copy.copying(&add))?;
        drop(progress);
        ui.note(format_args!("{}: {}", out.shown(), Human(disk.size())));
        Ok(())
    }

    fn in_place(&self, ui: Ui) -> Result<(), CowError> {
        let found = inspect(&Host, &self.cow, self.base.as_deref())?;
        let mut below = found.files.iter().skip(1).zip(1..);
        let target = match &self.drop_to {
            None => below.next(),
            Some(file) => {
                let id = id_of(file);
                below.find(|(below, _)| Some(below.stat.id) == id)
            }
        };
        let depth = match (target, &self.drop_to) {
            (Some((target, depth)), _) => {
                self.confirm(target, ui)?;
                NonZeroUsize::new(depth).unwrap_or(NonZeroUsize::MIN)
            }
            (None, Some(file)) => {
                return Err(CowError::NotBelow { file: file.clone(), cow: self.cow.clone() });
            }
            // A problem with the chain is reported when it is opened.
            (None, None) => NonZeroUsize::MIN,
        };
        let size = found.files.first().map_or(0, |top| top.stat.size);
        let progress = ui.progress("merge", size);
        let (base, add) = (self.base.as_deref(), |bytes| progress.add(bytes));
        let copying = self.copy.copying(&add);
        let merged = ops::merge_in_place(&Host, &self.cow, base, depth, copying)?;
        drop(progress);
        let (cow, target) = (self.cow.shown(), merged.target.shown());
        match merged.emptied {
            true => ui.note(format_args!("{target}: has the whole disk; {cow} is empty and based on it")),
            false => ui.warn(format_args!(
                "{target} has the whole disk, but the header of {cow} is of a version that is never written: it no longer \
                 matches; remove it"
            )),
        }
        Ok(())
    }

    /// Refuses to continue unless the user passed --yes; names the dependent files.
    fn confirm(&self, facts: &FileFacts, ui: Ui) -> Result<(), CowError> {
        let target = &facts.path;
        let others = Dependents::over(target, &self.cow);
        if !self.yes {
            return Err(CowError::NotConfirmed { target: target.to_owned(), others });
        }
        ui.warn(format_args!(
            "{} is overwritten with the merged disk; every other COW file over it becomes invalid ({others})",
            target.shown()
        ));
        if facts.stat.kind == FileKind::BlockDevice {
            ui.warn(format_args!(
                "{}: is a block device, which has no lasting mtime: a native COW file over it detects the change only if a block \
                 of its sample changes, a UML COW file never",
                target.shown()
            ));
        }
        Ok(())
    }
}
