//! A driver that puts any chain of descriptors into its ring, and a frontend that migrates: it keeps a
//! dirty log, and a copy of guest memory that follows it.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;

use crate::frontend::{PROTOCOL_FEATURES, RawFrontend};
use crate::ring::FLUSH;

/// Where guest memory begins, for the guest and for the frontend.
pub const GUEST: u64 = 0x10_0000;
const VMM: u64 = 0x7f00_0000_0000;
pub const PAGE: u64 = 4096;

/// After this a test that waits is a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// `VHOST_VRING_F_LOG`
const F_LOG: u32 = 1;

/// Guest memory, and where the next free page of it is. Places are counted from its beginning.
pub struct Memory {
    pub file: File,
    pub len: u64,
    free: u64,
}

impl Memory {
    pub fn new(pages: u64) -> Self {
        let len = pages * PAGE;
        Memory { file: memfd(len), len, free: 0 }
    }

    /// Takes `len` bytes, from a page's beginning on.
    pub fn take(&mut self, len: u64) -> u64 {
        let at = self.free;
        self.free += len.next_multiple_of(PAGE);
        assert!(self.free <= self.len, "guest memory is full");
        at
    }

    /// Tells the daemon of it.
    pub fn set(&self, frontend: &mut RawFrontend) {
        let mut body = [1u32, 0].map(u32::to_ne_bytes).concat();
        body.extend([GUEST, self.len, VMM, 0].map(u64::to_ne_bytes).concat());
        frontend.send(FrontendReq::SET_MEM_TABLE, &body, &[self.file.as_raw_fd()]);
    }

    /// What ADD_MEM_REG and REM_MEM_REG say of it.
    pub fn region(&self) -> Vec<u8> {
        [0, GUEST, self.len, VMM, 0].map(u64::to_ne_bytes).concat()
    }

    /// A log that is just large enough for it.
    pub fn log(&self) -> Log {
        Log::new((GUEST + self.len).div_ceil(8 * PAGE))
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub fn page(&self, page: u64) -> Vec<u8> {
        self.read::<4096>(page * PAGE).to_vec()
    }

    /// All pages, as they are now.
    pub fn copy(&self) -> Vec<Vec<u8>> {
        (0..self.len / PAGE).map(|page| self.page(page)).collect()
    }

    /// The pages that differ from a copy.
    pub fn changed_since(&self, copy: &[Vec<u8>]) -> BTreeSet<u64> {
        let differs = |page: &u64| self.page(*page) != copy[usize::try_from(*page).unwrap()];
        (0..self.len / PAGE).filter(differs).collect()
    }
}

pub fn memfd(len: u64) -> File {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// A dirty log.
pub struct Log {
    pub file: File,
    pub len: u64,
    map: *mut u8,
}

impl Log {
    pub fn new(len: u64) -> Self {
        let file = memfd(len);
        // SAFETY: a new mapping of the whole file, which nobody shortens while it is used.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                usize::try_from(len).unwrap(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(map, libc::MAP_FAILED);
        Log { file, len, map: map.cast() }
    }

    pub fn set(&self, frontend: &mut RawFrontend) {
        frontend.set_log_base(self.len, 0, &self.file);
    }

    /// Takes the marks: the marked pages, counted from the beginning of guest memory.
    pub fn take(&self) -> BTreeSet<u64> {
        use std::sync::atomic::{AtomicU8, Ordering};
        let byte = |at: u64| {
            // SAFETY: inside the mapping; the daemon uses atomics as well.
            let byte = unsafe { AtomicU8::from_ptr(self.map.add(usize::try_from(at).unwrap())) };
            byte.swap(0, Ordering::AcqRel)
        };
        let pages = (0..self.len).flat_map(|at| {
            let bits = byte(at);
            (0..8).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| 8 * at + bit)
        });
        pages.map(|page| page.checked_sub(GUEST / PAGE).expect("a page below memory")).collect()
    }
}

/// A buffer of a request.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub at: u64,
    pub len: u32,
    pub writable: bool,
}

pub fn readable(at: u64, len: u32) -> Buffer {
    Buffer { at, len, writable: false }
}

pub fn writable(at: u64, len: u32) -> Buffer {
    Buffer { at, len, writable: true }
}

/// A ring. What the driver writes and what the device writes stand in different pages.
pub struct Queue {
    pub number: u32,
    pub size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    avail_idx: u16,
    kick: EventFd,
}

impl Queue {
    pub fn new(memory: &mut Memory, number: u32, size: u16) -> Self {
        let entries = u64::from(size);
        Queue {
            number,
            size,
            desc: memory.take(16 * entries),
            avail: memory.take(6 + 2 * entries),
            used: memory.take(6 + 8 * entries),
            avail_idx: 0,
            kick: EventFd::new(0).unwrap(),
        }
    }

    /// The used ring's pages.
    pub fn used_pages(&self) -> impl Iterator<Item = u64> + use<> {
        pages(self.used, 6 + 8 * u64::from(self.size))
    }

    /// Tells the daemon all about it, and enables it.
    pub fn start(&self, frontend: &mut RawFrontend, logged: bool) {
        frontend.send_state(FrontendReq::SET_VRING_NUM, self.number, self.size.into());
        frontend.send_state(FrontendReq::SET_VRING_BASE, self.number, self.avail_idx.into());
        self.set_addresses(frontend, logged);
        frontend.send_fd(FrontendReq::SET_VRING_KICK, self.number.into(), &self.kick);
        frontend.send_state(FrontendReq::SET_VRING_ENABLE, self.number, 1);
    }

    pub fn set_addresses(&self, frontend: &mut RawFrontend, logged: bool) {
        self.send_addresses(frontend, if logged { F_LOG } else { 0 }, GUEST + self.used);
    }

    /// The same with a place of the used ring in the log that is not its own.
    pub fn set_addresses_logged_at(&self, frontend: &mut RawFrontend, at: u64) {
        self.send_addresses(frontend, F_LOG, at);
    }

    fn send_addresses(&self, frontend: &mut RawFrontend, flags: u32, log: u64) {
        let mut body = [self.number, flags].map(u32::to_ne_bytes).concat();
        let words = [VMM + self.desc, VMM + self.used, VMM + self.avail, log];
        body.extend(words.map(u64::to_ne_bytes).concat());
        frontend.send(FrontendReq::SET_VRING_ADDR, &body, &[]);
    }

    /// Writes the descriptors of a request from place `head` on.
    pub fn describe(&self, memory: &Memory, head: u16, buffers: &[Buffer]) {
        memory.write(self.desc + 16 * u64::from(head), &table(head, buffers));
    }

    /// The same in a table of its own at `table_at`.
    pub fn describe_indirect(&self, memory: &Memory, head: u16, table_at: u64, all: &[Buffer]) {
        memory.write(table_at, &table(0, all));
        let len = u32::try_from(16 * all.len()).unwrap();
        let bytes = descriptor(readable(table_at, len), INDIRECT, 0);
        memory.write(self.desc + 16 * u64::from(head), &bytes);
    }

    /// Makes it available. Only the available ring is written.
    pub fn offer(&mut self, memory: &Memory, head: u16) {
        let entry = u64::from(self.avail_idx % self.size);
        memory.write(self.avail + 4 + 2 * entry, &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        memory.write(self.avail + 2, &self.avail_idx.to_le_bytes());
        self.kick.write(1).unwrap();
    }

    pub fn used_idx(&self, memory: &Memory) -> u16 {
        u16::from_le_bytes(memory.read(self.used + 2))
    }

    /// Requests that were offered and are not answered.
    pub fn in_flight(&self, memory: &Memory) -> u16 {
        self.avail_idx.wrapping_sub(self.used_idx(memory))
    }

    /// The head of the answer that was the `index`th.
    pub fn used_head(&self, memory: &Memory, index: u16) -> u16 {
        let at = self.used + 4 + 8 * u64::from(index % self.size);
        u16::from_le_bytes(memory.read(at))
    }

    /// Waits until everything is answered.
    pub fn wait(&self, memory: &Memory) {
        wait_until("an answer", || self.in_flight(memory) == 0);
    }

    /// Waits until the device sleeps and has asked for the next kick (with EVENT_IDX).
    pub fn wait_asleep(&self, memory: &Memory) {
        let avail_event = self.used + 4 + 8 * u64::from(self.size);
        let asked = || u16::from_le_bytes(memory.read(avail_event)) == self.avail_idx;
        wait_until("sleep", asked);
    }
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The pages that a range touches.
pub fn pages(at: u64, len: u64) -> impl Iterator<Item = u64> {
    at / PAGE..(at + len).div_ceil(PAGE)
}

fn table(first: u16, buffers: &[Buffer]) -> Vec<u8> {
    let last = buffers.len() - 1;
    let each = buffers.iter().zip(first..).enumerate();
    let bytes = each.flat_map(|(n, (&buffer, place))| {
        let flags = if n == last { 0 } else { NEXT };
        descriptor(buffer, flags, place + 1)
    });
    bytes.collect()
}

fn descriptor(buffer: Buffer, flags: u16, next: u16) -> Vec<u8> {
    let flags = flags | if buffer.writable { WRITE } else { 0 };
    let mut bytes = (GUEST + buffer.at).to_le_bytes().to_vec();
    bytes.extend(buffer.len.to_le_bytes());
    bytes.extend([flags, next].map(u16::to_le_bytes).concat());
    bytes
}

/// The header of a request.
pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&[kind, 0].map(u32::to_le_bytes).concat(), sector.to_le_bytes().as_slice()].concat()
}

/// A frontend whose ring has answered a flush, which can be offered again as head 0; and the place of
/// its status.
pub fn running(stream: UnixStream, features: u64) -> (RawFrontend, Memory, Queue, u64) {
    let mut frontend = RawFrontend::new(stream);
    frontend.negotiate(features, PROTOCOL_FEATURES);
    let mut memory = Memory::new(100);
    let mut queue = Queue::new(&mut memory, 0, 16);
    let (head, status) = (memory.take(16), memory.take(1));
    memory.write(head, &header(FLUSH, 0));
    queue.describe(&memory, 0, &[readable(head, 16), writable(status, 1)]);
    memory.set(&mut frontend);
    queue.start(&mut frontend, false);
    queue.offer(&memory, 0);
    queue.wait(&memory);
    (frontend, memory, queue, status)
}
