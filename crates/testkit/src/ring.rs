//! A queue that has one request at a time, at a fixed place in memory, and waits for the call.

use std::io::{PipeReader, Read};
use std::os::unix::net::UnixStream;

use vmm_sys_util::eventfd::EventFd;

use crate::driver::Layout;
use crate::frontend::{PROTOCOL_FEATURES, RawFrontend};
use crate::memory::{GUEST, Memory};
use crate::queue::{Queue, readable, writable};
use crate::request::{HEADER_LEN, IN, OUT, header};

/// Entries of a ring.
pub const RING_SIZE: u16 = 16;

/// Bytes kept for each ring, its headers, and its data.
const RING_SPACE: u64 = 0x1_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x4000;
const DATA: u64 = 0x5000;

/// How the daemon signals used requests.
pub enum Call {
    /// As usual.
    Event(EventFd),
    /// A frontend may pass anything that can be written.
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
    /// The queue.
    pub queue: Queue,
    /// What it waits for.
    pub call: Call,
    base: u64,
}

impl Ring {
    /// The ring of a queue. In one memory each queue has a place of its own.
    pub fn new(queue: u32) -> Self {
        let base = u64::from(queue) * RING_SPACE;
        let desc = GUEST + base;
        let layout = Layout { size: RING_SIZE, desc, avail: desc + AVAIL, used: desc + USED };
        let call = Call::Event(EventFd::new(0).unwrap());
        Ring { queue: Queue::at(queue, layout), call, base }
    }

    /// The body of SET_VRING_ADDR.
    pub fn addresses(&self) -> Vec<u8> {
        self.queue.addresses(0, 0)
    }

    /// Sets up the ring in the daemon without enabling it.
    pub fn set_up(&self, frontend: &mut RawFrontend) {
        let Call::Event(call) = &self.call else { panic!("a pipe is passed by the test itself") };
        self.queue.set_up(frontend, false, Some(call));
    }

    /// Enables or disables it.
    pub fn enable(&self, frontend: &mut RawFrontend, on: bool) {
        self.queue.enable(frontend, on);
    }

    /// Makes a request available, without a kick.
    pub fn submit(&mut self, memory: &Memory, kind: u32, sector: u64, data: &[u8]) {
        memory.write(self.base + HEADER, &header(kind, sector));
        memory.write(self.base + STATUS, &[0xee]);
        memory.write(self.base + DATA, data);
        let data_len = u32::try_from(data.len()).unwrap();
        let direction = if kind == IN { writable } else { readable };
        let mut buffers = vec![readable(self.base + HEADER, HEADER_LEN)];
        if !data.is_empty() {
            buffers.push(direction(self.base + DATA, data_len));
        }
        buffers.push(writable(self.base + STATUS, 1));
        self.queue.describe(memory, 0, &buffers);
        // With EVENT_IDX: signal when this request is used.
        let driver = &mut self.queue.driver;
        driver.set_used_event(memory, driver.avail_idx);
        driver.offer(memory, &[0]);
    }

    /// Notifies the daemon of available requests.
    pub fn kick(&self) {
        self.queue.kick();
    }

    /// Waits until the request is answered; its status and its data.
    pub fn wait<const N: usize>(&mut self, memory: &Memory) -> (u8, [u8; N]) {
        while !self.is_done(memory) {
            self.call.wait();
        }
        self.answer(memory)
    }

    /// Whether the request is answered.
    pub fn is_done(&self, memory: &Memory) -> bool {
        self.queue.in_flight(memory) == 0
    }

    /// The status and the data as they are now.
    pub fn answer<const N: usize>(&self, memory: &Memory) -> (u8, [u8; N]) {
        let [status] = memory.read(self.base + STATUS);
        (status, memory.read(self.base + DATA))
    }

    /// Reads one sector.
    pub fn read_sector(&mut self, memory: &Memory, sector: u64) -> [u8; 512] {
        self.submit(memory, IN, sector, &[0; 512]);
        self.kick();
        let (status, data) = self.wait(memory);
        assert_eq!(status, 0);
        data
    }

    /// Writes one sector.
    pub fn write_sector(&mut self, memory: &Memory, sector: u64, data: &[u8; 512]) {
        self.submit(memory, OUT, sector, data);
        self.kick();
        assert_eq!(self.wait::<0>(memory).0, 0);
    }
}

/// A frontend with these features whose ring 0 is served.
pub fn running(stream: UnixStream, features: u64) -> (RawFrontend, Memory, Ring) {
    let mut frontend = RawFrontend::new(stream);
    frontend.negotiate(features, PROTOCOL_FEATURES);
    let (memory, ring) = (Memory::default(), Ring::new(0));
    memory.set(&mut frontend);
    ring.set_up(&mut frontend);
    ring.enable(&mut frontend, true);
    (frontend, memory, ring)
}
