//! Guest memory that the daemon has not got, may not write, or loses: the guest gets an error or
//! the frontend its end, and the log says what is to be done about it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::common::{Daemon, sector};
use nix::sys::memfd::{MFdFlags, memfd_create};
use testkit::frontend::{F_PROTOCOL_FEATURES, F_SEG_MAX, F_VERSION_1, RawFrontend};
use testkit::memory::{GUEST, Memory, memfd};
use testkit::queue::{Buffer, Queue, readable, running, writable};
use testkit::request::{IN, OUT, header};
use testkit::wait::wait_until;
use vhost::vhost_user::message::FrontendReq;

const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES;
/// Where a second region stands, counted from the first byte of the first one; and in the frontend.
const SECOND: u64 = 1 << 30;
const SECOND_VMM: u64 = 0x7e00_0000_0000;
/// Its length: a huge page.
const SECOND_LEN: u64 = 2 << 20;

const OK: u8 = 0;
const IOERR: u8 = 1;
/// What a status byte holds before.
const UNTOUCHED: u8 = 0xee;

/// A frontend with a ring, all of it in the first region.
struct Guest {
    frontend: RawFrontend,
    memory: Memory,
    queue: Queue,
    head: u64,
    status: u64,
}

impl Guest {
    fn new(daemon: &Daemon) -> Self {
        let (frontend, mut memory, queue, status) = running(daemon.connect(), FEATURES);
        let head = memory.take(16);
        Guest { frontend, memory, queue, head, status }
    }

    fn add_second(&mut self, file: &File) {
        let words = [0, GUEST + SECOND, SECOND_LEN, SECOND_VMM, 0];
        let body = words.map(u64::to_ne_bytes).concat();
        self.frontend.send(FrontendReq::ADD_MEM_REG, &body, &[file.as_raw_fd()]);
    }

    /// One request with these buffers behind the header; its status.
    fn request(&mut self, kind: u32, sector: u64, buffers: &[Buffer]) -> u8 {
        self.offer(kind, sector, buffers);
        self.queue.wait(&self.memory);
        let [status] = self.memory.read(self.status);
        status
    }

    fn offer(&mut self, kind: u32, sector: u64, buffers: &[Buffer]) {
        self.memory.write(self.head, &header(kind, sector));
        self.memory.write(self.status, &[UNTOUCHED]);
        let all = [&[readable(self.head, 16)], buffers].concat();
        self.queue.describe(&self.memory, 0, &all);
        self.queue.offer(&self.memory, 0);
    }

    /// Reads a sector into memory at `data`.
    fn read(&mut self, number: u64, data: u64) -> u8 {
        self.request(IN, number, &[writable(data, 512), writable(self.status, 1)])
    }
}

#[test]
fn a_buffer_in_memory_that_is_not_shared() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(&daemon);
    assert_eq!(guest.read(3, SECOND), IOERR);
    let line = daemon.wait_line("request refused");
    assert!(line.contains(&format!("guest address {:#x}, 512 bytes", GUEST + SECOND)), "{line}");
    assert!(line.contains("share=on"), "{line}");
    // A table of descriptors may be there as well: then nobody knows where the status is.
    let buffers = [readable(guest.head, 16), writable(guest.status, 1)];
    guest.queue.describe_indirect(&guest.memory, 0, 0x8000, &buffers);
    // The first descriptor is the first thing in memory.
    let indirect = [(GUEST + SECOND).to_le_bytes().as_slice(), &32u32.to_le_bytes()].concat();
    guest.memory.write(0, &indirect);
    guest.memory.write(guest.status, &[UNTOUCHED]);
    guest.queue.offer(&guest.memory, 0);
    guest.queue.wait(&guest.memory);
    assert_eq!(guest.memory.read(guest.status), [UNTOUCHED]);

    // It is a moment's matter where the frontend takes a region away and brings it again.
    let second = memfd(SECOND_LEN);
    guest.add_second(&second);
    assert_eq!(guest.read(3, SECOND), OK);
    let mut bytes = [0; 512];
    second.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, sector(3));
    daemon.terminate();
}

#[test]
fn memory_that_may_only_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(&daemon);
    let second = memfd(SECOND_LEN);
    second.write_all_at(&[0x77; 512], 0).unwrap();
    let path = format!("/proc/self/fd/{}", second.as_raw_fd());
    guest.add_second(&File::open(path).unwrap());

    // From there to the disk.
    let status = guest.status;
    let write = [readable(SECOND, 512), writable(status, 1)];
    assert_eq!(guest.request(OUT, 9, &write), OK);
    let data = guest.memory.take(512);
    assert_eq!(guest.read(9, data), OK);
    assert_eq!(guest.memory.read(data), [0x77; 512]);
    // Not from the disk to there, wholly or in part.
    assert_eq!(guest.read(3, SECOND), IOERR);
    let line = daemon.wait_line("request refused");
    assert!(line.contains("for reading only"), "{line}");
    let parts = [writable(data, 512), writable(SECOND + 512, 512), writable(status, 1)];
    assert_eq!(guest.request(IN, 3, &parts), IOERR);
    // Nor the status.
    let read = [writable(data, 512), writable(SECOND, 1)];
    assert_eq!(guest.request(IN, 3, &read), UNTOUCHED);
    let mut bytes = [0; 1024];
    second.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [[0x77; 512], [0; 512]].concat()[..]);
    assert_eq!(guest.read(3, data), OK);
    daemon.terminate();
}

#[test]
fn a_ring_in_memory_that_may_only_be_read_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(&daemon);
    let second = memfd(SECOND_LEN);
    let path = format!("/proc/self/fd/{}", second.as_raw_fd());
    guest.add_second(&File::open(path).unwrap());
    let err = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    guest.frontend.send_fd(FrontendReq::SET_VRING_ERR, 0, &err);
    guest.frontend.get_vring_base(0);
    let flags = [0, 0].map(u32::to_ne_bytes).concat();
    let words = [SECOND_VMM, SECOND_VMM + 0x2000, SECOND_VMM + 0x1000, 0];
    let body = [flags, words.map(u64::to_ne_bytes).concat()].concat();
    guest.frontend.send(FrontendReq::SET_VRING_ADDR, &body, &[]);
    let kick = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    guest.frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &kick);
    assert_ne!(err.read().unwrap(), 0);
    let line = daemon.wait_line("the ring is stopped");
    assert!(line.contains("for reading only"), "{line}");
    daemon.terminate();
}

/// An area that the daemon has to write.
#[test]
fn a_dirty_log_that_may_only_be_read_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(&daemon);
    let log = guest.memory.log();
    let read_only = File::open(format!("/proc/self/fd/{}", log.file.as_raw_fd())).unwrap();
    guest.frontend.send_log_base(log.len, 0, &[read_only.as_raw_fd()]);
    let line = daemon.wait_line("connection closed: SET_LOG_BASE");
    assert!(line.contains("dirty log") && line.contains("for reading only"), "{line}");
    guest.frontend.wait_closed();
    daemon.terminate();
}

/// The file is as long as it was, and the system has no page for it: what a full tmpfs is too.
#[test]
fn shared_memory_that_has_run_out_is_not_the_frontend_s_fault() {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let Ok(second) = memfd_create(c"huge", flags).map(File::from) else {
        println!("skipped: no huge pages of 2 MiB on this system");
        return;
    };
    second.set_len(SECOND_LEN).unwrap();
    if has_free_huge_pages() {
        println!("skipped: this system has huge pages to give");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(&daemon);
    guest.add_second(&second);
    guest.offer(IN, 3, &[writable(SECOND, 512), writable(guest.status, 1)]);
    let line = daemon.wait_line("connection closed");
    assert!(line.contains("guest memory: the system has no page"), "{line}");
    assert!(line.contains("prealloc=on"), "{line}");
    guest.frontend.wait_closed();
    let mut guest = Guest::new(&daemon);
    let data = guest.memory.take(512);
    assert_eq!(guest.read(3, data), OK);
    daemon.terminate();
}

fn has_free_huge_pages() -> bool {
    let dir = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    ["free_hugepages", "nr_overcommit_hugepages"].into_iter().any(|name| {
        std::fs::read_to_string(format!("{dir}/{name}")).map_or(true, |n| n.trim() != "0")
    })
}

#[test]
fn requests_that_may_not_fit_their_ring() {
    let directory = tempfile::tempdir().unwrap();
    let fits = |args: &[&str], features: u64| {
        let mut daemon = Daemon::with_image(directory.path(), args);
        // A ring of 16.
        let (mut frontend, ..) = running(daemon.connect(), features);
        assert!(frontend.get_config(12, 4).is_some());
        wait_until("the start", || daemon.said().contains("16 descriptors"));
        !daemon.terminate().contains("may wait for ever")
    };
    const F_INDIRECT_DESC: u64 = testkit::frontend::F_INDIRECT_DESC;
    assert!(!fits(&[], FEATURES | F_SEG_MAX));
    assert!(fits(&[], FEATURES | F_SEG_MAX | F_INDIRECT_DESC));
    assert!(fits(&[], FEATURES), "it makes requests of one segment");
    assert!(fits(&["--queue-size=16"], FEATURES | F_SEG_MAX), "fewer segments are offered");
}
