//! The header of an open COW file, and its changes on disk. Each can be interrupted at any write
//! and leaves a usable header.

use std::io;
use std::path::Path;

use cow_format::header::{Backing, NativeHeader, NativeState, UmlHeader};
use cow_format::identity::Timestamp;
use cow_format::{Bitmap, ByteOffset, Header, HeaderError, SECTOR_SIZE};

use super::flush::{FlushFailure, flush};
use crate::image::ImageError;
use crate::image::opened::Opened;
use crate::shown::Shown;
use crate::storage::{SECTOR, Storage};

/// A header that could not be changed.
#[derive(Debug)]
pub(crate) enum UpdateError {
    /// The format cannot express the change.
    Header(HeaderError),
    /// It could not be written.
    Io(io::Error),
}

impl UpdateError {
    /// The error of the file at `path`.
    pub(crate) fn at(self, path: &Path) -> ImageError {
        match self {
            UpdateError::Header(source) => ImageError::Header { path: path.to_owned(), source },
            UpdateError::Io(source) => ImageError::io(path, "write the header of")(source),
        }
    }
}

impl From<UpdateError> for io::Error {
    fn from(err: UpdateError) -> Self {
        match err {
            UpdateError::Io(err) => err,
            UpdateError::Header(err) => io::Error::other(err),
        }
    }
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

/// The largest offset of the path in a version 3 header, padded or not.
const UML_PATH_AT: usize = 36;

/// Replaces the backing path and mtime in a UML header.
///
/// There is only one copy of it, and a disk writes 512 bytes atomically: so sector 0, which holds
/// every other field and the beginning of the path, is written last and alone. The sectors after it
/// are ignored as long as the path in sector 0 ends there. If neither the old nor the new path
/// does, the header passes through a state with a short path to a nonexistent file; after an
/// interruption there, the base has to be given again.
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
        write_synced(file, &bytes[SECTOR..], SECTOR_SIZE)?;
    }
    write_synced(file, &bytes[..SECTOR], 0)?;
    Ok(new)
}

fn write_synced(file: &impl Storage, bytes: &[u8], at: u64) -> io::Result<()> {
    file.write_all_at(bytes, ByteOffset::new(at))?;
    file.sync()
}

/// Writes a native header over the older of its two copies. The newer one is made durable first, so
/// that one of them is always intact. The caller syncs if something depends on it.
fn write_native(file: &impl Storage, header: &mut NativeHeader) -> Result<(), UpdateError> {
    file.sync()?;
    let write = header.next_write()?;
    file.write_all_at(&write.bytes[..], write.at)?;
    Ok(())
}

/// The same, but durable on return.
pub(crate) fn write_native_synced(
    file: &impl Storage,
    header: &mut NativeHeader,
) -> Result<(), UpdateError> {
    write_native(file, header)?;
    file.sync()?;
    Ok(())
}

/// Refuses a file whose header allows reading only.
pub(crate) fn check_writable(path: &Path, header: &Header) -> Result<(), ImageError> {
    match header {
        Header::Uml(uml) if uml.is_read_only() => {
            let source = HeaderError::ReadOnlyVersion { version: uml.version().number() };
            Err(ImageError::Header { path: path.to_owned(), source })
        }
        Header::Native(native) if native.state() == NativeState::Frozen => {
            Err(ImageError::Frozen { path: path.to_owned() })
        }
        _ => Ok(()),
    }
}

/// What is known about the copy of a native header that was written last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Newest {
    /// It is durable.
    Durable,
    /// Writing it has failed: the other one is durable.
    InDoubt,
}

/// How far recording a failed sync got.
#[derive(Debug)]
pub(crate) enum NotMarked {
    /// Not even into the page cache.
    AtAll(io::Error),
    /// It is not durable, and is lost if the page is evicted.
    Durably(io::Error),
}

/// After a failed sync: from now on every opener treats the file as after a power cut. This is
/// recorded first in the page cache, at once, so that it survives the death of this process; then
/// durably, since the page may be evicted.
pub(crate) fn void_live(
    file: &impl Storage,
    native: &mut NativeHeader,
    newest: Newest,
) -> Result<(), NotMarked> {
    native.make_live_void();
    let write = match newest {
        Newest::Durable => native.next_write(),
        Newest::InDoubt => native.write_again(),
    };
    let write = write.map_err(|err| NotMarked::AtAll(io::Error::other(err)))?;
    file.write_all_at(&write.bytes[..], write.at).map_err(NotMarked::AtAll)?;
    file.write_durably(&write.bytes[..], write.at).map_err(NotMarked::Durably)
}

/// The same for a file that is changed as a whole, and that only a tool has open.
pub(crate) fn mark_failed<F: Storage>(cow: &Opened<F>, header: &mut Header, newest: Newest) {
    if let Header::Native(native) = header
        && let Err(err) = void_live(&cow.file, native, newest)
    {
        log_not_marked(&cow.path, &err);
    }
}

/// Makes everything in `bitmap` durable, then the clean state.
pub(crate) fn settle<F: Storage>(
    cow: &Opened<F>,
    header: &mut Header,
    bitmap: &Bitmap,
) -> Result<(), ImageError> {
    if let Err(failure) = flush(&cow.file, bitmap, header.geometry()) {
        if let FlushFailure::Sync(_) = failure {
            mark_failed(cow, header, Newest::Durable);
        }
        return Err(failure.at(&cow.path));
    }
    mark_clean(&cow.file, header).map_err(|err| {
        // Everything is durable, but it is unknown which header is.
        mark_failed(cow, header, Newest::InDoubt);
        err.at(&cow.path)
    })
}

/// Logs what the user has to do if a failed sync could not be recorded.
pub(crate) fn log_not_marked(path: &Path, err: &NotMarked) {
    let path = path.shown();
    match err {
        NotMarked::Durably(err) => log::error!(
            "{path}: a sync has failed, and that is recorded in the page cache only ({err}); flushed data \
             can be lost if memory runs short before the disk is opened again: first unmount its file \
             system and mount it again, or reboot"
        ),
        NotMarked::AtAll(err) => log::error!(
            "{path}: a sync has failed, and that could not be recorded ({err}): before opening the disk \
             again, unmount its file system and mount it again, or reboot; otherwise flushed data can \
             be lost"
        ),
    }
}

/// Records durably that only the durable state is valid. Must be called after a full flush.
pub(crate) fn mark_clean(file: &impl Storage, header: &mut Header) -> Result<(), UpdateError> {
    match header {
        Header::Uml(_) => Ok(()),
        Header::Native(native) => {
            native.set_clean()?;
            write_native_synced(file, native)
        }
    }
}

/// The same for a file prepared by [`super::writable::make_writable`]: its live bitmap has no bit
/// that is not durable.
pub(crate) fn mark_settled(file: &impl Storage, header: &mut Header) -> Result<(), UpdateError> {
    match header {
        Header::Uml(_) => Ok(()),
        Header::Native(native) => {
            native.set_clean_and_settled()?;
            write_native_synced(file, native)
        }
    }
}

/// Changes the path of the backing file, durably.
pub(crate) fn set_backing_path(
    file: &impl Storage,
    header: &mut Header,
    path: &[u8],
    mtime: Timestamp,
) -> Result<(), UpdateError> {
    match header {
        Header::Uml(uml) => *uml = write_uml_backing(file, uml, path, mtime)?,
        Header::Native(native) => {
            let Some(old) = native.backing() else { return Ok(()) };
            let new = Backing::new(path, old.format(), *old.identity(), old.digest().copied())?;
            native.set_backing(Some(new));
            write_native_synced(file, native)?;
        }
    }
    Ok(())
}
