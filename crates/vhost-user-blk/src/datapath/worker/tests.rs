use std::io::Write;

use block_io::DiskOptions;
use block_io::ring::{DisabledUring, IoEngine};
use testkit::descriptor::linked;
use testkit::request::{FLUSH, IN, header as header_of};
use vmm_sys_util::event::{EventFlag, new_event_consumer_and_notifier};

use super::*;
use crate::guest::{DATA, Desc, Guest};
use crate::process::requirements::Engine;

// Its I/O is the worse for the feature.
#[cfg(feature = "fault-points")]
mod fault_injection;
mod windows;

/// What a queue's thread has for its rings, for an engine that can be used.
fn uring(engine: IoEngine) -> Option<Uring> {
    match engine {
        IoEngine::IoUring => Some(DisabledUring::new(16).unwrap().enable().unwrap()),
        IoEngine::Sync => None,
    }
}

fn any_uring() -> Option<Uring> {
    DisabledUring::new(16).ok().map(|uring| uring.enable().unwrap())
}

fn shared(disk: &Arc<Disk>, queues: usize) -> Shared {
    let no_threads = QueueThreads::new(Engine::choose(Some(IoEngine::Sync), 1, 16).unwrap());
    Shared {
        mappings: Mappings::new(disk),
        holes: Holes::new(disk),
        committer: Committer::spawn(Arc::clone(disk), queues).unwrap(),
        serial: [0; ID_LEN],
        limits: ParseLimits { capacity: disk.capacity(), read_only: disk.read_only() },
        poll: Duration::ZERO,
        threads: Arc::new(no_threads),
        failure: Arc::new(EventFd::new(0).unwrap()),
        disk: Arc::clone(disk),
    }
}

fn start(queue: usize, guest: &Guest, write_through: &Arc<AtomicBool>) -> RingStart {
    let events = || new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
    RingStart {
        queue,
        memory: Arc::clone(&guest.memory),
        state: QueueState { event_idx_enabled: true, ..guest.layout },
        write_through: Arc::clone(write_through),
        kick: events().0,
        call: Some(events().1),
        err: None,
        inflight: None,
        log: None,
    }
}

/// The ring holds one flush.
#[test]
fn a_watch_that_is_lost_ends_the_ring_and_what_it_has_is_answered() {
    let engines = [IoEngine::IoUring, IoEngine::Sync].into_iter();
    for engine in engines.filter(|engine| engine.probe().is_ok()) {
        for watch in [KICK, STOP, COMMIT, TIDY] {
            // A new one each time: the lock of the last round may be held by a child of another
            // test for a moment.
            let image = tempfile::NamedTempFile::new().unwrap();
            image.as_file().set_len(1 << 20).unwrap();
            let disk = Arc::new(Disk::open_raw(image.path(), &DiskOptions::default()).unwrap());
            let shared = shared(&disk, 1);
            let mut guest = Guest::new(16, 0);
            guest.write(DATA, &header_of(FLUSH, 0));
            guest.write(DATA + 16, &[0xff]);
            let status = Desc::buffer(DATA + 16, 1, true);
            guest.set_chain(0, [Desc::buffer(DATA, 16, false), status]);
            guest.offer(0);
            let start = start(0, &guest, &Arc::new(AtomicBool::new(false)));
            let (stop, pulse) = (EventFd::new(0).unwrap(), Pulse::waiting());
            let mut uring = uring(engine);
            let queue = split_queue(&start, None).unwrap();
            let mut worker =
                Worker::new(&start, queue, &shared, &stop, &pulse, uring.as_mut()).unwrap();
            worker.take();
            worker.lost(watch, &io::Error::from_raw_os_error(libc::EINVAL));
            assert!(!worker.is_open());
            assert_eq!(shared.failure.read().unwrap(), 1, "the session is told");
            // The entry is taken, and it ends by itself.
            assert_eq!(worker.run(), 1);
            assert_eq!((guest.used_idx(), guest.read::<1>(DATA + 16)), (1, [0]));
            disk.close().unwrap();
        }
    }
}

/// The same piece of memory again and again makes a request as long as the guest wishes.
#[test]
fn a_batch_of_endless_reads_is_cut_off() {
    const PIECE: u32 = 128 << 10;
    const PIECES: u64 = 200;
    const REQUESTS: u16 = 24;
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(u64::from(PIECE) * PIECES).unwrap();
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let disk = Arc::new(Disk::open_raw(image.path(), &options).unwrap());
    let shared = shared(&disk, 1);
    let mut guest = Guest::new(64, 0);
    let (header, table, data) = (DATA, DATA + 0x1000, DATA + 0x8000);
    guest.write(header, &header_of(IN, 0));
    let mut chain = vec![Desc::buffer(header, 16, false)];
    chain.extend((0..PIECES).map(|_| Desc::buffer(data, PIECE, true)));
    chain.push(Desc::buffer(header + 16, 1, true));
    guest.set_table(table, &linked(0, chain.iter().copied()));
    for head in 0..REQUESTS {
        guest.set_desc(head, Desc::indirect(table, chain.len()));
        guest.offer(head);
    }
    let start = start(0, &guest, &Arc::new(AtomicBool::new(false)));
    let stop = EventFd::new(0).unwrap();
    let pulse = Pulse::waiting();
    let mut uring = any_uring();
    let queue = split_queue(&start, None).unwrap();
    let mut worker = Worker::new(&start, queue, &shared, &stop, &pulse, uring.as_mut()).unwrap();
    let mut moved = 0;
    while guest.used_idx() < REQUESTS {
        worker.turn();
        assert!(worker.batch_bytes <= BATCH_BYTES_MAX + WINDOW.bytes, "{}", worker.batch_bytes);
        moved += worker.batch_bytes;
    }
    assert_eq!(moved, u64::from(REQUESTS) * PIECES * u64::from(PIECE));
    assert_eq!(guest.read::<1>(header + 16), [0]);
}

/// While a long read is copied by a thread of the kernel the next is copied here.
#[test]
fn one_of_several_long_reads_is_offloaded() {
    const LEN: u32 = 256 << 10;
    let mut image = tempfile::NamedTempFile::new().unwrap();
    let content = |request: u32| vec![u8::try_from(request).unwrap() + 1; LEN as usize];
    for request in 0..3 {
        image.write_all(&content(request)).unwrap();
    }
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let disk = Arc::new(Disk::open_raw(image.path(), &options).unwrap());
    let shared = shared(&disk, 1);
    let data = |request: u32| DATA + (1 << 20) + u64::from(request * LEN);
    let mut guest = Guest::with_end(16, 0, data(3));
    for request in 0..3 {
        let (header, first) = (DATA + 64 * u64::from(request), u16::try_from(3 * request).unwrap());
        let sector = u64::from(request * LEN / 512);
        guest.write(header, &header_of(IN, sector));
        let buffers = [(header, 16, false), (data(request), LEN, true), (header + 16, 1, true)];
        let descs = buffers.map(|(address, len, writable)| Desc::buffer(address, len, writable));
        guest.set_chain(first, descs);
        guest.offer(first);
    }
    let start = start(0, &guest, &Arc::new(AtomicBool::new(false)));
    let (stop, pulse) = (EventFd::new(0).unwrap(), Pulse::waiting());
    let mut uring = any_uring();
    let queue = split_queue(&start, None).unwrap();
    let mut worker = Worker::new(&start, queue, &shared, &stop, &pulse, uring.as_mut()).unwrap();
    let mut begin_next = || {
        let head = worker.queue.pop().unwrap().unwrap();
        worker.begin(head);
        (worker.offloaded, worker.queue.in_flight())
    };
    // Nobody looks whether it has come back; so the second is copied, and so would the last be
    // anyway.
    assert_eq!(begin_next(), (true, 1));
    assert_eq!(begin_next(), (true, 1));
    while guest.used_idx() < 3 {
        worker.turn();
    }
    assert!(!worker.offloaded);
    for request in 0..3 {
        let read = guest.read::<{ LEN as usize }>(data(request));
        assert!(read[..] == content(request), "{request}");
        assert_eq!(guest.read::<1>(DATA + 64 * u64::from(request) + 16), [0]);
    }
}
