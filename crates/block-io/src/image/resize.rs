//! Changing the size of a disk that is not in use.
//!
//! The size changes at the moment of the header's write. What a smaller disk leaves behind its end
//! is cleared after that, and again before the disk grows: bits there would bring deleted data
//! back.

use std::io;
use std::path::Path;

use cow_format::check::clear_beyond_end;
use cow_format::header::NativeHeader;
use cow_format::{
    BITMAP_PAGE_LEN, Bitmap, ByteOffset, Geometry, PAGE_SECTORS, SECTOR_SIZE, Sector, SectorCount,
    SectorRange,
};

use super::chain::Opener;
use super::edit::{ChangeError, Edit, native_of};
use super::write::header_io::{check_writable, write_native_synced};
use super::{DiskOptions, ImageError};
use crate::storage::{Env, Storage};

/// Resizes the native COW file at `path` to `size` bytes, a multiple of 512. New space reads as
/// zeros. A smaller size loses the data beyond it and must be allowed. An interruption leaves the
/// old or the new size.
pub fn resize<E: Env>(
    env: &E,
    path: &Path,
    size: u64,
    may_shrink: bool,
) -> Result<(), ChangeError> {
    if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
        return Err(ChangeError::Size { path: path.to_owned(), size });
    }
    let mut edit = Edit::open(env, path)?;
    check_writable(path, &edit.header)?;
    let mut header = native_of(&mut edit.header, path, "be resized")?.clone();
    let old = *header.geometry();
    let virtual_size = old.virtual_size();
    if size < virtual_size && !may_shrink {
        return Err(ChangeError::Shrink { path: path.to_owned(), size, virtual_size });
    }
    // Any refusal must come before the first change.
    header.resize(size).map_err(ImageError::header(path))?;
    let below = if size > virtual_size { size_below(env, path, &edit)? } else { 0 };
    edit.settle()?;
    let native = native_of(&mut edit.header, path, "be resized")?;
    native.resize(size).map_err(ImageError::header(path))?;
    let new = *native.geometry();
    let file = &edit.cow.file;
    let end = new.sector_at(new.all().end()).get();
    let set_len =
        |file: &E::File| file.set_len(end).map_err(ImageError::io(path, "set the length of"));
    if size > virtual_size {
        clear_beyond(file, native, &old).map_err(ImageError::io(path, "clear the end of"))?;
        hide_below(file, &old, &new, below).map_err(ImageError::io(path, "write the bitmap of"))?;
        set_len(file)?;
    }
    write_native_synced(file, native).map_err(|err| err.at(path))?;
    if size < virtual_size {
        clear_beyond(file, native, &new).map_err(ImageError::io(path, "clear the end of"))?;
        set_len(file)?;
        file.sync().map_err(ImageError::io(path, "sync"))?;
    }
    Ok(())
}

/// The size in bytes of the disk below the file: if it is larger than the old size, growing would
/// expose it.
fn size_below<E: Env>(env: &E, path: &Path, edit: &Edit<E::File>) -> Result<u64, ImageError> {
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let below = Opener::new(env, &options, path).below(path, &edit.header)?;
    Ok(below.first().map_or(0, |nearest| nearest.disk_size()))
}

/// Clears bits and data past the end of a disk of this geometry, in all the space that the file has
/// for growth.
fn clear_beyond(file: &impl Storage, header: &NativeHeader, geometry: &Geometry) -> io::Result<()> {
    let page_len = BITMAP_PAGE_LEN as u64;
    let bitmap = geometry.bitmap_offset().get();
    let edge = geometry.sectors().get() / PAGE_SECTORS;
    let room = header.virtual_size_max().div_ceil(PAGE_SECTORS * SECTOR_SIZE) * page_len;
    if (edge + 1) * page_len <= room {
        let mut page = [0; BITMAP_PAGE_LEN];
        let at = ByteOffset::new(bitmap + edge * page_len);
        file.read_zero_filled(&mut page, at)?;
        if clear_beyond_end(geometry, edge, &mut page) {
            file.write_all_at(&page, at)?;
        }
        let rest = (edge + 1) * page_len;
        file.punch(ByteOffset::new(bitmap + rest), room - rest)?;
    }
    // The state is clean: no bit of the live bitmap is needed.
    if let Some(live) = geometry.live_bitmap_offset() {
        file.punch(live, room)?;
    }
    let end = geometry.sector_at(geometry.all().end());
    file.punch(end, file.len()?.saturating_sub(end.get()))
}

/// Marks the new sectors present, as holes, as far as the file below has data: it must not become
/// visible.
fn hide_below(file: &impl Storage, old: &Geometry, new: &Geometry, below: u64) -> io::Result<()> {
    let start = old.sectors().get();
    let end = SectorCount::covering(below).get().min(new.sectors().get());
    let Some(range) =
        SectorRange::new(Sector::new(start), SectorCount::new(end.saturating_sub(start)))
    else {
        return Ok(());
    };
    let bitmap = Bitmap::new(new.sectors());
    let first = start / PAGE_SECTORS;
    let mut page = [0; BITMAP_PAGE_LEN];
    // The first page also has bits of the disk before it grew.
    file.read_zero_filled(
        &mut page,
        ByteOffset::new(old.bitmap_offset().get() + first * BITMAP_PAGE_LEN as u64),
    )?;
    bitmap.load_durable(first, &page);
    bitmap.insert(range);
    // The holes come first: no bit may be durable before them.
    file.sync()?;
    for index in first..end.div_ceil(PAGE_SECTORS) {
        bitmap.render_page(index, &mut page);
        file.write_all_at(&page, new.page_at(index))?;
    }
    Ok(())
}
