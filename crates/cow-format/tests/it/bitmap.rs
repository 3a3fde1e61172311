//! The bitmap against a `Vec<bool>`, under threads, and in bytes of memory (see also `memory.rs`).

use cow_format::{BITMAP_PAGE_LEN, Bitmap, PAGE_SECTORS, Sector, SectorCount, SectorRange};
use proptest::prelude::*;

/// Three pages and a bit, so that the last page and the last word are partial.
const SECTORS: u64 = 3 * PAGE_SECTORS + 1003;

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u64, u64),
    LoadDurable(u64, Vec<u8>),
    LoadLive(u64, Vec<u8>),
}

/// Starts and lengths near the borders of words, blocks and pages, and some anywhere.
fn position() -> impl Strategy<Value = u64> {
    let near = |unit: u64| {
        (0..=SECTORS / unit, -2i64..=2).prop_map(move |(n, d)| (n * unit).saturating_add_signed(d))
    };
    prop_oneof![near(8), near(64), near(PAGE_SECTORS), 0..SECTORS + 100]
}

fn page_bytes() -> impl Strategy<Value = Vec<u8>> {
    let sparse = prop::collection::vec((0..BITMAP_PAGE_LEN, any::<u8>()), 0..20).prop_map(|set| {
        let mut bytes = vec![0; BITMAP_PAGE_LEN];
        set.into_iter().for_each(|(at, byte)| bytes[at] = byte);
        bytes
    });
    prop_oneof![
        sparse,
        Just(vec![0xff; BITMAP_PAGE_LEN]),
        prop::collection::vec(any::<u8>(), 0..300)
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (position(), prop_oneof![1u64..20, 1u64..3000, Just(PAGE_SECTORS), 1..SECTORS])
            .prop_map(|(start, count)| Op::Insert(start, count)),
        1 => (0u64..5, page_bytes()).prop_map(|(page, bytes)| Op::LoadDurable(page, bytes)),
        1 => (0u64..5, page_bytes()).prop_map(|(page, bytes)| Op::LoadLive(page, bytes)),
    ]
}

/// Applies `op` to both; checks what `insert` says.
fn apply(op: &Op, bitmap: &Bitmap, model: &mut [bool]) {
    match op {
        Op::Insert(start, count) => {
            let clipped = range(*start, *count).clipped_to(Sector::new(SECTORS));
            let sectors = &mut model[at(clipped.start().get())..at(clipped.end().get())];
            assert_eq!(bitmap.insert(range(*start, *count)), sectors.contains(&false));
            sectors.fill(true);
        }
        Op::LoadDurable(page, bytes) => {
            bitmap.load_durable(*page, bytes);
            load(model, *page, bytes);
        }
        Op::LoadLive(page, bytes) => {
            bitmap.load_live(*page, bytes);
            load(model, *page, bytes);
        }
    }
}

fn load(model: &mut [bool], page: u64, bytes: &[u8]) {
    for bit in 0..bytes.len() * 8 {
        if let Some(sector) = model.get_mut(at(page * PAGE_SECTORS) + bit) {
            *sector |= bytes[bit / 8] & (1 << (bit % 8)) != 0;
        }
    }
}

fn at(sector: u64) -> usize {
    usize::try_from(sector).unwrap()
}

fn check(bitmap: &Bitmap, model: &[bool]) {
    let present = model.iter().filter(|&&bit| bit).count() as u64;
    assert_eq!(bitmap.present().get(), present);
    assert_eq!(bitmap.last_present().map(|s| at(s.get())), model.iter().rposition(|&bit| bit));
    let mut pos = 0;
    let mut last = None;
    for run in bitmap.runs(range(0, SECTORS + 5000)) {
        assert_eq!(run.range.start().get(), pos);
        assert_ne!(Some(run.present), last, "runs are maximal");
        for sector in pos..run.range.end().get() {
            assert_eq!(run.present, model.get(at(sector)) == Some(&true), "sector {sector}");
        }
        (pos, last) = (run.range.end().get(), Some(run.present));
    }
    assert_eq!(pos, SECTORS + 5000);
    for page in 0..bitmap.pages() + 1 {
        let mut bytes = [0xaa; BITMAP_PAGE_LEN];
        bitmap.render_page(page, &mut bytes);
        assert_eq!(bitmap.page_is_empty(page), bytes.iter().all(|&byte| byte == 0));
        for bit in 0..PAGE_SECTORS {
            let sector = at(page * PAGE_SECTORS + bit);
            let set = bytes[at(bit / 8)] & (1 << (bit % 8)) != 0;
            assert_eq!(set, model.get(sector) == Some(&true), "sector {sector}");
        }
        let word = bitmap.word(page * 512 + 3).to_le_bytes();
        assert_eq!(word, bytes[24..32]);
    }
}

/// A failure's seed goes to `bitmap.regressions` beside this file, and is tried first from then on.
fn config() -> ProptestConfig {
    let seeds = proptest::test_runner::FileFailurePersistence::WithSource("regressions");
    ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 48 },
        failure_persistence: Some(Box::new(seeds)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn is_like_a_vec_of_bools(ops in prop::collection::vec(op(), 1..40), ask in (position(), 1u64..3000)) {
        let bitmap = Bitmap::new(SectorCount::new(SECTORS));
        let mut model = vec![false; at(SECTORS)];
        for op in &ops {
            apply(op, &bitmap, &mut model);
        }
        check(&bitmap, &model);
        let (start, count) = ask;
        let all = (start..start + count).all(|sector| model.get(at(sector)) == Some(&true));
        prop_assert_eq!(bitmap.contains(range(start, count)), all);
        prop_assert!(bitmap.contains(range(start, 0)));
    }
}

#[test]
fn threads_may_insert_at_once() {
    // Miri takes some milliseconds for each.
    const END: u64 = if cfg!(miri) { 200 } else { SECTORS };
    let bitmap = Bitmap::new(SectorCount::new(SECTORS));
    let barrier = std::sync::Barrier::new(4);
    // Thread t owns every sector n with n % 7 == t or t + 4 … and all share words, blocks and the
    // first touch.
    std::thread::scope(|scope| {
        for t in 0..4 {
            let (bitmap, barrier) = (&bitmap, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for sector in (0..END).filter(|n| n % 7 == t) {
                    assert!(bitmap.insert(range(sector, 1)));
                    assert!(bitmap.contains(range(sector, 1)));
                }
            });
        }
    });
    let model: Vec<bool> = (0..SECTORS).map(|n| n < END && n % 7 < 4).collect();
    if !cfg!(miri) {
        check(&bitmap, &model);
    }
    let present = model.iter().filter(|present| **present).count();
    assert_eq!(bitmap.present(), SectorCount::new(present as u64));
    assert_eq!(bitmap.dirty_pages(), END.div_ceil(PAGE_SECTORS));
}

#[test]
fn a_page_is_known_when_its_file_has_been_asked() {
    let bitmap = Bitmap::unknown(SectorCount::new(SECTORS));
    let unknown = |start, count| bitmap.next_unknown(range(start, count));
    assert_eq!((unknown(5, 1), unknown(PAGE_SECTORS - 1, 2)), (Some(0), Some(0)));
    assert_eq!((unknown(SECTORS, 100), unknown(5, 0)), (None, None));
    bitmap.load_durable(1, &[0xff; BITMAP_PAGE_LEN]);
    assert_eq!(unknown(PAGE_SECTORS, 1), Some(1));
    bitmap.set_known(1..2);
    assert_eq!(
        (unknown(PAGE_SECTORS, PAGE_SECTORS), unknown(PAGE_SECTORS, SECTORS)),
        (None, Some(2))
    );
    bitmap.set_known(2..99);
    assert_eq!((unknown(PAGE_SECTORS, SECTORS), unknown(0, SECTORS)), (None, Some(0)));
    bitmap.set_known(0..bitmap.pages());
    assert_eq!(unknown(0, SECTORS), None);
    // What is read once more, and late, takes nothing back; what only the live bitmap has must be
    // flushed.
    assert!(bitmap.insert(range(3, 1)));
    bitmap.load_durable(0, &[0]);
    assert!(bitmap.contains(range(3, 1)) && bitmap.contains(range(PAGE_SECTORS, PAGE_SECTORS)));
    assert_eq!(bitmap.dirty_pages(), 1);
    bitmap.load_live(2, &[1]);
    assert_eq!(bitmap.dirty_pages(), 2);
}

/// A page of ones is read by one thread while another asks for what is known.
#[test]
fn what_is_known_has_its_bits() {
    const ROUNDS: usize = if cfg!(miri) { 4 } else { 200 };
    for round in 0..ROUNDS {
        let bitmap = Bitmap::unknown(SectorCount::new(SECTORS));
        // The last page alone, or all: pages and regions are marked in different places.
        let first = if round % 2 == 0 { bitmap.pages() - 1 } else { 0 };
        let some = range((bitmap.pages() - 1) * PAGE_SECTORS, 64);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                bitmap.load_durable(bitmap.pages() - 1, &[0xff; 8]);
                bitmap.set_known(first..bitmap.pages());
            });
            while bitmap.next_unknown(some).is_some() {
                std::hint::spin_loop();
            }
            assert!(bitmap.contains(some));
        });
    }
}

#[test]
fn the_largest_disk_needs_little_and_answers() {
    let bitmap = Bitmap::new(SectorCount::covering(cow_format::VIRTUAL_SIZE_MAX));
    let last = bitmap.sectors().get() - 1;
    assert!(bitmap.insert(range(last, 1)));
    assert!(!bitmap.insert(range(last, 1)));
    assert_eq!(bitmap.runs(range(0, last + 1)).count(), 2);
    assert_eq!(bitmap.last_present(), Some(Sector::new(last)));
    assert_eq!(bitmap.word(u64::MAX), 0);
    bitmap.load_durable(u64::MAX, &[1]);
    assert!(bitmap.page_is_empty(u64::MAX));
}
