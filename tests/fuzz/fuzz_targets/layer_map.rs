//! The map of a chain from bitmaps with any bits, beside a look at each layer's bits.
//!
//! Input: the sizes of the disk, of the layers below and of the base; the layers' bits; the ranges
//! that are looked up.

#![no_main]

use cow_format::header::NativeHeader;
use cow_format::{
    BITMAP_PAGE_LEN, Bitmap, Extent, Geometry, LayerMap, PAGE_SECTORS, SECTOR_SIZE, Sector,
    SectorCount, SectorRange,
};
use fuzz::{Input, range};
use libfuzzer_sys::fuzz_target;

const SECTORS_MAX: u64 = 2 * PAGE_SECTORS + 700;
const LAYERS_MAX: u64 = 6;
const LOOK_UP_MAX: u64 = 300;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let layers: Vec<Layer> =
        (0..=input.below(LAYERS_MAX)).map(|_| Layer::new(&mut input)).collect();
    let base = (input.u8() & 1 != 0).then(|| input.below(SECTORS_MAX * SECTOR_SIZE));
    let chain = Chain::new(layers, base);
    while !input.is_empty() {
        let start = chain.position(&mut input);
        let range = range(start, 1 + input.below(LOOK_UP_MAX));
        match input.u8() & 1 {
            0 => chain.look_up(range),
            _ => {
                chain.learn(range);
                _ = chain.map.top().unwrap().insert(range);
                chain.look_up(range);
            }
        }
    }
});

struct Layer {
    geometry: Geometry,
    /// The bits in its file: where they begin, in bytes.
    bits: Vec<(usize, Vec<u8>)>,
}

impl Layer {
    fn new(input: &mut Input) -> Self {
        let size = 1 + input.below(SECTORS_MAX) * SECTOR_SIZE + input.below(SECTOR_SIZE);
        let header = NativeHeader::create(size, uuid::Uuid::nil(), None).unwrap();
        let bits = (0..input.u8() % 4).map(|_| {
            let at = input.below(3 * BITMAP_PAGE_LEN as u64);
            (usize::try_from(at).unwrap(), input.short().to_vec())
        });
        Layer { bits: bits.collect(), geometry: *header.geometry() }
    }

    /// A page of the bitmap as it is in the file.
    fn page(&self, page: u64) -> [u8; BITMAP_PAGE_LEN] {
        let mut bytes = [0; BITMAP_PAGE_LEN];
        let page = usize::try_from(page).unwrap() * BITMAP_PAGE_LEN;
        for (at, bits) in &self.bits {
            for (index, byte) in bits.iter().enumerate() {
                if let Some(place) = (at + index).checked_sub(page).and_then(|at| bytes.get_mut(at))
                {
                    *place |= byte;
                }
            }
        }
        bytes
    }

    fn has(&self, sector: u64) -> bool {
        let at = usize::try_from(sector / 8).unwrap();
        let byte = |(start, bits): &(usize, Vec<u8>)| Some(*bits.get(at.checked_sub(*start)?)?);
        sector < self.geometry.sectors().get()
            && self.bits.iter().filter_map(byte).any(|byte| byte & (1 << (sector % 8)) != 0)
    }
}

struct Chain {
    layers: Vec<Layer>,
    base: Option<u64>,
    map: LayerMap,
}

impl Chain {
    fn new(layers: Vec<Layer>, base: Option<u64>) -> Self {
        let top = Bitmap::unknown(layers[0].geometry.sectors());
        let below: Vec<Geometry> = layers[1..].iter().map(|layer| layer.geometry).collect();
        let map = LayerMap::new(&layers[0].geometry, top, &below, base).unwrap();
        Chain { layers, base, map }
    }

    /// A sector of the disk, mostly near bits.
    fn position(&self, input: &mut Input) -> u64 {
        let layer = &self.layers[usize::from(input.u8()) % self.layers.len()];
        let near = layer.bits.first().map_or(0, |(at, _)| *at as u64 * 8);
        (near + input.below(PAGE_SECTORS)) % self.map.sectors().get()
    }

    /// Reads what is unknown, as block-io does.
    fn learn(&self, range: SectorRange) {
        while let Some(page) = self.map.next_unknown(range) {
            if !self.map.is_region_begun(page) {
                self.map.begin_region(page, |index| !self.layers[index + 1].bits.is_empty());
            }
            let top = self.map.top().unwrap();
            top.load_durable(page, &self.layers[0].page(page));
            top.set_known(page..page + 1);
            if !self.map.is_folded(page) {
                let mut fold = self.map.fold(page);
                for (index, layer) in self.layers[1..].iter().enumerate().rev() {
                    // Nothing at all for a layer that ends before this page.
                    let len = match page < layer.geometry.bitmap_pages() {
                        true => layer.geometry.bitmap_page_len(page),
                        false => 0,
                    };
                    fold.overlay(index, &layer.page(page)[..len]);
                }
                fold.publish();
            }
            assert_ne!(self.map.next_unknown(range), Some(page));
        }
    }

    fn look_up(&self, range: SectorRange) {
        self.learn(range);
        let mut pos = range.start_bytes().get();
        let end = pos + range.len_bytes();
        for extent in self.map.extents(range) {
            let (Extent::Data { len, .. } | Extent::Zero { len }) = extent;
            assert!(len > 0);
            self.check(pos, extent);
            pos += len;
        }
        assert_eq!(pos, end);
    }

    /// Every sector of an extent that begins at byte `pos` of the disk.
    fn check(&self, pos: u64, extent: Extent) {
        let (Extent::Data { len, .. } | Extent::Zero { len }) = extent;
        let mut done = 0;
        while done < len {
            let expected = self.expected(pos + done);
            match (extent, expected) {
                (Extent::Data { layer, at, .. }, Some((expected, start))) => {
                    assert_eq!((layer.get(), at.get() + done), (expected, start));
                }
                (Extent::Zero { .. }, None) => {}
                (found, expected) => panic!("{found:?} at {pos}; expected {expected:?}"),
            }
            // Within the last sector of a base its end counts.
            done += SECTOR_SIZE - (pos + done) % SECTOR_SIZE;
        }
    }

    /// Which layer's file has byte `pos` of the disk, and where.
    fn expected(&self, pos: u64) -> Option<(usize, u64)> {
        let sector = pos / SECTOR_SIZE;
        if sector >= self.map.sectors().get() {
            return None;
        }
        let one = SectorRange::new(Sector::new(sector), SectorCount::new(1)).unwrap();
        if self.map.top().unwrap().contains(one) {
            return Some((0, self.layers[0].geometry.data_offset().get() + pos));
        }
        for (index, layer) in self.layers.iter().enumerate().skip(1) {
            if sector >= layer.geometry.sectors().get() {
                return None;
            }
            if layer.has(sector) {
                return Some((index, layer.geometry.data_offset().get() + pos));
            }
        }
        self.base.filter(|base| pos < *base).map(|_| (self.layers.len(), pos))
    }
}
