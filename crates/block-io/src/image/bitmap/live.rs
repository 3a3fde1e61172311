//! The live bitmap. Its bits are in the page cache before a write is acknowledged, so that the
//! write survives the death of this process (docs/architecture.md, "Durability").

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use cow_format::{
    BITMAP_PAGE_LEN, Bitmap, ByteOffset, Geometry, PAGE_SECTORS, Sector, SectorCount, SectorRange,
};

use super::pages::for_each_stray;
use super::side_file::{self, RawSideHeader, make_void};
use crate::storage::{Env, Storage};
use crate::sync::lock;

/// Locks for the pages of the live bitmap. Few queues set new bits at the same time, so collisions
/// are rare.
const STRIPES: usize = 64;
/// The permissions to read and write, without the right to execute.
const READ_WRITE_MODE: u32 = 0o666;
/// Sectors that one word of the bitmap covers.
const WORD_SECTORS: u64 = 64;

/// The live bitmap of a COW file that is open for writing.
pub(crate) struct LiveBitmap<F> {
    place: Place<F>,
    /// One word of the file holds the bits of many sectors, so two writers of one page must not
    /// overtake each other: the later write has to contain the bits of the earlier. Each holds its
    /// page's lock from rendering the words until the new bits are in memory. That spans a write of
    /// a few bytes into the page cache, never disk I/O, and happens once in a sector's life.
    /// (Setting the bits in memory with an atomic OR and writing afterwards would need no lock, but
    /// then another queue could acknowledge a rewrite of a sector whose live bit has not left the
    /// process yet.)
    stripes: [Mutex<()>; STRIPES],
}

enum Place<F> {
    /// In the COW file itself.
    Native(ByteOffset),
    /// In a side file.
    SideFile { file: Arc<F>, path: PathBuf },
}

impl<F: Storage> LiveBitmap<F> {
    fn new(place: Place<F>) -> Self {
        LiveBitmap { place, stripes: [const { Mutex::new(()) }; STRIPES] }
    }

    /// The live bitmap at `at` in the COW file `cow`. Unless it is `settled` (valid, or known to be
    /// a subset of the durable one), every bit that the durable one lacks is cleared first; only
    /// then may the caller record the page cache in the header.
    pub(crate) fn native(
        cow: &F,
        at: ByteOffset,
        geometry: &Geometry,
        settled: bool,
    ) -> io::Result<Self> {
        if !settled {
            clear_stray_bits(cow, at, geometry)?;
        }
        Ok(Self::new(Place::Native(at)))
    }

    /// The live bitmap in the side file of `cow`: the `valid` one, or a new one, which who can
    /// access `cow` can access.
    pub(crate) fn side_file<E: Env<File = F>>(
        env: &E,
        cow: &F,
        cow_path: &Path,
        geometry: &Geometry,
        valid: Option<Arc<F>>,
    ) -> io::Result<Self> {
        let path = side_file::path_for(cow_path);
        if let Some(file) = valid {
            return Ok(Self::new(Place::SideFile { file, path }));
        }
        match env.remove(&path) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
            _ => {}
        }
        let file = Arc::new(env.create_new(&path)?);
        let (witness, stat) = (env.cache_witness(cow), cow.stat()?);
        file.set_mode(stat.mode & READ_WRITE_MODE)?;
        let header = RawSideHeader::new(env.boot_id()?, witness, &stat, geometry);
        file.write_all_at(header.bytes(), ByteOffset::new(0))?;
        Ok(Self::new(Place::SideFile { file, path }))
    }

    /// The file of the live bitmap, and its offset there.
    fn place<'a>(&'a self, cow: &'a F) -> (&'a F, ByteOffset) {
        match &self.place {
            Place::Native(at) => (cow, *at),
            Place::SideFile { file, .. } => (file, side_file::BITMAP_AT),
        }
    }

    /// Sets the bits of `ranges`, first in the page cache, then in memory. Neighbouring ranges in
    /// one bitmap page share a write, so sorted ranges are cheapest; ranges that are already
    /// present cost nothing. After an error some bits may be set; a range can then be retried
    /// alone.
    pub(crate) fn set(&self, cow: &F, bitmap: &Bitmap, ranges: &[SectorRange]) -> io::Result<()> {
        let mut rest = ranges;
        while let Some(&first) = rest.first() {
            let page = page_of(first.start());
            let together =
                rest.iter().take_while(|range| pages_of(**range) == (page..page + 1)).count();
            let (group, tail) = rest.split_at(together.max(1));
            for page in pages_of(first) {
                self.set_in_page(cow, bitmap, page, group)?;
            }
            rest = tail;
        }
        Ok(())
    }

    /// Sets the bits of `ranges` that are in `page`.
    fn set_in_page(
        &self,
        cow: &F,
        bitmap: &Bitmap,
        page: u64,
        ranges: &[SectorRange],
    ) -> io::Result<()> {
        if ranges.iter().all(|range| bitmap.contains(in_page(*range, page))) {
            return Ok(());
        }
        let stripe = usize::try_from(page % STRIPES as u64).unwrap_or(0);
        let _lock = lock(&self.stripes[stripe]);
        let mut words = Words::new(page);
        ranges.iter().for_each(|range| words.add(in_page(*range, page)));
        let (file, at) = self.place(cow);
        let (offset, bytes) = words.render(bitmap);
        file.write_all_at(bytes, ByteOffset::new(at.get() + offset))?;
        ranges.iter().for_each(|range| _ = bitmap.insert(in_page(*range, page)));
        Ok(())
    }

    /// After a failed sync: makes a live bitmap void that is in a file of its own. One in the COW
    /// file is made void by the header.
    pub(crate) fn make_void(&self) -> io::Result<()> {
        match &self.place {
            Place::Native(_) => Ok(()),
            Place::SideFile { file, .. } => make_void(&**file),
        }
    }

    /// Ends the live bitmap's use after a full flush and the clean state: removes the side file of
    /// a UML file.
    pub(crate) fn close<E: Env<File = F>>(&self, env: &E) -> Result<(), (PathBuf, io::Error)> {
        match &self.place {
            Place::Native(_) => Ok(()),
            Place::SideFile { path, .. } => env.remove(path).map_err(|err| (path.clone(), err)),
        }
    }
}

/// Punches out the pages of a void live bitmap that have bits which the durable one lacks. Usually
/// there are none: looking for them is much cheaper than punching out everything, which frees
/// blocks only to allocate them again.
fn clear_stray_bits(cow: &impl Storage, at: ByteOffset, geometry: &Geometry) -> io::Result<()> {
    let mut stray: Vec<Range<u64>> = Vec::new();
    for_each_stray(cow, geometry, cow, at, |page| {
        match stray.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => stray.push(page..page + 1),
        }
        Ok(())
    })?;
    let page_len = BITMAP_PAGE_LEN as u64;
    stray.iter().try_for_each(|run| {
        cow.punch(
            ByteOffset::new(at.get() + run.start * page_len),
            (run.end - run.start) * page_len,
        )
    })
}

/// Some words of a bitmap page with new bits in them.
struct Words {
    page: u64,
    bytes: [u8; BITMAP_PAGE_LEN],
    /// The words that have a new bit, from the first to the last.
    used: Range<usize>,
}

impl Words {
    fn new(page: u64) -> Self {
        Words { page, bytes: [0; BITMAP_PAGE_LEN], used: 0..0 }
    }

    /// Sets the bits of `range`, which is within the page.
    fn add(&mut self, range: SectorRange) {
        let bit =
            |sector: Sector| usize::try_from(sector.get() - self.page * PAGE_SECTORS).unwrap_or(0);
        let (start, end) = (bit(range.start()), bit(range.end()));
        if start >= end {
            return;
        }
        for bit in start..end {
            self.bytes[bit / 8] |= 1 << (bit % 8);
        }
        let words = start / 64..(end - 1) / 64 + 1;
        self.used = match self.used.is_empty() {
            true => words,
            false => self.used.start.min(words.start)..self.used.end.max(words.end),
        };
    }

    /// The words combined with the bits that `bitmap` already has, and their offset in the live
    /// bitmap, in bytes.
    fn render(&mut self, bitmap: &Bitmap) -> (u64, &[u8]) {
        let first_word = self.page * (PAGE_SECTORS / WORD_SECTORS) + self.used.start as u64;
        let bytes = &mut self.bytes[self.used.start * 8..self.used.end * 8];
        for (word, index) in bytes.chunks_exact_mut(8).zip(first_word..) {
            for (byte, present) in word.iter_mut().zip(bitmap.word(index).to_le_bytes()) {
                *byte |= present;
            }
        }
        (first_word * 8, bytes)
    }
}

fn page_of(sector: Sector) -> u64 {
    sector.get() / PAGE_SECTORS
}

/// The bitmap pages that `range` touches.
fn pages_of(range: SectorRange) -> Range<u64> {
    page_of(range.start())..range.end().get().div_ceil(PAGE_SECTORS).max(page_of(range.start()))
}

/// The part of `range` that `page` covers; may be empty.
fn in_page(range: SectorRange, page: u64) -> SectorRange {
    let clip = |sector: Sector| sector.get().clamp(page * PAGE_SECTORS, (page + 1) * PAGE_SECTORS);
    let (start, end) = (clip(range.start()), clip(range.end()));
    SectorRange::new(Sector::new(start), SectorCount::new(end - start)).unwrap_or(range)
}
