//! Which sectors are present, and which bitmap pages must still be written.
//!
//! Three levels, each allocated when first needed: regions of 16 GiB of disk, chunks of 16 MiB (one
//! bitmap page on disk), and in a chunk a coarse map (a bit per 4 KiB block: all 8 sectors present)
//! beside a fine map (a bit per sector) that exists only where a part of a block was written. A
//! sector is present when the chunk is full or either map says so, so memory follows what is
//! written and most writes cost one bit.
//!
//! Bits only go from 0 to 1. Readers take no lock. Setting new bits takes the region's dirty lock
//! for a few stores; see [`Bitmap::insert`] for why.
//!
//! A bitmap in a file is read on demand: a page is *known* once its bits have been added. Adding is
//! an OR, so pages can be read twice, by several threads, and while others insert.

use std::iter::FusedIterator;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::units::{Sector, SectorCount, SectorRange};

/// Bytes in a bitmap page: the unit in which a bitmap is read, snapshot and written.
pub const BITMAP_PAGE_LEN: usize = 4096;

/// Sectors covered by one bitmap page (16 MiB of disk).
pub const PAGE_SECTORS: u64 = BITMAP_PAGE_LEN as u64 * 8;

/// Chunks in a region. 40 KiB of chunk heads are allocated when the first sector of 16 GiB is
/// written.
pub(crate) const REGION_CHUNKS: usize = 1024;
pub(crate) const REGION_SECTORS: u64 = PAGE_SECTORS * REGION_CHUNKS as u64;

/// Sectors in a word of the bitmap.
const WORD_SECTORS: u64 = 64;
/// Words in a bitmap page.
const PAGE_WORDS: usize = BITMAP_PAGE_LEN / 8;
/// Words of a chunk's coarse map: one bit for each 8 sectors.
const COARSE_WORDS: usize = PAGE_WORDS / 8;

/// The bitmap of one COW file in memory.
pub struct Bitmap {
    sectors: u64,
    regions: Box<[Slot]>,
}

/// The place of a region.
#[derive(Default)]
struct Slot {
    /// All pages of the region are known.
    known: AtomicBool,
    region: OnceLock<Box<Region>>,
}

impl Bitmap {
    /// A bitmap with no sector present.
    pub fn new(sectors: SectorCount) -> Self {
        let bitmap = Self::unknown(sectors);
        bitmap.set_known(0..bitmap.pages());
        bitmap
    }

    /// A bitmap with no known page. A page must be known before it is queried and before sectors of
    /// it are inserted.
    pub fn unknown(sectors: SectorCount) -> Self {
        let regions = sectors.get().div_ceil(REGION_SECTORS);
        Self { sectors: sectors.get(), regions: (0..regions).map(|_| Slot::default()).collect() }
    }

    /// The first unknown page in `range`. Pages past the end of the disk count as known.
    #[inline]
    pub fn next_unknown(&self, range: SectorRange) -> Option<u64> {
        let (start, end) = (range.start().get(), range.end().get().min(self.sectors));
        if start >= end {
            return None;
        }
        let mut page = start / PAGE_SECTORS;
        while page * PAGE_SECTORS < end {
            let slot = self.regions.get(usize_of(page / REGION_CHUNKS as u64))?;
            if slot.known.load(Ordering::Acquire) {
                page = (page / REGION_CHUNKS as u64 + 1) * REGION_CHUNKS as u64;
                continue;
            }
            let index = offset_in(page, REGION_CHUNKS as u64);
            if !slot.region.get().is_some_and(|region| region.is_known(index)) {
                return Some(page);
            }
            page += 1;
        }
        None
    }

    /// Whether page `page`, a page of the disk, is known.
    pub fn is_known(&self, page: u64) -> bool {
        let slot = self.regions.get(usize_of(page / REGION_CHUNKS as u64));
        slot.is_none_or(|slot| {
            let index = offset_in(page, REGION_CHUNKS as u64);
            slot.known.load(Ordering::Acquire)
                || slot.region.get().is_some_and(|region| region.is_known(index))
        })
    }

    /// Marks `pages` as known: the bits in their file have been added, and their other sectors are
    /// absent.
    pub fn set_known(&self, pages: Range<u64>) {
        let end = pages.end.min(self.pages());
        for (index, lo, hi) in split(pages.start, end, REGION_CHUNKS as u64) {
            let first = index as u64 * REGION_CHUNKS as u64;
            let whole =
                lo == 0 && first + hi as u64 == self.pages().min(first + REGION_CHUNKS as u64);
            match (self.regions.get(index), whole) {
                (Some(slot), true) => slot.known.store(true, Ordering::Release),
                _ => {
                    let Some(region) = self.region_or_new(index) else { return };
                    (lo..hi).for_each(|chunk| region.set_known(chunk));
                }
            }
        }
    }

    /// The size of the disk.
    pub fn sectors(&self) -> SectorCount {
        SectorCount::new(self.sectors)
    }

    /// The number of bitmap pages that the disk needs.
    pub fn pages(&self) -> u64 {
        self.sectors.div_ceil(PAGE_SECTORS)
    }

    /// True if all sectors of `range` are present; true for an empty range.
    pub fn contains(&self, range: SectorRange) -> bool {
        let (start, end) = (range.start().get(), range.end().get());
        start == end || self.run_end(start, end, true) == end
    }

    /// Sets the bits of `range` and marks their pages dirty where a bit is new; true if one is.
    /// Sectors past the end of the disk are ignored.
    ///
    /// Bits and dirty mark change under the region's lock, which a flush takes too before it looks
    /// for dirty pages. Otherwise a second writer of the same sector could find the bit set by the
    /// first, have its write acknowledged and flushed, all before the first had marked the page.
    pub fn insert(&self, range: SectorRange) -> bool {
        let range = range.clipped_to(Sector::new(self.sectors));
        // Otherwise a flush would write the page without the bits that are in the file.
        debug_assert_eq!(self.next_unknown(range), None);
        if self.contains(range) {
            return false;
        }
        let mut changed = false;
        for (index, lo, hi) in split(range.start().get(), range.end().get(), REGION_SECTORS) {
            let Some(region) = self.region_or_new(index) else { break };
            let mut dirty = region.dirty();
            for (chunk, lo, hi) in split(lo as u64, hi as u64, PAGE_SECTORS) {
                if region.chunks[chunk].set(lo, hi) {
                    dirty.mark(chunk);
                    changed = true;
                }
            }
        }
        changed
    }

    /// The runs of present and of absent sectors of `range`, in order and without gaps. Sectors
    /// past the end of the disk are absent. While other threads insert, neighbouring runs may be of
    /// the same kind.
    pub fn runs(&self, range: SectorRange) -> Runs<'_> {
        Runs { bitmap: self, pos: range.start().get(), end: range.end().get() }
    }

    /// The number of present sectors.
    pub fn present(&self) -> SectorCount {
        let chunks = self.regions.iter().filter_map(Slot::get).flat_map(|region| &region.chunks);
        SectorCount::new(chunks.map(Chunk::present).sum())
    }

    /// The last present sector.
    pub fn last_present(&self) -> Option<Sector> {
        let page = (0..self.pages()).rev().find(|&page| !self.page_is_empty(page))?;
        let chunk = self.chunk(page * PAGE_SECTORS)?;
        let word = (0..PAGE_WORDS).rev().find(|&word| chunk.word(word) != 0)?;
        let bit = u64::from(chunk.word(word).ilog2());
        Some(Sector::new(page * PAGE_SECTORS + word as u64 * WORD_SECTORS + bit))
    }

    /// The bits of sectors `64 * index ..`, sector `64 * index` in bit 0: as the disk has them,
    /// little-endian.
    pub fn word(&self, index: u64) -> u64 {
        let Some(sector) = index.checked_mul(WORD_SECTORS) else { return 0 };
        self.chunk(sector).map_or(0, |chunk| chunk.word(offset_in(sector, PAGE_SECTORS) / 64))
    }

    /// Writes page `page` into `bytes` as it is on disk: sector n is bit n % 8 of byte n / 8.
    pub fn render_page(&self, page: u64, bytes: &mut [u8; BITMAP_PAGE_LEN]) {
        bytes.fill(0);
        let Some(chunk) = page.checked_mul(PAGE_SECTORS).and_then(|sector| self.chunk(sector))
        else {
            return;
        };
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&chunk.word(index).to_le_bytes());
        }
    }

    /// True if no sector of page `page` is present.
    pub fn page_is_empty(&self, page: u64) -> bool {
        page.checked_mul(PAGE_SECTORS)
            .and_then(|sector| self.chunk(sector))
            .is_none_or(Chunk::is_empty)
    }

    /// Adds page `page` as read from the durable bitmap. Bytes past the first 4096 and bits past
    /// the end of the disk are ignored (UML leaves uninitialised memory there).
    pub fn load_durable(&self, page: u64, bytes: &[u8]) {
        self.load(page, bytes, false);
    }

    /// Adds page `page` as read from a valid live bitmap; where that brings a new bit, the page is
    /// dirty. So the durable bitmap has to be loaded first.
    pub fn load_live(&self, page: u64, bytes: &[u8]) {
        self.load(page, bytes, true);
    }

    fn load(&self, page: u64, bytes: &[u8], mark_dirty: bool) {
        let mut whole = [0; BITMAP_PAGE_LEN];
        let len = bytes.len().min(BITMAP_PAGE_LEN);
        whole[..len].copy_from_slice(&bytes[..len]);
        if page >= self.pages() || whole == [0; BITMAP_PAGE_LEN] {
            return;
        }
        let index = offset_in(page, REGION_CHUNKS as u64);
        let Some(region) = self.region_or_new(usize_of(page / REGION_CHUNKS as u64)) else {
            return;
        };
        let mut dirty = region.dirty();
        let sectors = self.sectors - page * PAGE_SECTORS;
        if region.chunks[index].load(&whole, sectors.min(PAGE_SECTORS)) && mark_dirty {
            dirty.mark(index);
        }
    }

    /// The number of dirty pages at this moment; writers change it at any time.
    pub fn dirty_pages(&self) -> u64 {
        self.regions.iter().filter_map(Slot::get).map(|region| region.dirty().count()).sum()
    }

    /// Takes up to `max` dirty pages from page `from` on, in ascending order, marks them clean and
    /// appends them to `pages`. Returns the page to continue from.
    pub(crate) fn take_dirty(&self, from: u64, max: usize, pages: &mut Vec<u64>) -> u64 {
        let mut next = from;
        for (index, lo, _) in split(from, self.pages().max(from), REGION_CHUNKS as u64) {
            let base = index as u64 * REGION_CHUNKS as u64;
            next = base + REGION_CHUNKS as u64;
            let Some(region) = self.regions.get(index).and_then(Slot::get) else { continue };
            let mut dirty = region.dirty();
            for chunk in lo..REGION_CHUNKS {
                if pages.len() == max {
                    return base + chunk as u64;
                }
                if dirty.take(chunk) {
                    pages.push(base + chunk as u64);
                }
            }
        }
        next
    }

    /// Marks pages dirty that [`Self::take_dirty`] took and that could not be written.
    pub(crate) fn put_back_dirty(&self, pages: &[u64]) {
        for &page in pages {
            if let Some(region) = self.region_or_new(usize_of(page / REGION_CHUNKS as u64)) {
                region.dirty().mark(offset_in(page, REGION_CHUNKS as u64));
            }
        }
    }

    /// The end of the run of sectors like `present` that begins at `pos`, at most `end`; `pos` if
    /// it is empty.
    pub(crate) fn run_end(&self, mut pos: u64, end: u64, present: bool) -> u64 {
        while pos < end && pos < self.sectors {
            let lo = offset_in(pos, PAGE_SECTORS);
            let Some(region) = self.region(pos) else {
                if present {
                    return pos;
                }
                pos += REGION_SECTORS - pos % REGION_SECTORS;
                continue;
            };
            let chunk = &region.chunks[offset_in(pos / PAGE_SECTORS, REGION_CHUNKS as u64)];
            let found = chunk.run_end(lo, present);
            pos = pos - lo as u64 + found;
            if found < PAGE_SECTORS {
                break;
            }
        }
        // Past the end of the disk all is absent.
        if pos >= self.sectors && !present { end } else { pos.min(end) }
    }

    fn region(&self, sector: u64) -> Option<&Region> {
        self.regions.get(usize_of(sector / REGION_SECTORS))?.get()
    }

    fn chunk(&self, sector: u64) -> Option<&Chunk> {
        Some(&self.region(sector)?.chunks[offset_in(sector / PAGE_SECTORS, REGION_CHUNKS as u64)])
    }

    fn region_or_new(&self, index: usize) -> Option<&Region> {
        Some(self.regions.get(index)?.region.get_or_init(Box::default))
    }
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bitmap")
            .field("sectors", &self.sectors)
            .field("present", &self.present())
            .finish()
    }
}

/// Some neighbouring sectors that are all present or all absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The sectors; never empty.
    pub range: SectorRange,
    /// Whether they are present.
    pub present: bool,
}

/// The runs of a range; see [`Bitmap::runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    bitmap: &'a Bitmap,
    pos: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.pos >= self.end {
            return None;
        }
        let start = self.pos;
        self.pos = self.bitmap.run_end(start, self.end, true);
        let present = self.pos > start;
        if !present {
            // A bit set since the check above would make this run empty; it counts as absent.
            self.pos = self.bitmap.run_end(start, self.end, false).max(start + 1);
        }
        Some(Run { range: SectorRange::from_bounds(start, self.pos), present })
    }
}

impl FusedIterator for Runs<'_> {}

impl Slot {
    fn get(&self) -> Option<&Region> {
        self.region.get().map(Box::as_ref)
    }
}

/// 16 GiB of disk.
struct Region {
    dirty: Mutex<DirtyPages>,
    /// A bit for each chunk whose page is known.
    known: [AtomicU64; REGION_CHUNKS / 64],
    chunks: [Chunk; REGION_CHUNKS],
}

impl Default for Region {
    fn default() -> Self {
        Self {
            dirty: Mutex::default(),
            known: [const { AtomicU64::new(0) }; REGION_CHUNKS / 64],
            chunks: [const { Chunk::new() }; REGION_CHUNKS],
        }
    }
}

impl Region {
    /// If this is true, the bits that were added before [`Self::set_known`] are visible too.
    fn is_known(&self, chunk: usize) -> bool {
        self.known[chunk / 64].load(Ordering::Acquire) & (1 << (chunk % 64)) != 0
    }

    fn set_known(&self, chunk: usize) {
        self.known[chunk / 64].fetch_or(1 << (chunk % 64), Ordering::Release);
    }

    fn dirty(&self) -> MutexGuard<'_, DirtyPages> {
        // Each change under the lock is complete in itself, so a panic elsewhere leaves nothing
        // half done.
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which chunks of a region have bits that no flush has taken yet.
#[derive(Default)]
struct DirtyPages([u64; REGION_CHUNKS / 64]);

impl DirtyPages {
    fn mark(&mut self, chunk: usize) {
        self.0[chunk / 64] |= 1 << (chunk % 64);
    }

    fn take(&mut self, chunk: usize) -> bool {
        let bit = 1 << (chunk % 64);
        let was = self.0[chunk / 64] & bit != 0;
        self.0[chunk / 64] &= !bit;
        was
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// 16 MiB of disk: the sectors of one bitmap page.
struct Chunk {
    full: AtomicBool,
    coarse: OnceLock<Box<[AtomicU64; COARSE_WORDS]>>,
    fine: OnceLock<Box<[AtomicU64; PAGE_WORDS]>>,
}

impl Chunk {
    const fn new() -> Self {
        Self { full: AtomicBool::new(false), coarse: OnceLock::new(), fine: OnceLock::new() }
    }

    /// Bits of 64 sectors: the union of both maps.
    fn word(&self, word: usize) -> u64 {
        if self.is_full() {
            return u64::MAX;
        }
        let coarse = self.coarse.get().map_or(0, |coarse| {
            let [byte, ..] =
                (coarse[word / 8].load(Ordering::Acquire) >> (word % 8 * 8)).to_le_bytes();
            spread(byte)
        });
        coarse | self.fine.get().map_or(0, |fine| fine[word].load(Ordering::Acquire))
    }

    fn is_full(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }

    fn is_unallocated(&self) -> bool {
        !self.is_full() && self.coarse.get().is_none() && self.fine.get().is_none()
    }

    fn is_empty(&self) -> bool {
        self.is_unallocated() || (0..PAGE_WORDS).all(|word| self.word(word) == 0)
    }

    fn present(&self) -> u64 {
        if self.is_full() {
            return PAGE_SECTORS;
        }
        if self.is_unallocated() {
            return 0;
        }
        (0..PAGE_WORDS).map(|word| u64::from(self.word(word).count_ones())).sum()
    }

    /// The end of the run of sectors like `present` from sector `lo` of the chunk on.
    fn run_end(&self, lo: usize, present: bool) -> u64 {
        let (coarse, fine) = (self.coarse.get(), self.fine.get());
        if self.is_full() || (coarse.is_none() && fine.is_none()) {
            return if present == self.is_full() { PAGE_SECTORS } else { lo as u64 };
        }
        if let (Some(coarse), None) = (coarse, fine) {
            // Most chunks: whole blocks only, so look at them eight sectors at a time.
            let word = |index: usize| coarse[index].load(Ordering::Acquire);
            return (first_unlike(lo / 8, COARSE_WORDS, present, word) * 8).max(lo) as u64;
        }
        first_unlike(lo, PAGE_WORDS, present, |index| self.word(index)) as u64
    }

    /// Sets sectors `lo..hi` of the chunk; true if one is new.
    fn set(&self, lo: usize, hi: usize) -> bool {
        if lo == 0 && hi as u64 == PAGE_SECTORS {
            return !self.full.swap(true, Ordering::AcqRel);
        }
        let mut changed = false;
        for (word, lo, hi) in split(lo as u64, hi as u64, WORD_SECTORS) {
            changed |= self.or(word, low_bits((hi - lo) as u64) << lo);
        }
        changed
    }

    /// Adds the first `sectors` bits of `page`; true if one is new.
    fn load(&self, page: &[u8; BITMAP_PAGE_LEN], sectors: u64) -> bool {
        if sectors == PAGE_SECTORS && *page == [0xff; BITMAP_PAGE_LEN] {
            return !self.full.swap(true, Ordering::AcqRel);
        }
        let mut changed = false;
        for (index, raw) in page.as_chunks().0.iter().enumerate() {
            let bits = u64::from_le_bytes(*raw);
            if bits != 0 {
                let inside = sectors.saturating_sub(index as u64 * WORD_SECTORS).min(WORD_SECTORS);
                changed |= self.or(index, bits & low_bits(inside));
            }
        }
        changed
    }

    /// Sets `bits` of a word: whole blocks in the coarse map, the rest in the fine one; true if one
    /// is new.
    fn or(&self, word: usize, bits: u64) -> bool {
        let new = bits & !self.word(word);
        if new == 0 {
            return false;
        }
        let blocks = whole_bytes(bits);
        if blocks != 0 {
            let coarse =
                self.coarse.get_or_init(|| Box::new([const { AtomicU64::new(0) }; COARSE_WORDS]));
            let blocks = u64::from(blocks) << (word % 8 * 8);
            let was = coarse[word / 8].fetch_or(blocks, Ordering::AcqRel);
            if was | blocks == u64::MAX
                && coarse.iter().all(|word| word.load(Ordering::Acquire) == u64::MAX)
            {
                self.full.store(true, Ordering::Release);
            }
        }
        let rest = new & !spread(blocks);
        if rest != 0 {
            let fine =
                self.fine.get_or_init(|| Box::new([const { AtomicU64::new(0) }; PAGE_WORDS]));
            fine[word].fetch_or(rest, Ordering::AcqRel);
        }
        true
    }
}

/// The first bit from `lo` on that is not `present`; the number of bits if there is none.
fn first_unlike(lo: usize, words: usize, present: bool, word: impl Fn(usize) -> u64) -> usize {
    let mut skip = lo % 64;
    for index in lo / 64..words {
        let unlike = if present { !word(index) } else { word(index) } >> skip;
        if unlike != 0 {
            return index * 64 + skip + unlike.trailing_zeros() as usize;
        }
        skip = 0;
    }
    words * 64
}

/// The lowest `count` bits of a word.
fn low_bits(count: u64) -> u64 {
    if count < WORD_SECTORS { (1 << count) - 1 } else { u64::MAX }
}

/// Each bit of `byte` eight times: bit i becomes byte i of the word.
fn spread(byte: u8) -> u64 {
    // Copy the byte to all eight places and keep bit i in place i; then turn each non-zero byte
    // into 0xff.
    let picked = (u64::from(byte) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
    (((picked + 0x7f7f_7f7f_7f7f_7f7f) >> 7) & 0x0101_0101_0101_0101) * 0xff
}

/// Bit i of the result: byte i of the word is 0xff.
fn whole_bytes(word: u64) -> u8 {
    word.to_le_bytes()
        .iter()
        .enumerate()
        .fold(0, |bits, (i, &byte)| bits | (u8::from(byte == 0xff) << i))
}

/// Cuts `start..end` at multiples of `unit`: (index of the unit, start in it, end in it).
fn split(start: u64, end: u64, unit: u64) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut pos = start;
    std::iter::from_fn(move || {
        if pos >= end {
            return None;
        }
        let (index, lo) = (pos / unit, pos % unit);
        let hi = unit.min(end - index * unit);
        pos = index * unit + hi;
        Some((usize_of(index), usize_of(lo), usize_of(hi)))
    })
}

/// `value % unit` as an index; `unit` is far below 2^32.
pub(crate) fn offset_in(value: u64, unit: u64) -> usize {
    usize_of(value % unit)
}

/// The value as an index; if it does not fit, an index that is certainly out of bounds.
pub(crate) fn usize_of(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_spread_to_bytes_and_back() {
        for byte in 0..=255u8 {
            let word = spread(byte);
            assert_eq!(whole_bytes(word), byte);
            assert!((0..64).all(|bit| (word >> bit & 1 == 1) == (byte >> (bit / 8) & 1 == 1)));
        }
    }
}
