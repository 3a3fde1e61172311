//! The flush machine: what is written when, what stays dirty, and that a pass ends.
//!
//! That bits cannot be written before the data sync is a matter of types: `WritePages` comes only
//! out of `AwaitSync::synced`.

use cow_format::header::UmlHeader;
use cow_format::identity::Timestamp;
use cow_format::{
    AwaitSync, Bitmap, FLUSH_BATCH_PAGES, FlushPass, Geometry, Next, PAGE_SECTORS, Sector,
    SectorCount, SectorRange, WritePages,
};

fn disk(size: u64) -> (Geometry, Bitmap) {
    let header = UmlHeader::create(b"/base", size, Timestamp::new(0, 0).unwrap()).unwrap();
    let geometry = *header.geometry();
    (geometry, Bitmap::new(geometry.sectors()))
}

fn insert(bitmap: &Bitmap, sector: u64) {
    bitmap.insert(SectorRange::new(Sector::new(sector), SectorCount::new(1)).unwrap());
}

fn write<'a>(step: AwaitSync<'a>) -> WritePages<'a> {
    match step.synced() {
        Next::Write(pages) => pages,
        Next::Complete => panic!("complete"),
    }
}

fn complete(step: AwaitSync<'_>) {
    assert!(matches!(step.synced(), Next::Complete));
}

/// The file offsets and bytes of a batch.
fn writes(pages: &WritePages<'_>) -> Vec<(u64, Vec<u8>)> {
    pages.writes().map(|write| (write.at.get(), write.bytes.to_vec())).collect()
}

#[test]
fn a_clean_bitmap_takes_one_sync() {
    let (geometry, bitmap) = disk(1 << 30);
    complete(FlushPass::begin(&bitmap, &geometry));
    insert(&bitmap, 5);
    complete(write(FlushPass::begin(&bitmap, &geometry)).written());
    insert(&bitmap, 5);
    complete(FlushPass::begin(&bitmap, &geometry));
}

#[test]
fn a_bit_set_after_the_snapshot_belongs_to_the_next_pass() {
    let (geometry, bitmap) = disk(1 << 20);
    insert(&bitmap, 0);
    let pass = FlushPass::begin(&bitmap, &geometry);
    insert(&bitmap, 9);
    let pages = write(pass);
    insert(&bitmap, 18);
    let mut first = vec![0; 256]; // no more than the bitmap has
    first[0] = 1;
    assert_eq!(writes(&pages), [(8192, first.clone())]);
    complete(pages.written());
    let pages = write(FlushPass::begin(&bitmap, &geometry));
    first[1..3].copy_from_slice(&[2, 4]);
    assert_eq!(writes(&pages), [(8192, first)]);
}

#[test]
fn neighbouring_pages_are_one_write() {
    let (geometry, bitmap) = disk((16 << 20) * 9 + 4096);
    [0, 1, 2, 5, 8, 9].iter().for_each(|page| insert(&bitmap, page * PAGE_SECTORS));
    let pages = write(FlushPass::begin(&bitmap, &geometry));
    let found: Vec<_> = writes(&pages).iter().map(|(at, bytes)| (*at, bytes.len())).collect();
    assert_eq!(found, [(8192, 3 * 4096), (8192 + 5 * 4096, 4096), (8192 + 8 * 4096, 4096 + 1)]);
    for (_, bytes) in writes(&pages) {
        assert!(bytes.iter().enumerate().all(|(at, &byte)| byte == u8::from(at % 4096 == 0)));
    }
}

#[test]
fn a_pass_that_fails_leaves_its_pages_dirty() {
    let (geometry, bitmap) = disk(1 << 30);
    let dirty = |expected: u64| assert_eq!(bitmap.dirty_pages(), expected);
    insert(&bitmap, 0);
    insert(&bitmap, PAGE_SECTORS * 3);
    dirty(2);
    let pass = FlushPass::begin(&bitmap, &geometry);
    dirty(0);
    drop(pass); // the data sync failed
    dirty(2);
    let pages = write(FlushPass::begin(&bitmap, &geometry));
    dirty(0);
    drop(pages); // a page write failed
    dirty(2);
    let last = write(FlushPass::begin(&bitmap, &geometry)).written();
    dirty(0);
    drop(last); // the second sync failed
    dirty(2);
    complete(write(FlushPass::begin(&bitmap, &geometry)).written());
    dirty(0);
}

#[test]
fn many_pages_go_in_batches_that_share_their_syncs() {
    let (geometry, bitmap) = disk(1 << 40);
    let dirty = 2 * FLUSH_BATCH_PAGES + 7;
    (0..dirty as u64).for_each(|page| insert(&bitmap, page * 3 * PAGE_SECTORS));
    let mut step = FlushPass::begin(&bitmap, &geometry);
    let (mut syncs, mut pages) = (0, 0);
    loop {
        syncs += 1;
        match step.synced() {
            Next::Complete => break,
            Next::Write(batch) => {
                let count = batch.writes().count();
                assert!(count <= FLUSH_BATCH_PAGES);
                pages += count;
                // Writers behind the pass do not hold it up; their pages are the next pass's.
                insert(&bitmap, 1 + syncs);
                step = batch.written();
            }
        }
    }
    assert_eq!((syncs, pages), (4, dirty));
    assert_eq!(bitmap.dirty_pages(), 1);
}

#[test]
fn a_live_bitmap_is_made_durable_by_the_next_flush() {
    let (geometry, bitmap) = disk(1 << 30);
    bitmap.load_durable(0, &[1]);
    bitmap.load_live(0, &[1]);
    complete(FlushPass::begin(&bitmap, &geometry));
    bitmap.load_live(0, &[3]);
    let pages = write(FlushPass::begin(&bitmap, &geometry));
    assert_eq!(writes(&pages)[0].1[0], 3);
}

#[test]
fn a_bit_that_is_found_set_is_flushed_by_a_later_pass() {
    // One thread sets nearly a whole page's bits, which takes a while. The other sees the first of
    // them, so a write of its own to that sector sets nothing; its flush must cover the bit all the
    // same.
    const PAGES: u64 = if cfg!(miri) { 3 } else { 400 };
    let (geometry, bitmap) = disk(PAGES * (16 << 20));
    let barrier = std::sync::Barrier::new(2);
    let mut missed = Vec::new();
    let range = |page: u64, count| {
        SectorRange::new(Sector::new(page * PAGE_SECTORS), SectorCount::new(count)).unwrap()
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for page in 0..PAGES {
                barrier.wait();
                bitmap.insert(range(page, PAGE_SECTORS - 1));
            }
        });
        for page in 0..PAGES {
            barrier.wait();
            while !bitmap.contains(range(page, 1)) {
                std::hint::spin_loop();
            }
            bitmap.insert(range(page, 1));
            let at = geometry.page_at(page).get();
            let mut durable = false;
            let mut step = FlushPass::begin(&bitmap, &geometry);
            while let Next::Write(pages) = step.synced() {
                for write in pages.writes().filter(|write| write.at.get() <= at) {
                    let byte = write.bytes.get(usize::try_from(at - write.at.get()).unwrap());
                    durable |= byte.is_some_and(|byte| byte & 1 == 1);
                }
                step = pages.written();
            }
            missed.extend((!durable).then_some(page));
        }
    });
    assert!(
        missed.is_empty(),
        "bits that were seen and not durable after a flush: pages {missed:?}"
    );
}
