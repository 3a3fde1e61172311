//! Whether this host has an io_uring that does all that a ring needs.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use cow_format::ByteOffset;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Engine, Event, FileSlot, IoEngine, Plan, Ring, Uring, Watch};

/// The watched descriptor, which is ready from the beginning.
const READY: Watch = Watch(0);
/// The end of patience.
const LATE: Watch = Watch(1);
/// Only a kernel that never answers takes so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests at a time. What a ring can do does not depend on it.
const DEPTH: usize = 1;

/// Why there is no io_uring that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoUring {
    /// It cannot be made, or entered.
    #[error("cannot {what}: {source}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel is too old.
    #[error("the kernel does not know {0}")]
    Operation(&'static str),
    /// It was asked and said nothing.
    #[error("it gives no answer")]
    Silent,
}

impl NoUring {
    fn refused(what: &'static str) -> impl FnOnce(io::Error) -> Self {
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
    /// Has the engine do once what a ring will have it do.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn probe(self) -> Result<(), NoUring> {
        match self {
            IoEngine::IoUring => probe_uring(),
            IoEngine::Sync => Ok(()),
        }
    }
}

fn probe_uring() -> Result<(), NoUring> {
    // Older than the ring, and so there until that has been dropped, which waits for the read.
    let mut count = 0u64;
    let buffer = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: size_of::<u64>() };
    let event = EventFd::from_value_and_flags(1, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map_err(|e| NoUring::refused("make an eventfd")(e.into()))?;
    let files = [Some(event.as_fd()), None];
    let uring = Uring::new(DEPTH, &files).map_err(NoUring::refused("make one"))?;
    let missing = uring.missing_operation();
    if let Some(name) = missing.map_err(NoUring::refused("ask what it does"))? {
        return Err(NoUring::Operation(name));
    }
    let mut ring = Ring::<()>::over(Engine::Uring(uring), DEPTH);
    ring.watch(event.as_fd(), READY).map_err(NoUring::refused("wait for a descriptor"))?;
    ring.alarm(PATIENCE, LATE);
    wait_for_ready(&mut ring)?;
    let mut plan = Plan::default();
    plan.read(FileSlot(0), ByteOffset::new(0), &[buffer]);
    // SAFETY: `count`, which nobody looks at, and `event` outlive the ring.
    unsafe { ring.submit((), &mut plan) }.map_err(|()| NoUring::Silent)?;
    wait_for_read(&mut ring)
}

/// A multishot poll, which Linux has since 5.13.
fn wait_for_ready(ring: &mut Ring<()>) -> Result<(), NoUring> {
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
fn wait_for_read(ring: &mut Ring<()>) -> Result<(), NoUring> {
    loop {
        match ring.next_event() {
            Some(Event::Done((), result)) => return result.map_err(NoUring::refused("read")),
            Some(Event::Ready(LATE)) => return Err(NoUring::Silent),
            Some(_) => {}
            None => ring.enter(true).map_err(NoUring::refused("enter it"))?,
        }
    }
}
