//! Whether a COW file is sound: what a checker finds beyond the errors that keep a file from being
//! opened.
//!
//! Pure: the caller reads pages and asks the file system where the file has data, and repairs what
//! is found.

use crate::bitmap::{Bitmap, PAGE_SECTORS};
use crate::geometry::{DataTruncated, Geometry};
use crate::header::{Header, HeaderError, NativeState};
use crate::units::{ByteOffset, SECTOR_SIZE, Sector, SectorRange};

/// File systems allocate blocks of this size (or a multiple). Less than a whole block cannot be
/// released.
const BLOCK: u64 = 4096;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Worth knowing; nothing is wrong.
    Note,
    /// Space is wasted or something is left over; the disk's content is right.
    Leak,
    /// Something that the file should hold is lost.
    Corrupt,
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// The file was not closed. Opening it for writing repairs that.
    #[error("the file is in use, or was not closed")]
    NotClosed,
    /// The host went down while the file was in use. Opening it for writing puts the sectors in
    /// place.
    #[error(
        "flushed sectors are in the journal only; opening the file for writing puts them in place"
    )]
    Journal,
    /// Feature bits of a newer program; the next write clears them.
    #[error("unknown compatible features {0:#x}")]
    UnknownFeatures(u64),
    /// One copy of the header cannot be used. Writing a header repairs that.
    #[error("one copy of the header is broken, the other serves: {0}")]
    HeaderCopy(HeaderError),
    /// The data of present sectors is past the end of the file. It is lost and cannot be restored.
    #[error(transparent)]
    Data(#[from] DataTruncated),
    /// Bits of sectors past the end of the disk, which would become valid if it grew. To be
    /// cleared.
    #[error("{count} bits past the end of the disk, the first for sector {first}")]
    BitsBeyondEnd {
        /// The lowest such sector.
        first: Sector,
        /// How many bits.
        count: u64,
    },
    /// Blocks with data of sectors that are not present: left by a crash before their write was
    /// complete. To be punched out.
    #[error("{bytes} bytes are allocated for sectors that are not present")]
    Leaked {
        /// In whole blocks.
        bytes: u64,
    },
}

impl Finding {
    /// How bad it is.
    pub const fn severity(&self) -> Severity {
        match self {
            Self::NotClosed | Self::Journal | Self::UnknownFeatures(_) => Severity::Note,
            Self::BitsBeyondEnd { .. } | Self::Leaked { .. } => Severity::Leak,
            Self::HeaderCopy(_) | Self::Data(_) => Severity::Corrupt,
        }
    }
}

/// The check of one file whose header could be read.
#[derive(Debug)]
pub struct Check<'a> {
    geometry: &'a Geometry,
    findings: Vec<Finding>,
    beyond: Option<(Sector, u64)>,
    leaked: u64,
}

impl<'a> Check<'a> {
    /// Begins with what header and lengths say. `last` is the last present sector.
    pub fn new(header: &'a Header, last: Option<Sector>, file_len: u64) -> Self {
        let mut findings = Vec::new();
        if let Header::Native(native) = header {
            findings.extend(native.broken_copy().cloned().map(Finding::HeaderCopy));
            if matches!(native.state(), NativeState::InUse { .. }) {
                findings.push(Finding::NotClosed);
            }
            if native.unknown_features() != 0 {
                findings.push(Finding::UnknownFeatures(native.unknown_features()));
            }
        }
        let geometry = header.geometry();
        findings.extend(geometry.check_last(last, file_len).err().map(Finding::Data));
        Self { geometry, findings, beyond: None, leaked: 0 }
    }

    /// Examines page `page` of the durable bitmap as it is in the file; true if it has bits past
    /// the end of the disk, which [`clear_beyond_end`] clears. Pages in the room for growth belong
    /// here too, in ascending order.
    pub fn bitmap_page(&mut self, page: u64, bytes: &[u8]) -> bool {
        let Some((first, count)) = beyond_end(self.geometry, page, bytes) else { return false };
        let (_, sum) = self.beyond.get_or_insert((first, 0));
        *sum += count;
        true
    }

    /// Takes a range of the file that has data, as the file system says, and gives those blocks of
    /// it that belong to no present sector, as (offset, length in bytes). `bitmap` has the bits of
    /// the sectors in that range; others may be missing.
    pub fn allocated(
        &mut self,
        bitmap: &Bitmap,
        at: ByteOffset,
        len: u64,
    ) -> impl Iterator<Item = (ByteOffset, u64)> {
        let leaked = leaks(self.geometry, bitmap, at, len);
        let leaked_sum = &mut self.leaked;
        leaked.inspect(|(_, len)| *leaked_sum += len)
    }

    /// All that was found, the worst first.
    pub fn finish(self) -> Vec<Finding> {
        let mut findings = self.findings;
        findings.extend(self.beyond.map(|(first, count)| Finding::BitsBeyondEnd { first, count }));
        if self.leaked > 0 {
            findings.push(Finding::Leaked { bytes: self.leaked });
        }
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity()));
        findings
    }
}

/// Those blocks of a range of the file that belong to no present sector, as (offset, length in
/// bytes).
pub fn leaks(
    geometry: &Geometry,
    bitmap: &Bitmap,
    at: ByteOffset,
    len: u64,
) -> impl Iterator<Item = (ByteOffset, u64)> {
    let data_offset = geometry.data_offset().get();
    let end = at.get().saturating_add(len).min(i64::MAX.unsigned_abs());
    let start = at.get().max(data_offset);
    let sectors = match end.checked_sub(start) {
        // A file can be longer than any disk in it: what lies there belongs to no sector either.
        Some(_) => (start - data_offset) / SECTOR_SIZE..(end - data_offset).div_ceil(SECTOR_SIZE),
        None => 0..0,
    };
    let range = SectorRange::from_bounds(sectors.start, sectors.end);
    bitmap.runs(range).filter(|run| !run.present).filter_map(move |run| {
        let from = (data_offset + run.range.start_bytes().get()).max(start).next_multiple_of(BLOCK);
        let to = (data_offset + run.range.end().get() * SECTOR_SIZE).min(end) / BLOCK * BLOCK;
        (from < to).then(|| (ByteOffset::new(from), to - from))
    })
}

/// Clears the bits of a bitmap page that lie past the end of the disk; true if there was one.
pub fn clear_beyond_end(geometry: &Geometry, page: u64, bytes: &mut [u8]) -> bool {
    let found = beyond_end(geometry, page, bytes).is_some();
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte &= !beyond_mask(geometry, page, index);
    }
    found
}

/// The first sector and the number of bits past the end of the disk.
fn beyond_end(geometry: &Geometry, page: u64, bytes: &[u8]) -> Option<(Sector, u64)> {
    let mut found = bytes
        .iter()
        .enumerate()
        .map(|(index, byte)| (index as u64, byte & beyond_mask(geometry, page, index)))
        .filter(|&(_, bits)| bits != 0)
        .peekable();
    let &(index, bits) = found.peek()?;
    let first = page
        .saturating_mul(PAGE_SECTORS)
        .saturating_add(index * 8 + u64::from(bits.trailing_zeros()));
    Some((Sector::new(first), found.map(|(_, bits)| u64::from(bits.count_ones())).sum()))
}

/// The bits of byte `index` of a page whose sectors are past the end of the disk.
fn beyond_mask(geometry: &Geometry, page: u64, index: usize) -> u8 {
    let first = page.saturating_mul(PAGE_SECTORS).saturating_add(index as u64 * 8);
    match geometry.sectors().get().saturating_sub(first) {
        0 => 0xff,
        inside @ 1..8 => 0xff << inside,
        _ => 0,
    }
}
