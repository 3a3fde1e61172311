//! Moving a COW file to another base.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cow_format::header::BackingFormat;
use cow_format::{Header, SECTOR_SIZE, Sector, SectorCount, SectorRange};

use super::compare::Pair;
use super::walk::{Image, Zeros};
use super::zeroes::is_zero;
use super::{OpError, Progress, parallel};
use crate::disk::Disk;
use crate::image::chain::{Opener, path_to_store};
use crate::image::identity::identity_of;
use crate::image::opened::Opened;
use crate::image::write::header_io::{check_writable, set_backing_path, write_native_synced};
use crate::image::{BaseOptions, CowFormat, DiskOptions, ImageError, native_backing};
use crate::storage::{Env, Storage};

/// Moves the COW file at `cow` to `base`, or to no base. The content of its disk stays the same:
/// sectors that differ are first copied into it. An interruption leaves the disk unchanged, over
/// its old base or over the new one.
pub fn rebase<E: Env>(
    env: &E,
    cow: &Path,
    base: Option<&BaseOptions>,
    progress: Progress<'_>,
) -> Result<(), OpError> {
    let disk = Disk::open_cow_in(env.clone(), cow, None, &DiskOptions::default())?;
    let reading = DiskOptions { read_only: true, ..DiskOptions::default() };
    let new = NewBase::open(env, cow, disk.layers()[0].file(), base)?;
    if let Some(header) = disk.header() {
        new.check(cow, &header, disk.size())?;
    }
    match base {
        None => keep(&disk, &Zeros { size: disk.size() }, progress)?,
        Some(base) if base.format == BackingFormat::Raw => {
            let image = Disk::open_raw_in(env.clone(), &base.path, &reading)?;
            keep(&disk, &image, progress)?;
        }
        Some(base) => {
            let image = Disk::open_cow_in(env.clone(), &base.path, None, &reading)?;
            keep(&disk, &image, progress)?;
        }
    }
    disk.close()?;
    match disk.header() {
        Some(mut header) => new.write(env, cow, disk.layers()[0].file(), &mut header),
        None => Ok(()),
    }
}

/// Makes `base` the backing file in the header of `cow`, whatever that does to the content of its
/// disk.
pub fn rebase_unsafe<E: Env>(
    env: &E,
    cow: &Path,
    base: Option<&BaseOptions>,
) -> Result<(), OpError> {
    let options = DiskOptions::default();
    let top = Opener::new(env, &options, cow).top()?;
    let mut header = top.header()?;
    check_writable(cow, &header)?;
    let new = NewBase::open(env, cow, &top.file, base)?;
    new.check(cow, &header, header.geometry().virtual_size())?;
    new.write(env, cow, &top.file, &mut header)
}

/// Copies into `disk` what is present below its top and differs in `new`.
fn keep<E: Env, I: Image>(disk: &Disk<E>, new: &I, progress: Progress<'_>) -> Result<(), OpError> {
    let Some(present) = disk.top_bitmap()? else { return Ok(()) };
    type Both<'a, E, I> = Pair<<Disk<E> as Image>::Reader<'a>, <I as Image>::Reader<'a>>;
    let work = |pair: &mut Both<'_, E, I>, range: SectorRange| {
        // Collect all of them first: bits are set during the copy.
        let absent: Vec<_> = present.runs(range).filter(|run| !run.present).collect();
        for run in absent.iter().map(|run| run.range) {
            pair.differences(run, |at, bytes| {
                let start = Sector::new(at / SECTOR_SIZE);
                let Some(range) =
                    SectorRange::new(start, SectorCount::covering(bytes.len() as u64))
                else {
                    return Ok(());
                };
                match is_zero(bytes) {
                    true => disk.discard(range)?,
                    false => disk.write(range, bytes)?,
                }
                Ok(())
            })?;
        }
        progress(range.len_bytes());
        Ok::<(), OpError>(())
    };
    let state = || Pair::new(disk, new);
    parallel::for_each_piece(disk.capacity(), parallel::threads(), state, work)
}

/// The new base, open and locked.
struct NewBase<'a, F> {
    base: Option<(&'a BaseOptions, Opened<F>, Option<Header>)>,
}

impl<'a, F: Storage> NewBase<'a, F> {
    fn open<E: Env<File = F>>(
        env: &E,
        cow: &Path,
        top: &F,
        base: Option<&'a BaseOptions>,
    ) -> Result<Self, OpError> {
        let Some(base) = base else { return Ok(NewBase { base: None }) };
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let own = top.stat().map_err(OpError::io(cow, "stat"))?.id;
        if env.id(&base.path).is_ok_and(|id| id == own) {
            let (top, path, again) = (cow.to_owned(), base.path.clone(), cow.to_owned());
            return Err(ImageError::Repeated { top, path, again }.into());
        }
        let (opened, header) =
            Opener::new(env, &options, cow).new_base(&base.path, base.format, cow)?;
        Ok(NewBase { base: Some((base, opened, header)) })
    }

    /// Refuses a base that the header of `cow` cannot refer to.
    fn check(&self, cow: &Path, header: &Header, size: u64) -> Result<(), OpError> {
        let Header::Uml(_) = header else { return Ok(()) };
        let unable = |what| Err(ImageError::UmlCannot { path: cow.to_owned(), what }.into());
        match &self.base {
            None => unable("be without a backing file"),
            Some((base, ..)) if base.format != BackingFormat::Raw => {
                unable("be over anything but a raw image")
            }
            Some((_, opened, _)) if opened.stat.size != size => {
                unable("be of another size than its backing file")
            }
            Some(_) => Ok(()),
        }
    }

    /// Writes the new reference.
    fn write<E: Env<File = F>>(
        &self,
        env: &E,
        cow: &Path,
        file: &F,
        header: &mut Header,
    ) -> Result<(), OpError> {
        let stored = match &self.base {
            Some((base, ..)) => Some(path_to_store(env, cow, &base.path, CowFormat::of(header))?),
            None => None,
        };
        let written = match (header, &self.base, &stored) {
            (header @ Header::Uml(_), Some((_, opened, _)), Some(path)) => {
                set_backing_path(file, header, path.as_os_str().as_bytes(), opened.stat.mtime)
            }
            (Header::Uml(_), ..) => Ok(()),
            (Header::Native(native), base, path) => {
                let backing = match (base, path) {
                    (Some((base, opened, header)), Some(path)) => {
                        let found = identity_of(opened, header.as_ref())?;
                        let backing = native_backing(path, base, found);
                        Some(backing.map_err(|source| ImageError::Header {
                            path: cow.to_owned(),
                            source,
                        })?)
                    }
                    _ => None,
                };
                native.set_backing(backing);
                write_native_synced(file, native)
            }
        };
        written.map_err(|err| err.at(cow).into())
    }
}
