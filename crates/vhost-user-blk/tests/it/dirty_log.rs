//! The dirty log of a live migration: every page of guest memory that the daemon changes is marked.
//!
//! Each test has its own counter-proof: without the log the same comparison finds what is missing.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::common::Daemon;
use block_io::image::{CreateOptions, create_cow};
use block_io::{CowFormat, Host};
use testkit::dirty_log::Log;
use testkit::frontend::{
    F_EVENT_IDX, F_INDIRECT_DESC, F_LOG_ALL, F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES,
    RawFrontend,
};
use testkit::memory::{Memory, PAGE, memfd, pages};
use testkit::queue::{self, Buffer, Queue, readable, writable};
use testkit::request::{DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES, header, segment};
use testkit::wait::wait_until;
use vhost::vhost_user::message::FrontendReq;

const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES | F_INDIRECT_DESC;
/// The base ends here; the disk goes on with zeros.
const BASE_SECTORS: u64 = 2048;
const SECTORS: u64 = 2 * BASE_SECTORS;
const SIZE: u16 = 1024;

/// What is in a buffer before the device writes it. No sector is full of it.
const BEFORE: u8 = 0xee;

fn serve(directory: &Path, args: &[&str]) -> Daemon {
    let (base, cow) = (directory.join("base"), directory.join("cow"));
    let content: Vec<u8> = (0..BASE_SECTORS).flat_map(|n| crate::common::sector(n + 1)).collect();
    std::fs::write(&base, content).unwrap();
    let mut options = CreateOptions::over(CowFormat::Native, &base);
    options.size = Some(SECTORS * 512);
    create_cow(&Host, &cow, &options).unwrap();
    let mut all = vec!["--serial=serial", cow.to_str().unwrap()];
    all.extend(args);
    Daemon::start(directory, all)
}

/// Not in /tmp, which may be in memory and have no direct I/O.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// One of each kind of request, each with pages of its own.
struct Requests {
    /// Of each: its name, its first descriptor, and the pages that the device may write.
    all: Vec<(&'static str, u16, BTreeSet<u64>)>,
    next: u16,
}

impl Requests {
    fn new(memory: &mut Memory, queue: &Queue) -> Self {
        let mut requests = Requests { all: Vec::new(), next: 0 };
        let data = |memory: &mut Memory, len: u32| vec![writable(memory.take(len.into()), len)];
        let list = |memory: &mut Memory, sectors: u32| {
            let at = memory.take(16);
            memory.write(at, &segment(8, sectors, 0));
            vec![readable(at, 16)]
        };
        let page = data(memory, 4096);
        requests.add(memory, queue, "page", IN, 0, &page, false);
        let long = data(memory, 256 << 10);
        requests.add(memory, queue, "long", IN, 64, &long, false);
        // Neither aligned nor one after the other.
        let at = memory.take(5 * PAGE);
        let scattered = [writable(at + 4000, 512), writable(at + 3 * PAGE - 100, 3584)];
        requests.add(memory, queue, "indirect", IN, 8, &scattered, true);
        let zeros = data(memory, 8192);
        requests.add(memory, queue, "zeros", IN, BASE_SECTORS, &zeros, false);
        let both = data(memory, 8192);
        requests.add(memory, queue, "base and zeros", IN, BASE_SECTORS - 8, &both, true);
        let id = data(memory, 20);
        requests.add(memory, queue, "id", GET_ID, 0, &id, false);
        let out = vec![readable(memory.take(4096), 4096)];
        requests.add(memory, queue, "write", OUT, 16, &out, false);
        requests.add(memory, queue, "flush", FLUSH, 0, &[], false);
        let discard = list(memory, 8);
        requests.add(memory, queue, "discard", DISCARD, 0, &discard, false);
        let zero = list(memory, 16);
        requests.add(memory, queue, "write zeroes", WRITE_ZEROES, 0, &zero, true);
        // Refused.
        let outside = data(memory, 512);
        requests.add(memory, queue, "past the end", IN, SECTORS, &outside, false);
        requests.add(memory, queue, "unknown", 77, 0, &[], false);
        requests
    }

    #[expect(clippy::too_many_arguments)]
    fn add(
        &mut self,
        memory: &mut Memory,
        queue: &Queue,
        name: &'static str,
        kind: u32,
        sector: u64,
        data: &[Buffer],
        indirect: bool,
    ) {
        let (head, status) = (memory.take(16), memory.take(1));
        memory.write(head, &header(kind, sector));
        memory.write(status, &[BEFORE]);
        for buffer in data.iter().filter(|buffer| buffer.writable) {
            memory.write(buffer.at, &vec![BEFORE; buffer.len as usize]);
        }
        let chain = [&[readable(head, 16)], data, &[writable(status, 1)]].concat();
        if indirect {
            let table = memory.take(16 * chain.len() as u64);
            queue.describe_indirect(memory, self.next, table, &chain);
        } else {
            queue.describe(memory, self.next, &chain);
        }
        let written = chain.iter().filter(|buffer| buffer.writable);
        let written = written.flat_map(|buffer| pages(buffer.at, buffer.len.into()));
        self.all.push((name, self.next, written.collect()));
        self.next += u16::try_from(chain.len()).unwrap();
    }
}

/// Has the daemon do one of each, twice through the ring, and compares.
fn all_kinds(args: &[&str], features: u64, logged: bool) {
    let directory = directory();
    let daemon = serve(directory.path(), args);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(FEATURES | features, PROTOCOL_FEATURES);
    let mut memory = Memory::new(400);
    let mut queue = Queue::new(&mut memory, 0, SIZE);
    let requests = Requests::new(&mut memory, &queue);
    memory.set(&mut frontend);
    queue.start(&mut frontend, false);
    if features & F_EVENT_IDX != 0 {
        queue.wait_asleep(&memory);
    }
    let log = memory.log();
    log.set(&mut frontend);
    if logged {
        frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | features | F_LOG_ALL);
        queue.set_addresses(&mut frontend, true);
    }
    log.take();

    let before = memory.copy();
    let used: BTreeSet<u64> = queue.used_pages().collect();
    let (mut all_changed, mut all_marked) = (BTreeSet::new(), BTreeSet::new());
    for (name, head, written) in &requests.all {
        queue.offer(&memory, *head);
        queue.wait(&memory);
        if features & F_EVENT_IDX != 0 {
            queue.wait_asleep(&memory);
        }
        let (changed, marked) = (memory.changed_since(&before), log.take());
        let changed: BTreeSet<u64> = &changed & written;
        assert!(!changed.is_empty(), "{name}: nothing was written");
        let missing: Vec<_> = changed.difference(&marked).collect();
        assert_eq!(missing.is_empty(), logged, "{name}: {missing:?} of {changed:?} not marked");
        let wrong: Vec<_> =
            marked.iter().filter(|page| !(written | &used).contains(page)).collect();
        assert!(wrong.is_empty(), "{name}: {wrong:?} are marked");
        all_marked.extend(marked);
        all_changed.extend(changed);
    }
    // All of the used ring; its pages one after the other.
    let flush = requests.all.iter().find(|(name, ..)| *name == "flush").unwrap().1;
    for _ in 0..SIZE {
        queue.offer(&memory, flush);
        queue.wait(&memory);
    }
    if features & F_EVENT_IDX != 0 {
        queue.wait_asleep(&memory);
    }
    frontend.get_vring_base(0);
    all_marked.extend(log.take());
    let changed = &memory.changed_since(&before) & &used;
    assert!(changed.len() >= 2, "the used ring has {used:?}, of which only {changed:?} changed");
    let missing: Vec<_> = changed.difference(&all_marked).collect();
    assert_eq!(missing.is_empty(), logged, "used ring: {missing:?} of {changed:?} not marked");
    drop(frontend);
    daemon.terminate();
}

#[test]
fn all_that_is_written_is_marked() {
    all_kinds(&[], F_EVENT_IDX, true);
    all_kinds(&[], 0, true);
}

#[test]
fn all_that_is_written_by_direct_io_is_marked() {
    let direct = ["--cow-cache=direct", "--base-cache=direct", "--poll-us=0"];
    all_kinds(&direct, F_EVENT_IDX, true);
    all_kinds(&direct, 0, true);
}

/// The comparison can fail, for each kind of request.
#[test]
fn without_the_log_nothing_is_marked() {
    all_kinds(&[], F_EVENT_IDX, false);
    all_kinds(&["--base-cache=direct"], 0, false);
}

/// A read that fails half-way has written the first half.
#[test]
fn what_a_failed_read_left_behind_is_marked() {
    let directory = directory();
    let daemon = serve(directory.path(), &["--base-cache=direct"]);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
    let mut memory = Memory::new(200);
    let mut queue = Queue::new(&mut memory, 0, 16);
    let data = memory.take(16 << 10);
    memory.write(data, &[BEFORE; 16 << 10]);
    let (head, status) = (memory.take(16), memory.take(1));
    memory.write(head, &header(IN, 0));
    queue.describe(
        &memory,
        0,
        &[readable(head, 16), writable(data, 16 << 10), writable(status, 1)],
    );
    memory.set(&mut frontend);
    let log = memory.log();
    log.set(&mut frontend);
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
    queue.start(&mut frontend, true);
    // Behind the daemon's back.
    let base = std::fs::File::options().write(true).open(directory.path().join("base")).unwrap();
    base.set_len(8 << 10).unwrap();
    log.take();
    let before = memory.copy();
    queue.offer(&memory, 0);
    queue.wait(&memory);
    assert_eq!(memory.read(status), [1], "the read did not fail");
    let (changed, marked) = (memory.changed_since(&before), log.take());
    assert!(changed.contains(&(data / PAGE)), "no half was written: {changed:?}");
    let written: BTreeSet<u64> = pages(data, 16 << 10).chain(pages(status, 1)).collect();
    let missing: Vec<_> = (&changed & &written).difference(&marked).copied().collect();
    assert!(missing.is_empty(), "{missing:?} of {changed:?} not marked");
}

const QUEUES: u32 = 3;
const SLOTS: u16 = 8;
const READ_LEN: u32 = 8 << 10;

/// A queue under load: reads of ever other sectors into the same buffers.
struct Lane {
    queue: Queue,
    headers: Vec<u64>,
    /// The pages that only the device writes.
    device_pages: BTreeSet<u64>,
}

impl Lane {
    fn new(memory: &mut Memory, number: u32) -> Self {
        let queue = Queue::new(memory, number, 64);
        let mut device_pages: BTreeSet<u64> = queue.used_pages().collect();
        let mut headers = Vec::new();
        for slot in 0..SLOTS {
            let (head, status) = (memory.take(16), memory.take(1));
            let data = memory.take(READ_LEN.into());
            let chain = [readable(head, 16), writable(data, READ_LEN), writable(status, 1)];
            queue.describe(memory, 3 * slot, &chain);
            device_pages.extend(pages(data, READ_LEN.into()).chain(pages(status, 1)));
            headers.push(head);
        }
        Lane { queue, headers, device_pages }
    }

    /// Keeps all slots busy until `stop`; counts what is answered.
    fn run(&mut self, memory: &Memory, stop: &AtomicBool, answered: &AtomicU64) {
        let mut sector = u64::from(self.queue.number);
        let mut begin = |queue: &mut Queue, headers: &[u64], slot: u16| {
            // Also past the end of the base.
            sector = (sector + 1_009) % (SECTORS - u64::from(READ_LEN / 512));
            memory.write(headers[usize::from(slot)], &header(IN, sector));
            queue.offer(memory, 3 * slot);
        };
        let mut seen = self.queue.used_idx(memory);
        for slot in 0..SLOTS {
            begin(&mut self.queue, &self.headers, slot);
        }
        while !stop.load(Ordering::SeqCst) {
            let now = self.queue.used_idx(memory);
            if seen == now {
                std::thread::yield_now();
            }
            while seen != now {
                let slot = self.queue.used_head(memory, seen) / 3;
                begin(&mut self.queue, &self.headers, slot);
                seen = seen.wrapping_add(1);
                answered.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
}

/// Does what a migrating frontend does, with the log switched on and off again and again under
/// load: copies all memory, then again and again what is marked, and once more after the rings were
/// stopped. Gives the pages in which the copy is wrong in the end. `told`: the daemon marks in the
/// log that is looked at.
fn migrate_under_load(args: &[&str], told: bool) -> BTreeSet<u64> {
    const ROUNDS: usize = 4;
    let directory = directory();
    let num_queues = format!("--num-queues={QUEUES}");
    let daemon = serve(directory.path(), &[args, &[&num_queues]].concat());
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
    let mut memory = Memory::new(400);
    let mut lanes: Vec<_> = (0..QUEUES).map(|number| Lane::new(&mut memory, number)).collect();
    memory.set(&mut frontend);
    lanes.iter().for_each(|lane| lane.queue.start(&mut frontend, false));
    let device_pages: BTreeSet<u64> =
        lanes.iter().flat_map(|lane| lane.device_pages.iter().copied()).collect();

    let (memory, stop, answered) = (&memory, AtomicBool::new(false), AtomicU64::new(0));
    let await_more = || {
        let begun = answered.load(Ordering::SeqCst);
        wait_until("progress", || answered.load(Ordering::SeqCst) > begun + 300);
    };
    let unread = memory.log();
    let set = |log: &Log, frontend: &mut RawFrontend| {
        (if told { log } else { &unread }).set(frontend);
    };
    let copy = std::thread::scope(|scope| {
        for lane in &mut lanes {
            scope.spawn(|| lane.run(memory, &stop, &answered));
        }
        let _stop = StopAtEnd(&stop);
        let mut copy = Vec::new();
        for round in 1..=ROUNDS {
            await_more();
            let mut log = memory.log();
            set(&log, &mut frontend);
            frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
            copy = memory.copy();
            let mut follow = |log: &Log| {
                for page in log.take() {
                    copy[usize::try_from(page).unwrap()] = memory.page(page);
                }
            };
            for _ in 0..3 {
                await_more();
                follow(&log);
            }
            // A larger one, as for memory that is about to be added.
            let larger = Log::new(log.len + 512);
            set(&larger, &mut frontend);
            follow(&std::mem::replace(&mut log, larger));
            await_more();
            if round < ROUNDS {
                frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES);
            } else {
                // With requests in flight.
                (0..QUEUES).for_each(|queue| _ = frontend.get_vring_base(queue));
            }
            follow(&log);
        }
        copy
    });
    drop(frontend);
    daemon.terminate();
    &memory.changed_since(&copy) & &device_pages
}

/// Ends the load also when the test fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_copy_that_follows_the_log_is_right_in_the_end() {
    for args in [&[][..], &["--base-cache=direct"], &["--cow-cache=direct", "--poll-us=0"]] {
        assert_eq!(migrate_under_load(args, true), BTreeSet::new(), "{args:?}");
    }
}

/// The comparison can fail.
#[test]
fn a_copy_that_does_not_follow_the_log_is_wrong_in_the_end() {
    assert_ne!(migrate_under_load(&[], false), BTreeSet::new());
}

/// A frontend with one running ring, and no log so far.
fn running(daemon: &Daemon) -> (RawFrontend, Memory, Queue) {
    let (frontend, memory, queue, _) = queue::running(daemon.connect(), FEATURES);
    (frontend, memory, queue)
}

#[test]
fn a_ring_waits_for_its_log() {
    let directory = directory();
    let daemon = serve(directory.path(), &[]);
    let (mut frontend, memory, mut queue) = running(&daemon);
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
    queue.offer(&memory, 0);
    // Acknowledged: whatever could have been done was done.
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
    assert_eq!(queue.in_flight(&memory), 1);
    let log = memory.log();
    log.set(&mut frontend);
    queue.wait(&memory);
    assert!(queue.used_pages().all(|page| log.take().contains(&page)));
    drop(frontend);
    daemon.terminate();
}

#[test]
fn a_log_that_cannot_be_used_ends_the_connection_and_nothing_else() {
    let directory = directory();
    let mut daemon = serve(directory.path(), &[]);
    let len = Memory::new(100).log().len;
    let good = memfd(len);
    let (_, pipe) = std::io::pipe().unwrap();
    let cases: [(u64, u64, Option<&dyn AsRawFd>, &str); 7] = [
        (len - 1, 0, Some(&good), "are needed for guest memory up to"),
        (0, 0, Some(&good), "SET_LOG_BASE"),
        (len, 0, None, "SET_LOG_BASE"),
        (len, 1, Some(&good), "its file has"),
        (len, 1 << 63, Some(&good), "file offset plus size overflows"),
        (1 << 62, 0, Some(&good), "its file has"),
        (len, 0, Some(&pipe), "its descriptor is a pipe"),
    ];
    for (len, offset, fd, reason) in cases {
        let (mut frontend, ..) = running(&daemon);
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
        frontend.send_log_base(len, offset, &fds);
        let line = daemon.wait_line("connection closed: SET_LOG_BASE");
        assert!(line.contains(reason), "{line}");
        frontend.wait_closed();
        daemon.wait_line("connection ended");
    }
    running(&daemon);
    daemon.terminate();
}

#[test]
fn what_the_log_does_not_reach_is_refused() {
    let directory = directory();
    let mut daemon = serve(directory.path(), &[]);
    let with_log = |daemon: &Daemon| {
        let (mut frontend, memory, queue) = running(daemon);
        let log = memory.log();
        log.set(&mut frontend);
        frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
        frontend.need_reply = false;
        (frontend, queue, log)
    };
    // Memory above.
    let (mut frontend, _, log) = with_log(&daemon);
    let words = [0, 8 * PAGE * log.len, PAGE, 0x1234_0000, 0];
    let more = memfd(PAGE);
    let body = words.map(u64::to_ne_bytes).concat();
    frontend.send(FrontendReq::ADD_MEM_REG, &body, &[more.as_raw_fd()]);
    let line = daemon.wait_line("connection closed: ADD_MEM_REG");
    assert!(line.contains("dirty log of"), "{line}");
    frontend.wait_closed();
    // A used ring that is logged elsewhere.
    for at in [8 * PAGE * log.len - 8, u64::MAX] {
        let (mut frontend, queue, _log) = with_log(&daemon);
        queue.set_addresses_logged_at(&mut frontend, at);
        let line = daemon.wait_line("connection closed: SET_VRING_ADDR");
        assert!(line.contains("dirty log of"), "{line}");
        frontend.wait_closed();
    }
    running(&daemon);
    daemon.terminate();
}

#[test]
fn a_log_that_is_shortened_ends_the_connection_and_nothing_else() {
    let directory = directory();
    let mut daemon = serve(directory.path(), &[]);
    let (mut frontend, memory, mut queue) = running(&daemon);
    let log = memory.log();
    log.set(&mut frontend);
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
    log.file.set_len(0).unwrap();
    queue.offer(&memory, 0);
    let line = daemon.wait_line("connection closed");
    assert!(line.contains("has shortened the file"), "{line}");
    // Nothing was published that is not marked.
    assert_eq!(queue.in_flight(&memory), 1);
    frontend.wait_closed();

    // Noticed also where no ring is there to notice it.
    let (mut frontend, memory, _queue) = running(&daemon);
    let log = memory.log();
    log.set(&mut frontend);
    log.file.set_len(0).unwrap();
    frontend.need_reply = false;
    // The ring that starts marks all of itself.
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
    frontend.send_raw(&get_vring_base(), &[]);
    daemon.wait_line("has shortened the file");
    frontend.wait_closed();
    running(&daemon);
    daemon.terminate();
}

fn get_vring_base() -> Vec<u8> {
    let body = testkit::frontend::state(0, 0);
    testkit::frontend::message(FrontendReq::GET_VRING_BASE.into(), 1, &body)
}
