//! What makes a native header valid, field by field (`docs/spec/format-native.md` section 4).

use uuid::Uuid;
use zerocopy::FromBytes;

use super::check_size;
use super::error::{Field, HeaderError, Part};
use super::native_raw::{COPY_LEN, JOURNAL, RawHeader, has_magic};
use super::native_state::NativeState;
use crate::bitmap::BITMAP_PAGE_LEN;
use crate::geometry::Geometry;
use crate::journal::{Epoch, JournalArea};
use crate::units::SECTOR_SIZE;

/// Alignment of bitmaps and data: direct I/O works on every common disk and file system.
pub(super) const ALIGNMENT: u64 = 4096;
/// Where the first bitmap of a new file is: after both copies of the header.
pub(super) const BITMAP_OFFSET: u64 = 2 * COPY_LEN as u64;
/// Bytes of disk covered by one byte of bitmap.
pub(super) const BITMAP_BYTE_SPAN: u64 = 8 * SECTOR_SIZE;
/// Generations are below this, so that incrementing never overflows.
const GENERATION_END: u64 = 1 << 63;

/// A copy whose magic and checksum are valid. Fields of other versions are not examined.
pub(super) fn check_copy(prefix: &[u8], slot: usize) -> Result<&RawHeader, HeaderError> {
    let at = slot * COPY_LEN;
    let Some(bytes) = prefix.get(at..at + COPY_LEN) else {
        let (found, expected) = (prefix.len() as u64, (at + COPY_LEN) as u64);
        return Err(HeaderError::Truncated { part: Part::Header, found, expected });
    };
    if !has_magic(bytes) {
        return Err(HeaderError::NotCow { found: bytes[..8].to_vec() });
    }
    let raw = RawHeader::ref_from_bytes(bytes).map_err(|_| HeaderError::Truncated {
        part: Part::Header,
        found: 0,
        expected: COPY_LEN as u64,
    })?;
    let (found, expected) = (raw.crc32c.get(), checksum(bytes));
    if found != expected {
        return Err(HeaderError::field(
            Field::Crc32c,
            format_args!("{found:#010x}"),
            format!("{expected:#010x}"),
        ));
    }
    Ok(raw)
}

/// CRC32C of a copy with its own field, bytes 16 to 19, as zeros.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let head = crc32c::crc32c(&bytes[..16]);
    let head = crc32c::crc32c_append(head, &[0; 4]);
    crc32c::crc32c_append(head, &bytes[20..])
}

pub(super) fn check_generation(field: Field, found: u64) -> Result<u64, HeaderError> {
    if found < GENERATION_END {
        return Ok(found);
    }
    Err(HeaderError::field(field, found, "a number below 2^63"))
}

/// Whole bitmap pages. `size` is within [`VIRTUAL_SIZE_MAX`].
pub(super) fn bitmap_len(size: u64) -> u64 {
    size.div_ceil(BITMAP_BYTE_SPAN).next_multiple_of(BITMAP_PAGE_LEN as u64)
}

/// Section 4: all aligned, nothing overlaps, everything ends below 2^63.
pub(super) fn check_places(raw: &RawHeader) -> Result<Geometry, HeaderError> {
    let size = raw.virtual_size.get();
    check_size(Field::VirtualSize, size)?;
    let capacity = raw.bitmap_capacity.get();
    let (durable, live, data) =
        (raw.bitmap_offset.get(), raw.live_bitmap_offset.get(), raw.data_offset.get());
    for (field, found) in [
        (Field::BitmapCapacity, capacity),
        (Field::BitmapOffset, durable),
        (Field::LiveBitmapOffset, live),
        (Field::DataOffset, data),
    ] {
        if !found.is_multiple_of(ALIGNMENT) {
            return Err(HeaderError::field(field, found, "a multiple of 4096"));
        }
    }
    let bitmap_len = bitmap_len(size);
    if capacity < bitmap_len {
        let expected = format!("at least {bitmap_len}, for a disk of {size} bytes");
        return Err(HeaderError::field(Field::BitmapCapacity, capacity, expected));
    }
    let end_of = |field, at: u64| {
        let end = at.checked_add(capacity).filter(|&end| end < GENERATION_END);
        end.ok_or_else(|| {
            HeaderError::field(
                field,
                at,
                format!("an end below 2^63 with a capacity of {capacity}"),
            )
        })
    };
    let (durable_end, live_end) =
        (end_of(Field::BitmapOffset, durable)?, end_of(Field::LiveBitmapOffset, live)?);
    if durable < BITMAP_OFFSET {
        return Err(HeaderError::field(
            Field::BitmapOffset,
            durable,
            "8192 or more, after both copies of the header",
        ));
    }
    if live < BITMAP_OFFSET || (live < durable_end && durable < live_end) {
        let expected = format!(
            "a place after the header and apart from the bitmap at {durable}..{durable_end}"
        );
        return Err(HeaderError::field(Field::LiveBitmapOffset, live, expected));
    }
    let bitmaps_end = durable_end.max(live_end);
    if data < bitmaps_end {
        return Err(HeaderError::field(
            Field::DataOffset,
            data,
            format!("{bitmaps_end} or more, after both bitmaps"),
        ));
    }
    let live_bitmap_offset = Some(live);
    let geometry = Geometry {
        virtual_size: size,
        bitmap_offset: durable,
        bitmap_len,
        live_bitmap_offset,
        data_offset: data,
    };
    check_end(&geometry)?;
    Ok(geometry)
}

/// The journal, if there is one, lies between the bitmaps and the data.
pub(super) fn check_journal(
    raw: &RawHeader,
    geometry: &Geometry,
) -> Result<Option<JournalArea>, HeaderError> {
    let (at, len) = (raw.journal_offset.get(), raw.journal_len.get());
    if (at, len) == (0, 0) {
        return Ok(None);
    }
    let area = JournalArea::check(at, len)?;
    let capacity = raw.bitmap_capacity.get();
    // Checked by `check_places`: no overflow.
    let bitmaps_end =
        (geometry.bitmap_offset + capacity).max(raw.live_bitmap_offset.get() + capacity);
    if at < bitmaps_end || area.is_none_or(|area| area.end() > geometry.data_offset) {
        return Err(HeaderError::field(
            Field::JournalOffset,
            format_args!("{at}, for {len} bytes"),
            format!(
                "a place between the bitmaps' end at {bitmaps_end} and the data at {}",
                geometry.data_offset
            ),
        ));
    }
    Ok(area)
}

/// Only a file in use that has a journal has an epoch in its header, together with its feature bit.
pub(super) fn check_epoch(
    raw: &RawHeader,
    state: NativeState,
    journal: Option<JournalArea>,
) -> Result<Option<Epoch>, HeaderError> {
    let epoch = Epoch::from_bytes(raw.journal_epoch);
    let flagged = raw.incompatible.get() & JOURNAL != 0;
    let expected = match (epoch, journal, state) {
        (None, ..) if !flagged => return Ok(None),
        (Some(_), Some(_), NativeState::InUse { .. }) if flagged => return Ok(epoch),
        (Some(_), ..) if !flagged => "zeros where bit 0 of `incompatible` is not set",
        (None, ..) => "an epoch where bit 0 of `incompatible` is set",
        (Some(_), None, _) => "zeros in a file without a journal",
        (Some(_), Some(_), _) => "zeros in a file that is not in use",
    };
    let found = Uuid::from_bytes(raw.journal_epoch);
    Err(HeaderError::field(Field::JournalEpoch, found, expected))
}

/// The last sector ends below 2^63.
pub(super) fn check_end(geometry: &Geometry) -> Result<(), HeaderError> {
    let sectors = geometry.virtual_size.next_multiple_of(SECTOR_SIZE);
    match geometry.data_offset.checked_add(sectors).map(i64::try_from) {
        Some(Ok(_)) => Ok(()),
        _ => Err(HeaderError::field(
            Field::DataOffset,
            geometry.data_offset,
            "data that ends below 2^63",
        )),
    }
}
