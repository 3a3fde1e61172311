//! The layer map against one byte per sector and layer.

use cow_format::header::UmlHeader;
use cow_format::identity::Timestamp;
use cow_format::{
    BITMAP_PAGE_LEN, Bitmap, CHAIN_LAYERS_MAX, ChainTooDeep, Extent, Geometry, LayerMap,
    PAGE_SECTORS, SECTOR_SIZE, Sector, SectorCount, SectorRange,
};
use proptest::prelude::*;

const ZERO: usize = usize::MAX;

/// The largest disk of the random chains: two chunks and a bit.
const SECTORS_MAX: u64 = 2 * PAGE_SECTORS + 700;

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn geometry(size: u64) -> Geometry {
    *UmlHeader::create(b"/base", size, Timestamp::new(0, 0).unwrap()).unwrap().geometry()
}

fn at(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

/// A layer: its size in bytes and the ranges written to it.
#[derive(Clone, Debug)]
struct Layer {
    size: u64,
    writes: Vec<(u64, u64)>,
    /// Every so manieth sector is written as well; makes a chunk dense.
    every: Option<u64>,
}

impl Layer {
    fn bitmap(&self) -> Bitmap {
        let bitmap = Bitmap::new(SectorCount::covering(self.size));
        self.writes.iter().for_each(|&(start, count)| _ = bitmap.insert(range(start, count)));
        if let Some(step) = self.every {
            (0..PAGE_SECTORS)
                .step_by(at(step))
                .for_each(|sector| _ = bitmap.insert(range(sector, 1)));
        }
        bitmap
    }

    fn has(&self, sector: u64) -> bool {
        self.writes.iter().any(|&(start, count)| (start..start + count).contains(&sector))
            || self.every.is_some_and(|step| sector < PAGE_SECTORS && sector.is_multiple_of(step))
    }

    fn sectors(&self) -> u64 {
        self.size.div_ceil(SECTOR_SIZE)
    }
}

fn size() -> impl Strategy<Value = u64> {
    let near_page =
        (0..=2u64, 0..700u64).prop_map(|(page, more)| (page * PAGE_SECTORS + more) * SECTOR_SIZE);
    let whole = prop_oneof![near_page, (1..=SECTORS_MAX).prop_map(|n| n * SECTOR_SIZE)];
    (whole, prop_oneof![Just(0u64), 1u64..512]).prop_map(|(size, odd)| size.max(512) - odd)
}

fn layer() -> impl Strategy<Value = Layer> {
    let start = prop_oneof![
        0..SECTORS_MAX,
        (0..3u64, 0..16u64).prop_map(|(page, more)| page * PAGE_SECTORS + more)
    ];
    let writes = prop::collection::vec(
        (start, prop_oneof![1u64..16, 1u64..3000, Just(PAGE_SECTORS)]),
        0..12,
    );
    let every = prop_oneof![4 => Just(None), 2 => prop_oneof![2u64..4, 30u64..90].prop_map(Some)];
    (size(), writes, every).prop_map(|(size, writes, every)| Layer { size, writes, every })
}

/// From which layer each byte of a sector's start and end comes, by the plain rule.
fn model(layers: &[Layer], base: Option<u64>, sector: u64, last_byte: bool) -> usize {
    for (index, layer) in layers.iter().enumerate() {
        if sector >= layer.sectors() {
            return ZERO;
        }
        if layer.has(sector) {
            return index;
        }
    }
    let byte = sector * SECTOR_SIZE + if last_byte { SECTOR_SIZE - 1 } else { 0 };
    if base.is_some_and(|size| byte < size) { layers.len() } else { ZERO }
}

fn check(map: &LayerMap, layers: &[Layer], base: Option<u64>, asked: SectorRange) {
    learn(map, layers, asked);
    let data_offsets: Vec<u64> =
        layers.iter().map(|layer| geometry(layer.size).data_offset().get()).chain([0]).collect();
    let mut pos = asked.start_bytes().get();
    let mut last = None;
    for extent in map.extents(asked) {
        let (from, len) = match extent {
            Extent::Data { layer, at: found, len } => {
                assert_eq!(found.get(), data_offsets[layer.get()] + pos);
                (layer.get(), len)
            }
            Extent::Zero { len } => (ZERO, len),
        };
        assert!(len > 0);
        assert_ne!(Some(from), last, "extents are maximal");
        let end = pos + len;
        // The first and the last byte of each sector that the extent touches.
        for sector in pos / SECTOR_SIZE..end.div_ceil(SECTOR_SIZE) {
            if pos <= sector * SECTOR_SIZE {
                assert_eq!(from, model(layers, base, sector, false), "sector {sector}");
            }
            if end >= (sector + 1) * SECTOR_SIZE {
                assert_eq!(from, model(layers, base, sector, true), "sector {sector}");
            }
        }
        (pos, last) = (end, Some(from));
    }
    assert_eq!(pos, asked.start_bytes().get() + asked.len_bytes());
}

/// The map, with no bitmap page known.
fn build(layers: &[Layer], base: Option<u64>) -> Result<LayerMap, ChainTooDeep> {
    let geometries: Vec<_> = layers.iter().map(|layer| geometry(layer.size)).collect();
    let top = Bitmap::unknown(geometries[0].sectors());
    LayerMap::new(&geometries[0], top, &geometries[1..], base)
}

/// Adds only the unknown pages of `asked`, as a caller that reads files does.
fn learn(map: &LayerMap, layers: &[Layer], asked: SectorRange) {
    if map.next_unknown(asked).is_none() {
        return;
    }
    let bitmaps: Vec<_> = layers.iter().map(Layer::bitmap).collect();
    let mut bits = [0; BITMAP_PAGE_LEN];
    while let Some(page) = map.next_unknown(asked) {
        assert!(
            (asked.start().get() / PAGE_SECTORS..=asked.end().get() / PAGE_SECTORS).contains(&page)
        );
        if let Some(top) = map.top() {
            bitmaps[0].render_page(page, &mut bits);
            top.load_durable(page, &bits);
            top.set_known(page..page + 1);
        }
        if map.is_folded(page) {
            continue;
        }
        let has =
            |index: usize| map.region_of(page).any(|page| !bitmaps[index + 1].page_is_empty(page));
        map.begin_region(page, has);
        let mut fold = map.fold(page);
        for (index, bitmap) in bitmaps[1..].iter().enumerate().rev() {
            bitmap.render_page(page, &mut bits);
            fold.overlay(index, &bits);
        }
        fold.publish();
    }
}

/// A failure's seed goes to `map.regressions` beside this file, and is tried first from then on.
fn config() -> ProptestConfig {
    let seeds = proptest::test_runner::FileFailurePersistence::WithSource("regressions");
    ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 64 },
        failure_persistence: Some(Box::new(seeds)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn is_like_layers_of_bytes(
        layers in prop::collection::vec(layer(), 1..6),
        base in prop::option::of(size()),
        asked in prop::collection::vec((0..SECTORS_MAX + 1000, 0u64..5000), 1..4),
    ) {
        let map = build(&layers, base).unwrap();
        prop_assert_eq!(map.sectors().get(), layers[0].sectors());
        for (start, count) in asked {
            check(&map, &layers, base, range(start, count));
        }
        check(&map, &layers, base, range(0, SECTORS_MAX + 1000));
    }
}

#[test]
fn the_tail_of_an_odd_base_is_zeros_to_the_end_of_its_sector() {
    let empty = |size| Layer { size, writes: vec![], every: None };
    let map = build(&[empty(4096)], Some(1000)).unwrap();
    learn(&map, &[empty(4096)], range(0, 8));
    let extents: Vec<_> = map.extents(range(0, 8)).collect();
    let [Extent::Data { layer, at, len: 1000 }, Extent::Zero { len: 3096 }] = extents[..] else {
        panic!("{extents:?}");
    };
    assert_eq!((layer.get(), at.get()), (1, 0));
}

#[test]
fn a_raw_image_is_its_own_layer() {
    let map = LayerMap::raw(1000);
    assert!(map.top().is_none());
    assert_eq!(map.sectors().get(), 2);
    let extents: Vec<_> = map.extents(range(1, 1)).collect();
    let [Extent::Data { layer, at, len: 488 }, Extent::Zero { len: 24 }] = extents[..] else {
        panic!("{extents:?}")
    };
    assert_eq!((layer.get(), at.get()), (0, 512));
}

#[test]
fn a_write_is_seen_at_once() {
    let layers = [Layer { size: 1 << 20, writes: vec![], every: None }];
    let map = build(&layers, Some(1 << 20)).unwrap();
    learn(&map, &layers, range(0, 8));
    map.top().unwrap().insert(range(3, 2));
    let from: Vec<_> = map
        .extents(range(0, 8))
        .map(|extent| match extent {
            Extent::Data { layer, len, .. } => (layer.get(), len),
            Extent::Zero { len } => (ZERO, len),
        })
        .collect();
    assert_eq!(from, [(1, 1536), (0, 1024), (1, 1536)]);
}

#[test]
fn the_deepest_chain_works_and_a_deeper_one_does_not() {
    let size = SECTORS_MAX * SECTOR_SIZE;
    let layer =
        |n: u64| Layer { size, writes: vec![(n * 3, 5), (PAGE_SECTORS - 2, 1 + n)], every: None };
    let mut layers: Vec<_> = (0..CHAIN_LAYERS_MAX as u64).map(layer).collect();
    let map = build(&layers, Some(size)).unwrap();
    check(&map, &layers, Some(size), range(0, SECTORS_MAX));
    layers.push(layer(64));
    assert_eq!(build(&layers, Some(size)).unwrap_err(), ChainTooDeep { found: 65 });
}
