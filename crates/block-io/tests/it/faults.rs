//! Full disks, failing disks, several queues at once.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use block_io::image::{CreateOptions, create_cow};
use block_io::storage::file::Host;
use block_io::storage::{Env, Storage};
use block_io::testing::sim::{Choices, Operation, Sim, Verdict};
use block_io::{CachePolicy, Committer, CowFormat, Disk, DiskError, DiskOptions, Waiter};
use cow_format::{ByteOffset, Sector, SectorCount, SectorRange};

const FORMATS: [CowFormat; 2] = [CowFormat::Uml, CowFormat::Native];
const ENOSPC: i32 = 28;
const EIO: i32 = 5;

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn options() -> DiskOptions {
    DiskOptions { lock_wait: Duration::ZERO, ..DiskOptions::default() }
}

/// A base of 0xbb on the simulated disk, and a new COW file over it.
fn sim(format: CowFormat) -> Sim {
    let sim = Sim::new();
    let base = sim.create_new(Path::new("/base")).unwrap();
    base.write_all_at(&[0xbb; 64 * 512], ByteOffset::new(0)).unwrap();
    base.sync().unwrap();
    sim.sync_parent(Path::new("/base")).unwrap();
    create_cow(&sim, Path::new("/cow"), &CreateOptions::over(format, Path::new("/base"))).unwrap();
    sim
}

fn open(sim: &Sim) -> Disk<Sim> {
    Disk::open_cow_in(sim.clone(), Path::new("/cow"), None, &options()).unwrap()
}

fn sector<E: Env>(disk: &Disk<E>, sector: u64) -> u8 {
    let mut buf = [0; 512];
    disk.read(range(sector, 1), &mut buf).unwrap();
    assert!(buf.iter().all(|byte| *byte == buf[0]));
    buf[0]
}

/// From now on every operation that `matching` picks fails, as long as the switch is on.
fn fail(sim: &Sim, errno: i32, matching: fn(Operation<'_>) -> bool) -> Arc<AtomicBool> {
    let on = Arc::new(AtomicBool::new(true));
    let switch = Arc::clone(&on);
    sim.set_hook(Some(Arc::new(move |_, operation| {
        match matching(operation) && switch.load(Ordering::Relaxed) {
            true => Verdict::Fail(errno),
            false => Verdict::Proceed,
        }
    })));
    on
}

fn is_write(operation: Operation<'_>) -> bool {
    matches!(operation, Operation::Write { .. })
}

/// The live bitmap is written a word at a time here.
fn is_live_write(operation: Operation<'_>) -> bool {
    matches!(operation, Operation::Write { len: 8, .. })
}

/// 64 sectors have a bitmap of 8 bytes (UML) or of one page.
fn is_sync(operation: Operation<'_>) -> bool {
    operation == Operation::Sync
}

#[test]
fn a_write_without_space_sets_no_bit_and_the_disk_works_on() {
    for format in FORMATS {
        for no_space in [is_write as fn(Operation<'_>) -> bool, is_live_write] {
            let sim = sim(format);
            let disk = open(&sim);
            let on = fail(&sim, ENOSPC, no_space);
            let err = disk.write(range(3, 1), &[1; 512]).unwrap_err();
            assert!(
                matches!(err, DiskError::Io { .. }) && err.to_string().contains("/cow"),
                "{err}"
            );
            assert_eq!(sector(&disk, 3), 0xbb);
            on.store(false, Ordering::Relaxed);
            assert!(!disk.is_failed());
            disk.write(range(3, 1), &[2; 512]).unwrap();
            disk.flush().unwrap();
            drop(disk);
            sim.power_cut(&mut Choices::oldest());
            assert_eq!(sector(&open(&sim), 3), 2);
        }
    }
}

#[test]
fn a_bitmap_that_cannot_be_written_is_written_later() {
    for format in FORMATS {
        let sim = sim(format);
        let disk = open(&sim);
        disk.write(range(3, 1), &[1; 512]).unwrap();
        let on = fail(&sim, ENOSPC, is_write);
        assert!(matches!(disk.flush(), Err(DiskError::Io { .. })));
        assert!(matches!(disk.flush(), Err(DiskError::Io { .. })));
        on.store(false, Ordering::Relaxed);
        disk.flush().unwrap();
        drop(disk);
        sim.power_cut(&mut Choices::oldest());
        assert_eq!(sector(&open(&sim), 3), 1);
    }
}

#[test]
fn a_failed_sync_is_for_ever() {
    for format in FORMATS {
        let sim = sim(format);
        let disk = open(&sim);
        disk.write(range(3, 1), &[1; 512]).unwrap();
        let on = fail(&sim, EIO, is_sync);
        assert!(matches!(disk.flush(), Err(DiskError::Failed { .. })));
        on.store(false, Ordering::Relaxed);
        assert!(disk.is_failed());
        assert!(matches!(disk.flush(), Err(DiskError::Failed { .. })));
        assert!(matches!(disk.write(range(4, 1), &[1; 512]), Err(DiskError::Failed { .. })));
        assert!(matches!(
            disk.begin_write(range(3, 1)).written(&[range(3, 1)]),
            Err(DiskError::Failed { .. })
        ));
        assert!(matches!(disk.close(), Err(DiskError::Failed { .. })));
        // What was acknowledged can still be read here. Who opens it next finds what was flushed.
        assert_eq!(sector(&disk, 3), 1);
        drop(disk);
        assert_eq!(sector(&open(&sim), 3), 0xbb);
    }
}

/// While the disk takes nothing at all a failed sync cannot be recorded. The next flush that the
/// guest asks for tries once more, and so does the end of its use.
#[test]
fn a_failed_sync_that_could_not_be_marked_is_marked_later() {
    for format in FORMATS {
        for by_flush in [true, false] {
            let sim = sim(format);
            let disk = open(&sim);
            disk.write(range(3, 1), &[1; 512]).unwrap();
            let on = fail(&sim, EIO, |operation| {
                is_sync(operation)
                    || is_write(operation)
                    || matches!(operation, Operation::WriteDurably { .. })
            });
            assert!(matches!(disk.flush(), Err(DiskError::Failed { .. })));
            on.store(false, Ordering::Relaxed);
            let failed = if by_flush { disk.flush() } else { disk.close() };
            assert!(matches!(failed, Err(DiskError::Failed { .. })));
            drop(disk);
            // What is recorded is on the disk: nothing depends on the page cache.
            sim.evict();
            assert_eq!(sector(&open(&sim), 3), 0xbb);
        }
    }
}

#[test]
fn a_second_sync_that_fails_is_for_ever_too() {
    for format in FORMATS {
        let sim = sim(format);
        let disk = open(&sim);
        disk.write(range(3, 1), &[1; 512]).unwrap();
        let syncs = AtomicU64::new(0);
        sim.set_hook(Some(Arc::new(move |_, operation| {
            match is_sync(operation) && syncs.fetch_add(1, Ordering::Relaxed) == 1 {
                true => Verdict::Fail(EIO),
                false => Verdict::Proceed,
            }
        })));
        assert!(matches!(disk.flush(), Err(DiskError::Failed { .. })));
        assert!(matches!(disk.flush(), Err(DiskError::Failed { .. })));
    }
}

/// Flushes one sector after the other, so that the journal is begun.
fn open_with_journal(sim: &Sim) -> Disk<Sim> {
    let disk = open(sim);
    for n in 0..3 {
        disk.write(range(n, 1), &[1; 512]).unwrap();
        disk.flush().unwrap();
    }
    disk
}

#[test]
fn a_record_that_fails_is_a_sync_that_fails() {
    let sim = sim(CowFormat::Native);
    let disk = open_with_journal(&sim);
    let on = fail(&sim, EIO, |operation| matches!(operation, Operation::WriteDurably { .. }));
    disk.write(range(3, 1), &[2; 512]).unwrap();
    assert!(matches!(disk.flush(), Err(DiskError::Failed { .. })));
    on.store(false, Ordering::Relaxed);
    assert!(matches!(disk.flush(), Err(DiskError::Failed { .. })));
    assert!(matches!(disk.close(), Err(DiskError::Failed { .. })));
    drop(disk);
    sim.power_cut(&mut Choices::oldest());
    let disk = open(&sim);
    assert_eq!([0, 1, 2, 3].map(|n| sector(&disk, n)), [1, 1, 1, 0xbb]);
}

#[test]
fn a_disk_without_room_for_its_journal_does_without() {
    let sim = sim(CowFormat::Native);
    let on =
        fail(&sim, ENOSPC, |operation| matches!(operation, Operation::Write { len: 65536, .. }));
    let disk = open_with_journal(&sim);
    on.store(false, Ordering::Relaxed);
    disk.write(range(3, 1), &[2; 512]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    sim.power_cut(&mut Choices::oldest());
    let disk = open(&sim);
    assert_eq!([0, 1, 2, 3].map(|n| sector(&disk, n)), [1, 1, 1, 2]);
}

/// A sector that is read while it is being written may be half of this and half of that: no record
/// is made of it.
#[test]
fn what_is_being_written_does_not_go_into_the_journal() {
    let sim = sim(CowFormat::Native);
    let disk = Arc::new(open_with_journal(&sim));
    let records = Arc::new(AtomicU64::new(0));
    let writing = Arc::new(AtomicBool::new(false));
    let (theirs, count, busy) = (Arc::clone(&disk), Arc::clone(&records), Arc::clone(&writing));
    sim.set_hook(Some(Arc::new(move |_, operation| {
        match operation {
            // Another queue begins a write, and ends it, in the middle of the flush.
            Operation::Read { len: 512, .. } if busy.load(Ordering::Relaxed) => {
                drop(theirs.begin_write(range(0, 64)));
            }
            Operation::WriteDurably { at, .. } if at.get() >= 8192 => {
                count.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
        Verdict::Proceed
    })));
    let mut expected = 0;
    for n in 10..30 {
        disk.write(range(n, 1), &[2; 512]).unwrap();
        writing.store(n % 4 == 1, Ordering::Relaxed);
        let under_way = match n % 4 {
            2 => Some(disk.begin_write(range(n - 3, 5))),
            // Other sectors do not matter.
            3 => Some(disk.begin_write(range(n + 1, 5))),
            _ => None,
        };
        disk.flush().unwrap();
        drop(under_way);
        writing.store(false, Ordering::Relaxed);
        expected += u64::from(n % 4 != 1 && n % 4 != 2);
        assert_eq!(records.load(Ordering::Relaxed), expected, "flush {n}");
    }
    sim.set_hook(None);
    let after = sim.fork();
    after.power_cut(&mut Choices::oldest());
    let disk = open(&after);
    assert!((10..30).all(|n| sector(&disk, n) == 2));
}

#[test]
fn rewrites_cost_no_write_of_a_bitmap() {
    for format in FORMATS {
        let sim = sim(format);
        let disk = open(&sim);
        disk.write(range(0, 64), &[1; 64 * 512]).unwrap();
        disk.flush().unwrap();
        let before = sim.steps();
        let ranges = [range(0, 7), range(9, 1), range(30, 34)];
        disk.begin_write(range(0, 64)).written(&ranges).unwrap();
        assert_eq!(sim.steps(), before);
        disk.flush().unwrap();
        disk.flush().unwrap();
        assert_eq!(sim.steps(), before + 1, "one sync, and none if nothing was written since");
    }
}

#[test]
fn a_batch_shares_a_write() {
    for format in FORMATS {
        let sim = sim(format);
        let disk = open(&sim);
        let before = sim.steps();
        disk.begin_write(range(0, 64))
            .written(&[range(1, 1), range(5, 2), range(40, 3), range(63, 1)])
            .unwrap();
        assert_eq!(sim.steps(), before + 1);
        drop(disk);
        let disk = open(&sim);
        let present = (0..64).filter(|sector| disk.is_present(range(*sector, 1)).unwrap());
        assert_eq!(present.collect::<Vec<_>>(), [1, 5, 6, 40, 41, 42, 63]);
    }
}

/// A real base of `sectors` sectors, and a COW file over it.
fn real(format: CowFormat, sectors: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    std::fs::File::create(&base).unwrap().set_len(sectors * 512).unwrap();
    create_cow(&Host, &dir.path().join("cow"), &CreateOptions::over(format, &base)).unwrap();
    dir
}

#[test]
fn queues_that_share_bytes_of_the_bitmap_lose_no_bit() {
    const QUEUES: usize = 4;
    const SECTORS: u64 = 40_000;
    for format in FORMATS {
        let dir = real(format, SECTORS);
        let disk = Disk::open_cow(&dir.path().join("cow"), None, &options()).unwrap();
        let start = Barrier::new(QUEUES);
        // Each queue takes its own sectors of every byte; one flushes all the time.
        std::thread::scope(|scope| {
            for queue in 0..QUEUES {
                let (disk, start, first) = (&disk, &start, 30_000 + queue as u64);
                scope.spawn(move || {
                    start.wait();
                    for sector in (first..34_000).step_by(QUEUES) {
                        disk.begin_write(range(sector, 1)).written(&[range(sector, 1)]).unwrap();
                        if queue == 0 && sector % 100 == 0 {
                            disk.flush().unwrap();
                        }
                    }
                });
            }
        });
        // The process dies: its bits are in the live bitmap.
        drop(disk);
        let disk = Disk::open_cow(&dir.path().join("cow"), None, &options()).unwrap();
        assert!(disk.is_present(range(30_000, 4000)).unwrap());
        assert!(
            !disk.is_present(range(29_999, 1)).unwrap()
                && !disk.is_present(range(34_000, 1)).unwrap()
        );
        disk.close().unwrap();
        drop(disk);
        let disk = Disk::open_cow(&dir.path().join("cow"), None, &options()).unwrap();
        assert!(disk.is_present(range(30_000, 4000)).unwrap());
    }
}

#[test]
fn a_commit_is_durable_for_everything_written_before_it() {
    const QUEUES: usize = 3;
    for format in FORMATS {
        let sim = sim(format);
        let disk = Arc::new(open(&sim));
        let committer = Committer::spawn(Arc::clone(&disk), QUEUES).unwrap();
        std::thread::scope(|scope| {
            for queue in 0..QUEUES {
                let (disk, committer, sim) = (&disk, &committer, &sim);
                scope.spawn(move || {
                    let mut answers = Vec::new();
                    for step in 0..20 {
                        let mine = range((queue + QUEUES * step) as u64, 1);
                        disk.write(mine, &[1; 512]).unwrap();
                        committer.submit(Waiter { queue, tag: 0 });
                        while answers.is_empty() {
                            std::thread::yield_now();
                            committer.drain(queue, &mut answers);
                        }
                        assert!(matches!(answers.drain(..).as_slice(), [(0, Ok(()))]));
                        let after = sim.fork();
                        after.power_cut(&mut Choices::oldest());
                        assert_eq!(sector(&open(&after), mine.start().get()), 1);
                    }
                });
            }
        });
    }
}

#[test]
fn direct_descriptions_of_all_layers() {
    for format in FORMATS {
        let dir = real(format, 4096);
        let direct = CachePolicy::Direct;
        for (base_cache, cow_cache) in [(direct, direct), (direct, CachePolicy::Buffered)] {
            let options = DiskOptions { base_cache, cow_cache, ..options() };
            let disk = Disk::open_cow(&dir.path().join("cow"), None, &options).unwrap();
            let has_direct = |layer: usize| disk.layers()[layer].file().direct().is_some();
            assert_eq!((has_direct(0), has_direct(1)), (cow_cache == direct, true));
            // Either way no other opener gets the lock.
            for cow_cache in [direct, CachePolicy::Buffered] {
                let other = DiskOptions { cow_cache, ..options };
                Disk::open_cow(&dir.path().join("cow"), None, &other).err().unwrap();
            }
            disk.close().unwrap();
        }
    }
}
