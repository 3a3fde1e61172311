//! The journal of a native COW file (`docs/spec/format-native.md` section 7): a flush of a few
//! sectors is one write.
//!
//! A flush in place takes two syncs, one before the bits and one after, and the first makes the
//! file system commit its own journal for each new extent. A record holds the sectors themselves,
//! in blocks that the file already has, so one write that is durable on return is enough. After a
//! power cut the records are replayed. Pure: the caller reads and writes.

use uuid::Uuid;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::header::error::{Field, HeaderError};
use crate::units::{ByteOffset, Sector, SectorCount, SectorRange};

const MAGIC: [u8; 8] = *b"COWJRNL\n";

/// Bytes of the first block of a record, and what its length is a multiple of: a block of every
/// file system in use.
pub const RECORD_BLOCK_LEN: usize = 4096;
const BLOCK_LEN: u64 = RECORD_BLOCK_LEN as u64;

/// The most ranges in a record: as many as fit into its first block.
pub const RANGES_MAX: usize = (RECORD_BLOCK_LEN - HEAD_LEN) / size_of::<RawRange>();
const HEAD_LEN: usize = 48;
/// The checksum's field.
const CRC: std::ops::Range<usize> = 8..12;

/// The first block of a record as it is on disk.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    magic: [u8; 8],
    /// CRC32C of the whole record with these four bytes as zeros.
    crc32c: U32,
    /// Bytes of the whole record.
    len: U32,
    epoch: [u8; 16],
    sequence: U64,
    range_count: U32,
    reserved: [u8; 4],
    ranges: [RawRange; RANGES_MAX],
}

/// Sectors that a record holds.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRange {
    sector: U64,
    count: U32,
    reserved: [u8; 4],
}

const _: () = assert!(size_of::<RawRecord>() == RECORD_BLOCK_LEN);
const _: () = assert!(std::mem::offset_of!(RawRecord, ranges) == HEAD_LEN);
const _: () = assert!(std::mem::offset_of!(RawRecord, crc32c) == CRC.start);

/// Where the journal of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalArea {
    at: u64,
    len: u64,
}

impl JournalArea {
    /// The longest journal in bytes: after a power cut it is read as a whole.
    pub const LEN_MAX: u64 = 64 << 20;

    /// A place of whole blocks; `None` for no bytes.
    pub(crate) fn check(at: u64, len: u64) -> Result<Option<Self>, HeaderError> {
        if !len.is_multiple_of(BLOCK_LEN) || len > Self::LEN_MAX {
            let expected = format!("a multiple of 4096 up to {}", Self::LEN_MAX);
            return Err(HeaderError::field(Field::JournalLen, len, expected));
        }
        if !at.is_multiple_of(BLOCK_LEN) || at > i64::MAX.unsigned_abs() - Self::LEN_MAX {
            let expected = "a multiple of 4096 far below 2^63";
            return Err(HeaderError::field(Field::JournalOffset, at, expected));
        }
        Ok((len > 0).then_some(Self { at, len }))
    }

    /// Where it begins in the file.
    pub const fn at(self) -> ByteOffset {
        ByteOffset::new(self.at)
    }

    /// Its length in bytes; not 0.
    #[expect(clippy::len_without_is_empty, reason = "there is no empty one")]
    pub const fn len(self) -> u64 {
        self.len
    }

    pub(crate) const fn end(self) -> u64 {
        self.at + self.len
    }
}

/// Identifies the records written since the journal was last restarted: a random number, so that no
/// guest can guess it and write sectors that look like a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch(Uuid);

impl Epoch {
    /// From 16 random bytes; `None` for zeros, which stand for no epoch.
    pub fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        let uuid = Uuid::from_bytes(bytes);
        (!uuid.is_nil()).then_some(Self(uuid))
    }

    pub(crate) fn to_bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }
}

/// The length in bytes of a record of `ranges`; `None` if they are too many, or too long.
pub fn record_len(ranges: &[SectorRange]) -> Option<usize> {
    let sectors: u64 = ranges.iter().map(|range| range.count().get()).sum();
    let data = sectors.checked_mul(crate::SECTOR_SIZE)?.checked_next_multiple_of(BLOCK_LEN)?;
    let len = data.checked_add(BLOCK_LEN).filter(|len| *len <= JournalArea::LEN_MAX)?;
    usize::try_from(len).ok().filter(|_| (1..=RANGES_MAX).contains(&ranges.len()))
}

/// Completes a record of [`record_len`] bytes: the data of `ranges`, one after the other, is there
/// from [`RECORD_BLOCK_LEN`] on and followed by zeros.
///
/// # Panics
///
/// If `record` has another length than [`record_len`] of `ranges`, or `ranges` have none.
pub fn seal(record: &mut [u8], epoch: Epoch, sequence: u64, ranges: &[SectorRange]) {
    assert_eq!(Some(record.len()), record_len(ranges));
    let mut raw = RawRecord::new_zeroed();
    raw.magic = MAGIC;
    // Both fit: `record_len` bounds them.
    raw.len = u32::try_from(record.len()).unwrap_or(u32::MAX).into();
    raw.range_count = u32::try_from(ranges.len()).unwrap_or(u32::MAX).into();
    raw.epoch = epoch.to_bytes();
    raw.sequence = sequence.into();
    for (raw, range) in raw.ranges.iter_mut().zip(ranges) {
        raw.sector = range.start().get().into();
        raw.count = u32::try_from(range.count().get()).unwrap_or(u32::MAX).into();
    }
    record[..RECORD_BLOCK_LEN].copy_from_slice(raw.as_bytes());
    let crc = checksum(record);
    record[CRC].copy_from_slice(&crc.to_le_bytes());
}

/// A complete record of the epoch whose content is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("record {sequence} of the journal is damaged: {what}; restore the file from a copy")]
pub struct RecordError {
    /// Which one, counted from 0.
    pub sequence: u64,
    /// What is wrong with it.
    pub what: &'static str,
}

/// The records that count in a journal, in the order in which they were written.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    rest: &'a [u8],
    epoch: Epoch,
    sequence: u64,
    disk: SectorCount,
}

/// The sectors of one record, each range with its content.
pub type Pieces<'a> = Vec<(SectorRange, &'a [u8])>;

impl<'a> Records<'a> {
    /// Reads `journal`, the content of the whole area, for a disk of `disk` sectors.
    pub fn new(journal: &'a [u8], epoch: Epoch, disk: SectorCount) -> Self {
        Self { rest: journal, epoch, sequence: 0, disk }
    }

    /// The next record. The journal ends at the first record that is incomplete or of another
    /// epoch.
    fn next_record(&self) -> Option<(&'a RawRecord, &'a [u8])> {
        let raw = RawRecord::ref_from_bytes(self.rest.get(..RECORD_BLOCK_LEN)?).ok()?;
        let len = usize::try_from(raw.len.get()).ok()?;
        let expected = raw.magic == MAGIC
            && raw.epoch == self.epoch.to_bytes()
            && raw.sequence.get() == self.sequence
            && len.is_multiple_of(RECORD_BLOCK_LEN);
        let record = self.rest.get(..len).filter(|_| expected && len > RECORD_BLOCK_LEN)?;
        (checksum(record) == raw.crc32c.get()).then_some((raw, record))
    }

    fn pieces(&self, raw: &'a RawRecord, record: &'a [u8]) -> Result<Pieces<'a>, RecordError> {
        let error = |what| RecordError { sequence: self.sequence, what };
        let count = usize::try_from(raw.range_count.get()).unwrap_or(usize::MAX);
        let ranges = raw.ranges.get(..count).ok_or_else(|| error("it has too many ranges"))?;
        let mut data = &record[RECORD_BLOCK_LEN..];
        let mut pieces = Vec::with_capacity(count);
        for raw in ranges {
            let count = SectorCount::new(raw.count.get().into());
            let range = SectorRange::new(Sector::new(raw.sector.get()), count)
                .filter(|range| !range.is_empty() && range.end().get() <= self.disk.get())
                .ok_or_else(|| error("a range lies outside of the disk"))?;
            let len = usize::try_from(range.len_bytes()).unwrap_or(usize::MAX);
            let (piece, rest) =
                data.split_at_checked(len).ok_or_else(|| error("its data is too short"))?;
            pieces.push((range, piece));
            data = rest;
        }
        Ok(pieces)
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<Pieces<'a>, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (raw, record) = self.next_record()?;
        let pieces = self.pieces(raw, record);
        self.rest = &self.rest[record.len()..];
        self.sequence += 1;
        Some(pieces)
    }
}

/// CRC32C of a record with its own field as zeros.
fn checksum(record: &[u8]) -> u32 {
    let head = crc32c::crc32c(&record[..CRC.start]);
    let head = crc32c::crc32c_append(head, &[0; CRC.end - CRC.start]);
    crc32c::crc32c_append(head, &record[CRC.end..])
}
