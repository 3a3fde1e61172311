//! The driver's end of a ring, for tests: writes any descriptors and indices, sound or not, into
//! anonymous guest memory.

use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::QueueState;

use crate::memory::{GuestAddress, Memory};
use crate::virtqueue::{QUEUE_SIZE_MAX, SplitQueue, short};

pub(crate) const NEXT: u16 = short(VRING_DESC_F_NEXT);
pub(crate) const WRITE: u16 = short(VRING_DESC_F_WRITE);
pub(crate) const INDIRECT: u16 = short(VRING_DESC_F_INDIRECT);

/// A descriptor as the guest writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Desc {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    pub(crate) fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A guest with one ring at [`RING`] and room for data above.
pub(crate) struct Guest {
    pub memory: Arc<Memory>,
    pub layout: QueueState,
    /// `avail.idx` as the driver last wrote it.
    pub avail_idx: u16,
}

/// Where the ring begins. Not 0, so that address 0 is nothing.
pub(crate) const RING: u64 = 0x1_0000;
/// Where buffers begin.
pub(crate) const DATA: u64 = 0x2_0000;
/// First address behind the memory.
pub(crate) const END: u64 = 0x6_0000;
/// A border between two regions that are one piece for the guest and two for the host.
pub(crate) const BORDER: u64 = 0x4_0000;

impl Guest {
    /// A ring of `size` entries, at most 256, all of whose indices stand at `start`.
    pub(crate) fn new(size: u16, start: u16) -> Self {
        Self::with_end(size, start, END)
    }

    /// The same with memory up to `end`.
    pub(crate) fn with_end(size: u16, start: u16, end: u64) -> Self {
        let low = usize::try_from(BORDER - RING).unwrap();
        let high = usize::try_from(end - BORDER).unwrap();
        let memory = Arc::new(Memory::anonymous(&[(RING, low), (BORDER, high)]));
        let layout = QueueState {
            max_size: QUEUE_SIZE_MAX,
            size,
            next_avail: start,
            ready: true,
            desc_table: RING,
            avail_ring: RING + 0x2000,
            used_ring: RING + 0x4000,
            ..QueueState::default()
        };
        let mut guest = Self { memory, layout, avail_idx: start };
        guest.set_avail_idx(start);
        guest.write(layout.used_ring + 2, &start.to_le_bytes());
        guest
    }

    /// The device's end, with nothing taken yet.
    pub(crate) fn queue(&self, event_idx: bool) -> SplitQueue {
        let state = QueueState { event_idx_enabled: event_idx, ..self.layout };
        SplitQueue::new(self.memory.clone(), state).unwrap()
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write(GuestAddress(address), bytes).unwrap();
    }

    pub(crate) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read(GuestAddress(address), &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn set_desc(&self, index: u16, desc: Desc) {
        self.write(self.layout.desc_table + 16 * u64::from(index), &desc.bytes());
    }

    /// Puts an indirect table anywhere.
    pub(crate) fn set_table(&self, address: u64, table: &[Desc]) {
        for (at, desc) in (address..).step_by(16).zip(table) {
            self.write(at, &desc.bytes());
        }
    }

    /// Makes a head available.
    pub(crate) fn offer(&mut self, head: u16) {
        let entry = u64::from(self.avail_idx % self.layout.size);
        self.write(self.layout.avail_ring + 4 + 2 * entry, &head.to_le_bytes());
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    pub(crate) fn set_avail_idx(&mut self, index: u16) {
        self.avail_idx = index;
        self.write(self.layout.avail_ring + 2, &index.to_le_bytes());
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.write(self.layout.avail_ring, &flags.to_le_bytes());
    }

    pub(crate) fn set_used_event(&self, event: u16) {
        let size = u64::from(self.layout.size);
        self.write(self.layout.avail_ring + 4 + 2 * size, &event.to_le_bytes());
    }

    pub(crate) fn used_flags(&self) -> u16 {
        u16::from_le_bytes(self.read(self.layout.used_ring))
    }

    pub(crate) fn used_idx(&self) -> u16 {
        u16::from_le_bytes(self.read(self.layout.used_ring + 2))
    }

    /// The used element that was written when `used.idx` was `index`: id and length.
    pub(crate) fn used(&self, index: u16) -> (u32, u32) {
        let at = self.layout.used_ring + 4 + 8 * u64::from(index % self.layout.size);
        (u32::from_le_bytes(self.read(at)), u32::from_le_bytes(self.read(at + 4)))
    }

    pub(crate) fn avail_event(&self) -> u16 {
        let size = u64::from(self.layout.size);
        u16::from_le_bytes(self.read(self.layout.used_ring + 4 + 8 * size))
    }
}

/// A property test of `cases` cases. Under miri there is no file to keep failures in, and time only
/// for a few.
pub(crate) fn proptest_config(cases: u32) -> proptest::test_runner::Config {
    let mut config = proptest::test_runner::Config::with_cases(if cfg!(miri) { 2 } else { cases });
    if cfg!(miri) {
        config.failure_persistence = None;
    }
    config
}
