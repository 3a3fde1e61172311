//! The thread that notices the end of a connection.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::driver::queue::Link;
use crate::error::Error;

/// Every queue checks the clock once in this time.
const TICK_MS: u16 = 1000;

/// Watches for the end of the connection, so that a thread that sleeps on its eventfd needs one
/// system call instead of two; and wakes every queue now and then, so that it can detect a stall.
#[derive(Debug)]
pub(crate) struct Watchdog {
    link: Arc<Link>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches `socket` for the queues whose call eventfds these are.
    ///
    /// # Errors
    /// No eventfd or no thread.
    pub fn spawn(socket: UnixStream, calls: Vec<EventFd>, link: Arc<Link>) -> Result<Self, Error> {
        let stop = EventFd::new(EFD_CLOEXEC).map_err(Error::io("eventfd"))?;
        let stopped = stop.try_clone().map_err(Error::io("dup of an eventfd"))?;
        let shared = Arc::clone(&link);
        let run = move || watch(&socket, &stopped, &calls, &shared);
        let thread = std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(run)
            .map_err(Error::io("watchdog thread"))?;
        Ok(Self { link, stop, thread: Some(thread) })
    }

    /// Ends the watch, whatever happens to the connection.
    pub fn stop(&mut self) {
        // Neither can fail in a way that anything could be done about: the thread ends at its next
        // tick at worst.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// What it shares with the queues.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Whether the backend has closed the connection.
    pub fn is_dead(&self) -> bool {
        self.link.dead.load(Ordering::Relaxed)
    }
}

fn watch(socket: &UnixStream, stop: &EventFd, calls: &[EventFd], link: &Link) {
    // SAFETY: the eventfd outlives this borrow of its number.
    let stop_fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(stop.as_raw_fd()) };
    loop {
        // A hang-up is reported without being asked for.
        let mut fds = [
            PollFd::new(socket.as_fd(), PollFlags::empty()),
            PollFd::new(stop_fd, PollFlags::POLLIN),
        ];
        // An interrupted poll is a tick like another.
        let _ = poll(&mut fds, PollTimeout::from(TICK_MS));
        if fds[1].any() == Some(true) {
            return;
        }
        let hung_up = fds[0].any() == Some(true);
        if hung_up {
            link.dead.store(true, Ordering::Relaxed);
        }
        for call in calls {
            // It fails only if the counter is full, and then the queue is awake.
            let _ = call.write(1);
        }
        if hung_up {
            return;
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop();
    }
}
