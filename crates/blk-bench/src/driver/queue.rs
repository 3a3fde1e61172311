//! One request queue of a virtio-blk device (virtio 1.3, section 5.2.6), the driver's side.
//!
//! A [`Slot`] is the right to have one request in flight: take one, fill its data, submit it, and
//! get it back with the completion. All of its memory is laid out once, so that a request costs a
//! few stores and no allocation.

mod untracked;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::memory::SharedMemory;
use crate::driver::ring::{
    DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_WRITE, Descriptor, DriverRing, RingLayout,
};
use crate::error::Error;

/// Bytes of a sector; the unit of all addresses in virtio-blk.
pub const SECTOR_SIZE: usize = 512;
/// Bytes that GET_ID asks for.
const ID_LEN: u32 = 20;
/// `struct virtio_blk_req`'s header.
const HEADER_LEN: u32 = 16;
/// One `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: u32 = 16;
/// Offsets in a slot's control block: the discard range …
const RANGE_AT: usize = 16;
/// … and the status byte, away from the cache line that the device only reads.
const STATUS_AT: usize = 64;
/// Bytes of a slot's control block.
const CONTROL_LEN: usize = 128;
/// What the status byte holds while the device has not written it.
const STATUS_UNSET: u8 = 0xff;
/// While polling, the clock and the connection are checked once in this many turns.
const SPINS_PER_CHECK: u32 = 2048;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    /// Read sectors into the slot's data.
    Read,
    /// Write the slot's data to sectors.
    Write,
    /// Make completed writes durable.
    Flush,
    /// The content of the sectors is no longer needed.
    Discard,
    /// The sectors read as zeros from now on.
    WriteZeroes {
        /// The device may deallocate them.
        unmap: bool,
    },
    /// Read the serial number (20 bytes) into the slot's data.
    GetId,
}

impl Op {
    fn code(self) -> u32 {
        match self {
            Self::Read => VIRTIO_BLK_T_IN,
            Self::Write => VIRTIO_BLK_T_OUT,
            Self::Flush => VIRTIO_BLK_T_FLUSH,
            Self::Discard => VIRTIO_BLK_T_DISCARD,
            Self::WriteZeroes { .. } => VIRTIO_BLK_T_WRITE_ZEROES,
            Self::GetId => VIRTIO_BLK_T_GET_ID,
        }
    }
}

/// A request: the operation and the sectors that it covers (none for a flush or GET_ID).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub op: Op,
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
}

impl Request {
    /// Bytes of data that move between driver and device, either way.
    pub fn data_len(&self) -> usize {
        match self.op {
            Op::Read | Op::Write => self.sectors as usize * SECTOR_SIZE,
            Op::GetId => ID_LEN as usize,
            Op::Flush | Op::Discard | Op::WriteZeroes { .. } => 0,
        }
    }

    /// The length in the used ring of a request that was done completely: the bytes written, the
    /// status included.
    pub fn expected_used_len(&self) -> u32 {
        let data = if self.op == Op::Write { 0 } else { self.data_len() };
        u32::try_from(data + 1).expect("a request has less than 4 GiB")
    }
}

/// The status byte of a completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// VIRTIO_BLK_S_OK
    Ok,
    /// VIRTIO_BLK_S_IOERR
    IoError,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported,
    /// The device gave the request back without writing a status, or wrote something that is none.
    Other(u8),
}

impl From<u8> for Status {
    fn from(byte: u8) -> Self {
        match u32::from(byte) {
            VIRTIO_BLK_S_OK => Self::Ok,
            VIRTIO_BLK_S_IOERR => Self::IoError,
            VIRTIO_BLK_S_UNSUPP => Self::Unsupported,
            _ => Self::Other(byte),
        }
    }
}

/// The right to have one request in flight. There are as many as the queue is deep.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot(u16);

impl Slot {
    /// 0 to depth - 1, for side tables of the caller.
    pub fn index(&self) -> usize {
        usize::from(self.0)
    }
}

/// A request that the device has answered.
#[derive(Debug)]
pub struct Completion {
    /// Free for the next request; it holds the data that was read.
    pub slot: Slot,
    /// What was asked.
    pub request: Request,
    /// The device's answer.
    pub status: Status,
    /// The bytes written, the status byte included, according to the device.
    pub used_len: u32,
}

/// How completions are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Ask for an interrupt and sleep on the eventfd.
    Eventfd,
    /// Poll the used ring for ever, with interrupts off.
    Poll,
    /// Poll for this long, then as `Eventfd`.
    Adaptive(Duration),
}

/// Where the memory of a queue's slots is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotLayout {
    pub depth: u16,
    /// Most bytes of data in one request.
    pub max_data: usize,
    /// Most bytes of data in one descriptor.
    pub segment: usize,
    pub indirect: bool,
    control: usize,
    tables: usize,
    data: usize,
    pub end: usize,
}

impl SlotLayout {
    pub fn new(start: usize, depth: u16, max_data: usize, segment: usize, indirect: bool) -> Self {
        let slots = usize::from(depth);
        let mut layout =
            Self { depth, max_data, segment, indirect, control: 0, tables: 0, data: 0, end: 0 };
        layout.control = start.next_multiple_of(CONTROL_LEN);
        layout.tables = layout.control + slots * CONTROL_LEN;
        layout.data = (layout.tables + slots * layout.table_len()).next_multiple_of(4096);
        layout.end = layout.data + slots * layout.data_stride();
        layout
    }

    /// Descriptors that one request can need.
    pub fn descriptors(max_data: usize, segment: usize) -> usize {
        // A discard has one range where a read has its data.
        2 + max_data.div_ceil(segment).max(1)
    }

    fn table_len(&self) -> usize {
        if self.indirect {
            DESC_SIZE as usize * Self::descriptors(self.max_data, self.segment)
        } else {
            0
        }
    }

    fn data_stride(&self) -> usize {
        self.max_data.max(SECTOR_SIZE).next_multiple_of(4096)
    }

    fn control(&self, slot: u16) -> usize {
        self.control + CONTROL_LEN * usize::from(slot)
    }

    fn table(&self, slot: u16) -> usize {
        self.tables + self.table_len() * usize::from(slot)
    }

    fn data(&self, slot: u16) -> usize {
        self.data + self.data_stride() * usize::from(slot)
    }

    /// Ring descriptors that belong to one slot.
    pub fn ring_stride(&self) -> u16 {
        let direct = Self::descriptors(self.max_data, self.segment);
        if self.indirect { 1 } else { u16::try_from(direct).unwrap_or(u16::MAX) }
    }
}

/// What the queues of a device and its watchdog share.
#[derive(Debug, Default)]
pub(crate) struct Link {
    /// The backend has closed the connection.
    pub dead: AtomicBool,
}

/// The ends of a queue that are not memory.
#[derive(Debug)]
pub(crate) struct QueueEnds {
    pub index: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub link: Arc<Link>,
    pub stall_after: Duration,
}

/// How often the two sides woke each other.
#[derive(Clone, Copy, Debug, Default)]
pub struct Notifications {
    /// Writes to the kick eventfd.
    pub kicks: u64,
    /// Returns from a sleep on the call eventfd.
    pub wakeups: u64,
}

/// One request queue. It is moved to the thread that drives it.
#[derive(Debug)]
pub struct Queue {
    ring: DriverRing,
    memory: Arc<SharedMemory>,
    layout: SlotLayout,
    ends: QueueEnds,
    free: Vec<Slot>,
    in_flight: Vec<Option<Request>>,
    in_flight_count: usize,
    idle_since: Option<Instant>,
    notifications: Notifications,
}

impl Queue {
    pub(crate) fn new(
        memory: Arc<SharedMemory>,
        ring: RingLayout,
        event_idx: bool,
        layout: SlotLayout,
        ends: QueueEnds,
    ) -> Self {
        Self {
            ring: DriverRing::new(Arc::clone(&memory), ring, event_idx),
            memory,
            layout,
            ends,
            free: (0..layout.depth).rev().map(Slot).collect(),
            in_flight: vec![None; usize::from(layout.depth)],
            in_flight_count: 0,
            idle_since: None,
            notifications: Notifications::default(),
        }
    }

    pub(crate) fn ring_layout(&self) -> &RingLayout {
        self.ring.layout()
    }

    /// The kick and the call eventfd, duplicated.
    pub(crate) fn ends(&self) -> Result<[EventFd; 2], Error> {
        let dup = |event: &EventFd| event.try_clone().map_err(Error::io("dup of an eventfd"));
        Ok([dup(&self.ends.kick)?, dup(&self.ends.call)?])
    }

    /// Index of the queue in its device.
    pub fn index(&self) -> u16 {
        self.ends.index
    }

    /// Most bytes of data in one request.
    pub fn max_data(&self) -> usize {
        self.layout.max_data
    }

    /// Requests that the device has not answered yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight_count
    }

    /// How often the two sides woke each other so far.
    pub fn notifications(&self) -> Notifications {
        self.notifications
    }

    /// A free slot, if not all are in flight or held by the caller.
    pub fn take_slot(&mut self) -> Option<Slot> {
        self.free.pop()
    }

    /// Gives a slot back.
    pub fn release(&mut self, slot: Slot) {
        self.free.push(slot);
    }

    /// The first `len` bytes of a slot's data.
    pub fn data(&self, slot: &Slot, len: usize) -> &[u8] {
        assert!(len <= self.layout.max_data.max(SECTOR_SIZE));
        // SAFETY: the holder of the slot has no request in flight with it, so the device leaves its
        // data alone.
        unsafe { self.memory.bytes(self.layout.data(slot.0), len) }
    }

    /// The first `len` bytes of a slot's data, to be filled.
    pub fn data_mut(&mut self, slot: &mut Slot, len: usize) -> &mut [u8] {
        assert!(len <= self.layout.max_data.max(SECTOR_SIZE));
        // SAFETY: as for `data`; exclusive, because both the queue and the slot are borrowed
        // mutably.
        unsafe { self.memory.bytes_mut(self.layout.data(slot.0), len) }
    }

    /// Puts a request into the ring. The device sees it at the next `kick`.
    ///
    /// # Panics
    /// If it has more data than the slot holds.
    pub fn submit(&mut self, slot: Slot, request: Request) {
        assert!(request.data_len() <= self.layout.max_data.max(SECTOR_SIZE));
        let control = self.layout.control(slot.0);
        let sector = if matches!(request.op, Op::Read | Op::Write) { request.sector } else { 0 };
        self.memory.store(control, u64::from(request.op.code()).to_le());
        self.memory.store(control + 8, sector.to_le());
        self.memory.store(control + STATUS_AT, STATUS_UNSET);

        let head = slot.0 * self.layout.ring_stride();
        let count = self.write_chain(&slot, &request);
        if self.layout.indirect {
            let table = Descriptor::new(
                self.memory.guest_address(self.layout.table(slot.0)),
                u32::from(count) * DESC_SIZE,
                DESC_INDIRECT,
                0,
            );
            self.ring.set_descriptor(head, table);
        }
        self.ring.push(head);
        self.in_flight[slot.index()] = Some(request);
        self.in_flight_count += 1;
    }

    /// Writes the descriptors of a request into its indirect table or its part of the ring's; gives
    /// their number.
    fn write_chain(&self, slot: &Slot, request: &Request) -> u16 {
        let control = self.layout.control(slot.0);
        let mut count = 0;
        let mut put = |offset: usize, len: u32, flags: u16| {
            self.put_descriptor(slot.0, count, offset, len, flags);
            count += 1;
        };
        put(control, HEADER_LEN, DESC_NEXT);
        match request.op {
            Op::Read | Op::Write | Op::GetId => {
                let write = if request.op == Op::Write { 0 } else { DESC_WRITE };
                let data = self.layout.data(slot.0);
                let end = request.data_len();
                let mut at = 0;
                while at < end {
                    let len = self.layout.segment.min(end - at);
                    put(
                        data + at,
                        u32::try_from(len).expect("checked at connect"),
                        DESC_NEXT | write,
                    );
                    at += len;
                }
            }
            Op::Discard | Op::WriteZeroes { .. } => {
                let unmap = u64::from(request.op == Op::WriteZeroes { unmap: true });
                self.memory.store(control + RANGE_AT, request.sector.to_le());
                let sectors_and_flags = u64::from(request.sectors) | unmap << 32;
                self.memory.store(control + RANGE_AT + 8, sectors_and_flags.to_le());
                put(control + RANGE_AT, RANGE_LEN, DESC_NEXT);
            }
            Op::Flush => {}
        }
        put(control + STATUS_AT, 1, DESC_WRITE);
        count
    }

    fn put_descriptor(&self, slot: u16, index: u16, offset: usize, len: u32, flags: u16) {
        let address = self.memory.guest_address(offset);
        if self.layout.indirect {
            let at = self.layout.table(slot) + DESC_SIZE as usize * usize::from(index);
            self.memory.store(at, Descriptor::new(address, len, flags, index + 1));
        } else {
            let index = slot * self.layout.ring_stride() + index;
            self.ring.set_descriptor(index, Descriptor::new(address, len, flags, index + 1));
        }
    }

    /// Shows everything submitted to the device, and wakes it if it wants to be.
    ///
    /// # Errors
    /// Writing to the eventfd failed.
    pub fn kick(&mut self) -> Result<(), Error> {
        if self.ring.publish() {
            self.notifications.kicks += 1;
            self.ends.kick.write(1).map_err(Error::io("write to the kick eventfd"))?;
        }
        Ok(())
    }

    /// Appends what the device has answered to `done`; gives how many there were. Does not wait.
    ///
    /// # Errors
    /// [`Error::BadHead`] if it answers what was not asked.
    pub fn reap(&mut self, done: &mut Vec<Completion>) -> Result<usize, Error> {
        let pending = self.ring.used_pending();
        if usize::from(pending) > self.in_flight_count {
            return Err(self.bad_head(u32::from(pending), "used.idx is ahead by more than that"));
        }
        for _ in 0..pending {
            let completion = self.next_completion()?;
            done.push(completion);
        }
        if pending != 0 {
            self.idle_since = None;
            self.ring.stay_parked();
        }
        Ok(usize::from(pending))
    }

    fn next_completion(&mut self) -> Result<Completion, Error> {
        let (slot, len, request) = self.next_answer()?;
        let Some(request) = request else {
            let id = u32::from(slot.0 * self.layout.ring_stride());
            return Err(self.bad_head(id, "that one is not in flight (answered twice?)"));
        };
        Ok(self.completion(slot, len, request))
    }

    /// The next answer: the slot, the length, and what was asked, if that was not answered before.
    fn next_answer(&mut self) -> Result<(Slot, u32, Option<Request>), Error> {
        let used = self.ring.pop_used();
        let stride = u32::from(self.layout.ring_stride());
        if !used.id.is_multiple_of(stride) || used.id / stride >= u32::from(self.layout.depth) {
            return Err(self.bad_head(used.id, "that is not the head of a request"));
        }
        let slot = Slot(u16::try_from(used.id / stride).expect("less than depth"));
        let request = self.in_flight[slot.index()].take();
        self.in_flight_count -= usize::from(request.is_some());
        Ok((slot, used.len, request))
    }

    fn completion(&self, slot: Slot, used_len: u32, request: Request) -> Completion {
        let status = self.memory.load::<u8>(self.layout.control(slot.0) + STATUS_AT);
        Completion { slot, request, status: status.into(), used_len }
    }

    fn bad_head(&self, id: u32, why: &'static str) -> Error {
        Error::BadHead { queue: self.ends.index, id, in_flight: self.in_flight_count, why }
    }

    /// Waits until there may be something to reap. Returns at once if there is; may return with
    /// nothing.
    ///
    /// # Errors
    /// The backend has gone, or nothing was completed for the stall time given at connect.
    pub fn wait(&mut self, wait: Wait) -> Result<(), Error> {
        let seen = match wait {
            Wait::Eventfd => false,
            Wait::Poll => self.spin(None)?,
            Wait::Adaptive(time) => self.spin(Some(time))?,
        };
        if seen || wait == Wait::Poll {
            return Ok(());
        }
        if !self.ring.arm() {
            self.check_alive()?;
            self.sleep()?;
            self.notifications.wakeups += 1;
        }
        self.ring.park();
        Ok(())
    }

    /// Sleeps on the call eventfd. The watchdog signals it too, so that this always comes back.
    fn sleep(&self) -> Result<(), Error> {
        let failed = Error::io("read from the call eventfd");
        match self.ends.call.read() {
            Ok(_) => Ok(()),
            // The description is shared with the backend, and QEMU's makes it non-blocking. Undo
            // that: with a blocking read a sleep is one system call.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                fcntl(self.call_borrowed(), FcntlArg::F_SETFL(OFlag::O_RDWR))
                    .map_err(Error::io("F_SETFL"))?;
                self.ends.call.read().map(drop).map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn call_borrowed(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd lives as long as self.
        unsafe { BorrowedFd::borrow_raw(self.ends.call.as_raw_fd()) }
    }

    /// True as soon as there is something to reap; false when `time` is over (about).
    fn spin(&mut self, time: Option<Duration>) -> Result<bool, Error> {
        let mut until = None;
        loop {
            for _ in 0..if time.is_some() { 64 } else { SPINS_PER_CHECK } {
                if self.ring.used_pending() != 0 {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            match (until, time) {
                (None, Some(time)) => until = Some(now + time),
                (Some(until), _) if now >= until => return Ok(false),
                (Some(_), _) => {}
                (None, None) => self.check_alive()?,
            }
        }
    }

    fn check_alive(&mut self) -> Result<(), Error> {
        let (queue, in_flight) = (self.ends.index, self.in_flight_count);
        if self.ends.link.dead.load(Ordering::Relaxed) {
            return Err(Error::Disconnected { queue, in_flight });
        }
        let now = Instant::now();
        let waited = now.duration_since(*self.idle_since.get_or_insert(now));
        if waited > self.ends.stall_after {
            return Err(Error::Stalled { queue, in_flight, waited });
        }
        Ok(())
    }
}
