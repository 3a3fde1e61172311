//! Where a COW file's bitmap and data are. One geometry for the UML headers and the native one.

use crate::bitmap::{BITMAP_PAGE_LEN, Bitmap};
use crate::units::{ByteOffset, SECTOR_SIZE, Sector, SectorCount, SectorRange};

/// The places in a COW file. Built only by a checked header: every sum of these is below 2^63, the
/// parts do not overlap and the bitmaps lie within the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    pub(crate) virtual_size: u64,
    pub(crate) bitmap_offset: u64,
    pub(crate) bitmap_len: u64,
    pub(crate) live_bitmap_offset: Option<u64>,
    pub(crate) data_offset: u64,
}

impl Geometry {
    /// The size of the virtual disk in bytes; need not be a multiple of 512.
    pub const fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    /// The size of the virtual disk as a guest sees it: rounded up to whole sectors.
    pub const fn sectors(&self) -> SectorCount {
        SectorCount::covering(self.virtual_size)
    }

    /// Where the (durable) bitmap begins.
    pub const fn bitmap_offset(&self) -> ByteOffset {
        ByteOffset::new(self.bitmap_offset)
    }

    /// Bytes of each bitmap that are in use. Native: whole pages. UML V1 and V2: may lack the bits
    /// of the last sectors, which then are absent.
    pub const fn bitmap_len(&self) -> u64 {
        self.bitmap_len
    }

    /// Where the live bitmap begins; UML files have none.
    pub const fn live_bitmap_offset(&self) -> Option<ByteOffset> {
        match self.live_bitmap_offset {
            Some(at) => Some(ByteOffset::new(at)),
            None => None,
        }
    }

    /// Where sector 0 is.
    pub const fn data_offset(&self) -> ByteOffset {
        ByteOffset::new(self.data_offset)
    }

    /// Where `sector` is, whether it is present or not. For sectors of the disk.
    pub fn sector_at(&self, sector: Sector) -> ByteOffset {
        debug_assert!(sector.get() <= self.sectors().get());
        ByteOffset::new(self.data_offset + sector.get() * SECTOR_SIZE)
    }

    /// The length of a file that holds every sector up to the virtual size: what a new file is set
    /// to.
    pub const fn full_len(&self) -> u64 {
        self.data_offset + self.virtual_size
    }

    /// The number of bitmap pages, the last perhaps partial.
    pub const fn bitmap_pages(&self) -> u64 {
        self.bitmap_len.div_ceil(BITMAP_PAGE_LEN as u64)
    }

    /// The bytes of page `page` that exist in a bitmap of this file: 4096, fewer on the last page
    /// of a UML file, none past the end.
    pub fn bitmap_page_len(&self, page: u64) -> usize {
        let start = page.saturating_mul(BITMAP_PAGE_LEN as u64);
        let len = self.bitmap_len.saturating_sub(start).min(BITMAP_PAGE_LEN as u64);
        usize::try_from(len).unwrap_or(BITMAP_PAGE_LEN)
    }

    /// Where page `page` of the durable bitmap is. For pages of the disk.
    pub fn page_at(&self, page: u64) -> ByteOffset {
        debug_assert!(page < self.bitmap_pages());
        ByteOffset::new(self.bitmap_offset + page * BITMAP_PAGE_LEN as u64)
    }

    /// Refuses a file of `file_len` bytes that ends before the data of a sector that `bitmap` says
    /// is present.
    pub fn check_data(&self, bitmap: &Bitmap, file_len: u64) -> Result<(), DataTruncated> {
        self.check_last(bitmap.last_present(), file_len)
    }

    /// The same, with the last present sector.
    pub fn check_last(&self, last: Option<Sector>, file_len: u64) -> Result<(), DataTruncated> {
        let Some(sector) = last else { return Ok(()) };
        // Of a partial last sector only what belongs to the disk has to be there: a discard sets
        // its bit and leaves the file's length alone.
        let expected_len = (self.sector_at(sector).get() + SECTOR_SIZE).min(self.full_len());
        if expected_len <= file_len {
            return Ok(());
        }
        Err(DataTruncated { sector, file_len, expected_len })
    }

    /// All sectors of the disk.
    pub fn all(&self) -> SectorRange {
        SectorRange::from_bounds(0, self.sectors().get())
    }
}

/// The bitmap names a sector whose data lies past the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "data truncated: the bitmap says that sector {sector} is present, so the file must have at least \
     {expected_len} bytes, but it has {file_len}; that data is lost, restore the file from a copy"
)]
pub struct DataTruncated {
    /// The last present sector.
    pub sector: Sector,
    /// The length of the file in bytes.
    pub file_len: u64,
    /// The length that the sector asks for.
    pub expected_len: u64,
}
