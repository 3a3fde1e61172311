//! Bitmaps are read where they are asked for: what cannot be read fails, nothing is taken for
//! absent because it was not loaded, and the order of loading does not matter.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use block_io::image::{CreateOptions, create_cow, snapshot};
use block_io::ops::reset;
use block_io::storage::{Access, Env, Storage};
use block_io::testing::sim::{Choices, Operation, Sim, Verdict};
use block_io::{CowFormat, Disk, DiskError, DiskOptions, Host};
use cow_format::{
    BITMAP_PAGE_LEN, ByteOffset, Geometry, HEADER_PREFIX_LEN, Header, PAGE_SECTORS, Sector,
    SectorCount, SectorRange,
};

const FORMATS: [CowFormat; 2] = [CowFormat::Uml, CowFormat::Native];
const EIO: i32 = 5;
const BASE: u8 = 0xbb;
/// Two regions of the bitmap, of 1024 pages each.
const SECTORS: u64 = 1100 * PAGE_SECTORS;
/// One sector in the page that will fail, one in its neighbour, which is read with it, one further
/// on, one in the very last page.
const BROKEN: u64 = PAGE_SECTORS + 5;
const WRITTEN: [u64; 4] = [5, BROKEN, 40 * PAGE_SECTORS + 5, 1099 * PAGE_SECTORS + 5];

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn options() -> DiskOptions {
    DiskOptions { lock_wait: Duration::ZERO, ..DiskOptions::default() }
}

fn open(sim: &Sim, name: &str) -> Disk<Sim> {
    Disk::open_cow_in(sim.clone(), Path::new(name), None, &options()).unwrap()
}

fn sector(disk: &Disk<Sim>, sector: u64) -> Result<u8, DiskError> {
    let mut buf = [0; 512];
    disk.read(range(sector, 1), &mut buf)?;
    assert!(buf.iter().all(|byte| *byte == buf[0]));
    Ok(buf[0])
}

/// A COW file `/cow` in which [`WRITTEN`] hold 1 to 4, over a base of [`BASE`].
fn sim(format: CowFormat) -> Sim {
    let sim = Sim::new();
    let base = sim.create_new(Path::new("/base")).unwrap();
    for sector in WRITTEN.into_iter().flat_map(|sector| [sector, sector + 1]) {
        base.write_all_at(&[BASE; 512], ByteOffset::new(sector * 512)).unwrap();
    }
    base.set_len(SECTORS * 512).unwrap();
    base.sync().unwrap();
    sim.sync_parent(Path::new("/base")).unwrap();
    create_cow(&sim, Path::new("/cow"), &CreateOptions::over(format, Path::new("/base"))).unwrap();
    let disk = open(&sim, "/cow");
    for (sector, content) in WRITTEN.into_iter().zip(1..) {
        disk.write(range(sector, 1), &[content; 512]).unwrap();
    }
    disk.close().unwrap();
    sim
}

fn geometry(sim: &Sim) -> (u64, Geometry) {
    let file = sim.open(Path::new("/cow"), Access::Read).unwrap();
    let mut prefix = vec![0; HEADER_PREFIX_LEN];
    file.read_exact_at(&mut prefix, ByteOffset::new(0)).unwrap();
    let header = Header::check(&prefix, file.len().unwrap()).unwrap();
    (file.ino(), *header.geometry())
}

/// From now on every read of the page of [`BROKEN`] in the durable bitmap of `/cow` fails, as long
/// as the switch is on.
fn break_page(sim: &Sim) -> Arc<AtomicBool> {
    let on = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&on);
    let (cow, geometry) = geometry(sim);
    let page = geometry.page_at(BROKEN / PAGE_SECTORS).get();
    sim.set_hook(Some(Arc::new(move |ino, operation| match operation {
        Operation::Read { at, len }
            if ino == cow
                && at.get() < page + BITMAP_PAGE_LEN as u64
                && at.get() + len as u64 > page
                && switch.load(Ordering::Relaxed) =>
        {
            Verdict::Fail(EIO)
        }
        _ => Verdict::Proceed,
    })));
    on
}

fn assert_unreadable<T>(result: Result<T, DiskError>) {
    let Err(err @ DiskError::Io { .. }) = result else { panic!("the bitmap was not asked for") };
    assert!(err.to_string().contains("/cow: cannot read the bitmap"), "{err}");
}

#[test]
fn a_page_that_cannot_be_read_fails_what_it_speaks_of_and_nothing_else() {
    for format in FORMATS {
        let sim = sim(format);
        let on = break_page(&sim);
        let disk = open(&sim, "/cow");
        // Neither its own content nor the base's: it is unknown which is right.
        assert_unreadable(sector(&disk, BROKEN));
        assert_unreadable(sector(&disk, BROKEN + 1));
        assert_unreadable(disk.write(range(BROKEN + 1, 1), &[9; 512]));
        assert_unreadable(disk.read(range(PAGE_SECTORS - 1, 2), &mut [0; 1024]));
        for (sector_number, content) in WRITTEN.into_iter().zip(1..) {
            if sector_number != BROKEN {
                assert_eq!(sector(&disk, sector_number).unwrap(), content);
                assert_eq!(sector(&disk, sector_number + 1).unwrap(), BASE);
            }
        }
        disk.flush().unwrap();
        on.store(false, Ordering::Relaxed);
        assert_eq!(sector(&disk, BROKEN).unwrap(), 2);
        assert_eq!(sector(&disk, BROKEN + 1).unwrap(), BASE, "the write had failed");
        disk.write(range(BROKEN + 1, 1), &[9; 512]).unwrap();
        disk.close().unwrap();
        drop(disk);
        sim.power_cut(&mut Choices::oldest());
        let disk = open(&sim, "/cow");
        assert_eq!((sector(&disk, BROKEN).unwrap(), sector(&disk, BROKEN + 1).unwrap()), (2, 9));
    }
}

#[test]
fn a_page_of_a_lower_layer_that_cannot_be_read_fails_what_shines_through() {
    let sim = sim(CowFormat::Native);
    snapshot(&sim, Path::new("/cow"), Path::new("/top")).unwrap();
    let on = break_page(&sim);
    let disk = open(&sim, "/top");
    assert_unreadable(sector(&disk, BROKEN));
    assert_eq!(sector(&disk, WRITTEN[0]).unwrap(), 1);
    // A write needs nothing from below; a read, which could, does.
    disk.write(range(BROKEN, 1), &[9; 512]).unwrap();
    assert_unreadable(sector(&disk, BROKEN));
    on.store(false, Ordering::Relaxed);
    assert_eq!(sector(&disk, BROKEN).unwrap(), 9);
    assert_eq!(sector(&disk, WRITTEN[3]).unwrap(), 4);
}

#[test]
fn a_flush_needs_what_a_dead_predecessor_left() {
    for format in FORMATS {
        let sim = sim(format);
        let disk = open(&sim, "/cow");
        disk.write(range(BROKEN + 1, 1), &[9; 512]).unwrap();
        drop(disk);
        let on = break_page(&sim);
        let disk = open(&sim, "/cow");
        // It cannot say what the dead one had acknowledged and not flushed; it has not failed for
        // ever.
        assert_unreadable(disk.flush());
        on.store(false, Ordering::Relaxed);
        disk.flush().unwrap();
        drop(disk);
        sim.power_cut(&mut Choices::oldest());
        assert_eq!(sector(&open(&sim, "/cow"), BROKEN + 1).unwrap(), 9);
    }
}

#[test]
fn opening_reads_no_bitmap() {
    for format in FORMATS {
        let sim = sim(format);
        let (cow, geometry) = geometry(&sim);
        let bytes = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&bytes);
        sim.set_hook(Some(Arc::new(move |ino, operation| {
            if let Operation::Read { at, len } = operation
                && ino == cow
                && (geometry.bitmap_offset()..geometry.data_offset()).contains(&at)
            {
                count.fetch_add(len, Ordering::Relaxed);
            }
            Verdict::Proceed
        })));
        let read = || bytes.swap(0, Ordering::Relaxed);
        let disk = open(&sim, "/cow");
        assert_eq!(read(), 0, "{format:?}, after a clean end");
        assert_eq!(sector(&disk, WRITTEN[3]).unwrap(), 4);
        let once = read();
        assert!((1..=64 << 10).contains(&once), "{format:?}: {once} bytes");
        assert_eq!(sector(&disk, WRITTEN[3] + 1).unwrap(), BASE);
        assert_eq!(read(), 0, "{format:?}: what is known is not read again");
        disk.write(range(7, 1), &[7; 512]).unwrap();
        drop(disk);
        read();
        let disk = open(&sim, "/cow");
        assert_eq!(read(), 0, "{format:?}, after a sudden end");
        assert_eq!(sector(&disk, 7).unwrap(), 7);
    }
}

#[test]
fn what_was_reset_does_not_come_back() {
    for format in FORMATS {
        let sim = sim(format);
        reset(&sim, Path::new("/cow")).unwrap();
        drop(open(&sim, "/cow"));
        let disk = open(&sim, "/cow");
        for written in WRITTEN {
            assert_eq!(sector(&disk, written).unwrap(), BASE, "{format:?}, sector {written}");
        }
    }
}

/// Numbers that a seed decides.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % n
    }
}

const THREADS: u64 = 4;
/// Where threads meet: few places, in several groups, words and bytes that all of them share.
const PLACES: u64 = 24;
const PLACE_SECTORS: u64 = 40;

/// The sectors that belong to thread `owner`, in an order that puts neighbours far apart.
fn own(owner: u64) -> impl Iterator<Item = u64> {
    let place = |n| n * 77 % PLACES;
    (0..PLACES * PLACE_SECTORS)
        .map(move |n| place(n) * 9 * PAGE_SECTORS + n / PLACES)
        .filter(move |sector| sector % THREADS == owner)
}

/// One thread asks for its sectors, writes some, flushes now and then; `has` is what they should
/// be.
fn play(disk: &Disk, owner: u64, has: &mut [bool], mut random: Random) {
    for (has, sector) in has.iter_mut().zip(own(owner)) {
        if random.below(2) == 0 {
            assert_eq!(disk.is_present(range(sector, 1)).unwrap(), *has, "sector {sector}");
        }
        if random.below(8) == 0 {
            disk.begin_write(range(sector, 1)).written(&[range(sector, 1)]).unwrap();
            *has = true;
        }
        if random.below(64) == 0 {
            disk.flush().unwrap();
        }
    }
}

#[test]
fn queues_may_ask_and_write_at_once_while_pages_are_being_read() {
    let seed = std::env::var("SEED").map_or_else(
        |_| u64::from(std::process::id()),
        |seed| seed.parse().expect("SEED: a number"),
    );
    println!("SEED={seed}");
    for format in FORMATS {
        let dir = tempfile::tempdir().unwrap();
        let (base, cow) = (dir.path().join("base"), dir.path().join("cow"));
        let size = PLACES * 9 * PAGE_SECTORS * 512;
        std::fs::File::create(&base).unwrap().set_len(size).unwrap();
        create_cow(&Host, &cow, &CreateOptions::over(format, &base)).unwrap();
        let mut has: Vec<Vec<bool>> =
            (0..THREADS).map(|owner| own(owner).map(|_| false).collect()).collect();
        for round in 0..12u64 {
            let disk = Disk::open_cow(&cow, None, &options()).unwrap();
            let start = Barrier::new(has.len());
            std::thread::scope(|scope| {
                for (owner, has) in (0..).zip(&mut has) {
                    let (disk, start) = (&disk, &start);
                    let random = Random(seed ^ round << 32 ^ owner << 48);
                    scope.spawn(move || {
                        start.wait();
                        play(disk, owner, has, random);
                    });
                }
            });
            // Every other time the process dies.
            if round % 2 == 0 {
                disk.close().unwrap();
            }
        }
        let disk = Disk::open_cow(&cow, None, &options()).unwrap();
        for (owner, has) in (0..).zip(&has) {
            for (sector, has) in own(owner).zip(has) {
                assert_eq!(disk.is_present(range(sector, 1)).unwrap(), *has, "sector {sector}");
            }
        }
    }
}
