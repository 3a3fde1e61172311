//! The io_uring engine.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};

use super::{Action, Completion, FileSlot, IOVECS_PER_OP_MAX, Part};

/// Submission queue entries of one ring. More are queued in user space; this
/// only bounds how many go to the kernel with one system call.
const ENTRIES_MAX: u32 = 256;

/// The operations that a ring needs, by number and by name.
const OPERATIONS: [(u8, &str); 6] = [
    (opcode::Read::CODE, "IORING_OP_READ"),
    (opcode::Write::CODE, "IORING_OP_WRITE"),
    (opcode::Readv::CODE, "IORING_OP_READV"),
    (opcode::Writev::CODE, "IORING_OP_WRITEV"),
    (opcode::Fallocate::CODE, "IORING_OP_FALLOCATE"),
    (opcode::PollAdd::CODE, "IORING_OP_POLL_ADD"),
];

/// An io_uring, and the entries to be handed to it.
pub(super) struct Uring {
    uring: IoUring,
    /// Entries that did not fit into the submission queue.
    backlog: VecDeque<squeue::Entry>,
    /// The target of touches. Its content is never used.
    touched: Box<[u8; 1]>,
}

// SAFETY: a Uring owns everything in it; the raw pointers in the backlog are addresses that the
// caller of `Ring::submit` vouches for.
unsafe impl Send for Uring {}

impl Uring {
    /// See [`super::Ring::new`].
    pub(super) fn new(depth: usize, files: &[Option<BorrowedFd<'_>>]) -> io::Result<Self> {
        let entries =
            u32::try_from(depth).unwrap_or(ENTRIES_MAX).next_power_of_two().clamp(8, ENTRIES_MAX);
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(entries)
            // Kernels before 6.1 support fewer flags; the ring works without.
            .or_else(|e| match e.raw_os_error() {
                Some(libc::EINVAL) => IoUring::new(entries),
                _ => Err(e),
            })?;
        let fds: Vec<RawFd> =
            files.iter().map(|f| f.as_ref().map_or(-1, AsRawFd::as_raw_fd)).collect();
        uring.submitter().register_files(&fds)?;
        Ok(Self { uring, backlog: VecDeque::new(), touched: Box::default() })
    }

    /// An operation of [`OPERATIONS`] that the kernel does not support.
    pub(super) fn missing_operation(&self) -> io::Result<Option<&'static str>> {
        let mut probe = Probe::new();
        self.uring.submitter().register_probe(&mut probe)?;
        Ok(OPERATIONS.iter().find(|(code, _)| !probe.is_supported(*code)).map(|(_, name)| *name))
    }

    pub(super) fn watch(&mut self, fd: RawFd, data: u64) {
        let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
        self.queue(poll.user_data(data));
    }

    pub(super) fn touch(&mut self, file: FileSlot, at: u64, data: u64) {
        let read = opcode::Read::new(types::Fixed(file.0), self.touched.as_mut_ptr(), 1);
        self.queue(read.offset(at).build().user_data(data));
    }

    /// The iovecs are valid until the completion has been seen.
    #[inline]
    pub(super) fn begin(&mut self, part: Part, iovecs: &[libc::iovec], data: u64) {
        self.queue(entry(part, iovecs).user_data(data));
    }

    fn queue(&mut self, entry: squeue::Entry) {
        // SAFETY: the entry's buffers are those of a plan in a slot of the ring, which
        // `submit`'s caller keeps valid and which the ring itself keeps until
        // the completion has been seen (`finish_part`, `drop`); a poll has none,
        // and that of a touch is a field of this, and the ring waits for the touches
        // before it goes.
        if self.backlog.is_empty() && unsafe { self.uring.submission().push(&entry) }.is_ok() {
            return;
        }
        self.backlog.push_back(entry);
    }

    /// See [`super::Ring::enter`].
    pub(super) fn enter(&mut self, wait: bool) -> io::Result<()> {
        if !wait && !self.has_queued() && !self.wants_enter() {
            return Ok(());
        }
        loop {
            self.refill();
            let wait_now = wait && self.backlog.is_empty();
            match self.uring.submitter().submit_and_wait(usize::from(wait_now)) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => return Ok(()),
                // The kernel is out of memory for now, or wants its completions fetched first: the
                // caller does that and tries again.
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

    /// See [`super::Ring::wants_enter`].
    #[inline]
    pub(super) fn wants_enter(&mut self) -> bool {
        let queue = self.uring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    #[inline]
    pub(super) fn next(&mut self) -> Option<Completion> {
        self.uring.completion().next().map(Completion::from)
    }
}

impl From<cqueue::Entry> for Completion {
    fn from(entry: cqueue::Entry) -> Self {
        let (data, result) = (entry.user_data(), entry.result());
        Completion { data, result, more: cqueue::more(entry.flags()) }
    }
}

/// A part as an entry; its buffers are `iovecs`.
fn entry(part: Part, iovecs: &[libc::iovec]) -> squeue::Entry {
    let Part { action, file, at, len, force_async, .. } = part;
    debug_assert!(iovecs.len() <= IOVECS_PER_OP_MAX);
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
        (Action::Write, _) => opcode::Writev::new(fd, iovecs.as_ptr(), count).offset(at).build(),
    };
    if force_async { entry.flags(squeue::Flags::ASYNC) } else { entry }
}
