//! Which layer of a chain a range of the disk comes from.
//!
//! The top layer's bitmap changes all the time and is read directly. The layers below never change,
//! so they are folded into one map from sector to layer: a lookup costs the same at any depth.
//! Sector n is at `data_offset + 512 n` in every layer, so neighbouring sectors of one layer are
//! one extent.
//!
//! Nothing is known at first. The caller asks for [`LayerMap::next_unknown`], reads that page's
//! bits from the files, and adds them to the top's bitmap and to [`LayerMap::fold`].

use std::iter::FusedIterator;
use std::ops::Range;

use crate::bitmap::{Bitmap, PAGE_SECTORS, REGION_CHUNKS};
use crate::fold::{Fold, Folded, NOWHERE};
use crate::geometry::Geometry;
use crate::units::{ByteOffset, SECTOR_SIZE, SectorCount, SectorRange};

/// COW layers in a chain, the top included; below them there may be a base image. So a layer's
/// index fits a byte with room to spare, and a chain of files that name each other comes to an end.
pub const CHAIN_LAYERS_MAX: usize = 64;

/// A layer of a chain: 0 is the top, the writable one; then going down; the base image comes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerIndex(u8);

impl LayerIndex {
    /// The top layer.
    pub const TOP: Self = Self(0);

    /// The number, at most [`CHAIN_LAYERS_MAX`].
    pub const fn get(self) -> usize {
        self.0 as usize
    }
}

/// How to read a part of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Read it from this layer's file.
    Data {
        /// The layer.
        layer: LayerIndex,
        /// Where in the layer's file.
        at: ByteOffset,
        /// The length in bytes.
        len: u64,
    },
    /// It reads as zeros.
    Zero {
        /// The length in bytes.
        len: u64,
    },
}

/// A chain has more layers than [`CHAIN_LAYERS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the chain has {found} layers, at most {CHAIN_LAYERS_MAX} are possible; merge some of them"
)]
pub struct ChainTooDeep {
    /// The layers, the base image not counted.
    pub found: usize,
}

/// The map of a whole chain.
#[derive(Debug)]
pub struct LayerMap {
    sectors: u64,
    top: Option<Bitmap>,
    below: Folded,
    /// By layer index.
    places: Vec<Place>,
}

/// Where a layer's sectors are in its file.
#[derive(Clone, Copy, Debug)]
struct Place {
    data_offset: u64,
    /// Bytes of disk that the file holds; after them its last sector is filled up with zeros. Only
    /// a raw image has such an end: a COW file holds whole sectors.
    end: u64,
}

impl Place {
    fn cow(geometry: &Geometry) -> Self {
        Self { data_offset: geometry.data_offset().get(), end: u64::MAX }
    }

    fn raw(size: u64) -> Self {
        Self { data_offset: 0, end: size }
    }
}

impl LayerMap {
    /// The map of a raw image of `size` bytes without anything below: layer 0 has it all.
    pub fn raw(size: u64) -> Self {
        let sectors = SectorCount::covering(size).get();
        let below = Folded::new(sectors, Vec::new(), sectors, 0);
        Self { sectors, top: None, below, places: vec![Place::raw(size)] }
    }

    /// The map of a COW file with bitmap `top` over COW files of the geometries `below` (nearest
    /// first) over a raw image of `base_size` bytes, if there is one.
    pub fn new(
        geometry: &Geometry,
        top: Bitmap,
        below: &[Geometry],
        base_size: Option<u64>,
    ) -> Result<Self, ChainTooDeep> {
        let layers = below.len() + 1;
        let Some(base) = u8::try_from(layers).ok().filter(|_| layers <= CHAIN_LAYERS_MAX) else {
            return Err(ChainTooDeep { found: layers });
        };
        let sectors = geometry.sectors().get();
        let sizes = below.iter().map(|layer| layer.sectors().get()).collect();
        let base_sectors = SectorCount::covering(base_size.unwrap_or(0)).get();
        let folded = Folded::new(sectors, sizes, base_sectors, base);
        let places = std::iter::once(Place::cow(geometry))
            .chain(below.iter().map(Place::cow))
            .chain(base_size.map(Place::raw))
            .collect();
        Ok(Self { sectors, top: Some(top), below: folded, places })
    }

    /// The first bitmap page of `range` that is unknown in the top or below it. Only known pages
    /// may be looked up.
    #[inline]
    pub fn next_unknown(&self, range: SectorRange) -> Option<u64> {
        let top = self.top.as_ref().and_then(|top| top.next_unknown(range));
        let end = range.end().get().min(self.sectors).div_ceil(PAGE_SECTORS);
        let pages = range.start().get() / PAGE_SECTORS..end.min(top.unwrap_or(end));
        pages.into_iter().find(|&page| !self.below.is_known(page)).or(top)
    }

    /// Whether what is below the top is known for bitmap page `page`.
    pub fn is_folded(&self, page: u64) -> bool {
        self.below.is_known(page)
    }

    /// The bitmap pages of the region of page `page`, for [`Self::begin_region`].
    pub fn region_of(&self, page: u64) -> Range<u64> {
        let first = page / REGION_CHUNKS as u64 * REGION_CHUNKS as u64;
        first..(first + REGION_CHUNKS as u64).min(self.sectors.div_ceil(PAGE_SECTORS))
    }

    /// Whether [`Self::begin_region`] has been called for the pages round `page`.
    pub fn is_region_begun(&self, page: u64) -> bool {
        self.below.is_begun(page)
    }

    /// Call this before a page of the region is folded: `has` returns for each layer below the top
    /// (0 is the nearest) whether it may have a sector in [`Self::region_of`] `page`. If none has,
    /// the pages need not be folded.
    pub fn begin_region(&self, page: u64, has: impl Fn(usize) -> bool) {
        self.below.begin_region(page / REGION_CHUNKS as u64, has);
    }

    /// Begins to fold what is below the top for bitmap page `page`.
    pub fn fold(&self, page: u64) -> PageFold<'_> {
        PageFold(self.below.begin(page))
    }

    /// Records that the file of `layer` ends after `bytes` bytes of disk; the rest of its last
    /// sector reads as zeros. This occurs with a COW file over an image that is not a whole number
    /// of sectors.
    pub fn ends_after(&mut self, layer: usize, bytes: u64) {
        if let Some(place) = self.places.get_mut(layer) {
            place.end = place.end.min(bytes);
        }
    }

    /// The size of the disk.
    pub fn sectors(&self) -> SectorCount {
        SectorCount::new(self.sectors)
    }

    /// The bitmap of the top layer; a raw image has none.
    pub fn top(&self) -> Option<&Bitmap> {
        self.top.as_ref()
    }

    /// The piece `pos..end`, in bytes of the disk, of layer `from` as far as its file goes; zeros
    /// after that.
    fn held(&self, from: u8, pos: u64, end: u64) -> Piece {
        let held = self.places.get(usize::from(from)).map_or(0, |place| place.end);
        if pos < held { Piece { from, end: end.min(held) } } else { Piece { from: NOWHERE, end } }
    }

    /// Where `range` comes from, in order; the lengths add up to the range's. Sectors past the end
    /// of the disk are zeros. Neighbouring extents are merged, except where a sector is written
    /// meanwhile.
    pub fn extents(&self, range: SectorRange) -> Extents<'_> {
        let start = range.start_bytes().get();
        Extents {
            map: self,
            pos: start,
            end: start + range.len_bytes(),
            absent_until: 0,
            ahead: None,
        }
    }
}

/// A bitmap page below the top that is being folded: the layers are overlaid from the deepest up,
/// then the page is published.
#[must_use = "nothing is known before the page is published"]
pub struct PageFold<'a>(Fold<'a>);

impl PageFold<'_> {
    /// Overlays layer `index` below the top (0 is the nearest) on the layers so far. `bits` is the
    /// page in the layer's file; bits missing at its end are zeros.
    pub fn overlay(&mut self, index: usize, bits: &[u8]) {
        self.0.overlay(index, bits);
    }

    /// The page is known from now on. Folding it a second time changes nothing.
    pub fn publish(self) {
        self.0.publish();
    }
}

/// The extents of a range; see [`LayerMap::extents`].
#[derive(Clone, Debug)]
pub struct Extents<'a> {
    map: &'a LayerMap,
    /// In bytes of the disk, as is `end`.
    pos: u64,
    end: u64,
    /// Up to this sector the top was found to have nothing.
    absent_until: u64,
    /// The piece at `pos`, if it is known.
    ahead: Option<Piece>,
}

/// Some bytes from one place, perhaps with more of the same behind them.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// A layer's index, or [`NOWHERE`].
    from: u8,
    /// In bytes of the disk.
    end: u64,
}

impl Extents<'_> {
    fn piece(&mut self, pos: u64) -> Piece {
        let (sector, end) = (pos / SECTOR_SIZE, self.end / SECTOR_SIZE);
        let top_end = match &self.map.top {
            Some(top) if sector >= self.absent_until => {
                let run_end = top.run_end(sector, end, true);
                if run_end > sector {
                    return self.map.held(0, pos, run_end * SECTOR_SIZE);
                }
                // A bit set since the check above counts as absent.
                self.absent_until = top.run_end(sector, end, false).max(sector + 1);
                self.absent_until
            }
            Some(_) => self.absent_until,
            None => end,
        };
        let (from, below_end) = self.map.below.lookup(sector, top_end);
        self.map.held(from, pos, below_end * SECTOR_SIZE)
    }
}

impl Iterator for Extents<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        let start = self.pos;
        if start >= self.end {
            return None;
        }
        let mut piece = match self.ahead.take() {
            Some(piece) => piece,
            None => self.piece(start),
        };
        while piece.end < self.end {
            let next = self.piece(piece.end);
            if next.from != piece.from {
                self.ahead = Some(next);
                break;
            }
            piece.end = next.end;
        }
        self.pos = piece.end;
        let len = piece.end - start;
        Some(match self.map.places.get(usize::from(piece.from)) {
            Some(place) => Extent::Data {
                layer: LayerIndex(piece.from),
                at: ByteOffset::new(place.data_offset + start),
                len,
            },
            None => Extent::Zero { len },
        })
    }
}

impl FusedIterator for Extents<'_> {}
