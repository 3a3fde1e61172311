//! A virtqueue as a frontend sees it: a driver that puts any chain of buffers into its ring, and
//! the messages that set up the ring in the daemon.

use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::EventFd;

use crate::descriptor::{Desc, linked, table};
use crate::driver::{Driver, Layout};
use crate::frontend::{PROTOCOL_FEATURES, RawFrontend, state};
use crate::memory::{GUEST, Memory, VMM, pages};
use crate::request::{FLUSH, header};
use crate::wait::wait_until;

/// `VHOST_VRING_F_LOG`
const F_LOG: u32 = 1;

/// A buffer of a request, in a [`Memory`].
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Its place.
    pub at: u64,
    /// Bytes of it.
    pub len: u32,
    /// The device writes it.
    pub writable: bool,
}

/// A buffer that the device reads.
pub fn readable(at: u64, len: u32) -> Buffer {
    Buffer { at, len, writable: false }
}

/// A buffer that the device writes.
pub fn writable(at: u64, len: u32) -> Buffer {
    Buffer { at, len, writable: true }
}

/// A queue, its ring and its kick.
pub struct Queue {
    /// Which of the device's queues it is.
    pub number: u32,
    /// The eventfd that notifies the daemon of available requests.
    pub kick: EventFd,
    /// The driver of its ring.
    pub driver: Driver,
}

impl Queue {
    /// With a new ring: what the driver writes and what the device writes are in different pages.
    pub fn new(memory: &mut Memory, number: u32, size: u16) -> Self {
        let mut take = |len| GUEST + memory.take(len);
        let layout = Layout {
            size,
            desc: take(Layout::desc_len(size)),
            avail: take(Layout::avail_len(size)),
            used: take(Layout::used_len(size)),
        };
        Self::at(number, layout)
    }

    /// With a ring in this place.
    pub fn at(number: u32, layout: Layout) -> Self {
        let driver = Driver::new(layout, 0);
        Queue { number, kick: EventFd::new(0).unwrap(), driver }
    }

    /// The pages of the used ring.
    pub fn used_pages(&self) -> impl Iterator<Item = u64> + use<> {
        let Layout { used, size, .. } = self.driver.layout;
        pages(used - GUEST, Layout::used_len(size))
    }

    /// Sets it up in the daemon, and enables it.
    pub fn start(&self, frontend: &mut RawFrontend, logged: bool) {
        self.set_up(frontend, logged, None);
        self.enable(frontend, true);
    }

    /// Sets it up in the daemon without enabling it. Without `call` the driver polls.
    pub fn set_up(&self, frontend: &mut RawFrontend, logged: bool, call: Option<&EventFd>) {
        let Driver { layout, avail_idx } = self.driver;
        frontend.send_state(FrontendReq::SET_VRING_NUM, self.number, layout.size.into());
        frontend.send_state(FrontendReq::SET_VRING_BASE, self.number, avail_idx.into());
        self.set_addresses(frontend, logged);
        if let Some(call) = call {
            frontend.send_fd(FrontendReq::SET_VRING_CALL, self.number.into(), call);
        }
        frontend.send_fd(FrontendReq::SET_VRING_KICK, self.number.into(), &self.kick);
    }

    /// Enables or disables it.
    pub fn enable(&self, frontend: &mut RawFrontend, on: bool) {
        frontend.send_state(FrontendReq::SET_VRING_ENABLE, self.number, on.into());
    }

    /// Sends the addresses of the ring to the daemon.
    pub fn set_addresses(&self, frontend: &mut RawFrontend, logged: bool) {
        let (flags, log) = if logged { (F_LOG, self.driver.layout.used) } else { (0, 0) };
        frontend.send(FrontendReq::SET_VRING_ADDR, &self.addresses(flags, log), &[]);
    }

    /// The same with a place of the used ring in the log that is not its own.
    pub fn set_addresses_logged_at(&self, frontend: &mut RawFrontend, at: u64) {
        frontend.send(FrontendReq::SET_VRING_ADDR, &self.addresses(F_LOG, at), &[]);
    }

    /// The body of SET_VRING_ADDR.
    pub fn addresses(&self, flags: u32, log: u64) -> Vec<u8> {
        let Layout { desc, avail, used, .. } = self.driver.layout;
        let [desc, used, avail] = [desc, used, avail].map(|address| address - GUEST + VMM);
        [state(self.number, flags), [desc, used, avail, log].map(u64::to_ne_bytes).concat()]
            .concat()
    }

    /// Writes the descriptors of a request from slot `head` on.
    pub fn describe(&self, memory: &Memory, head: u16, buffers: &[Buffer]) {
        self.driver.set_descs(memory, head, &chain(head, buffers));
    }

    /// The same in a table of its own at `table_at`.
    pub fn describe_indirect(&self, memory: &Memory, head: u16, table_at: u64, all: &[Buffer]) {
        memory.write(table_at, &table(&chain(0, all)));
        self.driver.set_desc(memory, head, Desc::indirect(GUEST + table_at, all.len()));
    }

    /// Makes it available. Only the available ring is written.
    pub fn offer(&mut self, memory: &Memory, head: u16) {
        self.driver.offer(memory, &[head]);
        self.kick();
    }

    /// Notifies the daemon of available requests.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// `used.idx`
    pub fn used_idx(&self, memory: &Memory) -> u16 {
        self.driver.used_idx(memory)
    }

    /// Requests that were offered and are not answered.
    pub fn in_flight(&self, memory: &Memory) -> u16 {
        self.driver.in_flight(memory)
    }

    /// The head of the answer that was the `index`th.
    pub fn used_head(&self, memory: &Memory, index: u16) -> u16 {
        u16::try_from(self.driver.used(memory, index).0).unwrap()
    }

    /// Waits until everything is answered.
    pub fn wait(&self, memory: &Memory) {
        wait_until("an answer", || self.in_flight(memory) == 0);
    }

    /// Waits until the device sleeps and has asked for the next kick (with EVENT_IDX).
    pub fn wait_asleep(&self, memory: &Memory) {
        wait_until("sleep", || self.driver.avail_event(memory) == self.driver.avail_idx);
    }
}

fn chain(first: u16, buffers: &[Buffer]) -> Vec<Desc> {
    let desc = |buffer: &Buffer| Desc::buffer(GUEST + buffer.at, buffer.len, buffer.writable);
    linked(first, buffers.iter().map(desc))
}

/// A frontend whose queue has answered a flush, which can be offered again as head 0; and the place
/// of its status.
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
