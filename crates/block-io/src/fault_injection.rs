//! Fault injection for tests: with the feature `fault-points` I/O fails, comes up short, and
//! completes in any order. Each thread has its own sequence of random numbers, which decides
//! everything, so that a seed reproduces a failure. Without the feature all of this compiles to
//! nothing.
//!
//! The environment variable `BLOCK_IO_FAULTS`, a seed, enables fault injection in the threads of a
//! program whose names begin with `queue-`; a test enables it for its own thread with `begin`.

#[cfg(feature = "fault-points")]
pub use on::*;

/// Returns an error once in `n` calls on average. (Without the feature: never.)
///
/// # Errors
/// `errno`
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn fails(_n: usize, _errno: i32) -> std::io::Result<()> {
    Ok(())
}

/// Whether something unusual should happen now, once in `n` calls on average. (Without the feature:
/// never.)
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn one_in(_n: usize) -> bool {
    false
}

/// The buffers that a transfer completes in one step. (Without the feature: all.)
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn shortened(buffers: &[libc::iovec]) -> &[libc::iovec] {
    buffers
}

#[cfg(feature = "fault-points")]
mod on {
    use std::cell::RefCell;
    use std::hash::{DefaultHasher, Hash, Hasher};
    use std::io;

    use crate::testing::sim::Choices;

    thread_local! {
        static CHOICES: RefCell<Option<Choices>> = RefCell::new(from_environment());
    }

    fn from_environment() -> Option<Choices> {
        let seed: u64 = std::env::var("BLOCK_IO_FAULTS").ok()?.parse().ok()?;
        let thread = std::thread::current();
        let name = thread.name().filter(|name| name.starts_with("queue-"))?;
        let mut hasher = DefaultHasher::new();
        (seed, name).hash(&mut hasher);
        Some(Choices::seeded(hasher.finish()))
    }

    /// Enables fault injection in this thread.
    pub fn begin(seed: u64) {
        CHOICES.set(Some(Choices::seeded(seed)));
    }

    /// Disables fault injection in this thread.
    pub fn end() {
        CHOICES.set(None);
    }

    /// Disables fault injection in this thread while `work` runs.
    pub fn without<T>(work: impl FnOnce() -> T) -> T {
        let choices = CHOICES.take();
        let result = work();
        CHOICES.set(choices);
        result
    }

    /// Whether faults are injected into this thread.
    pub fn is_on() -> bool {
        CHOICES.with_borrow(Option::is_some)
    }

    /// One of `0..n`; 0 if fault injection is disabled in this thread.
    pub fn below(n: usize) -> usize {
        CHOICES.with_borrow_mut(|choices| {
            choices.as_mut().map_or(0, |choices| choices.choose(n.max(1)))
        })
    }

    /// See the version without the feature.
    pub fn one_in(n: usize) -> bool {
        is_on() && below(n) == 0
    }

    /// See the version without the feature.
    pub fn fails(n: usize, errno: i32) -> io::Result<()> {
        if one_in(n) { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
    }

    /// See the version without the feature.
    pub fn shortened(buffers: &[libc::iovec]) -> Vec<libc::iovec> {
        let len = buffers.iter().map(|buffer| buffer.iov_len).sum::<usize>();
        if one_in(2) { prefix(buffers, below(len)) } else { buffers.to_vec() }
    }

    /// The first `len` bytes of `buffers`.
    pub fn prefix(buffers: &[libc::iovec], len: usize) -> Vec<libc::iovec> {
        let mut left = len;
        let mut taken = buffers.to_vec();
        for buffer in &mut taken {
            buffer.iov_len = buffer.iov_len.min(left);
            left -= buffer.iov_len;
        }
        taken.retain(|buffer| buffer.iov_len > 0);
        taken
    }
}
