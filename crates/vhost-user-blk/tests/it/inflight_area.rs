//! In-flight areas that a frontend has spoilt, given to a running daemon: the connection ends with
//! the reason in the log, the disk stays as it was, and the next frontend is served. (Each way in
//! which an area can contradict itself: `src/inflight/tests.rs`.)

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::common::Daemon;
use testkit::frontend::{
    F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend, message,
};
use testkit::memory::{Memory, memfd};
use testkit::queue::{Queue, readable, writable};
use testkit::request::{OUT, header};
use vhost::vhost_user::message::FrontendReq;

const SIZE: u16 = 16;
/// Header and descriptors of one queue, to the next 64 bytes.
const AREA_LEN: u64 = 320;

struct Guest {
    frontend: RawFrontend,
    memory: Memory,
    queue: Queue,
    status: u64,
}

impl Guest {
    /// A frontend with a ring that is not started, and a request to write sector 9.
    fn new(daemon: &Daemon) -> Self {
        let mut frontend = RawFrontend::new(daemon.connect());
        frontend.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES, PROTOCOL_FEATURES);
        // A refusal closes the connection; what comes after it may not be answered.
        frontend.need_reply = false;
        let mut memory = Memory::new(100);
        let queue = Queue::new(&mut memory, 0, SIZE);
        let (head, data, status) = (memory.take(16), memory.take(512), memory.take(1));
        memory.write(head, &header(OUT, 9));
        memory.write(data, &[0x55; 512]);
        memory.write(status, &[0xff]);
        queue.describe(&memory, 0, &[readable(head, 16), readable(data, 512), writable(status, 1)]);
        memory.set(&mut frontend);
        Guest { frontend, memory, queue, status }
    }

    /// SET_INFLIGHT_FD: the area is that long, and for so many queues.
    fn set_area(&mut self, file: &File, len: u64, queues: u16) {
        let mut body = [len, 0].map(u64::to_ne_bytes).concat();
        body.extend([queues, SIZE, 0, 0].map(u16::to_ne_bytes).concat());
        let bytes = message(FrontendReq::SET_INFLIGHT_FD.into(), 1, &body);
        self.frontend.send_raw(&bytes, &[file.as_raw_fd()]);
    }

    fn write(&mut self) {
        self.queue.offer(&self.memory, 0);
        self.queue.wait(&self.memory);
        assert_eq!(self.memory.read::<1>(self.status), [0]);
    }
}

/// An area as a predecessor might have left it, with something changed.
fn area(at: u64, bytes: &[u8]) -> File {
    let file = memfd(AREA_LEN);
    // Version 1, of as many descriptors; nothing is in flight.
    file.write_all_at(&[1, 0, 16, 0], 8).unwrap();
    file.write_all_at(bytes, at).unwrap();
    file
}

#[test]
fn what_cannot_be_an_area_ends_the_connection_only() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let cases: [(File, u64, u16, &str); 8] = [
        (area(0, &[]), AREA_LEN - 1, 1, "319 bytes"),
        (memfd(AREA_LEN - 64), AREA_LEN, 1, "its file has"),
        (area(0, &[]), AREA_LEN, 2, "2 queues"),
        (area(0, &[]), AREA_LEN, 0, "SET_INFLIGHT_FD"),
        (area(0, &[]), u64::MAX, 1, "SET_INFLIGHT_FD"),
        // These are seen when the ring starts.
        (area(0, &[0xff; 320]), AREA_LEN, 1, "in-flight area"),
        (area(14, &[7]), AREA_LEN, 1, "used_idx is 7"),
        (area(16, &[1]), AREA_LEN, 1, "1 requests are marked"),
    ];
    for (file, len, queues, expected) in cases {
        let mut guest = Guest::new(&daemon);
        guest.set_area(&file, len, queues);
        if file.metadata().unwrap().len() == AREA_LEN && len == AREA_LEN && queues == 1 {
            guest.queue.start(&mut guest.frontend, false);
        }
        daemon.closes(guest.frontend, expected);
    }
    let image = directory.path().join("disk.img");
    assert_eq!(std::fs::read(&image).unwrap(), crate::common::content());
    let mut guest = Guest::new(&daemon);
    guest.set_area(&area(0, &[]), AREA_LEN, 1);
    guest.queue.start(&mut guest.frontend, false);
    guest.write();
    drop(guest);
    daemon.terminate();
    assert_eq!(std::fs::read(image).unwrap()[9 * 512..10 * 512], [0x55; 512]);
}

#[test]
fn an_area_that_is_shortened_while_it_is_used_ends_the_connection_only() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let (mut guest, file) = (Guest::new(&daemon), area(0, &[]));
    guest.set_area(&file, AREA_LEN, 1);
    guest.queue.start(&mut guest.frontend, false);
    guest.write();
    file.set_len(0).unwrap();
    guest.queue.offer(&guest.memory, 0);
    daemon.closes(guest.frontend, "shortened");
    let mut guest = Guest::new(&daemon);
    guest.set_area(&area(0, &[]), AREA_LEN, 1);
    guest.queue.start(&mut guest.frontend, false);
    guest.write();
    drop(guest);
    daemon.terminate();
}
