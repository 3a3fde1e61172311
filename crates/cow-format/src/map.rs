//! Which layer of a chain a range of the disk comes from.
//!
//! The top layer's bitmap changes all the time and is looked at as it is. Everything below never changes, so it is
//! folded at open into one map from sector to layer: a lookup costs the same at any depth. Sector n stands at
//! `data_offset + 512 n` in every layer, so neighbouring sectors of one layer are one extent.

use std::iter::FusedIterator;

use crate::bitmap::{Bitmap, PAGE_SECTORS, REGION_CHUNKS, REGION_SECTORS, offset_in, usize_of};
use crate::geometry::Geometry;
use crate::units::{ByteOffset, SECTOR_SIZE, SectorCount, SectorRange};

/// COW layers in a chain, the top included; below them there may be a base image. So a layer's index fits a byte
/// with room to spare, and a chain of files that name each other comes to an end.
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

/// In place of a layer's index: no layer has this sector, it reads as zeros.
const NOWHERE: u8 = u8::MAX;

/// What to do for a part of a range.
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

/// A frozen layer below the top.
#[derive(Clone, Copy, Debug)]
pub struct LowerLayer<'a> {
    /// Where its data stands and how large it is. What lies above its end is zeros, whatever is deeper.
    pub geometry: &'a Geometry,
    /// Its sectors.
    pub bitmap: &'a Bitmap,
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

/// Where a layer's sectors stand in its file.
#[derive(Clone, Copy, Debug)]
struct Place {
    data_offset: u64,
    /// Bytes of disk that the file holds; after them its last sector is filled up with zeros. Only a raw image has
    /// such an end: a COW file holds whole sectors.
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
        let below = Folded::new(sectors, &[], Some(size), 0);
        Self { sectors, top: None, below, places: vec![Place::raw(size)] }
    }

    /// The map of a COW file with bitmap `top` over `below` (nearest first) over a raw image of `base_size` bytes,
    /// if there is one.
    pub fn new(
        geometry: &Geometry,
        top: Bitmap,
        below: &[LowerLayer<'_>],
        base_size: Option<u64>,
    ) -> Result<Self, ChainTooDeep> {
        let layers = below.len() + 1;
        let Some(base) = u8::try_from(layers).ok().filter(|_| layers <= CHAIN_LAYERS_MAX) else {
            return Err(ChainTooDeep { found: layers });
        };
        let sectors = geometry.sectors().get();
        let folded = Folded::new(sectors, below, base_size, base);
        let places = std::iter::once(Place::cow(geometry))
            .chain(below.iter().map(|layer| Place::cow(layer.geometry)))
            .chain(base_size.map(Place::raw))
            .collect();
        Ok(Self { sectors, top: Some(top), below: folded, places })
    }

    /// Tells that the file of `layer` ends after `bytes` bytes of disk: what its sectors lack reads as zeros. A COW file
    /// over an image of no whole number of sectors can end so.
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

    /// The piece `pos..end`, in bytes of the disk, of layer `from` as far as its file goes; zeros after that.
    fn held(&self, from: u8, pos: u64, end: u64) -> Piece {
        let held = self.places.get(usize::from(from)).map_or(0, |place| place.end);
        if pos < held { Piece { from, end: end.min(held) } } else { Piece { from: NOWHERE, end } }
    }

    /// Where `range` comes from, in order; the lengths add up to the range's. What lies past the end of the disk is
    /// zeros. Neighbouring extents are merged, except where a sector is written meanwhile.
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

/// The extents of a range; see [`LayerMap::extents`].
#[derive(Clone, Debug)]
pub struct Extents<'a> {
    map: &'a LayerMap,
    /// In bytes of the disk, as is `end`.
    pos: u64,
    end: u64,
    /// Up to this sector the top was seen to have nothing.
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
                // A bit set since the look above is absent as of that look.
                self.absent_until = top.run_end(sector, end, false).max(sector + 1);
                self.absent_until
            }
            Some(_) => self.absent_until,
            None => end,
        };
        let (from, below_end) = self.map.below.lookup(sector, self.map.sectors);
        self.map.held(from, pos, top_end.min(below_end).min(end) * SECTOR_SIZE)
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

/// From sector to layer, for everything below the top. Levels that are all alike are one entry.
#[derive(Debug)]
struct Folded {
    regions: Box<[Region]>,
}

#[derive(Debug)]
enum Region {
    Uniform(u8),
    Chunks(Box<[Chunk]>),
}

#[derive(Debug)]
enum Chunk {
    Uniform(u8),
    /// Ascending, the first at 0; each goes on to the next one's start.
    Runs(Box<[Span]>),
    /// By sector: where runs would take more.
    Dense(Box<[u8]>),
}

/// The start, in sectors of the chunk, of a run that comes from one place.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u16,
    from: u8,
}

impl Folded {
    /// `base` is the index of the base image.
    fn new(sectors: u64, layers: &[LowerLayer<'_>], base_size: Option<u64>, base: u8) -> Self {
        let base_sectors = SectorCount::covering(base_size.unwrap_or(0)).get();
        let fold = Fold { sectors, layers, base, base_sectors };
        Self {
            regions: (0..sectors.div_ceil(REGION_SECTORS))
                .map(|index| fold.region(index))
                .collect(),
        }
    }

    /// The layer of `sector` and the end of the run that is known without looking further.
    fn lookup(&self, sector: u64, sectors: u64) -> (u8, u64) {
        let region = self.regions.get(usize_of(sector / REGION_SECTORS));
        let Some(region) = region.filter(|_| sector < sectors) else {
            return (NOWHERE, u64::MAX / SECTOR_SIZE);
        };
        let chunks = match region {
            Region::Uniform(from) => {
                return (*from, sectors.min((sector / REGION_SECTORS + 1) * REGION_SECTORS));
            }
            Region::Chunks(chunks) => chunks,
        };
        let chunk_start = sector / PAGE_SECTORS * PAGE_SECTORS;
        let (from, end) = chunks[offset_in(sector / PAGE_SECTORS, REGION_CHUNKS as u64)]
            .lookup(sector - chunk_start);
        (from, sectors.min(chunk_start + end))
    }
}

impl Chunk {
    /// The layer of a sector of the chunk, and the end of its run.
    fn lookup(&self, sector: u64) -> (u8, u64) {
        match self {
            Self::Uniform(from) => (*from, PAGE_SECTORS),
            Self::Runs(spans) => {
                let next = spans.partition_point(|span| u64::from(span.start) <= sector);
                let end = spans.get(next).map_or(PAGE_SECTORS, |span| span.start.into());
                (spans[next - 1].from, end)
            }
            Self::Dense(from) => {
                let rest = &from[offset_in(sector, PAGE_SECTORS)..];
                let run = rest.iter().take_while(|&&other| other == rest[0]).count();
                (rest[0], sector + run as u64)
            }
        }
    }

    fn new(spans: &[Span]) -> Self {
        if let [span] = spans {
            return Self::Uniform(span.from);
        }
        if size_of_val(spans) as u64 <= PAGE_SECTORS {
            return Self::Runs(spans.into());
        }
        let ends = spans.iter().skip(1).map(|span| u64::from(span.start)).chain([PAGE_SECTORS]);
        let runs = spans.iter().zip(ends);
        Self::Dense(
            runs.flat_map(|(span, end)| (u64::from(span.start)..end).map(|_| span.from)).collect(),
        )
    }
}

/// What is folded.
struct Fold<'a> {
    sectors: u64,
    layers: &'a [LowerLayer<'a>],
    base: u8,
    base_sectors: u64,
}

impl Fold<'_> {
    fn region(&self, index: u64) -> Region {
        let (start, end) = (index * REGION_SECTORS, self.sectors.min((index + 1) * REGION_SECTORS));
        if let Some(from) = self.uniform(start, end) {
            return Region::Uniform(from);
        }
        let mut spans = (Vec::new(), Vec::new());
        let chunk = |start| self.chunk(start, &mut spans);
        let step = usize_of(PAGE_SECTORS);
        let chunks: Box<[Chunk]> = (start..end).step_by(step).map(chunk).collect();
        match chunks[0] {
            Chunk::Uniform(first)
                if chunks.iter().all(|c| matches!(c, Chunk::Uniform(from) if *from == first)) =>
            {
                Region::Uniform(first)
            }
            _ => Region::Chunks(chunks),
        }
    }

    /// Where `start..end` comes from, if that is plain to see: no layer has a sector of it or ends in it.
    fn uniform(&self, start: u64, end: u64) -> Option<u8> {
        for layer in self.layers {
            let layer_end = layer.geometry.sectors().get();
            if layer_end <= start {
                return Some(NOWHERE);
            }
            if layer_end < end || layer.bitmap.run_end(start, end, false) < end {
                return None;
            }
        }
        match self.base_sectors {
            base_end if base_end >= end => Some(self.base),
            base_end if base_end <= start => Some(NOWHERE),
            _ => None,
        }
    }

    /// Lays the layers over each other, the base first. `spans` is working memory.
    fn chunk(&self, start: u64, (spans, scratch): &mut (Vec<Span>, Vec<Span>)) -> Chunk {
        let end = self.sectors.min(start + PAGE_SECTORS);
        if let Some(from) = self.uniform(start, end) {
            return Chunk::Uniform(from);
        }
        spans.clear();
        spans.push(Span { start: 0, from: self.base });
        cut(spans, self.base_sectors, start, end);
        for (index, layer) in (1..self.base).zip(self.layers).rev() {
            if layer.bitmap.run_end(start, end, false) < end {
                lay_over(spans, layer.bitmap, start, end, index, scratch);
            }
            cut(spans, layer.geometry.sectors().get(), start, end);
        }
        Chunk::new(spans)
    }
}

/// Nothing comes from sectors at `layer_end` and beyond.
fn cut(spans: &mut Vec<Span>, layer_end: u64, start: u64, end: u64) {
    if layer_end < end {
        let at = layer_end.saturating_sub(start);
        spans.truncate(spans.partition_point(|span| u64::from(span.start) < at));
        push(spans, at, NOWHERE);
    }
}

/// Lays the present sectors of `bitmap` in `start..end` over `spans`.
fn lay_over(
    spans: &mut Vec<Span>,
    bitmap: &Bitmap,
    start: u64,
    end: u64,
    layer: u8,
    scratch: &mut Vec<Span>,
) {
    scratch.clear();
    let mut below = 0;
    for run in bitmap.runs(SectorRange::from_bounds(start, end)) {
        let (lo, hi) = (run.range.start().get() - start, run.range.end().get() - start);
        if run.present {
            push(scratch, lo, layer);
            continue;
        }
        // The last span that begins at or before `lo` reaches into the gap.
        while spans.get(below + 1).is_some_and(|next| u64::from(next.start) <= lo) {
            below += 1;
        }
        push(scratch, lo, spans[below].from);
        while let Some(next) = spans.get(below + 1).filter(|next| u64::from(next.start) < hi) {
            push(scratch, next.start.into(), next.from);
            below += 1;
        }
    }
    std::mem::swap(spans, scratch);
}

/// Appends a span, unless it only goes on with the last one.
fn push(spans: &mut Vec<Span>, start: u64, from: u8) {
    let Ok(start) = u16::try_from(start) else { return };
    if spans.last().is_none_or(|last| last.from != from) {
        spans.push(Span { start, from });
    }
}
