//! Long requests, which are done in windows; here a window is tiny.

use block_io::image::{CreateOptions, create_cow};
use block_io::{CachePolicy, CowFormat, DiskOptions, Host};
use cow_format::{Sector, SectorCount};
use tempfile::TempDir;
use testkit::request::{DISCARD, OUT, WRITE_ZEROES, segment};
use virtio_queue::Queue;

use super::*;
use crate::guest_memory::memory::GuestAddress;
use crate::virtio::inflight::{Area, AreaInfo};
use crate::virtio::split_queue::indices;

const SECTORS: u64 = 512;
const LEN: usize = 512 * 512;
const WHOLE: std::ops::Range<u64> = 0..SECTORS;
const TINY: Window = Window { bytes: 16 << 10, parts: 3, allocated: 8 << 10 };
const QUEUE_SIZE: u16 = 64;

/// Of each head: where its header and status are; its data.
const STEP: u64 = 32;
const BUFFER: u64 = DATA + 0x1000;
const AFTER: u64 = BUFFER + LEN as u64;

/// A disk of which every other sector comes from its base, or all of it.
struct Fixture {
    _directory: TempDir,
    disk: Arc<Disk>,
    content: Vec<u8>,
}

fn range(sectors: std::ops::Range<u64>) -> SectorRange {
    let count = SectorCount::new(sectors.end - sectors.start);
    SectorRange::new(Sector::new(sectors.start), count).unwrap()
}

fn fixture(cache: CachePolicy, mixed: bool) -> Fixture {
    // Not in /tmp, which may be in memory and knows no direct I/O.
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let (base, top) = (directory.path().join("base"), directory.path().join("top"));
    let mut content: Vec<u8> = (0..LEN).map(|at| u8::try_from(at / 512 % 251).unwrap()).collect();
    std::fs::write(&base, &content).unwrap();
    create_cow(&Host, &top, &CreateOptions::over(CowFormat::Native, &base)).unwrap();
    let options = DiskOptions { cow_cache: cache, base_cache: cache, ..DiskOptions::default() };
    let disk = Arc::new(Disk::open_cow(&top, None, &options).unwrap());
    for sector in WHOLE.step_by(2).filter(|_| mixed) {
        let place = &mut content[usize::try_from(sector).unwrap() * 512..][..512];
        place.fill(0xee);
        disk.write(range(sector..sector + 1), place).unwrap();
    }
    Fixture { _directory: directory, disk, content }
}

impl Fixture {
    fn read(&self) -> Vec<u8> {
        let mut found = vec![0; LEN];
        self.disk.read(range(WHOLE), &mut found).unwrap();
        found
    }

    fn is_present(&self) -> bool {
        self.disk.is_present(range(WHOLE)).unwrap()
    }

    /// Runs a worker of tiny windows, and then closes the disk.
    fn serve(&self, guest: &mut Guest, run: impl FnOnce(Worker<'_, SplitQueue>, &mut Guest)) {
        self.serve_tracked(guest, None, |worker, guest, _| run(worker, guest));
    }

    fn serve_tracked(
        &self,
        guest: &mut Guest,
        tracker: Option<Tracker>,
        run: impl FnOnce(Worker<'_, SplitQueue>, &mut Guest, &EventFd),
    ) {
        let shared = shared(&self.disk, 1);
        let start = start(0, guest, &Arc::new(AtomicBool::new(false)));
        let (stop, pulse) = (EventFd::new(EFD_NONBLOCK).unwrap(), Pulse::waiting());
        let queue = split_queue(&start, tracker).unwrap();
        let mut uring = any_uring();
        let mut worker =
            Worker::new(&start, queue, &shared, &stop, &pulse, uring.as_mut()).unwrap();
        worker.window = TINY;
        run(worker, guest, &stop);
    }
}

fn guest() -> Guest {
    Guest::with_end(QUEUE_SIZE, 0, AFTER)
}

/// A request with data in pieces of three sizes.
fn offer(guest: &mut Guest, head: u16, kind: u32, data: &[(u64, u32)]) {
    let at = DATA + u64::from(head) * STEP;
    guest.write(at, &header_of(kind, 0));
    guest.write(at + 16, &[0xff]);
    let mut chain = vec![Desc::buffer(at, 16, false)];
    chain.extend(data.iter().map(|(at, len)| Desc::buffer(*at, *len, kind == IN)));
    chain.push(Desc::buffer(at + 16, 1, true));
    guest.set_chain(head, chain);
    guest.offer(head);
}

fn offer_whole(guest: &mut Guest, head: u16, kind: u32) {
    let (a, b) = (512 * 7, 512 * 300);
    let len = u32::try_from(LEN).unwrap();
    let pieces =
        [(BUFFER, a), (BUFFER + u64::from(a), b), (BUFFER + u64::from(a + b), len - a - b)];
    offer(guest, head, kind, &pieces);
}

fn offer_segments(guest: &mut Guest, head: u16, kind: u32, ranges: &[SectorRange]) {
    let segments = ranges.iter().flat_map(|range| {
        segment(range.start().get(), u32::try_from(range.count().get()).unwrap(), 0)
    });
    let segments: Vec<u8> = segments.collect();
    guest.write(BUFFER, &segments);
    offer(guest, head, kind, &[(BUFFER, u32::try_from(segments.len()).unwrap())]);
}

fn status(guest: &Guest, head: u16) -> u8 {
    guest.read::<1>(DATA + u64::from(head) * STEP + 16)[0]
}

fn buffer(guest: &Guest) -> Vec<u8> {
    let mut found = vec![0; LEN];
    guest.memory.read(GuestAddress(BUFFER), &mut found).unwrap();
    found
}

/// Until a window of a request is done.
fn turn_to_unfinished(worker: &mut Worker<'_, SplitQueue>) {
    while worker.unfinished.is_empty() {
        worker.turn();
    }
}

fn turn_to_answer(worker: &mut Worker<'_, SplitQueue>, guest: &Guest, used: u16) {
    while guest.used_idx() < used {
        worker.turn();
    }
}

#[test]
fn a_long_read_never_has_more_parts_than_a_window() {
    let disk = fixture(CachePolicy::Direct, true);
    for parts in 1..=4 {
        let mut guest = guest();
        offer_whole(&mut guest, 0, IN);
        disk.serve(&mut guest, |mut worker, guest| {
            worker.window.parts = parts;
            let mut turns = 0;
            while guest.used_idx() == 0 {
                worker.turn();
                assert!(worker.ring.pieces_in_flight() <= 3 * parts, "{parts}");
                turns += 1;
            }
            assert!(turns >= LEN / 512 / parts, "{turns} turns of {parts}");
            assert_eq!(guest.used(0), (0, u32::try_from(LEN).unwrap() + 1));
            assert_eq!((status(guest, 0), worker.kept.get()), (0, 0));
            assert!(buffer(guest) == disk.content);
        });
    }
}

#[test]
fn what_is_in_the_page_cache_is_copied_in_windows_as_well() {
    let disk = fixture(CachePolicy::Buffered, false);
    let mut guest = guest();
    offer_whole(&mut guest, 0, IN);
    disk.serve(&mut guest, |mut worker, guest| {
        let windows = LEN as u64 / TINY.bytes;
        for _ in 1..windows {
            turn_to_unfinished(&mut worker);
            assert_eq!(guest.used_idx(), 0);
            let moving = match &worker.unfinished[0].work {
                Work::Read { moving, .. } => moving.left,
                _ => panic!("not a read"),
            };
            assert!(moving.start_bytes().get().is_multiple_of(TINY.bytes), "{moving}");
            let request = worker.unfinished.pop_front().unwrap();
            worker.go_on(request);
        }
        turn_to_answer(&mut worker, guest, 1);
        assert_eq!(status(guest, 0), 0);
        assert!(buffer(guest) == disk.content);
    });
}

#[test]
fn a_long_write_is_there_when_its_last_window_is() {
    for cache in [CachePolicy::Direct, CachePolicy::Buffered] {
        let disk = fixture(cache, false);
        let mut guest = guest();
        let new: Vec<u8> = (0..LEN).map(|at| u8::try_from(at % 241).unwrap()).collect();
        guest.write(BUFFER, &new);
        offer_whole(&mut guest, 0, OUT);
        disk.serve(&mut guest, |mut worker, guest| {
            turn_to_unfinished(&mut worker);
            offer(guest, 8, FLUSH, &[]);
            // The flush does not wait for it.
            let request = worker.unfinished.pop_front().unwrap();
            turn_to_answer(&mut worker, guest, 1);
            assert_eq!((guest.used(0).0, status(guest, 8)), (8, 0));
            assert!(disk.read() == disk.content, "no bit is set");
            worker.go_on(request);
            turn_to_answer(&mut worker, guest, 2);
            assert_eq!(status(guest, 0), 0);
            assert!(disk.is_present() && disk.read() == new);
        });
    }
}

#[test]
fn a_write_that_fails_midway_sets_no_bit() {
    let disk = fixture(CachePolicy::Buffered, false);
    let mut guest = guest();
    offer_whole(&mut guest, 0, OUT);
    disk.serve(&mut guest, |mut worker, guest| {
        turn_to_unfinished(&mut worker);
        let request = worker.unfinished.pop_front().unwrap();
        worker.completed(request, Err(io::Error::from_raw_os_error(libc::EIO)));
        worker.publish();
        assert_eq!((guest.used_idx(), status(guest, 0), worker.kept.get()), (1, 1, 0));
        assert!(disk.read() == disk.content);
    });
}

#[test]
fn ranges_are_zeroed_in_windows() {
    for kind in [DISCARD, WRITE_ZEROES] {
        let disk = fixture(CachePolicy::Buffered, true);
        let mut guest = guest();
        offer_segments(&mut guest, 0, kind, &[range(9..10), range(17..300), range(400..512)]);
        disk.serve(&mut guest, |mut worker, guest| {
            let mut windows = 0;
            while guest.used_idx() == 0 {
                worker.turn();
                assert!(worker.ring.pieces_in_flight() <= 3, "{kind}");
                windows += worker.unfinished.len();
            }
            assert!(windows >= 396 / 16 - 2, "{windows}");
            assert_eq!(status(guest, 0), 0);
        });
        let mut expected = disk.content.clone();
        for sectors in [9..10, 17..300, 400..512] {
            expected[sectors.start * 512..sectors.end * 512].fill(0);
        }
        assert!(disk.read() == expected, "{kind}");
    }
}

/// A file system that can neither punch nor zero.
#[test]
fn where_nothing_can_be_given_back_a_discard_changes_nothing_and_zeros_are_written() {
    for kind in [DISCARD, WRITE_ZEROES] {
        let disk = fixture(CachePolicy::Buffered, false);
        let mut guest = guest();
        offer_segments(&mut guest, 0, kind, &[range(8..16), range(32..480)]);
        disk.serve(&mut guest, |mut worker, guest| {
            // Its second window is begun when the file system says so.
            turn_to_unfinished(&mut worker);
            let request = worker.unfinished.pop_front().unwrap();
            worker.completed(request, Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)));
            worker.publish();
            assert_eq!(guest.used_idx(), u16::from(kind == DISCARD));
            while guest.used_idx() == 0 {
                worker.turn();
                // A piece of zeros is 64 KiB, and the first window has the first range as well.
                assert!(worker.ring.bytes_in_flight() <= TINY.bytes + 8 * 512);
            }
            assert_eq!(status(guest, 0), 0);
        });
        let mut expected = disk.content.clone();
        if kind == WRITE_ZEROES {
            expected[8 * 512..16 * 512].fill(0);
            expected[32 * 512..480 * 512].fill(0);
        }
        assert!(disk.read() == expected, "{kind}");
    }
}

#[test]
fn a_ring_that_stops_leaves_long_requests_to_the_next_one_if_they_are_tracked() {
    let disk = fixture(CachePolicy::Direct, true);
    let info = AreaInfo::new(1, QUEUE_SIZE);
    let area = Area::map(&info, info.create().unwrap()).unwrap();
    let mut guest = guest();
    let recover = |guest: &Guest| {
        let queue = Queue::try_from(guest.layout).unwrap();
        area.recover(0, indices(&guest.memory, &queue).unwrap()).unwrap()
    };
    offer_whole(&mut guest, 0, IN);
    let tracker = recover(&guest);
    disk.serve_tracked(&mut guest, Some(tracker), |mut worker, guest, stop| {
        turn_to_unfinished(&mut worker);
        stop.write(StopOrder::Leave as u64).unwrap();
        stop.write(StopOrder::Finish as u64).unwrap();
        assert_eq!(worker.run(), 1);
        assert_eq!(guest.used_idx(), 0, "it was answered");
    });
    let tracker = recover(&guest);
    assert_eq!(tracker.unfinished_count(), 1);
    disk.serve_tracked(&mut guest, Some(tracker), |mut worker, guest, _| {
        turn_to_answer(&mut worker, guest, 1);
        assert_eq!(status(guest, 0), 0);
        assert!(buffer(guest) == disk.content);
    });
}

#[test]
fn a_ring_that_stops_answers_long_requests_in_time() {
    let disk = fixture(CachePolicy::Direct, true);
    let info = AreaInfo::new(1, QUEUE_SIZE);
    let area = Area::map(&info, info.create().unwrap()).unwrap();
    // Whoever asks for the base must find everything before it answered, tracked or not.
    for (order, tracked) in [(StopOrder::Finish, true), (StopOrder::Leave, false)] {
        for (patience, expected) in [(Duration::from_secs(3600), 0), (Duration::ZERO, 1)] {
            area.clear();
            let mut guest = guest();
            offer_whole(&mut guest, 0, IN);
            let queue = Queue::try_from(guest.layout).unwrap();
            let at = indices(&guest.memory, &queue).unwrap();
            let tracker = tracked.then(|| area.recover(0, at).unwrap());
            disk.serve_tracked(&mut guest, tracker, |mut worker, guest, stop| {
                turn_to_unfinished(&mut worker);
                stop.write(order as u64).unwrap();
                worker.told_to_stop();
                assert!(matches!(worker.closing, Some(Closing::Answering(_))));
                worker.closing = Some(Closing::Answering(Instant::now() + patience));
                assert_eq!(worker.run(), 1);
                assert_eq!((guest.used_idx(), status(guest, 0)), (1, expected), "{order:?}");
            });
        }
    }
}

/// As many requests as the ring takes, each of `pieces` pieces of `len` bytes of the same memory.
fn offer_repeated(guest: &mut Guest, kind: u32, pieces: usize, len: u32) {
    let mut chain = vec![Desc::buffer(DATA, 16, false)];
    chain.extend((0..pieces).map(|_| Desc::buffer(BUFFER, len, kind == IN)));
    chain.push(Desc::buffer(DATA + 16, 1, true));
    guest.write(DATA, &header_of(kind, 0));
    guest.set_table(AFTER, &linked(0, chain.iter().copied()));
    for head in 0..QUEUE_SIZE {
        guest.set_desc(head, Desc::indirect(AFTER, chain.len()));
        guest.offer(head);
    }
}

#[test]
fn a_queue_has_no_more_pieces_than_its_limit_and_one_request() {
    const PIECES: usize = 400;
    let disk = fixture(CachePolicy::Direct, true);
    let mut guest = Guest::with_end(QUEUE_SIZE, 0, AFTER + 0x4000);
    offer_repeated(&mut guest, IN, PIECES, 512);
    disk.serve(&mut guest, |mut worker, guest| {
        let mut most = 0;
        while guest.used_idx() < QUEUE_SIZE {
            worker.turn();
            most = most.max(worker.ring.pieces_in_flight() + worker.kept.get());
        }
        assert_eq!((status(guest, 0), worker.kept.get()), (0, 0));
        assert!((PIECES_MAX..PIECES_MAX + 2 * PIECES).contains(&most), "{most}");
    });
}

#[test]
fn a_queue_moves_no_more_bytes_than_its_limit_and_one_window() {
    const PIECE: u32 = 128 << 10;
    const PIECES: usize = 64;
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(PIECES as u64 * u64::from(PIECE)).unwrap();
    let disk = Arc::new(Disk::open_raw(image.path(), &DiskOptions::default()).unwrap());
    let shared = shared(&disk, 1);
    let mut guest = Guest::with_end(QUEUE_SIZE, 0, AFTER + 0x4000);
    offer_repeated(&mut guest, OUT, PIECES, PIECE);
    let start = start(0, &guest, &Arc::new(AtomicBool::new(false)));
    let (stop, pulse) = (EventFd::new(0).unwrap(), Pulse::waiting());
    let mut uring = any_uring();
    let queue = split_queue(&start, None).unwrap();
    let mut worker = Worker::new(&start, queue, &shared, &stop, &pulse, uring.as_mut()).unwrap();
    worker.take();
    let bytes = worker.ring.bytes_in_flight();
    assert!((BYTES_MAX..=BYTES_MAX + WINDOW.bytes).contains(&bytes), "{bytes}");
    while guest.used_idx() < 4 {
        worker.turn();
        assert!(worker.ring.bytes_in_flight() <= BYTES_MAX + WINDOW.bytes);
    }
    assert_eq!(status(&guest, 0), 0);
}

/// The first read is offloaded, and has ended when the worker looks for more requests.
#[test]
fn a_window_that_ends_while_requests_are_taken_is_followed_by_the_next() {
    const LEN: u64 = 2 * OFFLOAD_MIN;
    let mut image = tempfile::NamedTempFile::new().unwrap();
    image.write_all(&vec![7; usize::try_from(LEN).unwrap()]).unwrap();
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let disk = Arc::new(Disk::open_raw(image.path(), &options).unwrap());
    let shared = shared(&disk, 1);
    let mut guest = Guest::with_end(QUEUE_SIZE, 0, BUFFER + LEN);
    for head in [0, 8] {
        offer(&mut guest, head, IN, &[(BUFFER, u32::try_from(LEN).unwrap())]);
    }
    let start = start(0, &guest, &Arc::new(AtomicBool::new(false)));
    let (stop, pulse) = (EventFd::new(0).unwrap(), Pulse::waiting());
    let mut uring = any_uring();
    let queue = split_queue(&start, None).unwrap();
    let mut worker = Worker::new(&start, queue, &shared, &stop, &pulse, uring.as_mut()).unwrap();
    worker.window.bytes = OFFLOAD_MIN;
    let head = worker.queue.pop().unwrap().unwrap();
    worker.begin(head);
    assert!(worker.offloaded);
    testkit::wait::wait_until("the end of the copy", || worker.ring.wants_enter());
    worker.close(Closing::Answering(Instant::now() + Duration::from_secs(3600)));
    assert!(worker.turn(), "it would sleep for ever");
    turn_to_answer(&mut worker, &guest, 1);
    assert_eq!((status(&guest, 0), guest.read::<1>(BUFFER + LEN - 1)), (0, [7]));
}
