//! The native header, checked (`docs/format-native.md`).

use uuid::Uuid;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::backing::Backing;
use super::check_size;
use super::error::{Field, HeaderError, Part};
use super::native_raw::{
    COPY_LEN, HEADER_LEN, JOURNAL, LIVE_SETTLED, MAGIC, RawHeader, VERSION, state,
};
use crate::bitmap::BITMAP_PAGE;
use crate::geometry::Geometry;
use crate::journal::{Epoch, JournalArea};
use crate::units::{ByteOffset, SECTOR_SIZE, VIRTUAL_SIZE_MAX};

/// Alignment of bitmaps and data: direct I/O works on every common disk and file system.
const ALIGNMENT: u64 = 4096;
/// Where the first bitmap of a new file stands: after both copies of the header.
const BITMAP_OFFSET: u64 = 2 * COPY_LEN as u64;
/// A new file's data begins at a multiple of this: whole stripes and flash blocks underneath.
const DATA_ALIGNMENT: u64 = 1 << 20;
/// Disk that one byte of bitmap speaks of.
const BITMAP_BYTE_SPAN: u64 = 8 * SECTOR_SIZE;
/// A new disk can grow in place to this or to [`GROWTH_FACTOR`] times its size, whichever is more. It costs file
/// length only: the bitmaps are holes until they are used.
const GROWTH_MIN: u64 = 16 << 30;
const GROWTH_FACTOR: u64 = 8;
/// A new file's journal has at least so much room, and what is left up to the data: a hundred small flushes and more
/// between two that are done in place. It costs space only while somebody uses the file who flushes little at a time.
const JOURNAL_MIN: u64 = 512 << 10;
/// Generations lie below this, so that counting on never overflows.
const GENERATION_END: u64 = 1 << 63;

/// The host's boot, as `/proc/sys/kernel/random/boot_id` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(Uuid);

impl BootId {
    /// From that file's text; `None` if it is no UUID or the nil one.
    pub fn parse(text: &str) -> Option<Self> {
        Uuid::try_parse(text.trim()).ok().and_then(Self::new)
    }

    /// `None` for the nil UUID, which stands for no boot.
    pub fn new(uuid: Uuid) -> Option<Self> {
        (!uuid.is_nil()).then_some(Self(uuid))
    }
}

/// What state a file is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NativeState {
    /// Closed in order: the durable bitmap says everything.
    Clean,
    /// Opened for writing and not closed since. Under the boot given, if any, the live bitmap counts as well.
    InUse {
        /// The boot of the live bitmap.
        live: Option<BootId>,
    },
    /// Never written again: other files build on it.
    Frozen,
}

/// A checked native header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NativeHeader {
    /// Which copy it was read from or written to last: 0 or 1.
    slot: u8,
    generation: u64,
    broken_copy: Option<HeaderError>,
    state: NativeState,
    content_generation: u64,
    uuid: Uuid,
    live_settled: bool,
    unknown_features: u64,
    bitmap_capacity: u64,
    geometry: Geometry,
    journal: Option<JournalArea>,
    epoch: Option<Epoch>,
    backing: Option<Backing>,
}

/// A copy of the header to be written, then synced.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct HeaderWrite {
    /// Where in the file.
    pub at: ByteOffset,
    /// What to write there.
    pub bytes: Box<[u8; COPY_LEN]>,
}

/// True if `prefix` begins with the native magic.
pub(super) fn has_magic(prefix: &[u8]) -> bool {
    prefix.starts_with(&MAGIC)
}

/// True if the second copy has the native magic: whose file it is, if the first is broken.
pub(super) fn has_second_magic(prefix: &[u8]) -> bool {
    prefix.get(COPY_LEN..).is_some_and(has_magic)
}

impl NativeHeader {
    /// The header of a new file: clean, of `virtual_size` bytes, with room to grow. Set the file's length to
    /// `geometry().full_len()` and write [`Self::next_write`] twice, so that both copies are good.
    pub fn create(
        virtual_size: u64,
        uuid: Uuid,
        backing: Option<Backing>,
    ) -> Result<Self, HeaderError> {
        Self::create_with_journal(virtual_size, uuid, backing, None)
    }

    /// The same with a journal of a given length in bytes: a multiple of 4096, at most [`JournalArea::LEN_MAX`]; 0 for none.
    pub fn create_with_journal(
        virtual_size: u64,
        uuid: Uuid,
        backing: Option<Backing>,
        journal_len: Option<u64>,
    ) -> Result<Self, HeaderError> {
        check_size(Field::VirtualSize, virtual_size)?;
        let room = virtual_size.saturating_mul(GROWTH_FACTOR).clamp(GROWTH_MIN, VIRTUAL_SIZE_MAX);
        let bitmap_capacity = room.div_ceil(BITMAP_BYTE_SPAN).next_multiple_of(ALIGNMENT);
        let bitmaps_end = BITMAP_OFFSET + 2 * bitmap_capacity;
        let after_journal = bitmaps_end + journal_len.unwrap_or(JOURNAL_MIN);
        let data_offset = after_journal.next_multiple_of(DATA_ALIGNMENT);
        let journal_len = journal_len.unwrap_or(data_offset - bitmaps_end);
        let journal = JournalArea::check(bitmaps_end, journal_len)?;
        let geometry = Geometry {
            virtual_size,
            bitmap_offset: BITMAP_OFFSET,
            bitmap_len: bitmap_len(virtual_size),
            live_bitmap_offset: Some(BITMAP_OFFSET + bitmap_capacity),
            data_offset,
        };
        Ok(Self {
            slot: 1,
            generation: 0,
            broken_copy: None,
            state: NativeState::Clean,
            content_generation: 0,
            uuid,
            live_settled: false,
            unknown_features: 0,
            bitmap_capacity,
            geometry,
            journal,
            epoch: None,
            backing,
        })
    }

    /// See [`super::Header::check`].
    pub(super) fn check(prefix: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let copies = [check_copy(prefix, 0), check_copy(prefix, 1)];
        let (slot, raw, broken) = match copies {
            [Ok(first), Ok(second)] => {
                let (one, two) = (first.generation.get(), second.generation.get());
                if one == two && first.as_bytes() != second.as_bytes() {
                    return Err(HeaderError::field(
                        Field::Generation,
                        format_args!("{one} in both copies, which differ"),
                        "one copy newer than the other; nothing says which of the two is right",
                    ));
                }
                if one >= two { (0, first, None) } else { (1, second, None) }
            }
            [Ok(first), Err(broken)] => (0, first, Some(broken)),
            [Err(broken), Ok(second)] => (1, second, Some(broken)),
            [Err(first), Err(second)] => {
                return Err(HeaderError::BothCopies { first: first.into(), second: second.into() });
            }
        };
        let header = Self::check_fields(raw, slot, broken)?;
        for (part, at) in [
            (Part::Bitmap, Some(header.geometry.bitmap_offset)),
            (Part::LiveBitmap, header.geometry.live_bitmap_offset),
        ] {
            // Checked by `check_places`: far below 2^63.
            let end = at.unwrap_or(0) + header.geometry.bitmap_len;
            if file_len < end {
                return Err(HeaderError::Truncated { part, found: file_len, expected: end });
            }
        }
        Ok(header)
    }

    fn check_fields(
        raw: &RawHeader,
        slot: u8,
        broken_copy: Option<HeaderError>,
    ) -> Result<Self, HeaderError> {
        if raw.version.get() != VERSION {
            return Err(HeaderError::field(
                Field::Version,
                raw.version.get(),
                "1: the file was written by a newer program, which has to read it",
            ));
        }
        if raw.header_len.get() != HEADER_LEN {
            return Err(HeaderError::field(Field::HeaderLen, raw.header_len.get(), "4096"));
        }
        if raw.incompatible.get() & !JOURNAL != 0 {
            return Err(HeaderError::field(
                Field::Incompatible,
                format_args!("{:#x}", raw.incompatible.get()),
                "no feature bit that this program does not know (it knows bit 0); use a newer one",
            ));
        }
        let generation = check_generation(Field::Generation, raw.generation.get())?;
        let content_generation =
            check_generation(Field::ContentGeneration, raw.content_generation.get())?;
        let state = match raw.state.get() {
            state::CLEAN => NativeState::Clean,
            state::IN_USE => {
                NativeState::InUse { live: BootId::new(Uuid::from_bytes(raw.live_boot_id)) }
            }
            state::FROZEN => NativeState::Frozen,
            found => {
                return Err(HeaderError::field(
                    Field::State,
                    found,
                    "0 (clean), 1 (in use) or 2 (frozen)",
                ));
            }
        };
        let geometry = check_places(raw)?;
        let journal = check_journal(raw, &geometry)?;
        Ok(Self {
            slot,
            generation,
            state,
            content_generation,
            uuid: Uuid::from_bytes(raw.uuid),
            // A copy that stands in for a newer one says nothing about that.
            live_settled: raw.compatible.get() & LIVE_SETTLED != 0
                && state == NativeState::Clean
                && broken_copy.is_none(),
            broken_copy,
            unknown_features: raw.compatible.get() & !LIVE_SETTLED,
            bitmap_capacity: raw.bitmap_capacity.get(),
            geometry,
            journal,
            epoch: check_epoch(raw, state, journal)?,
            backing: Backing::check(&raw.backing, &raw.backing_path)?,
        })
    }

    /// Where bitmaps and data stand.
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The file's UUID.
    pub const fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Goes up with each header that is written.
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Goes up each time the file is opened for writing: with the UUID it names the content of a frozen layer.
    pub const fn content_generation(&self) -> u64 {
        self.content_generation
    }

    /// What state the file is in.
    pub const fn state(&self) -> NativeState {
        self.state
    }

    /// The backing file; none if all that is not present is zeros.
    pub const fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Why the other copy of the header cannot be used; the next write puts it right.
    pub const fn broken_copy(&self) -> Option<&HeaderError> {
        self.broken_copy.as_ref()
    }

    /// Compatible feature bits that this program does not know; the next write clears them.
    pub const fn unknown_features(&self) -> u64 {
        self.unknown_features
    }

    /// Where the journal stands; files of older programs have none.
    pub const fn journal(&self) -> Option<JournalArea> {
        self.journal
    }

    /// Which records of the journal count; `None` if none does. Those that count must be put in place before anything
    /// else if the live bitmap does not count any more: see `docs/format-native.md` section 7.
    pub const fn journal_epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// Begins the journal anew: records of `epoch` count from now on, and no others. For a file in use that has a
    /// journal; whatever stands in it is in place by now, durably. To be synced before the first record is written,
    /// and before a flush is complete that older records do not cover.
    pub fn begin_journal(&mut self, epoch: Epoch) {
        debug_assert!(self.journal.is_some());
        debug_assert!(matches!(self.state, NativeState::InUse { .. }));
        self.epoch = Some(epoch);
    }

    /// No record counts any more: all are in place, durably.
    pub fn end_journal(&mut self) {
        self.epoch = None;
    }

    /// The size in bytes to which the disk can grow in place.
    pub fn virtual_size_max(&self) -> u64 {
        self.bitmap_capacity.saturating_mul(BITMAP_BYTE_SPAN).min(VIRTUAL_SIZE_MAX)
    }

    /// True if the live bitmap counts beside the durable one: the file was not closed, and the host has not been
    /// booted since. Else it is void.
    pub fn live_counts(&self, boot: BootId) -> bool {
        self.state == NativeState::InUse { live: Some(boot) }
    }

    /// True if the live bitmap, which is void, has no bit that the durable one lacks: nothing has to be taken out of it
    /// before [`Self::set_in_use`].
    pub const fn live_is_settled(&self) -> bool {
        self.live_settled
    }

    /// Opens for writing. Where [`Self::live_is_settled`] was true, sync this header before anything is written to the
    /// live bitmap: else a power cut could leave such bits under the header before it. Before a header that names a boot is written, the live bitmap must say nothing but what
    /// holds: it has no bit that the durable one lacks, or it belongs to this very boot.
    pub fn set_in_use(&mut self, live: Option<BootId>) -> Result<(), HeaderError> {
        self.refuse_frozen()?;
        self.content_generation =
            check_generation(Field::ContentGeneration, self.content_generation + 1)?;
        self.state = NativeState::InUse { live };
        self.live_settled = false;
        Ok(())
    }

    /// Closes in order; all bits are durable by now, and so is what they speak of, in its place.
    pub fn set_clean(&mut self) -> Result<(), HeaderError> {
        self.refuse_frozen()?;
        self.end_journal();
        self.state = NativeState::Clean;
        Ok(())
    }

    /// The same, by whoever had taken the strange bits out of the live bitmap: see [`Self::live_is_settled`].
    pub fn set_clean_and_settled(&mut self) -> Result<(), HeaderError> {
        self.set_clean()?;
        self.live_settled = true;
        Ok(())
    }

    /// Freezes for ever; all bits are durable by now.
    pub fn freeze(&mut self) {
        self.end_journal();
        self.state = NativeState::Frozen;
        self.live_settled = false;
    }

    /// Begins a change of a frozen layer's content, by a merge into it: the files over it mean the content that it had.
    pub fn renew_content(&mut self) -> Result<(), HeaderError> {
        self.content_generation =
            check_generation(Field::ContentGeneration, self.content_generation + 1)?;
        Ok(())
    }

    /// Names another backing file, or the same one elsewhere. A frozen layer may be rebound: its content stays.
    pub fn set_backing(&mut self, backing: Option<Backing>) {
        self.backing = backing;
    }

    /// Changes the size of the disk. Before it grows, clear the bits beyond the old end in both bitmaps and punch out
    /// their data; the same beyond the new end after it has shrunk: bits there would come back with the next growth.
    pub fn resize(&mut self, virtual_size: u64) -> Result<(), HeaderError> {
        self.refuse_frozen()?;
        check_size(Field::VirtualSize, virtual_size)?;
        if virtual_size > self.virtual_size_max() {
            return Err(HeaderError::field(
                Field::VirtualSize,
                virtual_size,
                format!(
                    "at most {}: the bitmap has no room for more; convert to a new file",
                    self.virtual_size_max()
                ),
            ));
        }
        let geometry =
            Geometry { virtual_size, bitmap_len: bitmap_len(virtual_size), ..self.geometry };
        check_end(&geometry)?;
        self.geometry = geometry;
        Ok(())
    }

    /// The next copy to write: one generation up and in the place of the older copy, so that the newer one stays
    /// whole whatever happens. To be synced before anything relies on it, and before the next one. If the write or
    /// sync fails, drop this header and read the file again.
    pub fn next_write(&mut self) -> Result<HeaderWrite, HeaderError> {
        self.generation = check_generation(Field::Generation, self.generation + 1)?;
        self.slot = 1 - self.slot;
        self.broken_copy = None;
        self.unknown_features = 0;
        let at = ByteOffset::new(u64::from(self.slot) * COPY_LEN as u64);
        let raw = self.encode();
        let mut bytes = Box::new([0; COPY_LEN]);
        bytes.copy_from_slice(raw.as_bytes());
        Ok(HeaderWrite { at, bytes })
    }

    fn encode(&self) -> RawHeader {
        let mut raw = RawHeader::new_zeroed();
        raw.magic = MAGIC;
        raw.version = VERSION.into();
        raw.header_len = HEADER_LEN.into();
        raw.state = match self.state {
            NativeState::Clean => state::CLEAN,
            NativeState::InUse { .. } => state::IN_USE,
            NativeState::Frozen => state::FROZEN,
        }
        .into();
        raw.generation = self.generation.into();
        raw.compatible = (if self.live_settled { LIVE_SETTLED } else { 0 }).into();
        raw.virtual_size = self.geometry.virtual_size.into();
        raw.bitmap_offset = self.geometry.bitmap_offset.into();
        raw.live_bitmap_offset = self.geometry.live_bitmap_offset.unwrap_or(0).into();
        raw.bitmap_capacity = self.bitmap_capacity.into();
        raw.data_offset = self.geometry.data_offset.into();
        raw.content_generation = self.content_generation.into();
        raw.uuid = self.uuid.into_bytes();
        if let NativeState::InUse { live: Some(BootId(boot)) } = self.state {
            raw.live_boot_id = boot.into_bytes();
        }
        if let Some(area) = self.journal {
            raw.journal_offset = area.at().get().into();
            raw.journal_len = area.len().into();
        }
        if let Some(epoch) = self.epoch {
            raw.incompatible = JOURNAL.into();
            raw.journal_epoch = epoch.to_bytes();
        }
        if let Some(backing) = &self.backing {
            backing.encode(&mut raw.backing, &mut raw.backing_path);
        }
        raw.crc32c = checksum(raw.as_bytes()).into();
        raw
    }

    fn refuse_frozen(&self) -> Result<(), HeaderError> {
        if self.state == NativeState::Frozen {
            return Err(HeaderError::field(
                Field::State,
                "2 (frozen)",
                "a file that is not frozen: others build on this one, make a new file on top of it",
            ));
        }
        Ok(())
    }
}

/// A copy whose magic and checksum are good. Fields of other versions are not looked at.
fn check_copy(prefix: &[u8], slot: usize) -> Result<&RawHeader, HeaderError> {
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
fn checksum(bytes: &[u8]) -> u32 {
    let head = crc32c::crc32c(&bytes[..16]);
    let head = crc32c::crc32c_append(head, &[0; 4]);
    crc32c::crc32c_append(head, &bytes[20..])
}

fn check_generation(field: Field, found: u64) -> Result<u64, HeaderError> {
    if found < GENERATION_END {
        return Ok(found);
    }
    Err(HeaderError::field(field, found, "a number below 2^63"))
}

/// Whole bitmap pages. `size` is within [`VIRTUAL_SIZE_MAX`].
fn bitmap_len(size: u64) -> u64 {
    size.div_ceil(BITMAP_BYTE_SPAN).next_multiple_of(BITMAP_PAGE as u64)
}

/// Section 4: all aligned, nothing overlaps, everything ends below 2^63.
fn check_places(raw: &RawHeader) -> Result<Geometry, HeaderError> {
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

/// The journal, if there is one, stands between the bitmaps and the data.
fn check_journal(raw: &RawHeader, geometry: &Geometry) -> Result<Option<JournalArea>, HeaderError> {
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

/// An epoch stands in the header of a file in use that has a journal, together with its feature bit.
fn check_epoch(
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
fn check_end(geometry: &Geometry) -> Result<(), HeaderError> {
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
