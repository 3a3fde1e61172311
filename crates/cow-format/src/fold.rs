//! Everything below the top of a chain, folded into one map from sector to layer: a lookup costs
//! the same at any depth.
//!
//! It is folded on demand, in chunks of one bitmap page (16 MiB of disk): the caller reads that
//! page of every layer, overlays them from the deepest up, and publishes the result. The layers
//! below the top never change, so any thread may fold a page, any number of times.

use std::sync::OnceLock;

use crate::bitmap::{
    BITMAP_PAGE_LEN, PAGE_SECTORS, REGION_CHUNKS, REGION_SECTORS, offset_in, usize_of,
};

/// In place of a layer's index: no layer has this sector, it reads as zeros.
pub(crate) const NOWHERE: u8 = u8::MAX;

/// A block that comes from several places: see [`Blocks::mixed`]. No layer has this index.
const MIXED: u8 = NOWHERE - 1;

/// Sectors in a block, the piece that guests write.
const BLOCK: usize = 8;
const CHUNK_SECTORS: usize = BITMAP_PAGE_LEN * 8;
const CHUNK_BLOCKS: usize = CHUNK_SECTORS / BLOCK;

/// Runs of a chunk that are searched; they fit a cache line.
const RUNS_MAX: usize = 16;
/// Bits of a word of [`Packed`].
const WORD_BITS: usize = 64;

/// Maps each sector to its layer. A region or chunk with a single layer is one entry.
#[derive(Debug)]
pub(crate) struct Folded {
    /// Of the disk.
    sectors: u64,
    /// The sectors of each layer below the top, nearest first. Sectors past a layer's end are
    /// zeros, whatever deeper layers hold.
    layers: Vec<u64>,
    /// The index of the base image, one more than the deepest layer's.
    base: u8,
    base_sectors: u64,
    regions: Box<[OnceLock<Region>]>,
}

#[derive(Debug)]
enum Region {
    Uniform(u8),
    Chunks(Box<[OnceLock<Chunk>]>),
}

#[derive(Debug)]
enum Chunk {
    Uniform(u8),
    /// Ascending, the first at 0; each goes on to the next one's start.
    Runs(Box<[Span]>),
    Blocks(Box<Blocks>),
    Packed(Box<Packed>),
}

/// The start, in sectors of the chunk, of a run that comes from one place.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u16,
    from: u8,
}

/// Blocks here and there that do not come from where most do.
#[derive(Debug)]
struct Blocks {
    most: u8,
    /// A bit for each block that does not come from `most`.
    other: [u64; CHUNK_BLOCKS / 64],
    /// The blocks in `other` before each of its words.
    before: [u16; CHUNK_BLOCKS / 64],
    /// Where those come from, in order, or [`MIXED`].
    from: Box<[u8]>,
    /// Ascending by block: where each sector of a mixed block comes from.
    mixed: Box<[(u16, [u8; BLOCK])]>,
}

/// Any mixture: as few bits for each sector as tell its places apart.
#[derive(Debug)]
struct Packed {
    /// In ascending order.
    places: Box<[u8]>,
    /// Bits of a sector: 1, 2, 4 or 8.
    bits: usize,
    /// By sector, from the lowest bits on: the index of its place.
    words: Box<[u64]>,
}

impl Folded {
    pub(crate) fn new(sectors: u64, layers: Vec<u64>, base_sectors: u64, base: u8) -> Self {
        let regions = (0..sectors.div_ceil(REGION_SECTORS)).map(|_| OnceLock::new()).collect();
        let folded = Self { sectors, layers, base, base_sectors, regions };
        if folded.layers.is_empty() {
            // There is no layer to query.
            (0..folded.regions.len() as u64)
                .for_each(|region| folded.begin_region(region, |_| false));
        }
        folded
    }

    /// Whether page `page` is in the map.
    #[inline]
    pub(crate) fn is_known(&self, page: u64) -> bool {
        match self.regions.get(usize_of(page / REGION_CHUNKS as u64)).map(OnceLock::get) {
            Some(Some(Region::Chunks(chunks))) => {
                chunks.get(offset_in(page, REGION_CHUNKS as u64)).is_none_or(|c| c.get().is_some())
            }
            Some(None) => false,
            Some(Some(Region::Uniform(_))) | None => true,
        }
    }

    /// Whether anything is known of the region of page `page`.
    pub(crate) fn is_begun(&self, page: u64) -> bool {
        self.regions.get(usize_of(page / REGION_CHUNKS as u64)).is_none_or(|r| r.get().is_some())
    }

    /// Begins region `index`: `has` returns for each layer (0 is the nearest) whether it may have a
    /// sector in the region.
    pub(crate) fn begin_region(&self, index: u64, has: impl Fn(usize) -> bool) {
        let Some(region) = self.regions.get(usize_of(index)) else { return };
        region.get_or_init(|| {
            let (start, end) = (index * REGION_SECTORS, (index + 1) * REGION_SECTORS);
            if let Some(from) = self.uniform(start, end.min(self.sectors), &has) {
                return Region::Uniform(from);
            }
            let pages = start / PAGE_SECTORS..end.min(self.sectors).div_ceil(PAGE_SECTORS);
            // If no layer has a sector here, only the ends of the files matter.
            let plain = !(0..self.layers.len()).any(&has);
            let chunk = |page| match plain {
                true => OnceLock::from(self.plain(page)),
                false => OnceLock::new(),
            };
            Region::Chunks(pages.map(chunk).collect())
        });
    }

    /// Page `page`, of which no layer has a sector.
    fn plain(&self, page: u64) -> Chunk {
        let mut fold = self.begin(page);
        (0..self.layers.len()).rev().for_each(|index| fold.overlay(index, &[]));
        fold.finish()
    }

    /// Where `start..end` comes from, if that is plain to see: no layer has a sector of it or ends
    /// in it.
    fn uniform(&self, start: u64, end: u64, has: &impl Fn(usize) -> bool) -> Option<u8> {
        for (index, &layer_end) in self.layers.iter().enumerate() {
            if layer_end <= start {
                return Some(NOWHERE);
            }
            if layer_end < end || has(index) {
                return None;
            }
        }
        match self.base_sectors {
            base_end if base_end >= end => Some(self.base),
            base_end if base_end <= start => Some(NOWHERE),
            _ => None,
        }
    }

    /// Begins to fold page `page`, with the base.
    pub(crate) fn begin(&self, page: u64) -> Fold<'_> {
        let mut fold = Fold { map: self, page, content: Content::Uniform(self.base) };
        fold.cut(self.base_sectors);
        fold
    }

    /// The layer of `sector` and the end, at most `end`, of the run that is known without looking
    /// further. The page must be known.
    #[inline]
    pub(crate) fn lookup(&self, sector: u64, end: u64) -> (u8, u64) {
        let region = self.regions.get(usize_of(sector / REGION_SECTORS));
        let Some(region) = region.filter(|_| sector < self.sectors) else {
            return (NOWHERE, end);
        };
        let chunk_start = sector / PAGE_SECTORS * PAGE_SECTORS;
        let chunk = match region.get() {
            Some(Region::Uniform(from)) => {
                let region_end = (sector / REGION_SECTORS + 1) * REGION_SECTORS;
                return (*from, end.min(self.sectors).min(region_end));
            }
            Some(Region::Chunks(chunks)) => {
                chunks[offset_in(sector / PAGE_SECTORS, REGION_CHUNKS as u64)].get()
            }
            None => None,
        };
        let Some(chunk) = chunk else {
            debug_assert!(false, "sector {sector} is looked up before its page is known");
            return (NOWHERE, end);
        };
        let limit = end.min(self.sectors).min(chunk_start + PAGE_SECTORS) - chunk_start;
        let (from, run_end) = chunk.lookup(usize_of(sector - chunk_start), usize_of(limit));
        (from, chunk_start + run_end as u64)
    }
}

/// One page being folded: the layers overlaid so far.
pub(crate) struct Fold<'a> {
    map: &'a Folded,
    page: u64,
    content: Content,
}

enum Content {
    Uniform(u8),
    /// By sector.
    Sectors(Box<[u8]>),
}

impl Fold<'_> {
    /// Overlays layer `index` (0 is the nearest) on the layers so far; `bits` is the page in its
    /// file.
    pub(crate) fn overlay(&mut self, index: usize, bits: &[u8]) {
        // A layer's index in the chain is one more.
        let from = u8::try_from(index + 1).unwrap_or(NOWHERE);
        if bits.iter().any(|&byte| byte != 0) {
            let sectors = self.sectors();
            for (byte, of) in bits.iter().zip(sectors.chunks_exact_mut(BLOCK)) {
                match byte {
                    0 => {}
                    0xff => of.fill(from),
                    byte => of.iter_mut().enumerate().for_each(|(bit, of)| {
                        if byte & 1 << bit != 0 {
                            *of = from;
                        }
                    }),
                }
            }
        }
        let layer_end = self.map.layers.get(index).copied().unwrap_or(0);
        self.cut(layer_end);
    }

    /// Nothing comes from sectors at `end` and beyond.
    fn cut(&mut self, end: u64) {
        let inside = end.saturating_sub(self.page * PAGE_SECTORS);
        if inside == 0 {
            self.content = Content::Uniform(NOWHERE);
        } else if inside < PAGE_SECTORS {
            self.sectors()[usize_of(inside)..].fill(NOWHERE);
        }
    }

    fn sectors(&mut self) -> &mut [u8] {
        if let Content::Uniform(from) = self.content {
            self.content = Content::Sectors(vec![from; CHUNK_SECTORS].into());
        }
        match &mut self.content {
            Content::Sectors(sectors) => sectors,
            Content::Uniform(_) => &mut [],
        }
    }

    /// Puts the page into the map, after all layers were overlaid.
    pub(crate) fn publish(self) {
        let (map, page) = (self.map, self.page);
        let region = map.regions.get(usize_of(page / REGION_CHUNKS as u64)).and_then(OnceLock::get);
        if let Some(Region::Chunks(chunks)) = region
            && let Some(chunk) = chunks.get(offset_in(page, REGION_CHUNKS as u64))
        {
            chunk.get_or_init(|| self.finish());
        }
    }

    fn finish(self) -> Chunk {
        let end = self.map.sectors.saturating_sub(self.page * PAGE_SECTORS).min(PAGE_SECTORS);
        match self.content {
            Content::Uniform(from) => Chunk::Uniform(from),
            Content::Sectors(mut sectors) => {
                // Sectors past the end of the disk are never looked up.
                let last = sectors.get(usize_of(end).saturating_sub(1)).copied();
                sectors[usize_of(end)..].fill(last.unwrap_or(NOWHERE));
                Chunk::new(sectors)
            }
        }
    }
}

impl Chunk {
    fn new(sectors: Box<[u8]>) -> Self {
        let mut spans = Vec::new();
        let mut at = 0;
        for run in sectors.chunk_by(|a, b| a == b) {
            if spans.len() == RUNS_MAX {
                let packed = Packed::new(&sectors);
                return match Blocks::new(&sectors, packed.len()) {
                    Some(blocks) => Chunk::Blocks(blocks),
                    None => Chunk::Packed(Box::new(packed)),
                };
            }
            // Below 2^15.
            let start = u16::try_from(at).unwrap_or(u16::MAX);
            spans.push(Span { start, from: run[0] });
            at += run.len();
        }
        match spans[..] {
            [span] => Chunk::Uniform(span.from),
            _ => Chunk::Runs(spans.into()),
        }
    }

    /// The layer of a sector of the chunk, and the end of its run, at most `limit`, which is past
    /// the sector.
    fn lookup(&self, sector: usize, limit: usize) -> (u8, usize) {
        match self {
            Self::Uniform(from) => (*from, limit),
            Self::Runs(spans) => {
                let next = spans.partition_point(|span| usize::from(span.start) <= sector);
                let end = spans.get(next).map_or(limit, |span| limit.min(span.start.into()));
                (spans[next - 1].from, end)
            }
            Self::Blocks(blocks) => blocks.lookup(sector, limit),
            Self::Packed(packed) => packed.lookup(sector, limit),
        }
    }
}

/// The value that `from` begins with, and where its run ends, counted from `start` on.
fn run(from: &[u8], start: usize) -> (u8, usize) {
    (from[0], start + from.iter().take_while(|&&other| other == from[0]).count())
}

impl Packed {
    fn new(sectors: &[u8]) -> Self {
        let mut index = [None; 256];
        sectors.iter().for_each(|&from| index[usize::from(from)] = Some(0));
        let mut places = Vec::new();
        for (from, index) in (0..=u8::MAX).zip(&mut index).filter(|(_, index)| index.is_some()) {
            *index = Some(places.len() as u64);
            places.push(from);
        }
        let is_enough = |bits: &usize| places.len() <= 1 << bits;
        let bits = [1, 2, 4].into_iter().find(is_enough).unwrap_or(8);
        let pack = |of_word: &[u8]| {
            let indices = of_word.iter().rev().map(|&from| index[usize::from(from)].unwrap_or(0));
            indices.fold(0, |word, index| word << bits | index)
        };
        let words = sectors.chunks(WORD_BITS / bits).map(pack).collect();
        Self { places: places.into(), bits, words }
    }

    /// In bytes, as far as it differs from chunk to chunk.
    fn len(&self) -> usize {
        self.places.len() + size_of_val(&*self.words)
    }

    fn lookup(&self, sector: usize, limit: usize) -> (u8, usize) {
        let of_word = WORD_BITS / self.bits;
        let lowest = u64::MAX >> (WORD_BITS - self.bits);
        let index = self.words[sector / of_word] >> (sector % of_word * self.bits) & lowest;
        // It in all places of a word.
        let alike = u64::MAX / lowest * index;
        let mut at = sector;
        while at < limit {
            let skip = at % of_word;
            let unlike = (self.words[at / of_word] ^ alike) >> (skip * self.bits);
            if unlike != 0 {
                at += unlike.trailing_zeros() as usize / self.bits;
                break;
            }
            at += of_word - skip;
        }
        (self.places[usize_of(index)], at.min(limit))
    }
}

impl Blocks {
    /// `None` if it would take more than `bytes_max` bytes.
    fn new(sectors: &[u8], bytes_max: usize) -> Option<Box<Self>> {
        let mut count = [0u32; 256];
        let of_block = |block: &[u8]| match block.iter().all(|from| *from == block[0]) {
            true => block[0],
            false => MIXED,
        };
        let blocks: Vec<u8> = sectors.chunks(BLOCK).map(of_block).collect();
        blocks.iter().for_each(|&from| count[usize::from(from)] += 1);
        let mixed = count[usize::from(MIXED)] as usize;
        count[usize::from(MIXED)] = 0;
        let most = (0..=u8::MAX).max_by_key(|&from| count[usize::from(from)])?;
        let others = blocks.len() - count[usize::from(most)] as usize;
        if size_of::<Self>() + others + mixed * size_of::<(u16, [u8; BLOCK])>() > bytes_max {
            return None;
        }
        let (mut other, mut before) = ([0; CHUNK_BLOCKS / 64], [0; CHUNK_BLOCKS / 64]);
        let (mut from, mut mixed) = (Vec::new(), Vec::new());
        for (index, &of) in blocks.iter().enumerate() {
            if index % 64 == 0 {
                before[index / 64] = u16::try_from(from.len()).ok()?;
            }
            if of != most {
                other[index / 64] |= 1 << (index % 64);
                from.push(of);
            }
            if of == MIXED {
                let block = sectors.as_chunks().0.get(index)?;
                mixed.push((u16::try_from(index).ok()?, *block));
            }
        }
        Some(Box::new(Self { most, other, before, from: from.into(), mixed: mixed.into() }))
    }

    fn lookup(&self, sector: usize, limit: usize) -> (u8, usize) {
        let first = sector / BLOCK;
        let from = self.of(first);
        if from == MIXED {
            let end = limit.min((first + 1) * BLOCK);
            let found = self.mixed.binary_search_by_key(&first, |(block, _)| (*block).into());
            let Ok(found) = found else { return (NOWHERE, end) };
            let base = first * BLOCK;
            return run(&self.mixed[found].1[sector - base..end - base], sector);
        }
        let mut next = first + 1;
        while next * BLOCK < limit && self.of(next) == from {
            next += 1;
        }
        (from, limit.min(next * BLOCK))
    }

    #[inline]
    fn of(&self, block: usize) -> u8 {
        let (word, bit) = (self.other[block / 64], block % 64);
        if word >> bit & 1 == 0 {
            return self.most;
        }
        let rank = (word & ((1 << bit) - 1)).count_ones() as usize;
        self.from[usize::from(self.before[block / 64]) + rank]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mixture_takes_no_more_bits_than_it_has_places() {
        let mut state = 1u64;
        let mut random = |limit: u64| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            usize_of((state >> 33) % limit)
        };
        for (places, bits) in [(2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (66, 8)] {
            let from: Vec<u8> = (0..places - 1).map(|from| from * 3).chain([NOWHERE]).collect();
            let mut sectors = vec![0; CHUNK_SECTORS];
            // Runs of one sector to some, so that there are few blocks of one place.
            let mut at = 0;
            while at < CHUNK_SECTORS {
                let longest = [1, 3, 9][random(3)];
                let end = (at + 1 + random(longest)).min(CHUNK_SECTORS);
                sectors[at..end].fill(from[random(places.into())]);
                at = end;
            }
            let chunk = Chunk::new(sectors.clone().into());
            let Chunk::Packed(packed) = &chunk else { panic!("{places} places") };
            assert_eq!(packed.len(), CHUNK_SECTORS * bits / 8 + usize::from(places));
            for _ in 0..10_000 {
                let sector = random(CHUNK_SECTORS as u64);
                let limit = sector + 1 + random((CHUNK_SECTORS - sector) as u64);
                assert_eq!(chunk.lookup(sector, limit), run(&sectors[sector..limit], sector));
            }
        }
    }
}
