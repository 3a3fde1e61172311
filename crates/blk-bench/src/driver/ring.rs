//! The driver's side of a split virtqueue (virtio 1.3, section 2.7).
//!
//! Unlike the ring of the `virtio-driver` crate it makes any number of requests visible with one
//! store of `avail.idx`, which is what a Linux guest does under load, and does not allocate or
//! chain free lists: the caller names the head.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::driver::memory::{Plain, SharedMemory};

/// `VIRTQ_DESC_F_NEXT`.
pub(crate) const DESC_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes.
pub(crate) const DESC_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub(crate) const DESC_INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`.
const NO_NOTIFY: u16 = 1;
/// Bytes of a descriptor.
pub(crate) const DESC_SIZE: u32 = 16;
/// Bytes of a used element.
const USED_SIZE: usize = 8;
/// Virtqueues are aligned to this, which is more than virtio asks, so that no two of them share a
/// cache line.
const ALIGN: usize = 128;
/// Without interrupts `used_event` is moved out of the way this often; it must be less than half of
/// its range.
const PARK_EVERY: u16 = 0x2000;

/// `struct virtq_desc`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

const _: () = assert!(size_of::<Descriptor>() == DESC_SIZE as usize);

impl Descriptor {
    /// As it is in memory: little-endian.
    pub fn new(address: u64, len: u32, flags: u16, next: u16) -> Self {
        Self {
            address: address.to_le(),
            len: len.to_le(),
            flags: flags.to_le(),
            next: next.to_le(),
        }
    }
}

/// Offsets of a ring's three parts in the shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingLayout {
    pub size: u16,
    pub desc: usize,
    pub avail: usize,
    pub used: usize,
    pub end: usize,
}

impl RingLayout {
    /// A ring of `size` entries at or after `start`.
    pub fn new(size: u16, start: usize) -> Self {
        let entries = usize::from(size);
        let desc = start.next_multiple_of(ALIGN);
        let avail = (desc + entries * DESC_SIZE as usize).next_multiple_of(ALIGN);
        let used = (avail + 4 + 2 * entries + 2).next_multiple_of(ALIGN);
        let end = (used + 4 + USED_SIZE * entries + 2).next_multiple_of(ALIGN);
        Self { size, desc, avail, used, end }
    }

    fn avail_entry(&self, index: u16) -> usize {
        self.avail + 4 + 2 * usize::from(index % self.size)
    }

    fn used_entry(&self, index: u16) -> usize {
        self.used + 4 + USED_SIZE * usize::from(index % self.size)
    }

    fn used_event(&self) -> usize {
        self.avail + 4 + 2 * usize::from(self.size)
    }

    fn avail_event(&self) -> usize {
        self.used + 4 + USED_SIZE * usize::from(self.size)
    }
}

/// A used element: the head that was returned, and the number of bytes that the device reports as
/// written.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Used {
    pub id: u32,
    pub len: u32,
}

const _: () = assert!(size_of::<Used>() == USED_SIZE);

impl Plain for Used {}

/// One split ring, the driver's side.
#[derive(Debug)]
pub(crate) struct DriverRing {
    memory: Arc<SharedMemory>,
    layout: RingLayout,
    event_idx: bool,
    /// Index after the last pushed head; published or not.
    avail_next: u16,
    /// The value of `avail.idx`.
    avail_published: u16,
    /// Index of the next used element to read.
    used_next: u16,
    /// `used_event` is set where the device will not reach it soon.
    parked_at: u16,
}

impl DriverRing {
    pub fn new(memory: Arc<SharedMemory>, layout: RingLayout, event_idx: bool) -> Self {
        let mut ring = Self {
            memory,
            layout,
            event_idx,
            avail_next: 0,
            avail_published: 0,
            used_next: 0,
            parked_at: 0,
        };
        ring.park();
        ring
    }

    pub fn layout(&self) -> &RingLayout {
        &self.layout
    }

    /// Fills a descriptor of the ring's own table.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        assert!(index < self.layout.size);
        self.memory.store(self.layout.desc + DESC_SIZE as usize * usize::from(index), descriptor);
    }

    /// Puts a head into the ring; the device does not see it before `publish`.
    pub fn push(&mut self, head: u16) {
        self.memory.store(self.layout.avail_entry(self.avail_next), head.to_le());
        self.avail_next = self.avail_next.wrapping_add(1);
    }

    /// Shows everything pushed to the device; true if the device wants to be kicked for it.
    pub fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.avail_published, self.avail_next);
        if old == self.avail_next {
            return false;
        }
        self.memory
            .atomic_u16(self.layout.avail + 2)
            .store(self.avail_next.to_le(), Ordering::Release);
        // The device stores its wish to be notified, then reads avail.idx; here the order is
        // reversed.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.memory.atomic_u16(self.layout.avail_event()).load(Ordering::Relaxed);
            need_event(u16::from_le(event), self.avail_next, old)
        } else {
            let flags = self.memory.atomic_u16(self.layout.used).load(Ordering::Relaxed);
            u16::from_le(flags) & NO_NOTIFY == 0
        }
    }

    /// How many used elements wait. More than the ring has entries means that the device is broken.
    pub fn used_pending(&self) -> u16 {
        let idx = self.memory.atomic_u16(self.layout.used + 2).load(Ordering::Acquire);
        u16::from_le(idx).wrapping_sub(self.used_next)
    }

    /// The next used element; call only if `used_pending` returned that there is one.
    pub fn pop_used(&mut self) -> Used {
        let used = self.memory.load::<Used>(self.layout.used_entry(self.used_next));
        self.used_next = self.used_next.wrapping_add(1);
        Used { id: u32::from_le(used.id), len: u32::from_le(used.len) }
    }

    /// Whether every pushed head has been answered.
    pub fn is_caught_up(&self) -> bool {
        self.used_next == self.avail_next
    }

    /// Asks for an interrupt at the next completion; true if one has arrived meanwhile, so that
    /// sleeping would be wrong.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            let event = self.memory.atomic_u16(self.layout.used_event());
            event.store(self.used_next.to_le(), Ordering::Relaxed);
        } else {
            self.memory.atomic_u16(self.layout.avail).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.used_pending() != 0
    }

    /// Asks for no interrupts.
    pub fn park(&mut self) {
        if self.event_idx {
            let event = self.memory.atomic_u16(self.layout.used_event());
            event.store(self.used_next.wrapping_sub(1).to_le(), Ordering::Relaxed);
            self.parked_at = self.used_next;
        } else {
            self.memory
                .atomic_u16(self.layout.avail)
                .store(NO_INTERRUPT.to_le(), Ordering::Relaxed);
        }
    }

    /// Keeps `used_event` out of the device's way as the indices run round; cheap enough to be
    /// called for each batch.
    pub fn stay_parked(&mut self) {
        if self.event_idx && self.used_next.wrapping_sub(self.parked_at) >= PARK_EVERY {
            self.park();
        }
    }
}

/// `vring_need_event`: whether moving the index from `old` to `new` has passed `event`.
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(event_idx: bool) -> DriverRing {
        let layout = RingLayout::new(8, 0);
        let memory = Arc::new(SharedMemory::new(layout.end, false).unwrap());
        DriverRing::new(memory, layout, event_idx)
    }

    #[test]
    fn need_event_knows_about_wrapping() {
        assert!(need_event(5, 6, 5));
        assert!(!need_event(5, 5, 4));
        assert!(need_event(0xffff, 0, 0xffff));
        assert!(need_event(0xfffe, 2, 0xfffe));
        assert!(!need_event(3, 2, 0xfffe));
    }

    #[test]
    fn heads_are_visible_only_after_publish() {
        let mut ring = ring(false);
        ring.push(3);
        ring.push(4);
        let idx = |ring: &DriverRing| {
            ring.memory.atomic_u16(ring.layout.avail + 2).load(Ordering::Relaxed)
        };
        assert_eq!(idx(&ring), 0);
        assert!(ring.publish(), "used.flags is 0: the device wants a kick");
        assert_eq!(idx(&ring), 2);
        assert!(!ring.publish(), "nothing new, no kick");
    }

    #[test]
    fn a_used_element_is_seen_once_and_interrupts_are_asked_for() {
        let mut ring = ring(true);
        assert!(!ring.arm());
        let layout = ring.layout;
        assert_eq!(ring.memory.atomic_u16(layout.used_event()).load(Ordering::Relaxed), 0);
        ring.memory.store(layout.used_entry(0), Used { id: 2_u32.to_le(), len: 7_u32.to_le() });
        ring.memory.atomic_u16(layout.used + 2).store(1, Ordering::Release);
        assert!(ring.arm(), "a completion came before we slept");
        assert_eq!(ring.used_pending(), 1);
        let used = ring.pop_used();
        assert_eq!((used.id, used.len), (2, 7));
        assert_eq!(ring.used_pending(), 0);
    }
}
