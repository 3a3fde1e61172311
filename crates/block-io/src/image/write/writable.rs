//! Preparing a COW file for writes: its length, its live bitmap, the durability of its name, and
//! the state of its header.

use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use cow_format::header::{NativeHeader, PageCache};
use cow_format::{Geometry, Header};

use super::header_io::{Newest, UpdateError, void_live};
use crate::image::ImageError;
use crate::image::bitmap::live::LiveBitmap;
use crate::image::bitmap::source::BitmapSource;
use crate::image::opened::Opened;
use crate::image::trust::page_cache;
use crate::shown::Shown;
use crate::storage::{Env, Storage};

/// State of a COW file that is open for writing.
pub(crate) struct WritableCow<F> {
    pub(crate) header: Mutex<Header>,
    pub(crate) geometry: Geometry,
    pub(crate) live: LiveBitmap<F>,
    /// The live bitmap left by a predecessor may have bits that are not durable and not loaded yet.
    pub(crate) unread: AtomicBool,
}

/// Prepares a COW file for writes: the live bitmap exists, and a successor will be able to tell
/// whether it is valid. If it already is, as `bits` say, the header says so and is left alone. A
/// file that is `inherited` is not written to at all.
pub(crate) fn make_writable<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    mut header: Header,
    bits: &BitmapSource<E::File>,
    inherited: bool,
) -> Result<WritableCow<E::File>, ImageError> {
    let (geometry, live_is_valid) = (*header.geometry(), bits.live_counts());
    hold_last_sector(&cow.file, &geometry).map_err(ImageError::io(&cow.path, "lengthen"))?;
    let make = ImageError::io(&cow.path, "make the live bitmap");
    let live = match &mut header {
        Header::Uml(_) => {
            let path = env.canonical(&cow.path).map_err(ImageError::io(&cow.path, "resolve"))?;
            LiveBitmap::side_file(env, &cow.file, &path, &geometry, bits.side_file())
                .map_err(ImageError::side_file(&path))?
        }
        Header::Native(native) => {
            let Some(at) = geometry.live_bitmap_offset() else {
                return Err(make(io::Error::other("the header gives it no place")));
            };
            let settled = native.live_is_settled();
            let live = LiveBitmap::native(&cow.file, at, &geometry, live_is_valid || settled);
            let live = live.map_err(make)?;
            // Not earlier: once the header names this page cache, every bit of the live bitmap must
            // be correct.
            let here = page_cache(env, &cow.file)?;
            match (live_is_valid, here) {
                // The predecessor may not have known the witness.
                (true, Some(here)) => native.set_live(here),
                (true, None) => {}
                (false, here) => begin_use(&cow.file, native, here).map_err(|e| e.at(&cow.path))?,
            }
            live
        }
    };
    if !inherited {
        warn_without_witness(env, cow);
    }
    if !inherited && cow.by_name {
        hold_name(env, &cow.path).map_err(ImageError::io(&cow.path, "sync the directory of"))?;
    }
    let unread = AtomicBool::new(live_is_valid);
    Ok(WritableCow { header: Mutex::new(header), geometry, live, unread })
}

/// Marks the file as in use, durably: then one of the header's copies is known to be intact
/// whatever a later sync reports, and the live bitmap is not used under this header before.
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

/// Extends a file that ends before the disk's last sector does, as one does over a base with a
/// partial last sector. This is durable and happens before any write: a power cut can lose the
/// extension caused by a write but keep its data, and then the sector would hold neither the old
/// nor the new content.
fn hold_last_sector(file: &impl Storage, geometry: &Geometry) -> io::Result<()> {
    let end = geometry.sector_at(geometry.all().end()).get();
    if file.len()? < end {
        file.set_len(end)?;
        file.sync()?;
    }
    Ok(())
}

/// Warns about the limits if one page cache cannot be told from another.
fn warn_without_witness<E: Env>(env: &E, cow: &Opened<E::File>) {
    if env.cache_witness(&cow.file).is_none() {
        log::warn!(
            "{}: this file system (or a sandbox without /sys) does not show whether it was mounted \
             again: if the daemon dies, flushed data is kept, but writes since then may be lost; \
             they are kept with ext4, XFS, Btrfs, F2FS and tmpfs, and with every file system from \
             Linux 6.8 on",
            cow.path.shown()
        );
    }
}

/// Makes the file's name durable: its creator may have died before doing so, and a flush is
/// worthless if the file is gone.
fn hold_name<E: Env>(env: &E, path: &Path) -> io::Result<()> {
    match env.canonical(path).and_then(|path| env.sync_parent(&path)) {
        // A process that may write the file but not read its directory did not create it.
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        result => result,
    }
}
