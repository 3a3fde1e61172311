//! The io_uring engine.

use std::collections::VecDeque;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, Parameters, Probe, cqueue, opcode, squeue, types};

use super::{
    Action, Completion, FILES_MAX, FileSlot, IOVECS_PER_OP_MAX, NoUring, Part, WATCH, WATCHES_MAX,
    Watch,
};

/// Submission queue entries of one ring. More are queued in user space; this
/// only bounds how many go to the kernel with one system call.
const ENTRIES_MAX: u32 = 256;

/// The operations that a ring needs, by number and by name. It is refused all others.
pub(super) const OPERATIONS: [(u8, &str); 7] = [
    (opcode::Read::CODE, "IORING_OP_READ"),
    (opcode::Write::CODE, "IORING_OP_WRITE"),
    (opcode::Readv::CODE, "IORING_OP_READV"),
    (opcode::Writev::CODE, "IORING_OP_WRITEV"),
    (opcode::Fallocate::CODE, "IORING_OP_FALLOCATE"),
    (opcode::PollAdd::CODE, "IORING_OP_POLL_ADD"),
    (opcode::PollRemove::CODE, "IORING_OP_POLL_REMOVE"),
];

/// IORING_REGISTER_FILES_UPDATE of `<linux/io_uring.h>`: all that may be registered in a ring that
/// is in use.
pub(super) const REGISTER_FILES_UPDATE: u8 = 6;

/// Every operation is on a registered file.
const FLAGS_REQUIRED: squeue::Flags = squeue::Flags::FIXED_FILE;
const FLAGS_ALLOWED: squeue::Flags = FLAGS_REQUIRED.union(squeue::Flags::ASYNC);

/// The places for registered files: those of [`FileSlot`]s, then those of [`Watch`]es.
pub(super) const PLACES: usize = FILES_MAX + WATCHES_MAX;
// Below 2^32.
#[expect(clippy::cast_possible_truncation)]
const WATCHES_AT: u32 = FILES_MAX as u32;

/// The identifier of the answer to a removal of a poll.
const REMOVAL: u64 = 1 << 61;

/// An io_uring that is not in use yet. It can be made by one thread for another. Once it is enabled
/// the kernel refuses it every operation but the seven that a ring needs, and every file that is
/// not registered in it.
#[derive(Debug)]
pub struct DisabledUring {
    // Its memory is mapped only by the thread that uses it.
    fd: OwnedFd,
    params: Parameters,
}

impl DisabledUring {
    /// For rings of at most `depth` requests at a time. (A ring of more works as well.)
    ///
    /// # Errors
    /// Why io_uring cannot be used.
    pub fn new(depth: usize) -> Result<Self, NoUring> {
        let entries =
            u32::try_from(depth).unwrap_or(ENTRIES_MAX).next_power_of_two().clamp(8, ENTRIES_MAX);
        let uring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(entries)
            // Kernels before 6.1 support fewer flags; the ring works without.
            .or_else(|e| match e.raw_os_error() {
                Some(libc::EINVAL) => IoUring::builder().setup_r_disabled().build(entries),
                _ => Err(e),
            })
            .map_err(NoUring::refused("make one"))?;
        let missing = missing_operation(&uring).map_err(NoUring::refused("ask what it does"))?;
        missing.map_or(Ok(()), |name| Err(NoUring::Operation(name)))?;
        let no_files = uring.submitter().register_files(&[-1; PLACES]);
        no_files.map_err(NoUring::refused("register files with it"))?;
        restrict(&uring).map_err(NoUring::refused("restrict it"))?;
        // SAFETY: `uring` keeps it open.
        let fd = unsafe { BorrowedFd::borrow_raw(uring.as_raw_fd()) }.try_clone_to_owned();
        let fd = fd.map_err(NoUring::refused("duplicate it"))?;
        Ok(Self { fd, params: uring.params().clone() })
    }

    /// From now on only the calling thread can use it.
    ///
    /// # Errors
    /// Errors of mmap(2) and io_uring_register(2).
    pub fn enable(self) -> io::Result<Uring> {
        // SAFETY: the descriptor is that of an io_uring with these parameters, and is given up.
        let uring = unsafe { IoUring::from_fd(self.fd.into_raw_fd(), self.params) }?;
        uring.submitter().register_enable_rings()?;
        Ok(Uring {
            uring,
            backlog: VecDeque::new(),
            touched: Box::default(),
            polls: 0,
            of_one_thread: PhantomData,
            #[cfg(any(test, feature = "fault-points"))]
            kept: VecDeque::new(),
        })
    }
}

/// An operation of [`OPERATIONS`] that the kernel does not support.
fn missing_operation(uring: &IoUring) -> io::Result<Option<&'static str>> {
    let mut probe = Probe::new();
    uring.submitter().register_probe(&mut probe)?;
    Ok(OPERATIONS.iter().find(|(code, _)| !probe.is_supported(*code)).map(|(_, name)| *name))
}

/// This applies as soon as the ring is enabled, and cannot be undone.
fn restrict(uring: &IoUring) -> io::Result<()> {
    let operations = OPERATIONS.iter().map(|(code, _)| Restriction::sqe_op(*code));
    let others = [
        Restriction::sqe_flags_required(FLAGS_REQUIRED.bits()),
        Restriction::sqe_flags_allowed(FLAGS_ALLOWED.bits()),
        Restriction::register_op(REGISTER_FILES_UPDATE),
    ];
    let mut all: Vec<_> = operations.chain(others).collect();
    uring.submitter().register_restrictions(&mut all)
}

/// An io_uring of one thread, which uses it for one [`super::Ring`] after the other.
pub struct Uring {
    pub(super) uring: IoUring,
    /// Entries that did not fit into the submission queue.
    backlog: VecDeque<squeue::Entry>,
    /// The target of touches. Its content is never used.
    touched: Box<[u8; 1]>,
    /// The watches with a poll: a bit for each.
    polls: u32,
    /// The kernel refuses it to other threads.
    of_one_thread: PhantomData<*const ()>,
    /// Completions that came while an attempt was waited for.
    #[cfg(any(test, feature = "fault-points"))]
    pub(super) kept: VecDeque<Completion>,
}

impl Uring {
    /// Registers the files of a ring that begins.
    pub(super) fn register(&mut self, files: &[Option<BorrowedFd<'_>>]) -> io::Result<()> {
        if files.len() > FILES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let fds: Vec<RawFd> =
            files.iter().map(|f| f.as_ref().map_or(-1, AsRawFd::as_raw_fd)).collect();
        // Of some, if not all can be.
        self.put(0, &fds).inspect_err(|_| _ = self.put(0, &[-1; PLACES]))
    }

    /// Puts files into places from `first` on; -1 empties a place.
    fn put(&self, first: u32, fds: &[RawFd]) -> io::Result<()> {
        // The kernel stops at the first that it cannot register.
        match self.uring.submitter().register_files_update(first, fds)? {
            done if done == fds.len() => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
        }
    }

    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, watch: Watch) -> io::Result<()> {
        // Of a number that is too high there is no place.
        self.put(WATCHES_AT.saturating_add(watch.0), &[fd.as_raw_fd()])?;
        self.poll(watch);
        Ok(())
    }

    /// Waits for a descriptor that was registered by [`Self::watch`].
    pub(super) fn poll(&mut self, watch: Watch) {
        self.polls |= 1 << watch.0;
        let file = types::Fixed(WATCHES_AT + watch.0);
        let poll = opcode::PollAdd::new(file, libc::POLLIN as u32).multi(true).build();
        self.queue(poll.user_data(WATCH | u64::from(watch.0)));
    }

    /// The last completion of a poll has come.
    pub(super) fn poll_ended(&mut self, watch: Watch) {
        self.polls &= !(1 << watch.0);
    }

    /// Ends the polls and gives up all files, so that nothing of this ring is left for the next.
    /// All operations on files have completed.
    pub(super) fn release(&mut self) -> io::Result<()> {
        while self.polls != 0 {
            self.end_poll(Watch(self.polls.trailing_zeros()))?;
        }
        self.put(0, &[-1; PLACES])
    }

    fn end_poll(&mut self, watch: Watch) -> io::Result<()> {
        let poll = WATCH | u64::from(watch.0);
        let removal = opcode::PollRemove::new(poll).build().flags(FLAGS_REQUIRED);
        self.queue(removal.user_data(REMOVAL));
        let mut answer = None;
        // A poll that was removed has a completion of its own, before the answer or after it.
        while answer.is_none() || answer == Some(0) && self.polls & (1 << watch.0) != 0 {
            self.enter(true)?;
            while let Some(Completion { data, result, more }) = self.next() {
                match data {
                    REMOVAL => answer = Some(result),
                    // The lower 32 bits were a u32.
                    #[expect(clippy::cast_possible_truncation)]
                    _ if data & WATCH != 0 && !more => self.poll_ended(Watch(data as u32)),
                    _ => {}
                }
            }
        }
        if answer == Some(-libc::ENOENT) {
            self.poll_ended(watch);
        }
        // EALREADY: it was being woken. The caller tries again.
        Ok(())
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

    pub(super) fn queue(&mut self, entry: squeue::Entry) {
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
        #[cfg(any(test, feature = "fault-points"))]
        if let Some(kept) = self.kept.pop_front() {
            return Some(kept);
        }
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
