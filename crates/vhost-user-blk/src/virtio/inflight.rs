//! The in-flight area: the requests in flight, recorded in memory that outlives this process.
//!
//! Layout and order of the stores are those of the vhost-user specification, section "Inflight I/O
//! tracking", for split rings. (The struct in the `vhost` crate has the wrong size.) The frontend
//! keeps the memory and gives it to the next daemon, which does the requests again that are marked
//! in it. At every moment it says, together with the ring, what to do:
//!
//! - A request is marked when it is fetched, before anything is done for it, and requests are
//!   fetched in the order of the ring. So `used.idx` plus the number of marks is the next entry of
//!   the available ring.
//! - The marks of a batch of answers are removed after the guest was shown the batch. If the daemon
//!   dies in between, the area's `used_idx` is behind the ring's by the length of the batch, whose
//!   heads are linked from `last_batch_head`.
//!
//! The process may be killed between any two stores, so each is a release: none moves before an
//! earlier one. The other side may write anything into the area at any time; what is read from it
//! is checked in the copy.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::fault;
use crate::guest_memory::memory::{GuestAddress, Loss, Memory, MemoryError};
use crate::virtio::device_state::{DeviceState, STATE_LEN};

/// The version of the layout.
const VERSION: u16 = 1;

/// Each queue's part begins at a multiple of this.
const ALIGN: u64 = 64;

/// Behind the parts of the queues, in an area that was made here, is room for a [`DeviceState`], in
/// bytes. The specification does not have it, but a frontend keeps the whole area.
const STATE_ROOM: u64 = ALIGN;

/// `QueueRegionSplit` without its descriptors; host-endian. All zeros: not initialised.
#[repr(C)]
struct RawHeader {
    features: AtomicU64,
    version: AtomicU16,
    desc_num: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

const _: () = assert!(size_of::<RawHeader>() == 16);

/// `DescStateSplit`; host-endian. Only those of head descriptors are used.
#[repr(C)]
struct RawDescriptor {
    inflight: AtomicU8,
    _padding: [AtomicU8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

const _: () = assert!(size_of::<RawDescriptor>() == 16);

/// An area that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflightError {
    /// A number of queues that the device does not have.
    #[error("in-flight area for {found} queues; expected 1 to {max}")]
    NumQueues {
        /// What the frontend said.
        found: u16,
        /// Queues of the device.
        max: usize,
    },
    /// A queue size that the device does not have.
    #[error("in-flight area for queues of {found} descriptors; expected 1 to {max}")]
    QueueSize {
        /// What the frontend said.
        found: u16,
        /// The largest queue of the device.
        max: u16,
    },
    /// Too small for its queues.
    #[error(
        "in-flight area of {found} bytes; {num_queues} queues of {queue_size} descriptors need {needed}"
    )]
    Size {
        /// What the frontend said, in bytes.
        found: u64,
        /// What it has to be at least, in bytes.
        needed: u64,
        /// For so many queues.
        num_queues: u16,
        /// Of so many descriptors.
        queue_size: u16,
    },
    /// The numbers in it would not be aligned.
    #[error("in-flight area at offset {found:#x} of its file; expected a multiple of {ALIGN}")]
    Offset {
        /// What the frontend said.
        found: u64,
    },
    /// It cannot be mapped to be written: too short, not a file, and the like.
    #[error("in-flight area: {0}")]
    Memory(#[from] MemoryError),
    /// A ring for which it has no part.
    #[error("the in-flight area has {num_queues} queues")]
    NoSuchQueue {
        /// Queues it was made for.
        num_queues: u16,
    },
    /// A field of a queue's header that is not as it was left.
    #[error("in-flight area: {field} is {found}; expected {expected}")]
    Field {
        /// Its name in the specification.
        field: &'static str,
        /// What it says.
        found: u64,
        /// What it must say.
        expected: u64,
    },
    /// The ring is larger than the area was made for.
    #[error("in-flight area for {desc_num} descriptors; the ring has {size}")]
    RingSize {
        /// Descriptors of the area.
        desc_num: u16,
        /// Descriptors of the ring.
        size: u16,
    },
    /// `used.idx` is ahead by more than a batch can be.
    #[error(
        "in-flight area: its used_idx is {found}, the ring's is {ring}; a batch has {size} entries at most"
    )]
    Batch {
        /// What the area says.
        found: u16,
        /// What the ring says.
        ring: u16,
        /// Descriptors of the ring.
        size: u16,
    },
    /// The list of the last batch leads astray.
    #[error("in-flight area: the last batch names descriptor {head}, which cannot be in it{}",
        if *twice { " twice" } else { "" })]
    Link {
        /// The descriptor.
        head: u16,
        /// It is in the list already; else the ring has no such descriptor.
        twice: bool,
    },
    /// The state of a descriptor that no daemon leaves behind.
    #[error("in-flight area: descriptor {head} has {field} {found}, which cannot be")]
    Descriptor {
        /// The descriptor.
        head: u16,
        /// `inflight` or `counter`.
        field: &'static str,
        /// What it says.
        found: u64,
    },
    /// More or fewer requests than the ring can have.
    #[error(
        "in-flight area: {marked} requests are marked, but the ring, of {size} descriptors, has \
         {available} that were made available and not answered"
    )]
    Available {
        /// Marks.
        marked: usize,
        /// `avail.idx` less `used.idx`.
        available: u16,
        /// Descriptors of the ring.
        size: u16,
    },
}

/// What a frontend says about an area.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AreaInfo {
    /// Length in bytes.
    pub(crate) size: u64,
    /// Where it begins in its file, in bytes.
    pub(crate) offset: u64,
    /// Queues it is for.
    pub(crate) num_queues: u16,
    /// Descriptors of each queue.
    pub(crate) queue_size: u16,
}

impl AreaInfo {
    /// The area for `num_queues` queues of `queue_size` descriptors and the state of the device, at
    /// the beginning of a file.
    pub(crate) fn new(num_queues: u16, queue_size: u16) -> Self {
        let size = queues_len(num_queues, queue_size) + STATE_ROOM;
        AreaInfo { size, offset: 0, num_queues, queue_size }
    }

    /// Whether a device of these limits has use for it.
    ///
    /// # Errors
    /// [`InflightError`] with the number that is wrong.
    pub(crate) fn check(
        &self,
        num_queues_max: usize,
        queue_size_max: u16,
    ) -> Result<(), InflightError> {
        let AreaInfo { size, offset, num_queues, queue_size } = *self;
        if num_queues == 0 || usize::from(num_queues) > num_queues_max {
            return Err(InflightError::NumQueues { found: num_queues, max: num_queues_max });
        }
        if queue_size == 0 || queue_size > queue_size_max {
            return Err(InflightError::QueueSize { found: queue_size, max: queue_size_max });
        }
        if !offset.is_multiple_of(ALIGN) {
            return Err(InflightError::Offset { found: offset });
        }
        let needed = queues_len(num_queues, queue_size);
        if size < needed {
            return Err(InflightError::Size { found: size, needed, num_queues, queue_size });
        }
        Ok(())
    }

    /// A file of zeros for it, whose length is fixed.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn create(&self) -> io::Result<File> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = File::from(memfd_create(c"vhost-user-inflight", flags)?);
        file.set_len(self.size)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
        Ok(file)
    }
}

/// Bytes of the parts of all queues.
fn queues_len(num_queues: u16, queue_size: u16) -> u64 {
    u64::from(num_queues) * stride(queue_size)
}

/// Bytes of one queue's part.
fn stride(queue_size: u16) -> u64 {
    (16 + 16 * u64::from(queue_size)).next_multiple_of(ALIGN)
}

/// The indices of a ring, read from the ring.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RingIndices {
    /// Descriptors of the ring.
    pub(crate) size: u16,
    /// `avail.idx`
    pub(crate) avail: u16,
    /// `used.idx`
    pub(crate) used: u16,
}

/// A mapped area.
#[derive(Debug)]
pub(crate) struct Area {
    memory: Arc<Memory>,
    num_queues: u16,
    queue_size: u16,
}

impl Area {
    /// Maps the area that `info`, which was checked, describes.
    ///
    /// # Errors
    /// [`InflightError::Memory`]
    pub(crate) fn map(info: &AreaInfo, file: File) -> Result<Self, InflightError> {
        let memory = Memory::of_file(file, info.offset, info.size)?;
        let (num_queues, queue_size) = (info.num_queues, info.queue_size);
        Ok(Area { memory: Arc::new(memory), num_queues, queue_size })
    }

    /// What a successor needs to map it.
    pub(crate) fn export(&self) -> Option<(AreaInfo, &File)> {
        let (region, file) = self.memory.files().next()?;
        let (num_queues, queue_size) = (self.num_queues, self.queue_size);
        Some((
            AreaInfo { size: region.size, offset: region.file_offset, num_queues, queue_size },
            file,
        ))
    }

    /// Forgets everything: the device was reset. (A frontend can say that its area is much longer
    /// than it has to be; what is behind it stays.)
    pub(crate) fn clear(&self) {
        let area = self.memory.regions().next().map_or(0, |region| region.size);
        let len = area.min(queues_len(self.num_queues, self.queue_size) + STATE_ROOM);
        if let (Some(start), Ok(len)) =
            (self.memory.contiguous_mut(GuestAddress(0), len), usize::try_from(len))
        {
            self.memory.zero_host(start, len);
        }
    }

    /// Keeps the state of the device for a successor, if the area has room for it.
    pub(crate) fn keep(&self, state: DeviceState) {
        // One that was made elsewhere may have none.
        let _ = self.memory.write(self.state_at(), &state.encode());
    }

    /// The state that a predecessor kept.
    pub(crate) fn kept(&self) -> Option<DeviceState> {
        let mut bytes = [0; STATE_LEN];
        self.memory.read(self.state_at(), &mut bytes).ok()?;
        DeviceState::decode(&bytes).ok()
    }

    fn state_at(&self) -> GuestAddress {
        GuestAddress(queues_len(self.num_queues, self.queue_size))
    }

    /// What became of it, if a page of its file was lost.
    pub(crate) fn loss(&self) -> Option<Loss> {
        self.memory.loss()
    }

    /// Ends what a predecessor was in the middle of, and gives the state of queue `queue`, whose
    /// ring stands as `ring` says. Unless all is in order nothing is changed.
    ///
    /// # Errors
    /// [`InflightError`] that says what contradicts what.
    pub(crate) fn recover(
        &self,
        queue: usize,
        ring: RingIndices,
    ) -> Result<Tracker, InflightError> {
        let desc_num = self.queue_size;
        let part = u64::try_from(queue)
            .ok()
            .filter(|&queue| queue < u64::from(self.num_queues))
            .and_then(|queue| {
                let start = GuestAddress(queue * stride(desc_num));
                self.memory.contiguous_mut(start, stride(desc_num))
            });
        let start = part.ok_or(InflightError::NoSuchQueue { num_queues: self.num_queues })?;
        if ring.size > desc_num {
            return Err(InflightError::RingSize { desc_num, size: ring.size });
        }
        let mut tracker = Tracker {
            memory: Arc::clone(&self.memory),
            start,
            desc_num,
            counter: 0,
            unfinished: Vec::new(),
            batch: Vec::with_capacity(ring.size.into()),
            next_avail: ring.used,
        };
        if tracker.header().version.load(Ordering::Acquire) == 0 {
            tracker.initialise(ring.used);
        }
        tracker.recover(ring)?;
        Ok(tracker)
    }
}

/// The part of the area that belongs to one queue, kept up to date while the ring is served.
#[derive(Debug)]
pub(crate) struct Tracker {
    memory: Arc<Memory>,
    /// Begins with a [`RawHeader`] and `desc_num` [`RawDescriptor`]s, inside `memory`.
    start: *mut u8,
    desc_num: u16,
    /// The next request's.
    counter: u64,
    /// Heads that are to be done again, the first one last.
    unfinished: Vec<u16>,
    /// Heads answered since the guest was last shown any.
    batch: Vec<u16>,
    next_avail: u16,
}

// SAFETY: the pointer points into the mapping that `memory` keeps, which belongs to no thread.
unsafe impl Send for Tracker {}

impl Tracker {
    fn header(&self) -> &RawHeader {
        // SAFETY: `start` is aligned and the part lies inside a mapping that `self` keeps; all
        // fields are atomics.
        unsafe { &*self.start.cast() }
    }

    fn descriptors(&self) -> &[RawDescriptor] {
        // SAFETY: as in `header`; so many descriptors come behind it.
        unsafe {
            let first = self.start.add(size_of::<RawHeader>()).cast();
            std::slice::from_raw_parts(first, self.desc_num.into())
        }
    }

    fn initialise(&self, used_idx: u16) {
        for descriptor in self.descriptors() {
            descriptor.inflight.store(0, Ordering::Release);
        }
        let header = self.header();
        header.features.store(0, Ordering::Release);
        header.desc_num.store(self.desc_num, Ordering::Release);
        header.last_batch_head.store(0, Ordering::Release);
        header.used_idx.store(used_idx, Ordering::Release);
        header.version.store(VERSION, Ordering::Release);
    }

    /// See [`Area::recover`].
    fn recover(&mut self, ring: RingIndices) -> Result<(), InflightError> {
        let header = self.header();
        let fields = [
            ("version", header.version.load(Ordering::Acquire).into(), VERSION.into()),
            ("features", header.features.load(Ordering::Acquire), 0),
            ("desc_num", header.desc_num.load(Ordering::Acquire).into(), self.desc_num.into()),
        ];
        for (field, found, expected) in fields {
            if found != expected {
                return Err(InflightError::Field { field, found, expected });
            }
        }
        let answered = self.last_batch(ring)?;
        let marked = self.marked(ring.size, &answered)?;
        let available = ring.avail.wrapping_sub(ring.used);
        if available > ring.size || usize::from(available) < marked.len() {
            return Err(InflightError::Available {
                marked: marked.len(),
                available,
                size: ring.size,
            });
        }
        // From here on nothing fails.
        self.counter = marked.last().map_or(0, |(counter, _)| counter + 1);
        self.next_avail = marked.iter().fold(ring.used, |next, _| next.wrapping_add(1));
        self.unfinished = marked.iter().rev().map(|&(_, head)| head).collect();
        let header = self.header();
        for (descriptor, _) in self.descriptors().iter().zip(&answered).filter(|(_, done)| **done) {
            descriptor.inflight.store(0, Ordering::Release);
            fault::reached("recover-clear");
        }
        header.used_idx.store(ring.used, Ordering::Release);
        fault::reached("recover-used-idx");
        Ok(())
    }

    /// For each descriptor, whether it is in the batch that the guest was shown but whose marks may
    /// still be there.
    fn last_batch(&self, ring: RingIndices) -> Result<Vec<bool>, InflightError> {
        let found = self.header().used_idx.load(Ordering::Acquire);
        let len = ring.used.wrapping_sub(found);
        if len > ring.size {
            return Err(InflightError::Batch { found, ring: ring.used, size: ring.size });
        }
        let mut answered = vec![false; ring.size.into()];
        let mut head = self.header().last_batch_head.load(Ordering::Acquire);
        for _ in 0..len {
            match answered.get_mut(usize::from(head)) {
                Some(answered) if !*answered => *answered = true,
                in_it => return Err(InflightError::Link { head, twice: in_it.is_some() }),
            }
            head = self.descriptors()[usize::from(head)].next.load(Ordering::Acquire);
        }
        Ok(answered)
    }

    /// Counters and heads of what is in flight, in the order in which it was fetched.
    fn marked(&self, size: u16, answered: &[bool]) -> Result<Vec<(u64, u16)>, InflightError> {
        let mut marked = Vec::new();
        for (head, descriptor) in (0..).zip(self.descriptors()) {
            match descriptor.inflight.load(Ordering::Acquire) {
                1 if head < size && answered[usize::from(head)] => {}
                1 if head < size => {
                    marked.push((descriptor.counter.load(Ordering::Acquire), head));
                }
                0 => {}
                found => {
                    let found = found.into();
                    return Err(InflightError::Descriptor { head, field: "inflight", found });
                }
            }
        }
        marked.sort_unstable();
        let twice = marked.windows(2).find(|pair| pair[0].0 == pair[1].0).map(|pair| pair[1]);
        match twice.or(marked.last().copied().filter(|&(counter, _)| counter == u64::MAX)) {
            Some((found, head)) => Err(InflightError::Descriptor { head, field: "counter", found }),
            None => Ok(marked),
        }
    }

    /// The first entry of the available ring that was not fetched.
    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Whether a page of the area's file was lost.
    #[inline]
    pub(crate) fn poisoned(&self) -> bool {
        self.memory.poisoned()
    }

    /// What became of it.
    pub(crate) fn loss(&self) -> Option<Loss> {
        self.memory.loss()
    }

    /// The next request that is to be done again.
    pub(crate) fn unfinished(&mut self) -> Option<u16> {
        self.unfinished.pop()
    }

    /// How many requests are left to be done again.
    pub(crate) fn unfinished_count(&self) -> usize {
        self.unfinished.len()
    }

    /// A request was fetched. False: the descriptor is in flight already, or the area has none of
    /// this number.
    #[inline]
    pub(crate) fn fetched(&mut self, head: u16) -> bool {
        let Some(descriptor) = self.descriptors().get(usize::from(head)) else { return false };
        if descriptor.inflight.load(Ordering::Relaxed) != 0 {
            return false;
        }
        descriptor.counter.store(self.counter, Ordering::Release);
        fault::reached("fetch-counter");
        descriptor.inflight.store(1, Ordering::Release);
        self.counter = self.counter.wrapping_add(1);
        fault::reached("fetch-mark");
        true
    }

    /// A request was answered; the guest does not see it yet.
    #[inline]
    pub(crate) fn answered(&mut self, head: u16) {
        let Some(descriptor) = self.descriptors().get(usize::from(head)) else { return };
        let header = self.header();
        let before = header.last_batch_head.load(Ordering::Relaxed);
        descriptor.next.store(before, Ordering::Release);
        fault::reached("link-next");
        header.last_batch_head.store(head, Ordering::Release);
        self.batch.push(head);
        fault::reached("link-head");
    }

    /// The guest was shown everything that was answered: the ring's `used.idx` is `used_idx`.
    #[inline]
    pub(crate) fn published(&mut self, used_idx: u16) {
        for &head in &self.batch {
            if let Some(descriptor) = self.descriptors().get(usize::from(head)) {
                descriptor.inflight.store(0, Ordering::Release);
                fault::reached("clear");
            }
        }
        self.batch.clear();
        fault::reached("cleared");
        self.header().used_idx.store(used_idx, Ordering::Release);
        fault::reached("used-idx-saved");
    }
}

#[cfg(test)]
mod tests;
