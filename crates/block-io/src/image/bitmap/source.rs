//! Where the bits of a COW file are stored, and how they are read: all at once, or page by page on
//! demand.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use cow_format::check::clear_beyond_end;
use cow_format::{
    BITMAP_PAGE_LEN, Bitmap, ByteOffset, Geometry, Header, PAGE_SECTORS, SECTOR_SIZE, Sector,
};

use super::pages::{for_each_stray, read_pages};
use super::side_file;
use crate::image::ImageError;
use crate::image::opened::Opened;
use crate::image::trust::{Trust, live_counts, needs_replay, valid_side_file};
use crate::storage::{Access, Env, Storage};

const PAGE_LEN: u64 = BITMAP_PAGE_LEN as u64;
/// Bitmap pages in memory at a time when all are looked at: 4 MiB, which cover 16 GiB of disk.
const WINDOW_PAGES: usize = 1024;

/// The valid bitmaps of one COW file.
pub(crate) struct BitmapSource<F> {
    geometry: Geometry,
    live: Option<Live<F>>,
}

/// A live bitmap that is valid in this page cache.
enum Live<F> {
    /// In the COW file itself.
    Native(ByteOffset),
    SideFile(Arc<F>),
}

impl<F: Storage> BitmapSource<F> {
    /// Determines whether the live bitmap is valid. Changes nothing. Refuses a file whose journal
    /// must be replayed first.
    pub(crate) fn find<E: Env<File = F>>(
        env: &E,
        cow: &Opened<F>,
        header: &Header,
        trust: Trust,
    ) -> Result<Self, ImageError> {
        Self::find_for(Access::Read, env, cow, header, trust)
    }

    /// The same, with a live bitmap that can be written.
    pub(crate) fn find_for<E: Env<File = F>>(
        access: Access,
        env: &E,
        cow: &Opened<F>,
        header: &Header,
        trust: Trust,
    ) -> Result<Self, ImageError> {
        if let Header::Native(native) = header
            && needs_replay(env, cow, native, trust)?
        {
            return Err(ImageError::Journal { path: cow.path.clone() });
        }
        Self::find_live(access, env, cow, header, trust)
    }

    /// The same for a file that is only inspected: its bitmap may lack what is in the journal.
    pub(crate) fn find_as_it_is<E: Env<File = F>>(
        env: &E,
        cow: &Opened<F>,
        header: &Header,
        trust: Trust,
    ) -> Result<Self, ImageError> {
        Self::find_live(Access::Read, env, cow, header, trust)
    }

    fn find_live<E: Env<File = F>>(
        access: Access,
        env: &E,
        cow: &Opened<F>,
        header: &Header,
        trust: Trust,
    ) -> Result<Self, ImageError> {
        let geometry = *header.geometry();
        let live = match header {
            Header::Uml(_) => valid_side_file(env, cow, header, trust, access)?
                .map(|file| Live::SideFile(Arc::new(file))),
            Header::Native(native) => match live_counts(env, &cow.file, native, trust)? {
                true => geometry.live_bitmap_offset().map(Live::Native),
                false => None,
            },
        };
        Ok(BitmapSource { geometry, live })
    }

    /// Whether the live bitmap is valid and supplements the durable one.
    pub(crate) fn live_counts(&self) -> bool {
        self.live.is_some()
    }

    /// The side file, if it has the valid live bitmap.
    pub(crate) fn side_file(&self) -> Option<Arc<F>> {
        match self.live.as_ref()? {
            Live::Native(_) => None,
            Live::SideFile(file) => Some(Arc::clone(file)),
        }
    }

    /// The file of the live bitmap, if it is valid, and its offset there.
    fn live<'a>(&'a self, cow: &'a F) -> Option<(&'a F, ByteOffset)> {
        Some(match self.live.as_ref()? {
            Live::Native(at) => (cow, *at),
            Live::SideFile(file) => (file, side_file::BITMAP_AT),
        })
    }

    /// Loads the whole bitmap. Bits that only the live bitmap has are dirty.
    pub(crate) fn load_all(&self, cow: &Opened<F>) -> Result<Bitmap, ImageError> {
        let bitmap = Bitmap::unknown(self.geometry.sectors());
        let loaded = self.load(&cow.file, &bitmap, 0..bitmap.pages());
        loaded.map_err(ImageError::io(&cow.path, "read the bitmap"))?;
        Ok(bitmap)
    }

    /// Loads `pages` into `bitmap`, which are then known. Several threads may do so at once; each
    /// adds the bits that it finds.
    pub(crate) fn load(&self, cow: &F, bitmap: &Bitmap, pages: Range<u64>) -> io::Result<()> {
        // The durable bits first: what the live bitmap adds to them has to be flushed.
        self.for_each(cow, &pages, |page, bytes, live| match live {
            false => bitmap.load_durable(page, bytes),
            true => bitmap.load_live(page, bytes),
        })?;
        bitmap.set_known(pages);
        Ok(())
    }

    /// Passes to `found` those of `pages` that may have a bit set: first the durable ones, then
    /// those of the live bitmap if it is valid, for which the flag is true. The last page may be
    /// shorter than 4096 bytes.
    pub(crate) fn for_each(
        &self,
        cow: &F,
        pages: &Range<u64>,
        mut found: impl FnMut(u64, &[u8], bool),
    ) -> io::Result<()> {
        for (index, (file, at)) in self.places(cow).enumerate() {
            read_pages(file, at, &self.geometry, pages, |page, bytes| {
                found(page, bytes, index > 0);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Whether a bit of `pages` may be set.
    pub(crate) fn may_have(&self, cow: &F, pages: &Range<u64>) -> io::Result<bool> {
        for (file, at) in self.places(cow) {
            let end = at.get() + (pages.end * PAGE_LEN).min(self.geometry.bitmap_len());
            let start = at.get() + pages.start * PAGE_LEN;
            if file.next_data(ByteOffset::new(start))?.is_some_and(|data| data.start < end) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The valid bitmaps, the durable one first: file and offset.
    fn places<'a>(&'a self, cow: &'a F) -> impl Iterator<Item = (&'a F, ByteOffset)> {
        std::iter::once((cow, self.geometry.bitmap_offset())).chain(self.live(cow))
    }

    /// Passes to `found` the pages in which the live bitmap, if it is valid, has bits that the
    /// durable one lacks.
    pub(crate) fn for_each_stray(
        &self,
        cow: &F,
        found: impl FnMut(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        match self.live(cow) {
            Some((file, at)) => for_each_stray(cow, &self.geometry, file, at, found),
            None => Ok(()),
        }
    }

    /// What is present in `pages`. They are looked at in windows: their number is up to whoever
    /// made the file.
    pub(crate) fn present(&self, cow: &F, pages: Range<u64>) -> io::Result<Present> {
        let mut found = Present::default();
        let mut window = BTreeMap::new();
        let last = self.pages().saturating_sub(1);
        for start in pages.clone().step_by(WINDOW_PAGES) {
            let pages = start..(start + WINDOW_PAGES as u64).min(pages.end);
            if !self.may_have(cow, &pages)? {
                continue;
            }
            self.for_each(cow, &pages, |page, bytes, _live| {
                let all = window.entry(page).or_insert([0; BITMAP_PAGE_LEN]);
                all.iter_mut().zip(bytes).for_each(|(all, byte)| *all |= byte);
            })?;
            while let Some((page, mut bytes)) = window.pop_first() {
                if page == last {
                    // UML leaves anything past the end.
                    clear_beyond_end(&self.geometry, page, &mut bytes);
                }
                found.add(page, &bytes);
            }
        }
        Ok(found)
    }

    /// The number of pages that the disk needs.
    pub(crate) fn pages(&self) -> u64 {
        self.geometry.sectors().get().div_ceil(PAGE_SECTORS)
    }

    /// Refuses a file that lacks the data of a present sector. Only pages that cover sectors past
    /// the end of the file are read.
    pub(crate) fn check_data(&self, cow: &Opened<F>) -> Result<(), ImageError> {
        let held = cow.disk_bytes(&self.geometry);
        if held >= self.geometry.virtual_size() {
            return Ok(());
        }
        let first = held / (PAGE_SECTORS * SECTOR_SIZE);
        let past = self.present(&cow.file, first..self.pages());
        let past = past.map_err(ImageError::io(&cow.path, "read the bitmap"))?;
        cow.check_data(&self.geometry, past.last)
    }
}

/// What bitmaps say of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Present {
    /// The number of present sectors.
    pub(crate) count: u64,
    /// The last of them.
    pub(crate) last: Option<Sector>,
}

impl Present {
    /// Adds the bits of page `page`.
    fn add(&mut self, page: u64, bytes: &[u8; BITMAP_PAGE_LEN]) {
        let words = bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        for (start, word) in (page * PAGE_SECTORS..).step_by(64).zip(words) {
            if word != 0 {
                self.count += u64::from(word.count_ones());
                self.last = Some(Sector::new(start + u64::from(word.ilog2())));
            }
        }
    }
}
