//! The native header, checked (`docs/spec/format-native.md`).

use uuid::Uuid;
use zerocopy::{FromZeros, IntoBytes};

use super::backing::Backing;
use super::check_size;
use super::error::{Field, HeaderError, Part};
use super::native_check::{
    ALIGNMENT, BITMAP_BYTE_SPAN, BITMAP_OFFSET, bitmap_len, check_copy, check_end, check_epoch,
    check_generation, check_journal, check_places, checksum,
};
use super::native_raw::{
    COPY_LEN, HEADER_LEN, JOURNAL, LIVE_SETTLED, MAGIC, RawHeader, VERSION, state,
};
use super::native_state::NativeState;
use super::page_cache::{BootId, CacheWitness, PageCache};
use crate::geometry::Geometry;
use crate::journal::{Epoch, JournalArea};
use crate::units::{ByteOffset, VIRTUAL_SIZE_MAX};

/// A new file's data begins at a multiple of this: whole stripes and flash blocks underneath.
const DATA_ALIGNMENT: u64 = 1 << 20;
/// A new disk can grow in place to this or to [`GROWTH_FACTOR`] times its size, whichever is more.
/// It costs file length only: the bitmaps are holes until they are used.
const GROWTH_MIN: u64 = 16 << 30;
const GROWTH_FACTOR: u64 = 8;
/// The least length of a new file's journal, which also takes the gap up to the data: over a
/// hundred small flushes between two flushes in place. It takes space only while small flushes are
/// made.
const JOURNAL_MIN: u64 = 512 << 10;

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

impl NativeHeader {
    /// The header of a new file: clean, of `virtual_size` bytes, with room to grow. Set the file's
    /// length to `geometry().full_len()` and write [`Self::next_write`] twice, so that both copies
    /// are good.
    pub fn create(
        virtual_size: u64,
        uuid: Uuid,
        backing: Option<Backing>,
    ) -> Result<Self, HeaderError> {
        Self::create_with_journal(virtual_size, uuid, backing, None)
    }

    /// The same with a journal of a given length in bytes: a multiple of 4096, at most
    /// [`JournalArea::LEN_MAX`]; 0 for none.
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
                let witness = CacheWitness::from_bytes(zerocopy::transmute!(raw.live_witness));
                let boot = BootId::new(Uuid::from_bytes(raw.live_boot_id));
                NativeState::InUse { live: boot.map(|boot| PageCache { boot, witness }) }
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
            // An older copy that replaces a broken newer one says nothing about that.
            live_settled: raw.compatible.get() & LIVE_SETTLED != 0
                && state == NativeState::Clean
                && broken_copy.is_none(),
            broken_copy,
            unknown_features: raw.compatible.get() & !LIVE_SETTLED,
            bitmap_capacity: raw.bitmap_capacity.get(),
            geometry,
            journal,
            epoch: check_epoch(raw, state, journal)?,
            backing: Backing::check(&raw.backing, &raw.witness, &raw.backing_path)?,
        })
    }

    /// Where bitmaps and data are.
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The file's UUID.
    pub const fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Increases with each header that is written.
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Increases each time the file is opened for writing; together with the UUID it identifies the
    /// content of a frozen layer.
    pub const fn content_generation(&self) -> u64 {
        self.content_generation
    }

    /// The state of the file.
    pub const fn state(&self) -> NativeState {
        self.state
    }

    /// The backing file; none if all that is not present is zeros.
    pub const fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Why the other copy of the header cannot be used; the next write repairs it.
    pub const fn broken_copy(&self) -> Option<&HeaderError> {
        self.broken_copy.as_ref()
    }

    /// Compatible feature bits that this program does not know; the next write clears them.
    pub const fn unknown_features(&self) -> u64 {
        self.unknown_features
    }

    /// Where the journal is; files of older programs have none.
    pub const fn journal(&self) -> Option<JournalArea> {
        self.journal
    }

    /// Which records of the journal count; `None` if none does. If the live bitmap no longer
    /// counts, they must be replayed before anything else: see `docs/spec/format-native.md` section
    /// 7.
    pub const fn journal_epoch(&self) -> Option<Epoch> {
        self.epoch
    }

    /// Restarts the journal: from now on only records of `epoch` count. For a file in use that has
    /// a journal, all records of which are durably in place. Sync the header before the first
    /// record is written, and before completing a flush that older records do not cover.
    pub fn begin_journal(&mut self, epoch: Epoch) {
        debug_assert!(self.journal.is_some());
        debug_assert!(matches!(self.state, NativeState::InUse { .. }));
        self.epoch = Some(epoch);
    }

    /// Ends the journal: no record counts any more, since all are durably in place.
    pub fn end_journal(&mut self) {
        self.epoch = None;
    }

    /// The size in bytes to which the disk can grow in place.
    pub fn virtual_size_max(&self) -> u64 {
        self.bitmap_capacity.saturating_mul(BITMAP_BYTE_SPAN).min(VIRTUAL_SIZE_MAX)
    }

    /// True if the live bitmap counts beside the durable one: the file was not closed, and the page
    /// cache in which it was left is certainly the one that it is in now. Otherwise it is void.
    pub fn live_counts(&self, here: &PageCache) -> bool {
        self.live().is_some_and(|live| live.is(here))
    }

    /// The page cache in which the live bitmap counts, if there is one.
    pub const fn live(&self) -> Option<PageCache> {
        match self.state {
            NativeState::InUse { live } => live,
            NativeState::Clean | NativeState::Frozen => None,
        }
    }

    /// Records the page cache in which the live bitmap of a file in use counts: a predecessor may
    /// have recorded less. Takes effect with the next header that is written.
    pub fn set_live(&mut self, live: PageCache) {
        if let NativeState::InUse { live: said } = &mut self.state {
            *said = Some(live);
        }
    }

    /// Makes the live bitmap void: after a failed sync it is unknown which of its data is durable.
    /// The records in the journal must be replayed. A file that was being closed is in use again.
    pub fn make_live_void(&mut self) {
        self.state = NativeState::InUse { live: None };
        self.live_settled = false;
    }

    /// True if the live bitmap, which is void, has no bit that the durable one lacks: nothing has
    /// to be removed from it before [`Self::set_in_use`].
    pub const fn live_is_settled(&self) -> bool {
        self.live_settled
    }

    /// Opens for writing. If [`Self::live_is_settled`] was true, sync this header before anything
    /// is written to the live bitmap: otherwise a power cut could leave such bits under the
    /// previous header. Before a header that names a page cache is written, the live bitmap must be
    /// valid: it has no bit that the durable one lacks, or it was written in this very page cache.
    pub fn set_in_use(&mut self, live: Option<PageCache>) -> Result<(), HeaderError> {
        self.refuse_frozen()?;
        self.content_generation =
            check_generation(Field::ContentGeneration, self.content_generation + 1)?;
        self.state = NativeState::InUse { live };
        self.live_settled = false;
        Ok(())
    }

    /// Marks the file closed; all bits, and the data that they describe, are durably in place by
    /// now.
    pub fn set_clean(&mut self) -> Result<(), HeaderError> {
        self.refuse_frozen()?;
        self.end_journal();
        self.state = NativeState::Clean;
        Ok(())
    }

    /// The same, for a caller that has removed the stray bits from the live bitmap: see
    /// [`Self::live_is_settled`].
    pub fn set_clean_and_settled(&mut self) -> Result<(), HeaderError> {
        self.set_clean()?;
        self.live_settled = true;
        Ok(())
    }

    /// Freezes the file for ever; all bits are durable by now.
    pub fn freeze(&mut self) {
        self.end_journal();
        self.state = NativeState::Frozen;
        self.live_settled = false;
    }

    /// Begins a change of a frozen layer's content by a merge into it: the files over it refer to
    /// its previous content.
    pub fn renew_content(&mut self) -> Result<(), HeaderError> {
        self.content_generation =
            check_generation(Field::ContentGeneration, self.content_generation + 1)?;
        Ok(())
    }

    /// Names another backing file, or the same one elsewhere. A frozen layer may be rebound: its
    /// content stays.
    pub fn set_backing(&mut self, backing: Option<Backing>) {
        self.backing = backing;
    }

    /// Changes the size of the disk. Before it grows, clear the bits beyond the old end in both
    /// bitmaps and punch out their data; the same beyond the new end after it has shrunk: bits
    /// there would come back with the next growth.
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

    /// The next copy to write: one generation up and in the place of the older copy, so that the
    /// newer one stays whole whatever happens. To be synced before anything relies on it, and
    /// before the next one. If the write or sync fails, drop this header and read the file again.
    pub fn next_write(&mut self) -> Result<HeaderWrite, HeaderError> {
        self.slot = 1 - self.slot;
        self.write_again()
    }

    /// The same in the place of the copy that was written or read last: for when that copy may not
    /// be durable while the other one is.
    pub fn write_again(&mut self) -> Result<HeaderWrite, HeaderError> {
        self.generation = check_generation(Field::Generation, self.generation + 1)?;
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
        if let Some(live) = self.live() {
            raw.live_boot_id = live.boot.to_bytes();
            raw.live_witness =
                zerocopy::transmute!(live.witness.map_or([0; 16], CacheWitness::to_bytes));
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
            backing.encode(&mut raw.backing, &mut raw.witness, &mut raw.backing_path);
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
