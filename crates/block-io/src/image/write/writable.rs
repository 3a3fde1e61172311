//! Making a COW file ready for writes: its length, its live bitmap, its name, and the state of its header.

use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use cow_format::header::{NativeHeader, PageCache};
use cow_format::{Geometry, Header};

use super::header_io::{Newest, UpdateError, void_live};
use crate::image::ImageError;
use crate::image::bitmap::live::LiveBitmap;
use crate::image::opened::Opened;
use crate::image::trust::page_cache;
use crate::storage::{Env, Storage};

/// What a COW file needs while it is open for writing.
pub(crate) struct WritableCow<F> {
    pub(crate) header: Mutex<Header>,
    pub(crate) geometry: Geometry,
    pub(crate) live: LiveBitmap<F>,
    /// The live bitmap that a predecessor left may say what is not durable and not known yet.
    pub(crate) unread: AtomicBool,
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
