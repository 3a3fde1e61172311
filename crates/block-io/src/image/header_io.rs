//! The header of an open COW file, and its changes on disk. Each can be interrupted at any write and leaves a header
//! that can be used.

use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use cow_format::header::{Backing, NativeHeader, NativeState, PageCache, UmlHeader};
use cow_format::identity::Timestamp;
use cow_format::{Bitmap, ByteOffset, Geometry, Header, HeaderError};

use super::ImageError;
use super::flush::{FlushFailure, flush};
use super::live::LiveBitmap;
use super::opened::Opened;
use super::trust::page_cache;
use crate::disk::WritableCow;
use crate::storage::{Env, Storage};
use crate::testing::mem::SECTOR;

/// A header that could not be changed.
#[derive(Debug)]
pub(crate) enum UpdateError {
    /// The header cannot say it.
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

/// Writes a native header over the older of its two copies. The newer one is made durable first, so that one of them
/// is whole whatever happens. The caller syncs if something depends on it.
fn write_native(file: &impl Storage, header: &mut NativeHeader) -> Result<(), UpdateError> {
    file.sync()?;
    let write = header.next_write()?;
    file.write_all_at(&write.bytes[..], write.at)?;
    Ok(())
}

/// The same, durable on return.
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

/// Makes a COW file ready for writes: the live bitmap stands, and a successor will know whether it counts. Where it
/// counts already, the header says so and is left alone. One that is `inherited` is not written to at all.
pub(crate) fn make_writable<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    mut header: Header,
    live_is_valid: bool,
    inherited: bool,
) -> Result<WritableCow<E::File>, ImageError> {
    let geometry = *header.geometry();
    hold_last_sector(&cow.file, &geometry).map_err(ImageError::io(&cow.path, "lengthen"))?;
    let make = ImageError::io(&cow.path, "make the live bitmap");
    let live = match &mut header {
        Header::Uml(_) => {
            let path = env.canonical(&cow.path).map_err(ImageError::io(&cow.path, "resolve"))?;
            LiveBitmap::side_file(env, &cow.file, &path, &geometry, live_is_valid)
                .map_err(ImageError::side_file(&path))?
        }
        Header::Native(native) => {
            let Some(at) = geometry.live_bitmap_offset() else {
                return Err(make(io::Error::other("the header gives it no place")));
            };
            let settled = native.live_is_settled();
            let live = LiveBitmap::native(&cow.file, at, &geometry, live_is_valid || settled);
            let live = live.map_err(make)?;
            // Only now: under this page cache's name it must say nothing that does not hold.
            let here = page_cache(env, &cow.file)?;
            match (live_is_valid, here) {
                // A predecessor may have known less of it.
                (true, Some(here)) => native.set_live(here),
                (true, None) => {}
                (false, here) => begin_use(&cow.file, native, here).map_err(|e| e.at(&cow.path))?,
            }
            live
        }
    };
    if !inherited {
        warn_without_witness(env, cow);
        hold_name(env, &cow.path).map_err(ImageError::io(&cow.path, "sync the directory of"))?;
    }
    let unread = AtomicBool::new(live_is_valid);
    Ok(WritableCow { header: Mutex::new(header), geometry, live, unread })
}

/// Writes that the file is in use, durably: then one of its header's copies is known to be whole whatever a later sync says,
/// and nobody looks at the live bitmap under the header before.
fn begin_use(
    file: &impl Storage,
    native: &mut NativeHeader,
    here: Option<PageCache>,
) -> Result<(), UpdateError> {
    file.sync()?;
    native.set_in_use(here)?;
    let write = native.next_write()?;
    let written = file.write_durably(&write.bytes[..], write.at);
    written.inspect_err(|_| _ = void_live(file, native, Newest::InDoubt))?;
    Ok(())
}

/// What is known of the copy of a native header that was written last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Newest {
    /// It is durable.
    Durable,
    /// Writing it has failed: the other one is durable.
    InDoubt,
}

/// How far the mark of a failed sync got.
#[derive(Debug)]
pub(crate) enum NotMarked {
    /// Not even into the page cache.
    AtAll(io::Error),
    /// It is not durable: it is lost if the page cache forgets it.
    Durably(io::Error),
}

/// After a failed sync: from now on the file is as after a power cut, whoever opens it next. First in the page cache, at
/// once, so that a death of this process finds it there; then durably, since the page cache may forget it.
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
        say_not_marked(&cow.path, &err);
    }
}

/// Makes everything durable that `bitmap` says, and then the state clean.
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
        // Everything is durable, but nobody knows which header is.
        mark_failed(cow, header, Newest::InDoubt);
        err.at(&cow.path)
    })
}

/// Says what has to be done where a failed sync could not be marked.
pub(crate) fn say_not_marked(path: &Path, err: &NotMarked) {
    let path = path.display();
    match err {
        NotMarked::Durably(err) => log::error!(
            "{path}: that a sync has failed stands in the page cache only ({err}); if memory becomes scarce before it is \
             opened again, what was flushed can be lost: unmount its file system and mount it again first, or reboot"
        ),
        NotMarked::AtAll(err) => log::error!(
            "{path}: that a sync has failed could not be written into it ({err}): before it is opened again, unmount its \
             file system and mount it again, or reboot; else what was flushed can be lost"
        ),
    }
}

/// Lengthens a file that ends before the disk's last sector does, as one does over a base of no whole number of sectors.
/// Durably and before any write: the length that a write brings can be lost in a power cut that keeps its data, and
/// then the sector would be neither what it was nor what was written.
fn hold_last_sector(file: &impl Storage, geometry: &Geometry) -> io::Result<()> {
    let end = geometry.sector_at(geometry.all().end()).get();
    if file.len()? < end {
        file.set_len(end)?;
        file.sync()?;
    }
    Ok(())
}

/// What does not hold where nothing tells one page cache from another.
fn warn_without_witness<E: Env>(env: &E, cow: &Opened<E::File>) {
    if env.cache_witness(&cow.file).is_none() {
        log::warn!(
            "{}: this file system (or a sandbox without /sys) does not show whether it was mounted anew: should the daemon \
             die, what was flushed is kept, but what was written since may be lost; with ext4, XFS, Btrfs, F2FS and tmpfs, \
             and from Linux 6.8 on with all, it is kept as well",
            cow.path.display()
        );
    }
}

/// Makes the file's name durable: whoever made it may have died before doing so, and a flush is worth nothing if the
/// file it went to is gone.
fn hold_name<E: Env>(env: &E, path: &Path) -> io::Result<()> {
    match env.canonical(path).and_then(|path| env.sync_parent(&path)) {
        // Who may write the file, but not read its directory, did not make it.
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        result => result,
    }
}

/// Writes, durably, that nothing but the durable state counts. To be called after a full flush.
pub(crate) fn mark_clean(file: &impl Storage, header: &mut Header) -> Result<(), UpdateError> {
    match header {
        Header::Uml(_) => Ok(()),
        Header::Native(native) => {
            native.set_clean()?;
            write_native_synced(file, native)
        }
    }
}

/// The same, of a file that [`make_writable`] made ready: its live bitmap has nothing that is not durable.
pub(crate) fn mark_settled(file: &impl Storage, header: &mut Header) -> Result<(), UpdateError> {
    match header {
        Header::Uml(_) => Ok(()),
        Header::Native(native) => {
            native.set_clean_and_settled()?;
            write_native_synced(file, native)
        }
    }
}

/// Gives the backing file another path, durably.
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
