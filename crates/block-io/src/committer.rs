//! Group commit: one thread per disk lets concurrent flushes of all queues share one pass.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::disk::Disk;
use crate::image::DiskError;
use crate::pulse::Pulse;
use crate::storage::Env;
use crate::sync::lock;
use crate::threads::{self, Task};

/// Stack of the committer's thread in bytes: a flush pass keeps its pages on the heap, so a small
/// stack is enough.
const STACK_BYTES: usize = 256 << 10;

/// The origin of a flush request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// The number of the queue, below the number given to [`Committer::spawn`].
    pub queue: usize,
    /// How the queue identifies the request.
    pub tag: u32,
}

/// The result of a flush. All waiters of one pass share its error.
pub type Flushed = Result<(), Arc<DiskError>>;

/// The thread that flushes, and the mailboxes in which it answers. Dropping it ends the thread
/// after everything submitted has been answered.
#[derive(Debug)]
pub struct Committer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    sweeper: Option<Sweeper>,
}

/// Frees the space that a host crash leaked, then ends.
#[derive(Debug)]
struct Sweeper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    inbox: Mutex<Inbox>,
    wake: Condvar,
    mailboxes: Vec<Mailbox>,
    pulse: Arc<Pulse>,
}

#[derive(Debug, Default)]
struct Inbox {
    waiting: Vec<Waiter>,
    stop: bool,
}

#[derive(Debug)]
struct Mailbox {
    answers: Mutex<Vec<(u32, Flushed)>>,
    event: EventFd,
}

impl Committer {
    /// Starts the thread for `disk`, with mailboxes for the queues `0..queues`.
    pub fn spawn<E: Env>(disk: Arc<Disk<E>>, queues: usize) -> io::Result<Self> {
        let sweeper = disk.is_leaky().then(|| Sweeper::spawn(Arc::clone(&disk))).transpose()?;
        let mut committer = Self::spawn_with(queues, move || disk.flush())?;
        committer.sweeper = sweeper;
        Ok(committer)
    }

    /// Starts a thread that calls `flush` for one pass, which makes everything before the call
    /// durable or fails.
    fn spawn_with(
        queues: usize,
        flush: impl FnMut() -> Result<(), DiskError> + Send + 'static,
    ) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let mailbox =
            |_| Ok(Mailbox { answers: Mutex::default(), event: EventFd::from_flags(flags)? });
        let mailboxes = (0..queues).map(mailbox).collect::<io::Result<_>>()?;
        let (inbox, wake) = (Mutex::default(), Condvar::new());
        let pulse = Arc::new(Pulse::waiting());
        let shared = Arc::new(Shared { inbox, wake, mailboxes, pulse });
        let theirs = Arc::clone(&shared);
        let builder = Builder::new().name("committer".to_owned()).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || {
            threads::started(Task::Metadata);
            theirs.run(flush)
        })?;
        Ok(Committer { shared, thread: Some(thread), sweeper: None })
    }

    /// Asks for a flush of every write whose `written()` returned before this call. Never blocks on
    /// I/O; allocates nothing once the number of waiting requests has reached its maximum.
    pub fn submit(&self, waiter: Waiter) {
        debug_assert!(waiter.queue < self.shared.mailboxes.len());
        lock(&self.shared.inbox).waiting.push(waiter);
        self.shared.wake.notify_one();
    }

    /// The thread's pulse; each pass is one step.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.shared.pulse
    }

    /// Moves the answers for `queue` to the end of `answers`: the tag and the result of the flush.
    /// It does not read the eventfd, so that a queue can do that in its ring.
    pub fn drain(&self, queue: usize, answers: &mut Vec<(u32, Flushed)>) {
        answers.append(&mut lock(&self.shared.mailboxes[queue].answers));
    }

    /// The eventfd that is signalled when the mailbox of `queue` is no longer empty. Consume the
    /// event first, then [`Committer::drain`].
    pub fn event(&self, queue: usize) -> BorrowedFd<'_> {
        self.shared.mailboxes[queue].event.as_fd()
    }
}

impl Sweeper {
    fn spawn<E: Env>(disk: Arc<Disk<E>>) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let builder = Builder::new().name("sweeper".to_owned()).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || {
            threads::started(Task::Metadata);
            disk.sweep(|| !stopped.load(Ordering::Relaxed))
        })?;
        Ok(Sweeper { stop, thread: Some(thread) })
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been reported.
            _ = thread.join();
        }
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        lock(&self.shared.inbox).stop = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has already been reported.
            _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self, mut flush: impl FnMut() -> Result<(), DiskError>) {
        let mut batch = Vec::new();
        while self.next_batch(&mut batch) {
            // Every waiter in the batch submitted before this pass began, so one pass answers them
            // all.
            let flushed = flush().map_err(Arc::new);
            for waiter in batch.drain(..) {
                self.mailboxes[waiter.queue].put(waiter.tag, flushed.clone());
            }
        }
    }

    /// Waits for requests and takes all of them; false when it is time to stop.
    fn next_batch(&self, batch: &mut Vec<Waiter>) -> bool {
        let idle = |inbox: &mut Inbox| inbox.waiting.is_empty() && !inbox.stop;
        self.pulse.rest();
        let waited = self.wake.wait_while(lock(&self.inbox), idle);
        self.pulse.beat();
        std::mem::swap(batch, &mut waited.unwrap_or_else(PoisonError::into_inner).waiting);
        !batch.is_empty()
    }
}

impl Mailbox {
    fn put(&self, tag: u32, flushed: Flushed) {
        let mut answers = lock(&self.answers);
        answers.push((tag, flushed));
        let first = answers.len() == 1;
        drop(answers);
        // If it was not empty, an event is already pending for the queue. A full counter means a
        // pending event as well.
        if first && let Err(err) = self.event.write(1) {
            log::debug!("committer: eventfd: {err}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    /// The tags of `count` answers, with the error message of a failed flush.
    fn answers(committer: &Committer, queue: usize, count: usize) -> Vec<(u32, Option<String>)> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut all = Vec::new();
        while all.len() < count {
            let mut fds = [PollFd::new(committer.event(queue), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE).unwrap();
            committer.shared.mailboxes[queue].event.read().unwrap();
            committer.drain(queue, &mut all);
        }
        all.into_iter().map(|(tag, flushed)| (tag, flushed.err().map(|e| e.to_string()))).collect()
    }

    fn no_space() -> DiskError {
        let source = io::Error::from_raw_os_error(libc::ENOSPC);
        DiskError::Io { path: "vm.cow".into(), action: "write the bitmap", source }
    }

    #[test]
    fn waiters_of_all_queues_share_a_pass() {
        let (begun, has_begun) = mpsc::channel();
        let (go_on, may_go_on) = mpsc::channel::<Result<(), DiskError>>();
        let committer = Committer::spawn_with(3, move || {
            begun.send(()).unwrap();
            may_go_on.recv().unwrap()
        })
        .unwrap();
        committer.submit(Waiter { queue: 0, tag: 1 });
        has_begun.recv().unwrap();
        // These arrive while the first pass runs: it does not cover them, and one more pass covers
        // them all.
        for tag in 0..30 {
            committer.submit(Waiter { queue: tag as usize % 3, tag: 100 + tag });
        }
        go_on.send(Ok(())).unwrap();
        assert_eq!(answers(&committer, 0, 1), [(1, None)]);
        has_begun.recv().unwrap();
        go_on.send(Err(no_space())).unwrap();
        for queue in 0..3 {
            let expected = (0..30)
                .filter(|tag| *tag as usize % 3 == queue)
                .map(|tag| (100 + tag, Some(no_space().to_string())));
            assert_eq!(answers(&committer, queue, 10), expected.collect::<Vec<_>>());
        }
        drop(committer);
        assert!(has_begun.try_recv().is_err(), "a third pass for nobody");
    }

    #[test]
    fn a_flush_covers_what_was_written_before_it_was_asked_for() {
        const QUEUES: usize = 4;
        let written = Arc::new(AtomicUsize::new(0));
        let durable = Arc::new(AtomicUsize::new(0));
        let (seen, kept) = (Arc::clone(&written), Arc::clone(&durable));
        let committer = Committer::spawn_with(QUEUES, move || {
            let before = seen.load(Ordering::Acquire);
            std::thread::yield_now();
            kept.store(before, Ordering::Release);
            Ok(())
        })
        .unwrap();
        std::thread::scope(|scope| {
            for queue in 0..QUEUES {
                let (committer, written, durable) = (&committer, &written, &durable);
                scope.spawn(move || {
                    for tag in 0..200 {
                        let mine = written.fetch_add(1, Ordering::AcqRel) + 1;
                        committer.submit(Waiter { queue, tag });
                        assert_eq!(answers(committer, queue, 1), [(tag, None)]);
                        assert!(durable.load(Ordering::Acquire) >= mine);
                    }
                });
            }
        });
    }

    #[test]
    fn what_was_submitted_is_answered_before_the_end() {
        let committer = Committer::spawn_with(1, || Ok(())).unwrap();
        let shared = Arc::clone(&committer.shared);
        committer.submit(Waiter { queue: 0, tag: 9 });
        drop(committer);
        assert!(matches!(lock(&shared.mailboxes[0].answers)[..], [(9, Ok(()))]));
    }
}
