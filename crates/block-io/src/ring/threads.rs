//! The engine for hosts without io_uring: a few threads that make plain system calls.
//!
//! The ring's owner hands over all queued operations once in each [`Threads::enter`], as with
//! io_uring, and sleeps in epoll_wait(2), which its watched descriptors and the threads wake. They
//! are watched edge-triggered, like multishot polls: an unread eventfd is reported at each write to
//! it.
//!
//! The cost compared with io_uring: two context switches for each operation, and no more than
//! [`THREADS_MAX`] operations of a queue in progress at the same time.
//!
//! **The fence** (docs/architecture.md) holds here as well, although no file is registered
//! anywhere. The lock is released with the last reference to its open file description, which is
//! the one in the process's descriptor table. The table is shared by all threads, and each thread
//! drops its reference to it in exit_files(), which it reaches only after it has left its system
//! call: SIGKILL does not end a thread in the middle of one. So the lock is held until the last
//! thread has returned from its operation, on whichever file: a direct transfer is waited for
//! uninterruptibly, and a transfer through the page cache is a copy from or to guest memory by the
//! thread itself. (This does not hold for direct I/O over NFS, whose client lets a killed thread
//! exit while its requests are in flight.)

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Action, Completion, Part};
use crate::sync::lock;
use crate::threads::{self, Task};

/// Threads of one ring: enough for a few slow reads in parallel, few enough that many queues do not
/// need thousands.
const THREADS_MAX: usize = 4;

/// The stack of a thread, in bytes: it only makes system calls.
const STACK_BYTES: usize = 64 << 10;

/// The identifier of the bell among the watched descriptors, whose identifiers have fewer bits.
const BELL: u64 = u64::MAX;

/// The number of ready descriptors that one call can return; the next call returns the rest.
const EVENTS_MAX: usize = 8;

/// Performs an operation and returns, like io_uring, the bytes transferred or a negative errno.
pub(super) type Perform = fn(&Operation) -> i32;

/// One system call to be made.
pub(super) struct Operation {
    /// See [`Completion::data`].
    data: u64,
    action: Action,
    fd: RawFd,
    at: i64,
    len: i64,
    iovecs: *const libc::iovec,
    count: libc::c_int,
}

// SAFETY: the pointer is an address that the kernel reads; the caller of `Ring::submit` promises
// that the buffers are valid, from any thread, and the ring keeps the list.
unsafe impl Send for Operation {}

/// The threads of a ring, and their queues.
pub(super) struct Threads {
    common: Arc<Common>,
    threads: Vec<JoinHandle<()>>,
    /// By [`super::FileSlot`]; -1 for none.
    files: Vec<RawFd>,
    epoll: Epoll,
    /// Operations to be handed over.
    begun: Vec<Operation>,
    /// Completions that were fetched and not reported yet.
    done: VecDeque<Completion>,
}

/// State shared by a ring's owner and its threads.
struct Common {
    work: Mutex<Work>,
    /// There is an operation for a thread, or there will be no more.
    more: Condvar,
    /// `Work::done` is not empty.
    any_done: AtomicBool,
    /// Wakes the owner.
    bell: EventFd,
    perform: Perform,
}

#[derive(Default)]
struct Work {
    waiting: VecDeque<Operation>,
    done: Vec<Completion>,
    /// Threads that wait for an operation, including those that were woken but do not run yet.
    idle: usize,
    /// The owner wants to be woken by the bell.
    owner_sleeps: bool,
    /// There will be no more operations.
    over: bool,
}

impl Common {
    fn lock(&self) -> MutexGuard<'_, Work> {
        lock(&self.work)
    }
}

impl Threads {
    /// See [`super::Ring::new`]. The files are kept open by the caller.
    pub(super) fn new(files: &[Option<BorrowedFd<'_>>], perform: Perform) -> io::Result<Self> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&bell, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, BELL))?;
        let common = Arc::new(Common {
            work: Mutex::default(),
            more: Condvar::new(),
            any_done: AtomicBool::new(false),
            bell,
            perform,
        });
        let mut threads = Self {
            common,
            threads: Vec::with_capacity(THREADS_MAX),
            files: files.iter().map(|f| f.as_ref().map_or(-1, AsRawFd::as_raw_fd)).collect(),
            epoll,
            begun: Vec::new(),
            done: VecDeque::new(),
        };
        // The first thread is required. If later ones cannot be started, it does all the work.
        threads.start_one()?;
        Ok(threads)
    }

    fn start_one(&mut self) -> io::Result<()> {
        let common = Arc::clone(&self.common);
        let thread = std::thread::Builder::new().name("block-io".to_owned());
        self.threads.push(thread.stack_size(STACK_BYTES).spawn(move || serve(&common))?);
        Ok(())
    }

    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, data: u64) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, data);
        Ok(self.epoll.add(fd.as_fd(), event)?)
    }

    /// The iovecs are valid until the completion has been seen.
    pub(super) fn begin(&mut self, part: Part, iovecs: &[libc::iovec], data: u64) {
        let Part { action, file, at, len, .. } = part;
        let fd = self.files.get(file.0 as usize).copied().unwrap_or(-1);
        // At most IOVECS_PER_OP_MAX.
        #[expect(clippy::cast_possible_truncation)]
        let count = iovecs.len() as libc::c_int;
        // An offset that is too large for the kernel becomes negative, which it refuses with
        // EINVAL.
        let (at, len) = (at.cast_signed(), len.cast_signed());
        let iovecs = iovecs.as_ptr();
        self.begun.push(Operation { data, action, fd, at, len, iovecs, count });
    }

    /// See [`super::Ring::enter`].
    pub(super) fn enter(&mut self, wait: bool) -> io::Result<()> {
        let sleeps = self.exchange(wait) && wait;
        self.look(if sleeps { EpollTimeout::NONE } else { EpollTimeout::ZERO })?;
        if sleeps {
            self.exchange(false);
        }
        Ok(())
    }

    /// Hands over queued operations and fetches completions; returns whether there is nothing to
    /// report. With `wait`, the bell then rings for the next completion.
    fn exchange(&mut self, wait: bool) -> bool {
        let must_lock = wait || !self.begun.is_empty() || self.wants_enter();
        if !must_lock {
            return self.done.is_empty();
        }
        let mut work = self.common.lock();
        let handed_over = self.begun.len();
        work.waiting.extend(self.begun.drain(..));
        self.done.extend(work.done.drain(..));
        self.common.any_done.store(false, Ordering::Relaxed);
        let nothing = self.done.is_empty();
        work.owner_sleeps = wait && nothing;
        let (wake, more) = (handed_over.min(work.idle), work.waiting.len() > work.idle);
        drop(work);
        (0..wake).for_each(|_| self.common.more.notify_one());
        if more && self.threads.len() < THREADS_MAX {
            _ = self
                .start_one()
                .inspect_err(|e| log::debug!("cannot start another I/O thread: {e}"));
        }
        nothing
    }

    /// Fetches the descriptors that have become ready.
    fn look(&mut self, timeout: EpollTimeout) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let ready = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            ready => ready?,
        };
        for event in &events[..ready] {
            if event.data() == BELL {
                // Only to keep it from overflowing.
                _ = self.common.bell.read();
            } else {
                let (data, result) = (event.data(), libc::POLLIN.into());
                self.done.push_back(Completion { data, result, more: true });
            }
        }
        Ok(())
    }

    /// See [`super::Ring::wants_enter`].
    #[inline]
    pub(super) fn wants_enter(&self) -> bool {
        self.common.any_done.load(Ordering::Acquire)
    }

    pub(super) fn next(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }
}

impl Drop for Threads {
    /// The ring has waited for all operations, so no thread is executing one.
    fn drop(&mut self) {
        self.common.lock().over = true;
        self.common.more.notify_all();
        for thread in self.threads.drain(..) {
            // A panic aborts the process in the release profile; here it has already been printed.
            _ = thread.join();
        }
    }
}

/// The body of a thread.
fn serve(common: &Common) {
    threads::started(Task::Operations);
    let mut work = common.lock();
    loop {
        if let Some(operation) = work.waiting.pop_front() {
            drop(work);
            let result = (common.perform)(&operation);
            work = common.lock();
            work.done.push(Completion { data: operation.data, result, more: false });
            common.any_done.store(true, Ordering::Release);
            if std::mem::take(&mut work.owner_sleeps) {
                drop(work);
                // This cannot fail: the owner reads it after every write.
                _ = common.bell.write(1);
                work = common.lock();
            }
        } else if work.over {
            return;
        } else {
            work.idle += 1;
            work = common.more.wait(work).unwrap_or_else(PoisonError::into_inner);
            work.idle -= 1;
        }
    }
}

/// Makes the system call.
pub(super) fn perform(operation: &Operation) -> i32 {
    let &Operation { action, fd, at, len, iovecs, count, .. } = operation;
    // SAFETY: the list belongs to a plan that the ring keeps, and its buffers are valid, as the
    // caller of `Ring::submit` has promised, until the completion has been seen.
    let result = unsafe {
        match action {
            Action::Read => libc::preadv64(fd, iovecs, count, at),
            Action::Write => libc::pwritev64(fd, iovecs, count, at),
            Action::Allocate(mode) => libc::fallocate64(fd, mode, at, len) as isize,
        }
    };
    // The kernel transfers less than 2 GiB in one call.
    if result < 0 { -Errno::last_raw() } else { i32::try_from(result).unwrap_or(i32::MAX) }
}
