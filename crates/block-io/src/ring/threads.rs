//! The engine for hosts without io_uring: a few threads that make plain system calls.
//!
//! The ring's owner hands over what is to be done once in each [`Threads::enter`], as it does to
//! io_uring, and sleeps in epoll_wait(2), which its watched descriptors and the threads end. They
//! are watched edge-triggered, as multishot polls are: an eventfd that nobody reads is reported at
//! each write to it.
//!
//! What this costs compared to io_uring: two switches between threads for each operation, and no
//! more than [`THREADS_MAX`] operations of a queue go on at the same time.
//!
//! **The fence** (docs/architecture.md) holds here as well, although no file is registered
//! anywhere. What ends the lock is the last reference to its open file description, which is that
//! in the process's table of descriptors. The table is shared by all threads, and each thread gives
//! up its share of it in exit_files(), which it comes to only after it has left its system call:
//! SIGKILL ends no thread in the middle of one. So the lock stays until the last thread has
//! returned from what it was doing, whichever file that is on: a transfer that bypasses the page
//! cache is waited for uninterruptibly, and one through the page cache copies from or to guest
//! memory by itself, in the thread. (Not so with direct I/O over NFS, whose client lets a killed
//! thread go while its requests are under way.)

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Action, Completion, Part};
use crate::sync::lock;

/// Threads of one ring: enough for a few slow reads to go on beside each other, few enough that
/// many queues do not make thousands.
const THREADS_MAX: usize = 4;

/// The stack of a thread, in bytes: it makes one system call after the other.
const STACK_BYTES: usize = 64 << 10;

/// The bell's place among the watched descriptors, whose data have fewer bits.
const BELL: u64 = u64::MAX;

/// Descriptors that one look can find ready; what is more is found by the next.
const EVENTS_MAX: usize = 8;

/// What a thread does with an operation: as io_uring, the bytes transferred or a negative errno.
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

// SAFETY: the pointer is an address that the kernel reads; whoever submits a plan promises
// (`Ring::submit`) that the buffers are valid, from whichever thread, and the ring keeps the list.
unsafe impl Send for Operation {}

/// The threads of a ring, and what waits for them.
pub(super) struct Threads {
    common: Arc<Common>,
    threads: Vec<JoinHandle<()>>,
    /// By [`super::FileSlot`]; -1 for none.
    files: Vec<RawFd>,
    epoll: Epoll,
    alarms: Vec<(Instant, u64)>,
    /// To be handed over.
    begun: Vec<Operation>,
    /// Fetched and not asked for yet.
    done: VecDeque<Completion>,
}

/// What a ring's owner and its threads share.
struct Common {
    work: Mutex<Work>,
    /// There is an operation for a thread, or none will come.
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
    /// Threads that wait for an operation, those included that have been woken and do not run yet.
    idle: usize,
    /// The owner wants to hear the bell.
    owner_sleeps: bool,
    /// There will be no more.
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
            alarms: Vec::new(),
            begun: Vec::new(),
            done: VecDeque::new(),
        };
        // One there must be. If later ones cannot be had it does the work alone.
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

    pub(super) fn alarm(&mut self, after: Duration, data: u64) {
        self.alarms.push((Instant::now() + after, data));
    }

    /// The iovecs are valid until the completion has been seen.
    pub(super) fn begin(&mut self, part: Part, iovecs: &[libc::iovec], data: u64) {
        let Part { action, file, at, len, .. } = part;
        let fd = self.files.get(file.0 as usize).copied().unwrap_or(-1);
        // At most IOVECS_PER_OP_MAX.
        #[expect(clippy::cast_possible_truncation)]
        let count = iovecs.len() as libc::c_int;
        // What is too far for the kernel becomes negative, which it refuses with EINVAL.
        let (at, len) = (at.cast_signed(), len.cast_signed());
        let iovecs = iovecs.as_ptr();
        self.begun.push(Operation { data, action, fd, at, len, iovecs, count });
    }

    /// See [`super::Ring::enter`].
    pub(super) fn enter(&mut self, wait: bool) -> io::Result<()> {
        let sleeps = self.exchange(wait) && wait;
        self.look(if sleeps { self.until_alarm() } else { EpollTimeout::ZERO })?;
        self.sound_alarms();
        if sleeps {
            self.exchange(false);
        }
        Ok(())
    }

    /// Hands over what is to be done, and fetches what was done; whether there is nothing to
    /// report. With `wait` the bell rings when there is.
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
            _ = self.start_one().inspect_err(|e| log::debug!("a thread for I/O: {e}"));
        }
        nothing
    }

    /// Fetches which descriptors have become ready.
    fn look(&mut self, timeout: EpollTimeout) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        let ready = match self.epoll.wait(&mut events, timeout) {
            Err(Errno::EINTR) => 0,
            ready => ready?,
        };
        for event in &events[..ready] {
            if event.data() == BELL {
                // Only so that it does not fill up.
                _ = self.common.bell.read();
            } else {
                self.report(event.data(), libc::POLLIN.into());
            }
        }
        Ok(())
    }

    fn report(&mut self, data: u64, result: i32) {
        self.done.push_back(Completion { data, result, more: true });
    }

    fn sound_alarms(&mut self) {
        if self.alarms.is_empty() {
            return;
        }
        let now = Instant::now();
        while let Some(at) = self.alarms.iter().position(|(when, _)| *when <= now) {
            let (_, data) = self.alarms.swap_remove(at);
            self.report(data, -libc::ETIME);
        }
    }

    /// Until the next alarm, rounded up to what epoll_wait(2) can tell apart.
    fn until_alarm(&self) -> EpollTimeout {
        let Some(next) = self.alarms.iter().map(|(when, _)| *when).min() else {
            return EpollTimeout::NONE;
        };
        let left = next.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
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
    /// The ring has waited for all operations, so that no thread is in one.
    fn drop(&mut self) {
        self.common.lock().over = true;
        self.common.more.notify_all();
        for thread in self.threads.drain(..) {
            // A panic aborts the process in the profile that is shipped; here it has been printed.
            _ = thread.join();
        }
    }
}

/// What a thread does all its life.
fn serve(common: &Common) {
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
                // It cannot fail: the owner reads it whenever it was written.
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
    // SAFETY: the list stands in a plan that the ring keeps, and its buffers are valid, as the
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
