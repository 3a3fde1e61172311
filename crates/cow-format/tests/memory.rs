//! What bitmaps and maps cost, in bytes asked of the allocator. Alone in its file: the count is of
//! the whole process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use cow_format::header::UmlHeader;
use cow_format::identity::Timestamp;
use cow_format::{BITMAP_PAGE_LEN, Bitmap, LayerMap, Sector, SectorCount, SectorRange};

/// 16 MiB each.
const PAGES: u64 = 64;

struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system allocator with its own arguments; only a counter is kept
// beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The bytes that are held when `make` is done, beyond what was held before.
fn held<T>(make: impl FnOnce() -> T) -> usize {
    let before = ALLOCATED.load(Ordering::Relaxed);
    let value = make();
    let after = ALLOCATED.load(Ordering::Relaxed);
    drop(value);
    after - before
}

fn insert_4k(bitmap: &Bitmap, block: u64) {
    bitmap.insert(SectorRange::new(Sector::new(block * 8), SectorCount::new(8)).unwrap());
}

// One test, so that no other thread of the harness allocates meanwhile.
#[test]
fn memory_follows_what_is_written() {
    let empty = held(|| Bitmap::new(SectorCount::covering(1 << 40)));
    assert!(empty < 200 << 10, "1 TiB, empty: {empty} bytes");

    let scattered = held(|| {
        let bitmap = Bitmap::new(SectorCount::covering(100 << 30));
        // 1 GiB in pieces of 4 KiB, evenly scattered: each of the 6400 chunks is touched.
        let blocks = (100u64 << 30) / 4096;
        let step = blocks / (1 << 18);
        (0..1 << 18).for_each(|n| insert_4k(&bitmap, n * step));
        assert_eq!(bitmap.present().get(), 8 << 18);
        bitmap
    });
    assert!(scattered < 6 << 20, "100 GiB with 1 GiB in scattered 4 KiB writes: {scattered} bytes");

    let frozen = Bitmap::new(SectorCount::covering(100 << 30));
    (0..1 << 18).for_each(|n| insert_4k(&frozen, n * 100));
    let header = UmlHeader::create(b"/base", 100 << 30, Timestamp::new(0, 0).unwrap()).unwrap();
    let geometry = *header.geometry();
    let map = |depth: usize| {
        let top = Bitmap::new(geometry.sectors());
        held(|| {
            let map =
                LayerMap::new(&geometry, top, &vec![geometry; depth], Some(100 << 30)).unwrap();
            while let Some(page) = map.next_unknown(geometry.all()) {
                map.begin_region(page, |_| true);
                let mut bits = [0; BITMAP_PAGE_LEN];
                frozen.render_page(page, &mut bits);
                let mut fold = map.fold(page);
                (0..depth).rev().for_each(|index| fold.overlay(index, &bits));
                fold.publish();
            }
            map
        })
    };
    let (shallow, folded, deep) = (map(0), map(1), map(8));
    assert!(shallow < 1 << 10, "map of an overlay of 100 GiB: {shallow} bytes");
    assert!(
        folded < 5 << 20,
        "map over a layer with 1 GiB in scattered 4 KiB writes: {folded} bytes"
    );
    assert!(deep < folded + (4 << 10), "the same layer 8 times: {deep} bytes");

    // The worst there is, and a sixteenth of what docs/guide/operations.md says of 1 TiB: in each
    // 16 MiB a block and part of one.
    let worst = held(|| {
        let bitmap = Bitmap::new(SectorCount::covering(1 << 36));
        for page in 0..bitmap.pages() {
            insert_4k(&bitmap, page * 4096);
            let odd = Sector::new(page * 32768 + 9);
            bitmap.insert(SectorRange::new(odd, SectorCount::new(1)).unwrap());
        }
        bitmap
    });
    assert!(worst < 296 << 16, "64 GiB, all of it mixed: {worst} bytes");
    let mixed = |depth: usize| {
        let top = Bitmap::new(geometry.sectors());
        // Each sector from another layer, or from the base.
        let of = |index: usize| -> Vec<u8> {
            let has = |sector: usize| u8::from(sector % (depth + 1) == index);
            let byte = |first: usize| (0..8).fold(0, |byte, bit| byte | has(first + bit) << bit);
            (0..BITMAP_PAGE_LEN).map(|at| byte(at * 8)).collect()
        };
        let layers: Vec<_> = (0..depth).map(of).collect();
        held(|| {
            let map =
                LayerMap::new(&geometry, top, &vec![geometry; depth], Some(100 << 30)).unwrap();
            for page in 0..PAGES {
                map.begin_region(page, |_| true);
                let mut fold = map.fold(page);
                for (index, bits) in layers.iter().enumerate().rev() {
                    fold.overlay(index, bits);
                }
                fold.publish();
            }
            map
        })
    };
    for (places, bytes_per_page) in [(2, 4300), (4, 8400), (16, 16_600)] {
        let bytes = mixed(places - 1);
        // 40 KiB are for the region of 16 GiB.
        let most = usize::try_from(PAGES).unwrap() * bytes_per_page + (48 << 10);
        assert!(bytes < most, "1 GiB from {places} places: {bytes} bytes");
    }

    let whole = held(|| {
        let bitmap = Bitmap::new(SectorCount::covering(1 << 40));
        bitmap.insert(SectorRange::new(Sector::new(0), bitmap.sectors()).unwrap());
        bitmap
    });
    assert!(whole < 4 << 20, "1 TiB, all present: {whole} bytes");
    println!("bitmap bytes: 1 TiB empty {empty}, full {whole}; 100 GiB scattered {scattered}");
    println!("map bytes, 100 GiB: {shallow}, over a scattered layer {folded}, over 8 such {deep}");
}
