//! The main thread's end of a worker: to stop it, whatever it is doing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use block_io::pulse::Pulse;
use vmm_sys_util::eventfd::EventFd;

use crate::datapath::queue_threads::{QueueThread, QueueThreads};
use crate::process::signals;

/// How long a worker may take to stop before the system call in which it may sleep is interrupted.
/// More than most need, and short enough that hundreds of workers can be stopped one by one.
const INTERRUPT_AFTER: Duration = Duration::from_millis(1);
/// It is interrupted again and again, as it may enter the next such call, with up to this interval.
const INTERRUPT_INTERVAL_MAX: Duration = Duration::from_millis(64);
/// How long a worker may make no progress when the daemon has to end. What a frontend can make it
/// sleep in ends at once, so this is for the disk: most answer within seconds even under load.
const END_PATIENCE: Duration = Duration::from_secs(5);

/// A worker was left behind.
static ABANDONED: AtomicBool = AtomicBool::new(false);

/// Whether a worker was left behind, because it did not stop when the daemon had to end. It may
/// still use the disk, its ring and guest memory, until the process ends.
pub(crate) fn any_abandoned() -> bool {
    ABANDONED.load(Ordering::Relaxed)
}

/// What a ring that is to stop does with a request of which some windows are done and others not
/// begun. It completes all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum StopOrder {
    /// It goes on for a while, then the request fails.
    Finish = 1,
    /// The same, unless there is an in-flight area: then it is left to who starts the ring next.
    /// More than any number of the other order, so that it counts whatever else is said.
    Leave = 1 << 32,
}

/// A queue that is being served.
pub(crate) struct WorkerHandle {
    pub(super) thread: QueueThread,
    /// Where the thread goes afterwards.
    pub(super) threads: Arc<QueueThreads>,
    pub(super) stop: Arc<EventFd>,
    pub(super) pulse: Arc<Pulse>,
    /// Receives the next entry of the available ring, when the worker is done with everything.
    pub(super) done: Receiver<u16>,
}

impl WorkerHandle {
    /// Tells the worker to take no more requests. It then answers those in flight, and ends.
    pub(crate) fn ask(&self, order: StopOrder) {
        // It cannot fail: the counter starts at 0, and is hardly ever written.
        _ = self.stop.write(order as u64);
    }

    /// Waits until the worker, which was asked at `asked`, has ended, and returns which entry of the
    /// available ring comes next. `None` if the daemon has to end and the worker does not.
    ///
    /// A disk that needs long for what is in flight is waited for. Then `meanwhile` is called now and
    /// then, to do what the main thread has to do all the time.
    pub(crate) fn stop(self, asked: Instant, mut meanwhile: impl FnMut()) -> Option<u16> {
        let mut interval = INTERRUPT_AFTER;
        let (mut count, mut since) = (self.pulse.count(), asked);
        loop {
            match self.done.recv_timeout(interval) {
                Ok(next) => {
                    self.threads.keep(self.thread);
                    return Some(next);
                }
                // A panic aborts the process in every profile that is shipped.
                Err(RecvTimeoutError::Disconnected) => return Some(0),
                Err(RecvTimeoutError::Timeout) => {}
            }
            // One that waits for its ring hears the order; an interruption would look like progress.
            if self.pulse.step().is_some() {
                self.thread.interrupt();
            }
            meanwhile();
            // A worker mostly waits for the disk, and makes a step with what is done.
            if self.pulse.count() != count {
                (count, since) = (self.pulse.count(), Instant::now());
            }
            if signals::stopping() && since.elapsed() >= END_PATIENCE {
                ABANDONED.store(true, Ordering::Relaxed);
                let (queue, after) = (self.thread.queue(), END_PATIENCE.as_secs());
                log::error!("queue-{queue} does not stop: no progress for {after} s");
                return None;
            }
            interval = (2 * interval).min(INTERRUPT_INTERVAL_MAX);
        }
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::mpsc::sync_channel;

    use nix::sys::eventfd::{EfdFlags, EventFd as Counter};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use block_io::ring::IoEngine;

    use super::*;
    use crate::process::requirements::Engine;
    use crate::virtio::notify::Bell;

    fn worker(work: impl FnOnce(&EventFd) -> u16 + Send + 'static) -> WorkerHandle {
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let theirs = Arc::clone(&stop);
        let (ending, done) = sync_channel(1);
        let threads =
            Arc::new(QueueThreads::new(Engine::choose(Some(IoEngine::Sync), 1, 8).unwrap()));
        let thread = threads.run(0, move |_| ending.send(work(&theirs)).unwrap()).unwrap();
        let pulse = Arc::new(Pulse::waiting());
        pulse.beat();
        WorkerHandle { thread, threads, stop, pulse, done }
    }

    fn stop(worker: WorkerHandle, meanwhile: impl FnMut()) -> Option<u16> {
        worker.ask(StopOrder::Finish);
        worker.stop(Instant::now(), meanwhile)
    }

    #[test]
    fn a_worker_that_needs_long_is_waited_for_and_the_main_thread_has_its_time() {
        // It goes on for as long as that.
        let (going_on, go_on) = sync_channel(0);
        let worker = worker(move |_| go_on.recv().unwrap());
        let mut times = 0;
        let next = stop(worker, || {
            times += 1;
            if times == 5 {
                going_on.send(7).unwrap();
            }
        });
        assert_eq!((next, times >= 5), (Some(7), true));
    }

    #[test]
    fn one_that_sleeps_in_its_bells_is_interrupted_until_it_ends() {
        let full = || {
            let counter = Counter::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
            counter.write(u64::MAX - 1).unwrap();
            counter
        };
        let counters = [(); 3].map(|()| full());
        let frontends = counters.each_ref().map(|one| one.as_fd().try_clone_to_owned().unwrap());
        let worker = worker(move |_| {
            let bells = counters.map(Bell::new);
            for flags in frontends {
                use nix::fcntl::{FcntlArg, OFlag, fcntl};
                // Not before the bell has looked.
                fcntl(flags, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            }
            // Each of them sleeps once, and then never again.
            (0..1000).for_each(|_| bells.iter().for_each(Bell::signal));
            3
        });
        assert_eq!(stop(worker, || ()), Some(3));
    }
}
