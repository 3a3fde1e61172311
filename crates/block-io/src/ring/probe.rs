//! Checks whether this host has an io_uring that supports everything a ring needs.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use cow_format::ByteOffset;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::{DisabledUring, Event, FileSlot, IoEngine, Plan, Ring, Watch};

/// A watched descriptor that is ready from the beginning.
const READY: Watch = Watch(0);
/// The timer that ends the wait.
const LATE: Watch = Watch(1);
/// Only a kernel that never answers takes this long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests at a time. The result does not depend on it.
const DEPTH: usize = 1;

/// Why io_uring cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoUring {
    /// It cannot be created or entered.
    #[error("cannot {what}: {source}")]
    Refused {
        /// The operation that failed.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel is too old.
    #[error("the kernel does not support {0}")]
    Operation(&'static str),
    /// It accepted the operations but completed none.
    #[error("it completes no operation")]
    Silent,
}

impl NoUring {
    pub(super) fn refused(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| NoUring::Refused { what, source }
    }

    /// The system's error number, if it gave one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            NoUring::Refused { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

impl IoEngine {
    /// Makes the engine do once everything that a ring will need.
    ///
    /// # Errors
    /// Why io_uring cannot be used.
    pub fn probe(self) -> Result<(), NoUring> {
        match self {
            IoEngine::IoUring => probe_uring(),
            IoEngine::Sync => Ok(()),
        }
    }
}

fn probe_uring() -> Result<(), NoUring> {
    // It must outlive the ring, whose drop waits for the read.
    let mut count = 0u64;
    let buffer = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: size_of::<u64>() };
    let event = EventFd::from_value_and_flags(1, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|e| NoUring::refused("make an eventfd")(e.into()))?;
    let late = timer().map_err(|e| NoUring::refused("make a timer")(e.into()))?;
    let files = [Some(event.as_fd()), None];
    let mut uring = DisabledUring::new(DEPTH)?.enable().map_err(NoUring::refused("enable it"))?;
    let ring = Ring::new(Some(&mut uring), DEPTH, &files);
    let mut ring = ring.map_err(NoUring::refused("register a file"))?;
    ring.watch(event.as_fd(), READY).map_err(NoUring::refused("wait for a descriptor"))?;
    ring.watch(late.as_fd(), LATE).map_err(NoUring::refused("wait for a timer"))?;
    wait_for_ready(&mut ring)?;
    let mut plan = Plan::default();
    plan.read(FileSlot(0), ByteOffset::new(0), &[buffer]);
    // SAFETY: `count`, which is not read, and `event` outlive the ring.
    unsafe { ring.submit((), &mut plan) }.map_err(|()| NoUring::Silent)?;
    wait_for_read(&mut ring)
}

fn timer() -> nix::Result<TimerFd> {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
    timer.set(Expiration::OneShot(PATIENCE.into()), TimerSetTimeFlags::empty())?;
    Ok(timer)
}

/// A multishot poll, which Linux has since 5.13.
fn wait_for_ready(ring: &mut Ring<'_, ()>) -> Result<(), NoUring> {
    loop {
        match ring.next_event() {
            Some(Event::Ready(READY)) => return Ok(()),
            Some(Event::Ready(_)) => return Err(NoUring::Silent),
            Some(Event::Lost(_, source)) => {
                return Err(NoUring::Refused { what: "wait for a descriptor", source });
            }
            Some(Event::Done(..)) | None => {
                ring.enter(true).map_err(NoUring::refused("enter it"))?;
            }
        }
    }
}

/// An operation on a registered file: of an eventfd eight bytes are read.
fn wait_for_read(ring: &mut Ring<'_, ()>) -> Result<(), NoUring> {
    loop {
        match ring.next_event() {
            Some(Event::Done((), result)) => return result.map_err(NoUring::refused("read")),
            Some(Event::Ready(LATE)) => return Err(NoUring::Silent),
            Some(_) => {}
            None => ring.enter(true).map_err(NoUring::refused("enter it"))?,
        }
    }
}
