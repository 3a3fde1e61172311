//! The bits of a COW file for a walk through its data, a window at a time: how many there are is up
//! to whoever made the file.

use std::ops::Range;

use cow_format::{Bitmap, ByteOffset, Geometry, PAGE_SECTORS, SECTOR_SIZE};

use crate::image::ImageError;
use crate::image::bitmap::source::BitmapSource;
use crate::image::opened::Opened;
use crate::storage::Storage;

/// Bytes of the file whose bits are loaded at a time (16 GiB): 4.7 MiB of memory.
const WINDOW_SPAN: u64 = 1024 * PAGE_SECTORS * SECTOR_SIZE;

/// The bits of a COW file, one window of them loaded.
pub(super) struct Windows<'a, F> {
    bits: &'a BitmapSource<F>,
    cow: &'a Opened<F>,
    geometry: &'a Geometry,
    /// The number of the window, in the file, and its bits.
    loaded: Option<(u64, Bitmap)>,
}

impl<'a, F: Storage> Windows<'a, F> {
    pub(super) fn new(
        bits: &'a BitmapSource<F>,
        cow: &'a Opened<F>,
        geometry: &'a Geometry,
    ) -> Self {
        Windows { bits, cow, geometry, loaded: None }
    }

    /// Passes `range` of the file to `found` in pieces, each with a bitmap that has the bits of the
    /// sectors in it.
    pub(super) fn for_each<E: From<ImageError>>(
        &mut self,
        range: Range<u64>,
        mut found: impl FnMut(&Bitmap, ByteOffset, u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = range.start;
        while at < range.end {
            let number = at / WINDOW_SPAN;
            let to = (number + 1).saturating_mul(WINDOW_SPAN).min(range.end);
            found(self.bitmap(number)?, ByteOffset::new(at), to - at)?;
            at = to;
        }
        Ok(())
    }

    fn bitmap(&mut self, number: u64) -> Result<&Bitmap, ImageError> {
        let loaded = match self.loaded.take() {
            Some((of, bitmap)) if of == number => bitmap,
            _ => self.load(number)?,
        };
        Ok(&self.loaded.insert((number, loaded)).1)
    }

    fn load(&self, number: u64) -> Result<Bitmap, ImageError> {
        let bitmap = Bitmap::unknown(self.geometry.sectors());
        let data = self.geometry.data_offset().get();
        let page = |at: u64| at.saturating_sub(data) / (PAGE_SECTORS * SECTOR_SIZE);
        let end = (number + 1).saturating_mul(WINDOW_SPAN);
        let pages = page(number * WINDOW_SPAN)..(page(end) + 1).min(bitmap.pages());
        if pages.start < pages.end {
            let loaded = self.bits.load(&self.cow.file, &bitmap, pages);
            loaded.map_err(ImageError::io(&self.cow.path, "read the bitmap"))?;
        }
        Ok(bitmap)
    }
}
