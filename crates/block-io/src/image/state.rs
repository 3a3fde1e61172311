//! The header of an open COW file, and its changes on disk. Each can be interrupted at any write and leaves a header
//! that can be used.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Mutex;

use cow_format::header::UmlHeader;
use cow_format::identity::Timestamp;
use cow_format::{Bitmap, ByteOffset, Header, HeaderError};

use super::OpenError;
use super::chain::Opened;
use super::live::{LiveBitmap, load_side_file};
use crate::disk::WritableCow;
use crate::mem::SECTOR;
use crate::storage::{Env, Storage};

/// A header that could not be changed.
#[derive(Debug)]
pub(crate) enum UpdateError {
    /// The header cannot say it.
    Header(HeaderError),
    /// It could not be written.
    Io(io::Error),
}

impl From<io::Error> for UpdateError {
    fn from(err: io::Error) -> Self {
        UpdateError::Io(err)
    }
}

impl From<HeaderError> for UpdateError {
    fn from(err: HeaderError) -> Self {
        UpdateError::Header(err)
    }
}

/// Where the path begins in a version 3 header, padded or not, at the latest.
const UML_PATH_AT: usize = 36;

/// Replaces the backing path and mtime in a UML header.
///
/// There is one copy of it, and a disk writes 512 bytes as a whole: so sector 0, which holds every other field and the
/// beginning of the path, is written last and alone. What stands in the sectors after it is ignored as long as the
/// path in sector 0 ends there. Where neither the old nor the new path does, the header passes through a state with a short
/// path that names no file; an interruption there leaves a COW file that wants its base named once more.
pub(crate) fn write_uml_backing(
    file: &impl Storage,
    old: &UmlHeader,
    path: &[u8],
    mtime: Timestamp,
) -> Result<UmlHeader, UpdateError> {
    let new = old.with_backing(path, mtime)?;
    let bytes = new.encode()?;
    let fits = |path: &[u8]| UML_PATH_AT + path.len() < SECTOR;
    if !fits(path) {
        if !fits(old.backing_path()) {
            let between = old.with_backing(b"(interrupted-rebind)", mtime)?.encode()?;
            write_synced(file, &between[..SECTOR], 0)?;
        }
        write_synced(file, &bytes[SECTOR..], SECTOR as u64)?;
    }
    write_synced(file, &bytes[..SECTOR], 0)?;
    Ok(new)
}

fn write_synced(file: &impl Storage, bytes: &[u8], at: u64) -> io::Result<()> {
    file.write_all_at(bytes, ByteOffset::new(at))?;
    file.sync()
}

/// Refuses a file whose header allows reading only.
pub(crate) fn check_writable(header: &Header) -> Result<(), HeaderError> {
    match header {
        Header::Uml(uml) if uml.is_read_only() => {
            Err(HeaderError::ReadOnlyVersion { version: uml.version().number() })
        }
        _ => Ok(()),
    }
}

/// Adds to `bitmap` what the live bitmap says, if it is of this boot and file; says whether it is.
pub(crate) fn load_live<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    header: &Header,
    bitmap: &Bitmap,
) -> io::Result<bool> {
    match header {
        Header::Uml(uml) => {
            load_side_file(env, &cow.file, &env.canonical(&cow.path)?, bitmap, uml.geometry())
        }
        _ => Ok(false),
    }
}

/// Makes a COW file ready for writes: the live bitmap stands, and a successor will know that it may be needed.
pub(crate) fn make_writable<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    header: Header,
    live_is_valid: bool,
) -> Result<WritableCow<E::File>, OpenError> {
    let geometry = *header.geometry();
    let path = env.canonical(&cow.path).map_err(OpenError::io(&cow.path, "resolve"))?;
    let live = LiveBitmap::side_file(env, &cow.file, &path, &geometry, live_is_valid);
    let live = live.map_err(OpenError::io(path, "make the live bitmap"))?;
    Ok(WritableCow { header: Mutex::new(header), geometry, live })
}

/// Writes that nothing but the durable state counts. To be called after a full flush.
pub(crate) fn mark_clean(_file: &impl Storage, _header: &mut Header) -> Result<(), UpdateError> {
    Ok(())
}

/// Replaces the path of the backing file.
pub(crate) fn set_backing_path(
    file: &impl Storage,
    header: &Header,
    path: &Path,
    mtime: Timestamp,
) -> Result<Header, UpdateError> {
    let path = path.as_os_str().as_bytes();
    match header {
        Header::Uml(uml) => Ok(Header::Uml(write_uml_backing(file, uml, path, mtime)?)),
        _ => Ok(header.clone()),
    }
}
