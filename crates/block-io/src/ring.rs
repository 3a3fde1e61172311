//! A typed io_uring: it owns each request from its submission to the last
//! completion of its parts.
//!
//! A request is planned as a list of parts ([`Plan`]): one part for each
//! extent of a file. The ring submits them, repeats what came up short, waits
//! for all of them and only then gives the request back, with the first error
//! or with success ([`Event::Done`]). So a request can be answered once, and
//! only after the kernel has let go of its buffers.
//!
//! The files are registered in the ring when it is made. This is part of the
//! fence of `docs/architecture.md`: as long as the ring lives the kernel
//! keeps their open file descriptions, and with them the locks.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use cow_format::ByteOffset;
use io_uring::{IoUring, cqueue, opcode, squeue, types};

#[cfg(feature = "fault-points")]
mod disturbed;

/// Iovecs in one operation: the kernel's UIO_MAXIOV.
const IOVECS_PER_OP_MAX: usize = 1024;

/// Submission queue entries of one ring. More are queued in user space; this
/// only bounds how many go to the kernel with one system call.
const ENTRIES_MAX: u32 = 256;

/// The top bit of `user_data` tells the completions of watched file
/// descriptors from those of requests.
const WATCH: u64 = 1 << 63;

/// The `user_data` of every touch.
const TOUCH: u64 = 1 << 62;

/// Touches under way at a time, so that a stream of one reader does not fill the
/// queues, or the kernel's worker threads where the file system needs them to wait in.
const TOUCHES_MAX: usize = 32;

/// A file of the ring: the place in the list given to [`Ring::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSlot(pub u32);

/// What a part does.
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
    /// Bytes still to do.
    len: u64,
    /// The part's iovecs: indices into those of its plan.
    first: usize,
    last: usize,
    /// A thread of the kernel does it from the beginning.
    aside: bool,
}

/// The parts of one request; reused from one request to the next, so that
/// planning allocates nothing once the vectors have grown.
#[derive(Default)]
pub struct Plan {
    parts: Vec<Part>,
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the iovecs are plain addresses; whoever submits the plan promises
// (`Ring::submit`) that they are valid, from whichever thread.
unsafe impl Send for Plan {}

impl Plan {
    /// Forgets all parts.
    pub fn clear(&mut self) {
        self.parts.clear();
        self.iovecs.clear();
    }

    /// No part was planned.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The number of parts.
    pub fn len(&self) -> usize {
        self.parts.len()
    }

    /// The bytes of all parts.
    pub fn len_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.len).sum()
    }

    /// The parts so far are done by threads of the kernel from the beginning, while the ring's
    /// owner does something else.
    pub fn set_aside(&mut self) {
        self.parts.iter_mut().for_each(|part| part.aside = true);
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
            aside: false,
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
            let last = self.iovecs.len();
            self.parts.push(Part { action, file, at, len, first, last, aside: false });
            at += len;
        }
    }
}

/// A file descriptor that wakes the ring's owner: an index of its choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch(pub u32);

/// What the ring has to say.
#[derive(Debug)]
pub enum Event<R> {
    /// All parts of the request are done; the first error, if there was one.
    Done(R, io::Result<()>),
    /// A watched file descriptor became readable. It is level-triggered for
    /// what was there before, edge-triggered after that.
    Ready(Watch),
}

struct Slot<R> {
    request: Option<R>,
    plan: Plan,
    parts_left: usize,
    error: Option<i32>,
}

/// An io_uring with requests of type `R` in flight. See the module's text.
pub struct Ring<R> {
    uring: IoUring,
    slots: Vec<Slot<R>>,
    free: Vec<usize>,
    watched: Vec<(RawFd, Watch)>,
    /// Entries that did not fit into the submission queue.
    backlog: VecDeque<squeue::Entry>,
    /// For the kernel to read when it takes the entry. All alarms of a ring share
    /// it: the last one's time holds for any that have not been handed over yet.
    alarm: Box<types::Timespec>,
    /// Where touches read to. Nobody looks at it.
    touched: Box<[u8; 1]>,
    touches_in_flight: usize,
    /// Parts that the kernel holds or that are queued for it.
    parts_in_flight: usize,
    #[cfg(feature = "fault-points")]
    disturbed: disturbed::Disturbed,
}

// SAFETY: everything in a Ring is owned by it; the raw pointers in the
// backlog and the plans are addresses that `submit`'s caller vouches for.
unsafe impl<R: Send> Send for Ring<R> {}

impl<R> Ring<R> {
    /// A ring for at most `depth` requests at a time over `files`; a `None`
    /// keeps its number free. To be called on the thread that will use it.
    ///
    /// # Errors
    /// What io_uring_setup(2) and io_uring_register(2) say.
    pub fn new(depth: usize, files: &[Option<BorrowedFd<'_>>]) -> io::Result<Self> {
        let entries =
            u32::try_from(depth).unwrap_or(ENTRIES_MAX).next_power_of_two().clamp(8, ENTRIES_MAX);
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(entries)
            // Kernels before 6.1 know less; the ring works without.
            .or_else(|e| match e.raw_os_error() {
                Some(libc::EINVAL) => IoUring::new(entries),
                _ => Err(e),
            })?;
        let fds: Vec<RawFd> =
            files.iter().map(|f| f.as_ref().map_or(-1, AsRawFd::as_raw_fd)).collect();
        uring.submitter().register_files(&fds)?;
        let slots = (0..depth)
            .map(|_| Slot { request: None, plan: Plan::default(), parts_left: 0, error: None })
            .collect();
        Ok(Self {
            uring,
            slots,
            free: (0..depth).rev().collect(),
            watched: Vec::new(),
            backlog: VecDeque::new(),
            alarm: Box::default(),
            touched: Box::default(),
            touches_in_flight: 0,
            parts_in_flight: 0,
            #[cfg(feature = "fault-points")]
            disturbed: Default::default(),
        })
    }

    /// Requests that can be submitted before one must be given back.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// No request is in flight.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Reports [`Event::Ready`] whenever `fd` becomes readable. The caller
    /// keeps `fd` open for the life of the ring.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) {
        self.watched.push((fd.as_raw_fd(), watch));
        self.arm(fd.as_raw_fd(), watch);
    }

    /// Reports [`Event::Ready`] once, when `after` has passed.
    pub fn alarm(&mut self, after: Duration, watch: Watch) {
        *self.alarm = types::Timespec::from(after);
        let timeout = opcode::Timeout::new(&raw const *self.alarm)
            .build()
            .user_data(WATCH | u64::from(watch.0));
        self.queue(timeout);
    }

    /// Whether [`Self::touch`] may be called.
    pub fn can_touch(&self) -> bool {
        self.touches_in_flight < TOUCHES_MAX
    }

    /// Reads the byte at `at` of `file` for no other reason than to let the kernel see
    /// a reader there. It is no request: no event comes of it, whatever becomes of it.
    pub fn touch(&mut self, file: FileSlot, at: ByteOffset) {
        let entry = opcode::Read::new(types::Fixed(file.0), self.touched.as_mut_ptr(), 1)
            .offset(at.get())
            .build();
        self.touches_in_flight += 1;
        self.queue(entry.user_data(TOUCH));
    }

    fn arm(&mut self, fd: RawFd, watch: Watch) {
        let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(WATCH | u64::from(watch.0));
        self.queue(poll);
    }

    /// Takes `request` and starts the parts of `plan`; they reach the kernel
    /// with the next [`Self::enter`]. `plan` comes back empty, with the
    /// capacity of an earlier one.
    ///
    /// # Errors
    /// Gives `request` back if [`Self::room`] is 0 or the plan is empty.
    ///
    /// # Safety
    /// The buffers of `plan` stay valid, and nobody else takes a Rust
    /// reference to them, until the request comes back in [`Event::Done`] or
    /// the ring has been dropped.
    pub unsafe fn submit(&mut self, request: R, plan: &mut Plan) -> Result<(), R> {
        if plan.is_empty() {
            return Err(request);
        }
        let Some(index) = self.free.pop() else { return Err(request) };
        let slot = &mut self.slots[index];
        std::mem::swap(&mut slot.plan, plan);
        plan.clear();
        slot.request = Some(request);
        slot.parts_left = slot.plan.parts.len();
        slot.error = None;
        for part in 0..self.slots[index].parts_left {
            self.queue_part(index, part);
        }
        Ok(())
    }

    fn queue_part(&mut self, slot: usize, part: usize) {
        self.parts_in_flight += 1;
        #[cfg(feature = "fault-points")]
        if crate::disturb::is_on() {
            return self.disturbed.hold(slot, part);
        }
        let entry = self.slots[slot].plan.entry(part);
        // Both fit: a plan has far fewer than 2^32 parts, a ring fewer slots.
        self.queue(entry.user_data((slot as u64) << 32 | part as u64));
    }

    fn queue(&mut self, entry: squeue::Entry) {
        // SAFETY: the entry's buffers are those of a plan in a slot, which
        // `submit`'s caller keeps valid and which the ring itself keeps until
        // the completion has been seen (`finish_part`, `drop`); a poll has none,
        // and those of an alarm and of a touch are fields of the ring, which waits
        // for the touches before it goes.
        if self.backlog.is_empty() && unsafe { self.uring.submission().push(&entry) }.is_ok() {
            return;
        }
        self.backlog.push_back(entry);
    }

    /// Hands what is queued to the kernel, lets completions come in, and
    /// waits for at least one event if `wait` is set. Without anything to
    /// hand over or to fetch it is no system call.
    ///
    /// # Errors
    /// What io_uring_enter(2) says; EINTR counts as success.
    pub fn enter(&mut self, wait: bool) -> io::Result<()> {
        #[cfg(feature = "fault-points")]
        if self.disturbed.is_busy() {
            return self.enter_disturbed(wait);
        }
        if !wait && !self.has_queued() && !self.wants_enter() {
            return Ok(());
        }
        loop {
            self.refill();
            let wait_now = wait && self.backlog.is_empty();
            match self.uring.submitter().submit_and_wait(usize::from(wait_now)) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => return Ok(()),
                // The kernel is out of memory for now, or wants its
                // completions fetched first: the caller does that and comes
                // back.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
            if self.backlog.is_empty() {
                return Ok(());
            }
        }
    }

    fn has_queued(&mut self) -> bool {
        !self.backlog.is_empty() || !self.uring.submission().is_empty()
    }

    fn refill(&mut self) {
        let mut queue = self.uring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `queue`.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// The kernel has completions that one [`Self::enter`] would fetch.
    pub fn wants_enter(&mut self) -> bool {
        #[cfg(feature = "fault-points")]
        if self.disturbed.is_busy() {
            return true;
        }
        let queue = self.uring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// The next event that has come in, without a system call.
    pub fn next_event(&mut self) -> Option<Event<R>> {
        loop {
            let completion = self.next_completion()?;
            if completion.data == TOUCH {
                self.touches_in_flight -= 1;
                continue;
            }
            if completion.data & WATCH != 0 {
                return Some(Event::Ready(self.rearm(&completion)));
            }
            if let Some(event) = self.finish_part(&completion) {
                return Some(event);
            }
        }
    }

    #[inline]
    fn next_completion(&mut self) -> Option<Completion> {
        #[cfg(feature = "fault-points")]
        if self.disturbed.is_busy() {
            return self.disturbed.next();
        }
        self.uring.completion().next().map(Completion::from)
    }

    fn rearm(&mut self, completion: &Completion) -> Watch {
        // The lower 32 bits were a u32.
        #[expect(clippy::cast_possible_truncation)]
        let watch = Watch(completion.data as u32);
        // A descriptor that is broken or whose other side is gone would be
        // ready again at once, for ever.
        let gone = libc::POLLERR | libc::POLLHUP | libc::POLLNVAL;
        let alive = completion.result >= 0 && completion.result & i32::from(gone) == 0;
        if alive && !completion.more {
            let fd = self.watched.iter().find(|(_, w)| *w == watch).map(|(fd, _)| *fd);
            if let Some(fd) = fd {
                self.arm(fd, watch);
            }
        }
        watch
    }

    /// Counts one part's completion; the request, if it was the last one.
    fn finish_part(&mut self, completion: &Completion) -> Option<Event<R>> {
        let data = completion.data;
        // Two u32 that `queue_part` put together.
        let (index, part) = ((data >> 32) as usize, (data & 0xffff_ffff) as usize);
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
        self.free.push(index);
        Some(Event::Done(request, result))
    }
}

impl<R> Drop for Ring<R> {
    /// Waits for the kernel to let go of every buffer.
    fn drop(&mut self) {
        while self.parts_in_flight + self.touches_in_flight > 0 {
            if let Err(e) = self.enter(true) {
                // The kernel still may write to the buffers; to end here is
                // the only thing that keeps others' memory whole.
                log::error!("io_uring cannot be drained: {e}");
                std::process::abort();
            }
            while self.next_event().is_some() {}
        }
    }
}

/// What the kernel says of an entry.
struct Completion {
    /// The entry's `user_data`.
    data: u64,
    result: i32,
    /// There will be another one.
    more: bool,
}

impl From<cqueue::Entry> for Completion {
    fn from(entry: cqueue::Entry) -> Self {
        let (data, result) = (entry.user_data(), entry.result());
        Completion { data, result, more: cqueue::more(entry.flags()) }
    }
}

enum Outcome {
    Done,
    /// So many bytes are done, the rest is to be submitted again.
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
            // The file ends before the range does: it was cut short under us.
            Action::Read if done == 0 => Outcome::Failed(libc::EIO),
            Action::Write if done == 0 => Outcome::Failed(libc::ENOSPC),
            _ => Outcome::Again(done),
        }
    }

    /// The part as an entry; its buffers are `iovecs`.
    fn entry(self, iovecs: &[libc::iovec]) -> squeue::Entry {
        let Part { action, file, at, len, aside, .. } = self;
        let fd = types::Fixed(file.0);
        // At most IOVECS_PER_OP_MAX.
        #[expect(clippy::cast_possible_truncation)]
        let count = iovecs.len() as u32;
        let entry = match (action, iovecs) {
            (Action::Allocate(mode), _) => {
                opcode::Fallocate::new(fd, len).offset(at).mode(mode).build()
            }
            (Action::Read, [one]) if let Ok(len) = u32::try_from(one.iov_len) => {
                opcode::Read::new(fd, one.iov_base.cast(), len).offset(at).build()
            }
            (Action::Write, [one]) if let Ok(len) = u32::try_from(one.iov_len) => {
                opcode::Write::new(fd, one.iov_base.cast(), len).offset(at).build()
            }
            (Action::Read, _) => opcode::Readv::new(fd, iovecs.as_ptr(), count).offset(at).build(),
            (Action::Write, _) => {
                opcode::Writev::new(fd, iovecs.as_ptr(), count).offset(at).build()
            }
        };
        if aside { entry.flags(squeue::Flags::ASYNC) } else { entry }
    }
}

impl Plan {
    fn entry(&self, part: usize) -> squeue::Entry {
        let part = self.parts[part];
        part.entry(&self.iovecs[part.first..part.last])
    }

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
