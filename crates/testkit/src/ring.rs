//! A guest's side: memory shared with the daemon, and a driver for one ring in it.

use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::FrontendReq;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vmm_sys_util::eventfd::EventFd;

use crate::frontend::{PROTOCOL_FEATURES, RawFrontend};

/// Guest memory of a test.
pub const MEMORY_LEN: u64 = 1 << 20;
/// Where it stands in the guest.
pub const GUEST_BASE: u64 = 0x10_0000;
/// Where it stands in the frontend, so it says. Nothing is ever mapped there.
pub const VMM_BASE: u64 = 0x7f12_3450_0000;
/// Entries of a ring.
pub const RING_SIZE: u16 = 16;

/// Bytes kept for each ring, its headers, and its data.
const RING_SPACE: u64 = 0x1_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x4000;
const DATA: u64 = 0x5000;

/// Request types.
pub const IN: u32 = VIRTIO_BLK_T_IN;
pub const OUT: u32 = VIRTIO_BLK_T_OUT;
pub const FLUSH: u32 = VIRTIO_BLK_T_FLUSH;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Memory that the daemon maps. The test goes to it by system calls only.
pub struct GuestMemory(pub File);

impl GuestMemory {
    pub fn new() -> Self {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(MEMORY_LEN).unwrap();
        GuestMemory(file)
    }

    /// The body of SET_MEM_TABLE for this memory.
    pub fn table() -> Vec<u8> {
        let mut body = [1u32, 0].map(u32::to_ne_bytes).concat();
        body.extend(region());
        body
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).unwrap();
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

/// The one region: guest address, size, frontend address, offset.
pub fn region() -> Vec<u8> {
    [GUEST_BASE, MEMORY_LEN, VMM_BASE, 0].map(u64::to_ne_bytes).concat()
}

/// The body of ADD_MEM_REG and REM_MEM_REG.
pub fn single_region() -> Vec<u8> {
    [&[0; 8], region().as_slice()].concat()
}

/// How the daemon tells that something was used.
pub enum Call {
    Event(EventFd),
    Pipe(PipeReader),
}

impl Call {
    /// Waits for one signal at least.
    pub fn wait(&mut self) {
        match self {
            Call::Event(event) => assert_ne!(event.read().unwrap(), 0),
            Call::Pipe(pipe) => {
                let mut bytes = [0; 8];
                pipe.read_exact(&mut bytes).unwrap();
                assert_eq!(u64::from_ne_bytes(bytes), 1);
            }
        }
    }
}

/// A driver that has one request at a time in its ring.
pub struct Ring {
    queue: u32,
    base: u64,
    avail: u16,
    pub kick: EventFd,
    pub call: Call,
}

impl Ring {
    pub fn new(queue: u32) -> Self {
        Ring {
            queue,
            base: u64::from(queue) * RING_SPACE,
            avail: 0,
            kick: EventFd::new(0).unwrap(),
            call: Call::Event(EventFd::new(0).unwrap()),
        }
    }

    /// The body of SET_VRING_ADDR.
    pub fn addresses(&self) -> Vec<u8> {
        let at = VMM_BASE + self.base;
        let flags_and_queue = state_of(self.queue);
        let addresses = [at, at + USED, at + AVAIL, 0].map(u64::to_ne_bytes).concat();
        [flags_and_queue, addresses].concat()
    }

    /// Tells the daemon all about the ring but to enable it.
    pub fn set_up(&self, frontend: &mut RawFrontend) {
        frontend.send_state(FrontendReq::SET_VRING_NUM, self.queue, RING_SIZE.into());
        frontend.send_state(FrontendReq::SET_VRING_BASE, self.queue, self.avail.into());
        frontend.send(FrontendReq::SET_VRING_ADDR, &self.addresses(), &[]);
        if let Call::Event(event) = &self.call {
            frontend.send_fd(FrontendReq::SET_VRING_CALL, self.queue.into(), event);
        }
        frontend.send_fd(FrontendReq::SET_VRING_KICK, self.queue.into(), &self.kick);
    }

    pub fn enable(&self, frontend: &mut RawFrontend, on: bool) {
        frontend.send_state(FrontendReq::SET_VRING_ENABLE, self.queue, on.into());
    }

    /// Makes a request available, without a kick.
    pub fn submit(&mut self, memory: &GuestMemory, kind: u32, sector: u64, data: &[u8]) {
        let mut header = [kind, 0].map(u32::to_le_bytes).concat();
        header.extend(sector.to_le_bytes());
        memory.write(self.base + HEADER, &header);
        memory.write(self.base + STATUS, &[0xee]);
        memory.write(self.base + DATA, data);
        let data_flags = if kind == IN { NEXT | WRITE } else { NEXT };
        let data_len = u32::try_from(data.len()).unwrap();
        let mut descriptors = vec![(HEADER, 16, NEXT, 1)];
        if !data.is_empty() {
            descriptors.push((DATA, data_len, data_flags, 2));
        }
        descriptors.push((STATUS, 1, WRITE, 0));
        for (n, (at, len, flags, next)) in descriptors.into_iter().enumerate() {
            let mut bytes = (GUEST_BASE + self.base + at).to_le_bytes().to_vec();
            bytes.extend(u32::to_le_bytes(len));
            bytes.extend(u16::to_le_bytes(flags));
            bytes.extend(u16::to_le_bytes(next));
            memory.write(self.base + 16 * n as u64, &bytes);
        }
        let entry = u64::from(self.avail % RING_SIZE);
        memory.write(self.base + AVAIL + 4 + 2 * entry, &0u16.to_le_bytes());
        // used_event: with EVENT_IDX, signal when this request is used.
        let used_event = self.base + AVAIL + 4 + 2 * u64::from(RING_SIZE);
        memory.write(used_event, &self.avail.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        memory.write(self.base + AVAIL + 2, &self.avail.to_le_bytes());
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Waits until the request is answered; its status and its data.
    pub fn wait<const N: usize>(&mut self, memory: &GuestMemory) -> (u8, [u8; N]) {
        while !self.is_done(memory) {
            self.call.wait();
        }
        self.answer(memory)
    }

    pub fn is_done(&self, memory: &GuestMemory) -> bool {
        u16::from_le_bytes(memory.read(self.base + USED + 2)) == self.avail
    }

    pub fn answer<const N: usize>(&self, memory: &GuestMemory) -> (u8, [u8; N]) {
        let [status] = memory.read(self.base + STATUS);
        (status, memory.read(self.base + DATA))
    }

    /// Reads one sector.
    pub fn read_sector(&mut self, memory: &GuestMemory, sector: u64) -> [u8; 512] {
        self.submit(memory, IN, sector, &[0; 512]);
        self.kick();
        let (status, data) = self.wait(memory);
        assert_eq!(status, 0);
        data
    }

    /// Writes one sector.
    pub fn write_sector(&mut self, memory: &GuestMemory, sector: u64, data: &[u8; 512]) {
        self.submit(memory, OUT, sector, data);
        self.kick();
        assert_eq!(self.wait::<0>(memory).0, 0);
    }
}

fn state_of(queue: u32) -> Vec<u8> {
    [queue, 0].map(u32::to_ne_bytes).concat()
}

/// Whether something can be read from `fd` now.
pub fn is_readable(fd: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
}

/// A frontend with these features whose ring 0 is served.
pub fn running(stream: UnixStream, features: u64) -> (RawFrontend, GuestMemory, Ring) {
    let mut frontend = RawFrontend::new(stream);
    frontend.negotiate(features, PROTOCOL_FEATURES);
    let (memory, ring) = (GuestMemory::new(), Ring::new(0));
    set_memory(&mut frontend, &memory);
    ring.set_up(&mut frontend);
    ring.enable(&mut frontend, true);
    (frontend, memory, ring)
}

/// Sends the memory table.
pub fn set_memory(frontend: &mut RawFrontend, memory: &GuestMemory) {
    let fds = [memory.0.as_raw_fd()];
    frontend.send(FrontendReq::SET_MEM_TABLE, &GuestMemory::table(), &fds);
}
