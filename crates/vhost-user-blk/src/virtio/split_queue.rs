//! The device's end of a split virtqueue (virtio 1.3, 2.7), little-endian (VERSION_1).
//!
//! A ring is set up as a `Queue` of the `virtio-queue` crate, which checks its size and alignment.
//! That `Queue` does not walk the running ring: it looks an address up in guest memory at each
//! access, which takes several times as long. Instead, a starting ring copies the state of its
//! `Queue` and resolves the three parts of the ring to host pointers once.
//!
//! The guest may be hostile: each value it can write is read once, by an atomic or volatile access,
//! and checked in the copy. What cannot be answered by failing one request, because it says nothing
//! about any request, is a [`RingError`], after which the ring is to be left alone.
//!
//! The path of a request through it: [`DeviceQueue`].

mod chain;

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_ALIGN_SIZE, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_ALIGN_SIZE,
    VRING_USED_ALIGN_SIZE, VRING_USED_F_NO_NOTIFY, vring_used_elem,
};
use virtio_queue::desc::split::VirtqUsedElem;
use virtio_queue::{Queue, QueueState, QueueT};

use self::chain::{Chain, DESCRIPTOR_SIZE};
use crate::fault;
use crate::guest_memory::memory::{GuestAddress, Loss, Memory};
use crate::virtio::device_queue::{ChainError, Descriptor, DeviceQueue, QUEUE_SIZE_MAX};
use crate::virtio::dirty_log::RingLog;
use crate::virtio::inflight::{RingIndices, Tracker};

/// The guest need not kick.
const NO_NOTIFY: u16 = short(VRING_USED_F_NO_NOTIFY);

/// A constant for a field of 16 bits. The bindings have 32 for all of them.
pub(crate) const fn short(constant: u32) -> u16 {
    let [low, high, 0, 0] = constant.to_le_bytes() else {
        panic!("the field has 16 bits");
    };
    u16::from_le_bytes([low, high])
}

/// Bytes before the entries of the available and of the used ring: flags, idx.
const HEADER_LEN: usize = 4;
/// Bytes of an entry of the available ring, and of the event field behind the last one.
const FIELD_LEN: usize = size_of::<u16>();
/// Bytes of an entry of the used ring.
const USED_LEN: usize = size_of::<VirtqUsedElem>();
// `VirtqUsedElem` has no public constructor, so its fields are written through the kernel's struct.
const _: () = assert!(size_of::<vring_used_elem>() == USED_LEN);

/// The ring cannot be started, or can no longer be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is 0, no power of two, or more than [`QUEUE_SIZE_MAX`].
    #[error("queue size {found}: not a power of two from 1 to {QUEUE_SIZE_MAX}")]
    Size {
        /// What the frontend set.
        found: u16,
    },
    /// A part of the ring is not wholly inside one region of guest memory.
    #[error(
        "{part} at guest address {address:#x}, {len} bytes: not inside one region of guest memory"
    )]
    Place {
        /// Which part.
        part: &'static str,
        /// Its guest address.
        address: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The part that this device writes is in memory that may only be read.
    #[error(
        "used ring at guest address {address:#x}: the frontend shares its memory for reading only"
    )]
    ReadOnly {
        /// Its guest address.
        address: u64,
    },
    /// A part of the ring is not aligned as section 2.7 asks.
    #[error("{part} at guest address {address:#x}: not aligned to {align} bytes")]
    Alignment {
        /// Which part.
        part: &'static str,
        /// Its guest address.
        address: u64,
        /// What it must be a multiple of.
        align: u32,
    },
    /// `avail.idx` is further ahead than the ring has entries.
    #[error("avail.idx {found} is more than the queue size {size} ahead of {next}")]
    AvailIndex {
        /// What the guest wrote.
        found: u16,
        /// The next entry this device would have taken.
        next: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// An entry of the available ring names no descriptor.
    #[error("available ring names descriptor {found}, the table has {size}")]
    Head {
        /// What the guest wrote.
        found: u16,
        /// Entries of the descriptor table.
        size: u16,
    },
    /// More requests are in flight than the ring has descriptors, so at least one descriptor is in
    /// two of them.
    #[error(
        "{size} requests are in flight, as many as there are descriptors, and the guest offers another"
    )]
    InFlight {
        /// Entries of the descriptor table.
        size: u16,
    },
    /// A request was made available that is in flight (noticed with in-flight tracking only).
    #[error("available ring names descriptor {head}, which is in flight")]
    Twice {
        /// What the guest wrote.
        head: u16,
    },
}

/// The first descriptor of a request that the guest made available and that is not answered yet.
/// Only [`DeviceQueue::push`] consumes it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a head that is not pushed is a request that the guest waits for in vain"]
pub struct Head(u16);

impl Head {
    /// Its place in the descriptor table.
    pub fn index(&self) -> u16 {
        self.0
    }
}

/// A started ring.
#[derive(Debug)]
pub struct SplitQueue {
    memory: Arc<Memory>,
    size: u16,
    event_idx: bool,
    desc: *const u8,
    avail: *const u8,
    used: *mut u8,
    /// The next entry of the available ring to take.
    next_avail: u16,
    /// `avail.idx` as last seen; entries before it may be taken without looking again.
    seen_avail: u16,
    /// Where the next used entry goes.
    next_used: u16,
    /// `used.idx` as the guest sees it.
    published: u16,
    /// Heads popped and not pushed.
    in_flight: u16,
    /// `used.flags` asks the guest not to kick (only without EVENT_IDX).
    quiet: bool,
    /// Where a successor finds what is in flight, if the frontend keeps that for us.
    inflight: Option<Tracker>,
    /// Where all that is written into guest memory is marked, while a migration wants it.
    log: Option<RingLog>,
}

// SAFETY: the pointers point into mappings that `memory` keeps, which do not belong to a thread.
unsafe impl Send for SplitQueue {}

impl SplitQueue {
    /// Starts on a ring that may be in the middle of its life: the first entry to take is the
    /// state's `next_avail`, the first used entry to write is where the ring's own `used.idx`
    /// stands, whatever the state says.
    pub fn new(memory: Arc<Memory>, state: QueueState) -> Result<Self, RingError> {
        let checked = Queue::try_from(state).map_err(|error| RingError::of(&error, &state))?;
        let (size, next_avail) = (checked.size(), checked.next_avail());
        let desc = place(&memory, DESC_TABLE, checked.desc_table(), desc_table_len(size))?;
        let avail = place(&memory, AVAIL_RING, checked.avail_ring(), avail_ring_len(size))?;
        let used = place(&memory, USED_RING, checked.used_ring(), used_ring_len(size))?;
        let read_only = |_| RingError::ReadOnly { address: checked.used_ring() };
        memory
            .check_writable(GuestAddress(checked.used_ring()), used_ring_len(size) as u64)
            .map_err(read_only)?;
        let mut queue = Self {
            memory,
            size,
            event_idx: checked.event_idx_enabled(),
            desc,
            avail,
            used,
            next_avail,
            seen_avail: next_avail,
            next_used: 0,
            published: 0,
            in_flight: 0,
            quiet: false,
            inflight: None,
            log: None,
        };
        queue.next_used = load(queue.used_idx_ptr(), Ordering::Acquire);
        queue.published = queue.next_used;
        // A predecessor may have left it at 1; with EVENT_IDX it must be 0 (2.7.10.1).
        store(queue.used_flags_ptr(), 0, Ordering::Relaxed);
        Ok(queue)
    }

    /// Keeps account of what is in flight from here on. What a predecessor left unfinished is
    /// popped first. To be called before anything else is done with the ring.
    pub(crate) fn track(&mut self, inflight: Tracker) {
        self.next_avail = inflight.next_avail();
        self.seen_avail = self.next_avail;
        self.inflight = Some(inflight);
    }

    /// Marks from here on what is written into guest memory; of the used ring also what was written
    /// before, for a predecessor may have died between a store and its mark. To be called before
    /// anything else is done with the ring.
    pub(crate) fn log(&mut self, log: RingLog) {
        log.mark_used(0, used_ring_len(self.size));
        log.announce();
        self.log = Some(log);
    }

    #[cold]
    fn mark_chain(&self, log: &RingLog, head: &Head, status: Option<GuestAddress>) {
        if let Some(status) = status {
            log.log.mark(status.0, 1);
        }
        // A request with more is refused: nothing but its status was written.
        let mut left = u32::MAX;
        for descriptor in self.chain(head).map_while(Result::ok).filter(|found| found.writable) {
            let Some(rest) = left.checked_sub(descriptor.len) else { return };
            left = rest;
            log.log.mark(descriptor.address.0, descriptor.len.into());
        }
    }

    /// Marks `len` bytes at `offset` of the used ring, which were written.
    #[inline]
    fn mark_used(&self, offset: usize, len: usize) {
        if let Some(log) = &self.log {
            log.mark_used(offset, len);
        }
    }

    /// The same, and tells the frontend that there are new marks.
    #[inline]
    fn mark_and_announce(&self, offset: usize, len: usize) {
        if let Some(log) = &self.log {
            log.mark_used(offset, len);
            log.announce();
        }
    }

    /// The next request that a predecessor did not answer. There are as many as descriptors at
    /// most.
    fn unfinished(&mut self) -> Option<Head> {
        let head = self.inflight.as_mut()?.unfinished()?;
        self.in_flight += 1;
        fault::reached("resubmit");
        Some(Head(head))
    }

    /// Reads `avail.idx` again. True: there is something to take.
    #[inline]
    fn look(&mut self) -> Result<bool, RingError> {
        // Acquire: the entries and descriptors before the index are read after it.
        let found = load(self.avail_ptr(1), Ordering::Acquire);
        let ahead = found.wrapping_sub(self.next_avail);
        if ahead > self.size {
            return Err(RingError::AvailIndex { found, next: self.next_avail, size: self.size });
        }
        self.seen_avail = found;
        Ok(ahead != 0)
    }

    /// `used.idx` as the guest sees it.
    #[cfg(test)]
    pub(crate) fn used_idx(&self) -> u16 {
        self.published
    }

    /// 16-bit field `index` of the available ring: flags, idx, `size` entries, used_event.
    #[inline]
    fn avail_ptr(&self, index: usize) -> *mut u16 {
        debug_assert!(index <= 2 + usize::from(self.size));
        // SAFETY: the part has 3 + size fields, all inside the mapping.
        unsafe { self.avail.cast::<u16>().add(index).cast_mut() }
    }

    #[inline]
    fn used_flags_ptr(&self) -> *mut u16 {
        self.used.cast()
    }

    #[inline]
    fn used_idx_ptr(&self) -> *mut u16 {
        // SAFETY: the part has at least 6 bytes.
        unsafe { self.used.add(2).cast() }
    }

    #[inline]
    fn avail_event_ptr(&self) -> *mut u16 {
        // SAFETY: the part has 6 bytes and 8 for each entry; this field is the last 2 of them.
        unsafe { self.used.add(used_offset(self.size.into())).cast() }
    }
}

impl DeviceQueue for SplitQueue {
    type Head = Head;
    type Error = RingError;

    #[inline]
    fn pop(&mut self) -> Result<Option<Head>, RingError> {
        if self.next_avail == self.seen_avail {
            if let Some(head) = self.unfinished() {
                return Ok(Some(head));
            }
            if !self.look()? {
                return Ok(None);
            }
        }
        if self.in_flight >= self.size {
            return Err(RingError::InFlight { size: self.size });
        }
        let entry = self.next_avail & (self.size - 1);
        // Relaxed: ordered behind the load of avail.idx in `look`.
        let head = load(self.avail_ptr(2 + usize::from(entry)), Ordering::Relaxed);
        if head >= self.size {
            return Err(RingError::Head { found: head, size: self.size });
        }
        if let Some(inflight) = &mut self.inflight
            && !inflight.fetched(head)
        {
            return Err(RingError::Twice { head });
        }
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
        Ok(Some(Head(head)))
    }

    #[inline]
    fn has_work(&self) -> bool {
        self.next_avail != self.seen_avail
            || load(self.avail_ptr(1), Ordering::Relaxed) != self.next_avail
            || self.inflight.as_ref().is_some_and(|inflight| inflight.unfinished_count() > 0)
    }

    #[inline]
    fn chain(&self, head: &Self::Head) -> impl Iterator<Item = Result<Descriptor, ChainError>> {
        // SAFETY: the table was resolved in `new`: as many descriptors as the ring has entries,
        // inside of a mapping that `memory` keeps.
        unsafe { Chain::new(&self.memory, self.desc, self.size, head.0) }
    }

    #[inline]
    fn mark_buffers(&self, head: &Head, status: Option<GuestAddress>) {
        if let Some(log) = &self.log {
            self.mark_chain(log, head, status);
        }
    }

    #[inline]
    fn push(&mut self, head: Head, written: u32) {
        let entry = usize::from(self.next_used & (self.size - 1));
        // SAFETY: `used` holds 4 bytes and `size` elements of 8, 4-byte aligned, inside the
        // mapping.
        unsafe {
            let element = self.used.add(used_offset(entry)).cast::<vring_used_elem>();
            (&raw mut (*element).id).write_volatile(u32::from(head.0).to_le());
            (&raw mut (*element).len).write_volatile(written.to_le());
        }
        self.mark_used(used_offset(entry), USED_LEN);
        fault::reached("used-element");
        if let Some(inflight) = &mut self.inflight {
            inflight.answered(head.0);
        }
        self.next_used = self.next_used.wrapping_add(1);
        // Saturating: a head of another queue is a bug, but none that may corrupt this one's count.
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return false;
        }
        // Release: the elements, and the data and status bytes before them, are visible before the
        // index.
        store(self.used_idx_ptr(), new, Ordering::Release);
        // Announces all marks of the batch.
        self.mark_and_announce(2, 2);
        self.published = new;
        // The guest arms its notification, then looks at used.idx; the index goes first here
        // (2.7.7.2, 2.7.14).
        fence(Ordering::SeqCst);
        fault::reached("used-idx");
        if let Some(inflight) = &mut self.inflight {
            inflight.published(new);
        }
        if self.event_idx {
            let event = load(self.avail_ptr(2 + usize::from(self.size)), Ordering::Relaxed);
            // One of the entries old..new went to place `event`.
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u32::from(load(self.avail_ptr(0), Ordering::Relaxed)) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// With EVENT_IDX there is nothing to do, since `avail_event` stays behind.
    #[inline]
    fn disable_notifications(&mut self) {
        if !self.event_idx && !self.quiet {
            self.quiet = true;
            store(self.used_flags_ptr(), NO_NOTIFY, Ordering::Relaxed);
            self.mark_and_announce(0, 2);
        }
    }

    #[inline]
    fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            // Not `avail.idx`: what was made available since is to be noticed below.
            store(self.avail_event_ptr(), self.next_avail, Ordering::Relaxed);
            self.mark_and_announce(used_offset(self.size.into()), FIELD_LEN);
        } else if self.quiet {
            self.quiet = false;
            store(self.used_flags_ptr(), 0, Ordering::Relaxed);
            self.mark_and_announce(0, 2);
        }
        // The guest writes avail.idx, then looks whether to kick; the wish goes first here
        // (2.7.13.4.1).
        fence(Ordering::SeqCst);
        self.has_work()
    }

    fn next_avail(&self) -> u16 {
        self.next_avail
    }

    fn in_flight(&self) -> u16 {
        self.in_flight
    }

    fn is_tracked(&self) -> bool {
        self.inflight.is_some()
    }

    #[inline]
    fn poisoned(&self) -> bool {
        self.memory.poisoned()
            || self.inflight.as_ref().is_some_and(Tracker::poisoned)
            || self.log.as_ref().is_some_and(|log| log.log.poisoned())
    }

    fn loss(&self) -> Option<Loss> {
        let inflight = || self.inflight.as_ref().and_then(Tracker::loss);
        let log = || self.log.as_ref().and_then(|log| log.log.loss());
        self.memory.loss().or_else(inflight).or_else(log)
    }
}

/// Place of entry `index` in a used ring, in bytes; that of the one behind the last is
/// `avail_event`'s.
#[inline]
const fn used_offset(index: usize) -> usize {
    HEADER_LEN + USED_LEN * index
}

/// Length of a used ring of `size` entries, in bytes. The event field is counted in even when
/// EVENT_IDX is off, as section 2.7 does.
pub(crate) fn used_ring_len(size: u16) -> usize {
    used_offset(size.into()) + FIELD_LEN
}

/// The same of an available ring.
fn avail_ring_len(size: u16) -> usize {
    HEADER_LEN + FIELD_LEN * (usize::from(size) + 1)
}

/// The same of a descriptor table.
fn desc_table_len(size: u16) -> usize {
    DESCRIPTOR_SIZE as usize * usize::from(size)
}

/// Reads the indices of the ring of `queue`.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn indices(memory: &Memory, queue: &Queue) -> Result<RingIndices, virtio_queue::Error> {
    Ok(RingIndices {
        size: queue.size(),
        avail: queue.avail_idx(memory, Ordering::Acquire)?.0,
        used: queue.used_idx(memory, Ordering::Acquire)?.0,
    })
}

/// A part of a ring: its name, and what its address must be a multiple of.
#[derive(Clone, Copy, Debug)]
struct Part(&'static str, u32);

const DESC_TABLE: Part = Part("descriptor table", VRING_DESC_ALIGN_SIZE);
const AVAIL_RING: Part = Part("available ring", VRING_AVAIL_ALIGN_SIZE);
const USED_RING: Part = Part("used ring", VRING_USED_ALIGN_SIZE);

impl RingError {
    /// What the crate refuses, with the value that it leaves out.
    fn of(error: &virtio_queue::Error, state: &QueueState) -> Self {
        match error {
            virtio_queue::Error::InvalidDescTableAlign => {
                Self::alignment(DESC_TABLE, state.desc_table)
            }
            virtio_queue::Error::InvalidAvailRingAlign => {
                Self::alignment(AVAIL_RING, state.avail_ring)
            }
            virtio_queue::Error::InvalidUsedRingAlign => {
                Self::alignment(USED_RING, state.used_ring)
            }
            _ => RingError::Size { found: state.size },
        }
    }

    fn alignment(Part(part, align): Part, address: u64) -> Self {
        RingError::Alignment { part, address, align }
    }
}

/// Resolves a part of the ring, at an address that is aligned. (`Queue::is_valid` looks for it in
/// guest memory too, and takes one that goes over the border of two regions.) It may be such that
/// can only be read.
fn place(memory: &Memory, part: Part, address: u64, len: usize) -> Result<*mut u8, RingError> {
    let len = len as u64;
    let outside = RingError::Place { part: part.0, address, len };
    let host = memory.contiguous(GuestAddress(address), len).ok_or(outside)?;
    // A region may begin anywhere, so the host's address counts as well: the accesses here need up
    // to 4 (descriptors are read at any alignment).
    if !host.addr().is_multiple_of(part.1.min(VRING_USED_ALIGN_SIZE) as usize) {
        return Err(RingError::alignment(part, address));
    }
    Ok(host.cast_mut())
}

/// Loads a 16-bit field of the ring. All of them are resolved by [`place`].
#[inline]
fn load(field: *mut u16, order: Ordering) -> u16 {
    // SAFETY: `place` checked that the part it is in lies in a mapping that the queue keeps and
    // that it is aligned; the other side uses atomic accesses of this size or is a guest that
    // deserves what it reads.
    u16::from_le(unsafe { AtomicU16::from_ptr(field) }.load(order))
}

/// Stores a 16-bit field of the used ring.
#[inline]
fn store(field: *mut u16, value: u16, order: Ordering) {
    // SAFETY: as in `load`.
    unsafe { AtomicU16::from_ptr(field) }.store(value.to_le(), order);
}

#[cfg(test)]
mod tests;
