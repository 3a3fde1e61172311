//! Checking one COW file, and repairing what can be repaired without guessing at data.

use std::path::Path;

use cow_format::check::{Check, Finding, clear_beyond_end, leaks};
use cow_format::header::NativeState;
use cow_format::{BITMAP_PAGE_LEN, Bitmap, ByteOffset, Geometry, Header};

use super::OpError;
use super::windows::Windows;
use crate::disk::Disk;
use crate::image::DiskOptions;
use crate::image::bitmap::source::BitmapSource;
use crate::image::chain::Opener;
use crate::image::opened::Opened;
use crate::image::trust::{Trust, needs_replay, recover};
use crate::image::write::header_io::write_native_synced;
use crate::storage::{Env, FS_BLOCK, Storage};

/// Bytes of disk that one page of the bitmap covers.
const PAGE_SPAN: u64 = BITMAP_PAGE_LEN as u64 * 8 * 512;

/// A finding, and whether it was repaired.
#[derive(Debug)]
pub struct Checked {
    /// What was found.
    pub finding: Finding,
    /// It has been repaired.
    pub repaired: bool,
}

/// Checks the COW file at `path`; with `repair`, repairs what can be. A header that cannot be read
/// is an error, [`crate::ImageError::Header`]. The files below are not checked.
pub fn check<E: Env>(env: &E, path: &Path, repair: bool) -> Result<Vec<Checked>, OpError> {
    let mut checked = Vec::new();
    if repair && close_in_order(env, path)? {
        checked.push(Checked { finding: Finding::NotClosed, repaired: true });
    }
    let options = DiskOptions { read_only: !repair, ..DiskOptions::default() };
    let cow = Opener::new(env, &options, path).top()?;
    let mut header = cow.header()?;
    let trust = match repair {
        // A clean file is not examined further.
        true => recover(env, &cow, &mut header)?,
        false => Trust::Witness,
    };
    if let Header::Native(native) = &header
        && needs_replay(env, &cow, native, trust)?
    {
        // Until the journal is replayed it is unknown which sectors are present.
        checked.push(Checked { finding: Finding::Journal, repaired: false });
        return Ok(checked);
    }
    let bits = BitmapSource::find(env, &cow, &header, trust)?;
    if bits.live_counts() && matches!(header, Header::Uml(_)) {
        checked.push(Checked { finding: Finding::NotClosed, repaired: false });
    }
    for finding in find(&cow, &header, &bits)? {
        let repaired = repair && put_right(&cow, &mut header, &finding, &bits)?;
        checked.push(Checked { finding, repaired });
    }
    Ok(checked)
}

/// If the disk was not closed, opens it for writing and closes it: its live state becomes durable.
/// Returns whether it did.
fn close_in_order<E: Env>(env: &E, path: &Path) -> Result<bool, OpError> {
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let cow = Opener::new(env, &options, path).top()?;
    let header = cow.header()?;
    let not_closed = match &header {
        Header::Native(native) => matches!(native.state(), NativeState::InUse { .. }),
        Header::Uml(_) => BitmapSource::find(env, &cow, &header, Trust::Witness)?.live_counts(),
    };
    drop(cow);
    if not_closed {
        Disk::open_cow_in(env.clone(), path, None, &DiskOptions::default())?.close()?;
    }
    Ok(not_closed)
}

fn find<F: Storage>(
    cow: &Opened<F>,
    header: &Header,
    bits: &BitmapSource<F>,
) -> Result<Vec<Finding>, OpError> {
    let present = bits.present(&cow.file, 0..bits.pages());
    let present = present.map_err(OpError::io(&cow.path, "read the bitmap of"))?;
    let mut check = Check::new(header, present.last, cow.stat.size);
    for_each_page(cow, header, |_, page, bytes| {
        check.bitmap_page(page, bytes);
        Ok(())
    })?;
    for_each_data(cow, header, bits, |bitmap, at, len| {
        check.allocated(bitmap, at, len).for_each(drop);
        Ok(())
    })?;
    Ok(check.finish())
}

/// Passes to `found` the ranges of the file that have data, from its first sector on, each with the
/// bits of the sectors in it.
fn for_each_data<F: Storage>(
    cow: &Opened<F>,
    header: &Header,
    bits: &BitmapSource<F>,
    mut found: impl FnMut(&Bitmap, ByteOffset, u64) -> Result<(), OpError>,
) -> Result<(), OpError> {
    // If all counts as data it is unknown what is allocated.
    if !cow.file.knows_holes() {
        return Ok(());
    }
    let mut windows = Windows::new(bits, cow, header.geometry());
    let mut at = header.geometry().data_offset().get();
    let end = match header {
        Header::Native(_) => u64::MAX,
        // A new UML file is created by writing its last byte: that block is not leaked.
        Header::Uml(_) => cow.stat.size.saturating_sub(1) / FS_BLOCK * FS_BLOCK,
    };
    while let Some(data) = next_data(cow, at)?.filter(|data| data.start < end) {
        windows.for_each(data.start..data.end.min(end), &mut found)?;
        at = data.end;
    }
    Ok(())
}

fn next_data<F: Storage>(
    cow: &Opened<F>,
    at: u64,
) -> Result<Option<std::ops::Range<u64>>, OpError> {
    cow.file.next_data(ByteOffset::new(at)).map_err(OpError::read(&cow.path, at))
}

/// Passes to `found` the pages of the durable bitmap, including the room for growth, that may have
/// a bit set.
fn for_each_page<F: Storage>(
    cow: &Opened<F>,
    header: &Header,
    mut found: impl FnMut(ByteOffset, u64, &mut [u8]) -> Result<(), OpError>,
) -> Result<(), OpError> {
    let geometry = header.geometry();
    let start = geometry.bitmap_offset().get();
    let end = start + room(header);
    let mut at = start;
    while at < end {
        let Some(data) = next_data(cow, at)?.filter(|data| data.start < end) else { break };
        let page = (data.start.max(start) - start) / BITMAP_PAGE_LEN as u64;
        at = start + page * BITMAP_PAGE_LEN as u64;
        let len =
            usize::try_from(end - at).map_or(BITMAP_PAGE_LEN, |left| left.min(BITMAP_PAGE_LEN));
        let mut bytes = [0; BITMAP_PAGE_LEN];
        let read = cow.file.read_zero_filled(&mut bytes[..len], ByteOffset::new(at));
        read.map_err(OpError::read(&cow.path, at))?;
        found(ByteOffset::new(at), page, &mut bytes[..len])?;
        at += BITMAP_PAGE_LEN as u64;
    }
    Ok(())
}

/// Bytes of the durable bitmap including its room for growth.
pub(super) fn room(header: &Header) -> u64 {
    match header {
        Header::Uml(uml) => uml.geometry().bitmap_len(),
        Header::Native(native) => {
            native.virtual_size_max().div_ceil(PAGE_SPAN) * BITMAP_PAGE_LEN as u64
        }
    }
}

/// Repairs the finding if possible; returns whether it is repaired.
fn put_right<F: Storage>(
    cow: &Opened<F>,
    header: &mut Header,
    finding: &Finding,
    bits: &BitmapSource<F>,
) -> Result<bool, OpError> {
    match (finding, header) {
        (Finding::HeaderCopy(_) | Finding::UnknownFeatures(_), Header::Native(native)) => {
            write_native_synced(&cow.file, native).map_err(|err| err.at(&cow.path))?;
        }
        (Finding::BitsBeyondEnd { .. }, header) => clear_bits(cow, header)?,
        (Finding::Leaked { .. }, header) => punch(cow, header, bits)?,
        // Lost data stays lost; a file that is still open elsewhere was refused earlier.
        _ => return Ok(false),
    }
    Ok(true)
}

fn clear_bits<F: Storage>(cow: &Opened<F>, header: &Header) -> Result<(), OpError> {
    let geometry: &Geometry = header.geometry();
    for_each_page(cow, header, |at, page, bytes| {
        if clear_beyond_end(geometry, page, bytes) {
            cow.file.write_all_at(bytes, at).map_err(OpError::write(&cow.path, at.get()))?;
        }
        Ok(())
    })?;
    sync(cow)
}

fn punch<F: Storage>(
    cow: &Opened<F>,
    header: &Header,
    bits: &BitmapSource<F>,
) -> Result<(), OpError> {
    for_each_data(cow, header, bits, |bitmap, at, len| {
        leaks(header.geometry(), bitmap, at, len).try_for_each(|(at, len)| {
            cow.file.punch(at, len).map_err(OpError::write(&cow.path, at.get()))
        })
    })?;
    sync(cow)
}

fn sync<F: Storage>(cow: &Opened<F>) -> Result<(), OpError> {
    cow.file.sync().map_err(OpError::io(&cow.path, "sync"))
}
