//! The threads of the queues.
//!
//! A thread is started with the first ring of its queue, and then serves one ring after the other:
//! an io_uring belongs to the thread that has enabled it, and no other can be made once the daemon
//! has started ([`Engine`]).

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use block_io::ring::{IoEngine, Uring};

use crate::process::requirements::Engine;
use crate::process::sandbox::{self, Thread};
use crate::process::signals;

/// The stack of a thread, in bytes. Its data is on the heap.
const STACK_BYTES: usize = 256 << 10;

/// What the rings of a thread use, or why they cannot: see [`Engine::uring`].
pub(crate) type ThreadUring = io::Result<Option<Uring>>;

/// Serves a ring until it is stopped.
type Job = Box<dyn FnOnce(&mut ThreadUring) + Send>;

/// The threads of all queues.
pub(crate) struct QueueThreads {
    engine: Arc<Engine>,
    /// Those that serve no ring.
    idle: Mutex<Vec<QueueThread>>,
}

/// A queue's thread. It ends when this is dropped and its ring was stopped.
pub(crate) struct QueueThread {
    queue: usize,
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

impl QueueThread {
    /// The number of its queue.
    pub(crate) fn queue(&self) -> usize {
        self.queue
    }

    /// Interrupts the system call in which it may sleep.
    pub(crate) fn interrupt(&self) {
        signals::interrupt(&self.thread);
    }
}

impl QueueThreads {
    /// No threads yet.
    pub(crate) fn new(engine: Engine) -> Self {
        Self { engine: Arc::new(engine), idle: Mutex::default() }
    }

    /// Has the thread of `queue` do `job`.
    ///
    /// # Errors
    /// It was to be started, and the system refuses that.
    pub(crate) fn run(
        &self,
        queue: usize,
        job: impl FnOnce(&mut ThreadUring) + Send + 'static,
    ) -> io::Result<QueueThread> {
        let thread = match self.take(queue) {
            Some(thread) => thread,
            None => self.spawn(queue)?,
        };
        // Its thread waits for it.
        _ = thread.jobs.send(Box::new(job));
        Ok(thread)
    }

    /// Keeps a thread whose job is done for the next ring of its queue.
    pub(crate) fn keep(&self, thread: QueueThread) {
        self.idle().push(thread);
    }

    fn take(&self, queue: usize) -> Option<QueueThread> {
        let mut idle = self.idle();
        let at = idle.iter().position(|thread| thread.queue == queue)?;
        Some(idle.swap_remove(at))
    }

    fn idle(&self) -> MutexGuard<'_, Vec<QueueThread>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, queue: usize) -> io::Result<QueueThread> {
        let (jobs, received) = channel();
        let engine = Arc::clone(&self.engine);
        let builder = Builder::new().name(format!("queue-{queue}")).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || work(&engine, received))?;
        Ok(QueueThread { queue, jobs, thread })
    }
}

/// The body of a thread.
fn work(engine: &Engine, jobs: Receiver<Job>) {
    signals::be_interruptible();
    let mut uring = engine.uring();
    sandbox::narrow(match &uring {
        Ok(None) => Thread::Queue { engine: IoEngine::Sync },
        _ => Thread::Queue { engine: IoEngine::IoUring },
    });
    for job in jobs {
        job(&mut uring);
    }
}
