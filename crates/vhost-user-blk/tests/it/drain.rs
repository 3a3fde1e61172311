//! Whatever stops a ring in the midst of I/O: once the frontend has its answer, what the daemon had
//! taken is answered and it writes nothing more into guest memory.

use std::io::Write;
use std::os::fd::AsRawFd;

use crate::common::Daemon;
use testkit::frontend::{
    F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend, message,
};
use testkit::memory::{Memory, PAGE};
use testkit::queue::{Queue, readable, writable};
use testkit::request::{IN, header};
use vhost::vhost_user::message::FrontendReq;

const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES;
/// Requests, and bytes that each of them reads.
const REQUESTS: u16 = 32;
const LEN: u32 = 16 * 4096;
const ROUNDS: u32 = 12;

/// A frontend with a ring that has been given work, and no answer was waited for.
struct Loaded {
    frontend: RawFrontend,
    memory: Memory,
    queue: Queue,
}

impl Loaded {
    fn new(daemon: &Daemon) -> Self {
        let mut frontend = RawFrontend::new(daemon.connect());
        frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
        let mut memory = Memory::new(u64::from(REQUESTS) * (u64::from(LEN) / PAGE + 2) + 10);
        let queue = Queue::new(&mut memory, 0, 128);
        memory.set(&mut frontend);
        queue.start(&mut frontend, false);
        let mut loaded = Loaded { frontend, memory, queue };
        (0..REQUESTS).for_each(|nth| loaded.offer(nth));
        loaded
    }

    fn offer(&mut self, nth: u16) {
        let Loaded { memory, queue, .. } = self;
        let (head, data, status) = (memory.take(16), memory.take(LEN.into()), memory.take(1));
        memory.write(head, &header(IN, u64::from(nth) * 37));
        let buffers = [readable(head, 16), writable(data, LEN), writable(status, 1)];
        queue.describe(memory, 3 * nth, &buffers);
        queue.offer(memory, 3 * nth);
    }
}

/// Direct reads take long enough for some to be in flight. Not in /tmp, which may have none.
fn serve() -> (tempfile::TempDir, Daemon) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let daemon = Daemon::with_image(directory.path(), &["--cow-cache=direct", "--poll-us=0"]);
    (directory, daemon)
}

/// Has `stop` stop rings that are at work, and looks whether they are at rest then.
fn is_at_rest_after(stop: impl Fn(&mut Loaded)) {
    let (_directory, daemon) = serve();
    let mut interrupted = 0;
    for _ in 0..ROUNDS {
        let mut loaded = Loaded::new(&daemon);
        let before = loaded.queue.in_flight(&loaded.memory);
        stop(&mut loaded);
        let Loaded { memory, queue, .. } = &loaded;
        interrupted += u32::from(queue.in_flight(memory) < before);
        let copy = memory.copy();
        // What is in flight, if anything is, lands meanwhile.
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(memory.changed_since(&copy).is_empty(), "memory changed after the answer");
    }
    assert!(interrupted > 0, "the rings had nothing to do when they were stopped");
    daemon.terminate();
}

#[test]
fn get_vring_base() {
    is_at_rest_after(|loaded| {
        let base = loaded.frontend.get_vring_base(0);
        assert_eq!(base, u32::from(loaded.queue.used_idx(&loaded.memory)), "taken, not answered");
    });
}

#[test]
fn reset_device() {
    is_at_rest_after(|loaded| loaded.frontend.send(FrontendReq::RESET_DEVICE, &[], &[]));
}

#[test]
fn memory_that_is_removed() {
    is_at_rest_after(|loaded| {
        loaded.frontend.send(FrontendReq::REM_MEM_REG, &loaded.memory.region(), &[]);
    });
}

#[test]
fn a_ring_that_is_disabled_and_goes_on_when_it_is_enabled() {
    is_at_rest_after(|loaded| {
        loaded.frontend.send_state(FrontendReq::SET_VRING_ENABLE, 0, 0);
    });
    let (_directory, daemon) = serve();
    let mut loaded = Loaded::new(&daemon);
    loaded.frontend.send_state(FrontendReq::SET_VRING_ENABLE, 0, 0);
    loaded.frontend.send_state(FrontendReq::SET_VRING_ENABLE, 0, 1);
    loaded.queue.wait(&loaded.memory);
    daemon.terminate();
}

#[test]
fn a_frontend_that_dies_in_the_middle_of_a_message() {
    let (_directory, mut daemon) = serve();
    for len in 1..20 {
        let Loaded { mut frontend, memory, .. } = Loaded::new(&daemon);
        let whole = message(FrontendReq::SET_VRING_KICK.into(), 1, &[0; 8]);
        if len % 2 == 0 {
            frontend.stream.write_all(&whole[..len]).unwrap();
        } else {
            frontend.send_raw(&whole[..len], &[memory.file.as_raw_fd()]);
        }
        drop(frontend);
        daemon.wait_line("connection ended");
        let copy = memory.copy();
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(memory.changed_since(&copy).is_empty(), "memory changed after the end");
    }
    daemon.terminate();
}
