//! For unit tests: the test kit's driver on a ring in the daemon's own [`Memory`], which is
//! anonymous here, so that no process and no file is needed.

use std::sync::Arc;

pub(crate) use testkit::descriptor::{Desc, INDIRECT, NEXT, WRITE};
use testkit::descriptor::{linked, table};
use testkit::driver::{Driver, GuestMemory, Layout};
use virtio_queue::QueueState;

use crate::guest_memory::memory::{GuestAddress, Memory};
use crate::virtio::device_queue::QUEUE_SIZE_MAX;
use crate::virtio::split_queue::SplitQueue;

impl GuestMemory for Memory {
    fn write_guest(&self, address: u64, bytes: &[u8]) {
        self.write(GuestAddress(address), bytes).unwrap();
    }

    fn read_guest(&self, address: u64, bytes: &mut [u8]) {
        self.read(GuestAddress(address), bytes).unwrap();
    }
}

/// A guest with one ring at [`RING`] and room for data above.
pub(crate) struct Guest {
    pub memory: Arc<Memory>,
    pub layout: QueueState,
    pub driver: Driver,
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
        let ring = Layout { size, desc: RING, avail: RING + 0x2000, used: RING + 0x4000 };
        let layout = QueueState {
            max_size: QUEUE_SIZE_MAX,
            size,
            next_avail: start,
            ready: true,
            desc_table: ring.desc,
            avail_ring: ring.avail,
            used_ring: ring.used,
            ..QueueState::default()
        };
        let mut guest = Self { memory, layout, driver: Driver::new(ring, start) };
        guest.set_avail_idx(start);
        guest.write(ring.used_idx(), &start.to_le_bytes());
        guest
    }

    /// The device's end, with nothing taken yet.
    pub(crate) fn queue(&self, event_idx: bool) -> SplitQueue {
        let state = QueueState { event_idx_enabled: event_idx, ..self.layout };
        SplitQueue::new(self.memory.clone(), state).unwrap()
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_guest(address, bytes);
    }

    pub(crate) fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_guest(address, &mut bytes);
        bytes
    }

    pub(crate) fn set_desc(&self, index: u16, desc: Desc) {
        self.driver.set_desc(&*self.memory, index, desc);
    }

    /// Writes a chain into the slots from `first` on.
    pub(crate) fn set_chain(&self, first: u16, descs: impl IntoIterator<Item = Desc>) {
        self.driver.set_descs(&*self.memory, first, &linked(first, descs));
    }

    /// Puts an indirect table anywhere.
    pub(crate) fn set_table(&self, address: u64, descs: &[Desc]) {
        self.write(address, &table(descs));
    }

    /// Makes a head available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.driver.offer(&*self.memory, &[head]);
    }

    pub(crate) fn set_avail_idx(&mut self, index: u16) {
        self.driver.set_avail_idx(&*self.memory, index);
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        self.driver.set_avail_flags(&*self.memory, flags);
    }

    pub(crate) fn set_used_event(&self, event: u16) {
        self.driver.set_used_event(&*self.memory, event);
    }

    pub(crate) fn used_flags(&self) -> u16 {
        self.driver.used_flags(&*self.memory)
    }

    pub(crate) fn used_idx(&self) -> u16 {
        self.driver.used_idx(&*self.memory)
    }

    /// The used element that was written when `used.idx` was `index`: id and length.
    pub(crate) fn used(&self, index: u16) -> (u32, u32) {
        self.driver.used(&*self.memory, index)
    }

    pub(crate) fn avail_event(&self) -> u16 {
        self.driver.avail_event(&*self.memory)
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
