//! A typed ring: it owns each request from its submission to the last
//! completion of its parts.
//!
//! A request is planned as a list of parts ([`Plan`]): one part for each extent of a file. The ring
//! submits them, continues short transfers, waits for all parts and only then gives the request
//! back, with the first error or with success ([`Event::Done`]). So a request can be answered only
//! once, and only after the kernel no longer uses its buffers.
//!
//! Below it is one of two engines ([`IoEngine`]), which perform the operations and know nothing of
//! requests: io_uring, or threads for hosts where io_uring is not permitted.
//!
//! An io_uring may do only what a ring needs, and only with files that are registered in it. The
//! files of a ring are registered when it begins, and given up when it ends. This is part of the
//! fence of `docs/architecture.md`: as long as an operation is in flight, the kernel keeps their
//! open file descriptions, and with them the locks. `ring/threads.rs` explains why this holds for
//! the other engine as well.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use cow_format::ByteOffset;

use crate::image::CHAIN_DEPTH_MAX;
use threads::Threads;

#[cfg(any(test, feature = "fault-points"))]
mod attempt;
#[cfg(feature = "fault-points")]
mod fault_injection;
mod probe;
mod threads;
mod uring;

pub use probe::NoUring;
pub use uring::{DisabledUring, Uring};

/// Iovecs in one operation: the kernel's UIO_MAXIOV.
const IOVECS_PER_OP_MAX: usize = 1024;

/// Files of a ring: the two descriptions of each layer of the deepest chain.
pub const FILES_MAX: usize = 2 * CHAIN_DEPTH_MAX;

/// Watched descriptors of a ring, with some to spare. Their numbers are below this.
pub const WATCHES_MAX: usize = 8;

/// Operations of requests that the engine of one ring has at most; the others wait here, where each
/// takes eight bytes. In the kernel it takes up to a kilobyte. No disk gets faster by more.
const OPERATIONS_MAX: usize = 256;

/// Parts and pieces of memory for which a plan keeps its room from one request to the next: those
/// of common requests. A ring has as many plans as requests at a time.
const PARTS_KEPT: usize = 4;
const IOVECS_KEPT: usize = 32;

/// The top bit of an operation's identifier ([`Completion::data`]) distinguishes completions of
/// watched file descriptors from those of requests.
const WATCH: u64 = 1 << 63;

/// The identifier of every touch.
const TOUCH: u64 = 1 << 62;

/// Limit of touches in flight, so that a stream of one reader does not fill the queues, or the
/// kernel's worker threads on file systems where touches need them.
const TOUCHES_MAX: usize = 32;

/// The engine that does the I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring.
    IoUring,
    /// Threads that make plain system calls: slower, but available on every Linux.
    Sync,
}

impl std::fmt::Display for IoEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            IoEngine::IoUring => "io_uring",
            IoEngine::Sync => "sync",
        })
    }
}

/// A file of the ring: its index in the list given to [`Ring::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(pub u32);

/// The operation of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Read,
    Write,
    /// fallocate(2) with these mode bits.
    Allocate(i32),
}

/// One operation on one contiguous range of one file.
#[derive(Clone, Copy, Debug)]
struct Part {
    action: Action,
    file: FileSlot,
    /// Bytes from the start of the file.
    at: u64,
    /// Bytes that remain.
    len: u64,
    /// The part's iovecs: indices into those of its plan.
    first: usize,
    last: usize,
    /// Done by a kernel thread from the beginning (IOSQE_ASYNC).
    force_async: bool,
}

/// The parts of one request; reused from one request to the next, so that
/// planning allocates nothing once the vectors have grown.
#[derive(Default)]
pub struct Plan {
    parts: Vec<Part>,
    iovecs: Vec<libc::iovec>,
    /// To be read or written, in bytes.
    moved: u64,
}

// SAFETY: the iovecs are plain addresses; the caller of `Ring::submit` promises that they are
// valid, from any thread.
unsafe impl Send for Plan {}

impl Plan {
    /// Forgets all parts, and gives back the memory that only a long request needs.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.iovecs.clear();
        self.moved = 0;
        if self.parts.capacity() > PARTS_KEPT || self.iovecs.capacity() > IOVECS_KEPT {
            *self = Self::default();
        }
    }

    /// No part was planned.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The number of parts.
    pub fn len(&self) -> usize {
        self.parts.len()
    }

    /// The parts, and the pieces of memory that they name.
    pub fn pieces(&self) -> usize {
        self.parts.len() + self.iovecs.len()
    }

    /// The bytes of all parts.
    pub fn len_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.len).sum()
    }

    /// The parts planned so far are done by kernel threads from the beginning, while the ring's
    /// owner does something else.
    pub fn force_async(&mut self) {
        self.parts.iter_mut().for_each(|part| part.force_async = true);
    }

    /// Reads from `file` at `at` into `buffers`, in order.
    pub fn read(&mut self, file: FileSlot, at: ByteOffset, buffers: &[libc::iovec]) {
        self.transfer(Action::Read, file, at, buffers);
    }

    /// Writes `buffers`, in order, to `file` at `at`.
    pub fn write(&mut self, file: FileSlot, at: ByteOffset, buffers: &[libc::iovec]) {
        self.transfer(Action::Write, file, at, buffers);
    }

    /// Makes `len` bytes of `file` at `at` a hole; the file's length stays.
    pub fn punch(&mut self, file: FileSlot, at: ByteOffset, len: u64) {
        self.allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, file, at, len);
    }

    /// Makes `len` bytes of `file` at `at` zeros that keep their disk space.
    pub fn zero(&mut self, file: FileSlot, at: ByteOffset, len: u64) {
        self.allocate(libc::FALLOC_FL_ZERO_RANGE, file, at, len);
    }

    fn allocate(&mut self, mode: i32, file: FileSlot, at: ByteOffset, len: u64) {
        let first = self.iovecs.len();
        self.parts.push(Part {
            action: Action::Allocate(mode),
            file,
            at: at.get(),
            len,
            first,
            last: first,
            force_async: false,
        });
    }

    fn transfer(
        &mut self,
        action: Action,
        file: FileSlot,
        at: ByteOffset,
        buffers: &[libc::iovec],
    ) {
        let mut at = at.get();
        for chunk in buffers.chunks(IOVECS_PER_OP_MAX) {
            let first = self.iovecs.len();
            self.iovecs.extend_from_slice(chunk);
            let len = chunk.iter().map(|v| v.iov_len as u64).sum();
            self.moved += len;
            let last = self.iovecs.len();
            self.parts.push(Part { action, file, at, len, first, last, force_async: false });
            at += len;
        }
    }
}

/// A file descriptor that wakes the ring's owner: a number below [`WATCHES_MAX`], chosen by the
/// owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch(pub u32);

/// An event reported by the ring.
#[derive(Debug)]
pub enum Event<R> {
    /// All parts of the request are done; the first error, if there was one.
    Done(R, io::Result<()>),
    /// A watched file descriptor became readable. This is level-triggered for what was there
    /// before, edge-triggered after that.
    Ready(Watch),
    /// A file descriptor is not watched: the kernel has refused it.
    Lost(Watch, io::Error),
}

struct Slot<R> {
    request: Option<R>,
    plan: Plan,
    parts_left: usize,
    error: Option<i32>,
}

/// An engine, by its concrete type, so that the compiler can inline the branches.
enum Engine<'a> {
    Uring(&'a mut Uring),
    Threads(Threads),
}

/// A ring with requests of type `R` in flight. See the module documentation.
pub struct Ring<'a, R> {
    engine: Engine<'a>,
    slots: Vec<Slot<R>>,
    free: Vec<usize>,
    touches_in_flight: usize,
    /// Parts that are with the engine, or wait for it.
    parts_in_flight: usize,
    /// The latter, as [`Completion::data`] will name them.
    waiting: VecDeque<u64>,
    /// See [`Self::pieces_in_flight`] and [`Self::bytes_in_flight`].
    pieces: usize,
    bytes: u64,
    #[cfg(feature = "fault-points")]
    injected: fault_injection::Injected,
}

impl<'a, R> Ring<'a, R> {
    /// A ring for at most `depth` requests at a time over `files`, of which there are at most
    /// [`FILES_MAX`]; a `None` keeps its index free. The engine is `uring`, or threads.
    ///
    /// # Errors
    /// Errors of io_uring_register(2), or of clone(2), eventfd(2) and epoll_create(2).
    pub fn new(
        uring: Option<&'a mut Uring>,
        depth: usize,
        files: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<Self> {
        match uring {
            Some(uring) => {
                uring.register(files)?;
                Ok(Self::over(Engine::Uring(uring), depth))
            }
            None => {
                let threads = Threads::new(files, threads::perform)?;
                Ok(Self::over(Engine::Threads(threads), depth))
            }
        }
    }

    fn over(engine: Engine<'a>, depth: usize) -> Self {
        let slots = (0..depth)
            .map(|_| Slot { request: None, plan: Plan::default(), parts_left: 0, error: None })
            .collect();
        Self {
            engine,
            slots,
            free: (0..depth).rev().collect(),
            touches_in_flight: 0,
            parts_in_flight: 0,
            waiting: VecDeque::new(),
            pieces: 0,
            bytes: 0,
            #[cfg(feature = "fault-points")]
            injected: Default::default(),
        }
    }

    /// The number of requests that can be submitted before one is given back.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// No request is in flight.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// [`Plan::pieces`] of all requests in flight.
    #[inline]
    pub fn pieces_in_flight(&self) -> usize {
        self.pieces
    }

    /// The bytes that the requests in flight read and write.
    #[inline]
    pub fn bytes_in_flight(&self) -> u64 {
        self.bytes
    }

    /// Reports [`Event::Ready`] whenever `fd` becomes readable. The caller
    /// keeps `fd` open for the life of the ring.
    ///
    /// # Errors
    /// `fd` is of a kind that cannot be polled. (io_uring reports most of these later, as an
    /// [`Event::Lost`].)
    pub fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        match &mut self.engine {
            Engine::Uring(uring) => uring.watch(fd, watch),
            Engine::Threads(threads) => threads.watch(fd, WATCH | u64::from(watch.0)),
        }
    }

    /// Whether [`Self::touch`] may be called. It is not worth the time of the thread engine.
    pub fn can_touch(&self) -> bool {
        matches!(self.engine, Engine::Uring(_)) && self.touches_in_flight < TOUCHES_MAX
    }

    /// Reads the byte at `at` of `file` only to show the kernel a reader there. It is not a
    /// request: no event results from it, whether it succeeds or not.
    pub fn touch(&mut self, file: FileSlot, at: ByteOffset) {
        if let Engine::Uring(uring) = &mut self.engine {
            self.touches_in_flight += 1;
            uring.touch(file, at.get(), TOUCH);
        }
    }

    /// Takes `request` and queues the parts of `plan`; they reach the kernel with the next
    /// [`Self::enter`]. `plan` comes back empty, with the room of an earlier one if that is little.
    ///
    /// # Errors
    /// Gives `request` back if [`Self::room`] is 0 or the plan is empty.
    ///
    /// # Safety
    /// Until the request comes back in [`Event::Done`] or the ring has been dropped, the buffers of
    /// `plan` stay valid, no Rust reference to them exists, and the files of the ring stay open.
    pub unsafe fn submit(&mut self, request: R, plan: &mut Plan) -> Result<(), R> {
        if plan.is_empty() {
            return Err(request);
        }
        let Some(index) = self.free.pop() else { return Err(request) };
        let slot = &mut self.slots[index];
        std::mem::swap(&mut slot.plan, plan);
        slot.request = Some(request);
        slot.parts_left = slot.plan.parts.len();
        slot.error = None;
        self.pieces += slot.plan.pieces();
        self.bytes += slot.plan.moved;
        for part in 0..self.slots[index].parts_left {
            self.queue_part(index, part);
        }
        Ok(())
    }

    fn queue_part(&mut self, slot: usize, part: usize) {
        self.parts_in_flight += 1;
        #[cfg(feature = "fault-points")]
        if crate::fault_injection::is_on() {
            return self.injected.hold(slot, part);
        }
        // Both fit: a plan has far fewer than 2^32 parts, a ring fewer slots.
        let data = (slot as u64) << 32 | part as u64;
        if self.parts_in_flight > OPERATIONS_MAX {
            self.waiting.push_back(data);
        } else {
            self.begin_part(data);
        }
    }

    #[inline]
    fn begin_part(&mut self, data: u64) {
        let (slot, part) = place(data);
        let plan = &self.slots[slot].plan;
        let part = plan.parts[part];
        self.engine.begin(part, &plan.iovecs[part.first..part.last], data);
    }

    /// Hands queued operations to the kernel, fetches completions, and waits for at least one event
    /// if `wait` is set. For io_uring it makes no system call if there is nothing to hand over or
    /// to fetch.
    ///
    /// # Errors
    /// Errors of io_uring_enter(2) or epoll_wait(2); EINTR counts as success.
    pub fn enter(&mut self, wait: bool) -> io::Result<()> {
        #[cfg(feature = "fault-points")]
        if self.injected.is_busy() {
            return self.enter_injected(wait);
        }
        self.engine.enter(wait)
    }

    /// There are completions that [`Self::enter`] would fetch.
    #[inline]
    pub fn wants_enter(&mut self) -> bool {
        #[cfg(feature = "fault-points")]
        if self.injected.is_busy() {
            return true;
        }
        match &mut self.engine {
            Engine::Uring(uring) => uring.wants_enter(),
            Engine::Threads(threads) => threads.wants_enter(),
        }
    }

    /// The next event that has arrived, without a system call.
    pub fn next_event(&mut self) -> Option<Event<R>> {
        loop {
            let completion = self.next_completion()?;
            if completion.data == TOUCH {
                self.touches_in_flight -= 1;
                continue;
            }
            if completion.data & WATCH != 0 {
                return Some(self.woken(&completion));
            }
            let event = self.finish_part(&completion);
            if let Some(next) = self.waiting.pop_front() {
                self.begin_part(next);
            }
            if event.is_some() {
                return event;
            }
        }
    }

    #[inline]
    fn next_completion(&mut self) -> Option<Completion> {
        #[cfg(feature = "fault-points")]
        if self.injected.is_busy() {
            return self.injected.next();
        }
        self.engine.next()
    }

    /// The event of a watched descriptor.
    fn woken(&mut self, completion: &Completion) -> Event<R> {
        // The lower 32 bits were a u32.
        #[expect(clippy::cast_possible_truncation)]
        let watch = Watch(completion.data as u32);
        if let (false, Engine::Uring(uring)) = (completion.more, &mut self.engine) {
            uring.poll_ended(watch);
        }
        if completion.result < 0 {
            return Event::Lost(watch, io::Error::from_raw_os_error(-completion.result));
        }
        // A broken or hung-up descriptor would be ready again at once, forever.
        let gone = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;
        let over = completion.more || completion.result & i32::from(gone) != 0;
        if let (false, Engine::Uring(uring)) = (over, &mut self.engine) {
            uring.poll(watch);
        }
        Event::Ready(watch)
    }

    /// Counts the completion of a part; returns the request after the last one.
    fn finish_part(&mut self, completion: &Completion) -> Option<Event<R>> {
        let (index, part) = place(completion.data);
        self.parts_in_flight -= 1;
        let slot = &mut self.slots[index];
        match slot.plan.parts[part].outcome(completion.result) {
            Outcome::Done => {}
            Outcome::Again(done) => {
                slot.plan.advance(part, done);
                self.queue_part(index, part);
                return None;
            }
            Outcome::Failed(errno) => {
                slot.error.get_or_insert(errno);
            }
        }
        slot.parts_left -= 1;
        if slot.parts_left > 0 {
            return None;
        }
        let result = slot.error.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
        let request = slot.request.take()?;
        self.pieces -= slot.plan.pieces();
        self.bytes -= slot.plan.moved;
        slot.plan.clear();
        self.free.push(index);
        Some(Event::Done(request, result))
    }
}

/// The request's slot, and the part in it, that an operation is for.
#[inline]
fn place(data: u64) -> (usize, usize) {
    // Two u32 that `Ring::queue_part` put together.
    ((data >> 32) as usize, (data & 0xffff_ffff) as usize)
}

impl<R> Ring<'_, R> {
    /// Waits until the kernel no longer uses any buffer, and gives up the files.
    fn end(&mut self) -> io::Result<()> {
        self.parts_in_flight -= self.waiting.len();
        self.waiting.clear();
        while self.parts_in_flight + self.touches_in_flight > 0 {
            self.enter(true)?;
            while self.next_event().is_some() {}
        }
        match &mut self.engine {
            Engine::Uring(uring) => uring.release(),
            Engine::Threads(_) => Ok(()),
        }
    }
}

impl<R> Drop for Ring<'_, R> {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            // The kernel may still write to the buffers; only aborting keeps other memory intact.
            log::error!("cannot wait for the I/O in flight: {e}");
            std::process::abort();
        }
    }
}

impl Engine<'_> {
    #[inline]
    fn begin(&mut self, part: Part, iovecs: &[libc::iovec], data: u64) {
        match self {
            Engine::Uring(uring) => uring.begin(part, iovecs, data),
            Engine::Threads(threads) => threads.begin(part, iovecs, data),
        }
    }

    #[inline]
    fn enter(&mut self, wait: bool) -> io::Result<()> {
        match self {
            Engine::Uring(uring) => uring.enter(wait),
            Engine::Threads(threads) => threads.enter(wait),
        }
    }

    #[inline]
    fn next(&mut self) -> Option<Completion> {
        match self {
            Engine::Uring(uring) => uring.next(),
            Engine::Threads(threads) => threads.next(),
        }
    }
}

/// An engine's report about an operation.
struct Completion {
    /// What the operation is known by.
    data: u64,
    /// Bytes, events of poll(2), or a negative errno.
    result: i32,
    /// There will be another completion.
    more: bool,
}

enum Outcome {
    Done,
    /// This many bytes are done; the rest is to be submitted again.
    Again(u64),
    Failed(i32),
}

impl Part {
    fn outcome(&self, result: i32) -> Outcome {
        let Ok(done) = u64::try_from(result) else {
            return match -result {
                libc::EINTR | libc::EAGAIN => Outcome::Again(0),
                errno => Outcome::Failed(errno),
            };
        };
        match self.action {
            Action::Allocate(_) => Outcome::Done,
            _ if done >= self.len => Outcome::Done,
            // The file ends before the range: it was truncated during the I/O.
            Action::Read if done == 0 => Outcome::Failed(libc::EIO),
            Action::Write if done == 0 => Outcome::Failed(libc::ENOSPC),
            _ => Outcome::Again(done),
        }
    }
}

impl Plan {
    /// `done` bytes of the part have been transferred: the rest remains.
    fn advance(&mut self, part: usize, done: u64) {
        let part = &mut self.parts[part];
        part.at += done;
        part.len -= done;
        let mut skip = done;
        while let Some(iovec) = self.iovecs[part.first..part.last].first_mut() {
            let len = iovec.iov_len as u64;
            if skip < len {
                // Less than iov_len, which is a usize.
                #[expect(clippy::cast_possible_truncation)]
                let skip = skip as usize;
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(skip).cast();
                iovec.iov_len -= skip;
                return;
            }
            skip -= len;
            part.first += 1;
        }
    }
}

#[cfg(test)]
mod tests;
