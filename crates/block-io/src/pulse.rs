//! Whether a thread makes progress, as another thread can observe it.

use std::sync::atomic::{AtomicU64, Ordering};

/// The pulse of one thread: a count of the steps that it has begun, odd while it waits for
/// something to do.
///
/// It orders nothing. It has a cache line of its own, since it is stored to at every step.
#[derive(Debug)]
#[repr(align(64))]
pub struct Pulse(AtomicU64);

impl Pulse {
    /// The pulse of a thread that waits.
    pub const fn waiting() -> Self {
        Pulse(AtomicU64::new(1))
    }

    /// A step begins. Only the thread itself may call this.
    #[inline]
    pub fn beat(&self) {
        // No read-modify-write: there is one writer.
        self.0.store((self.0.load(Ordering::Relaxed) | 1).wrapping_add(1), Ordering::Relaxed);
    }

    /// The thread waits for work, from here to the next [`Pulse::beat`].
    #[inline]
    pub fn rest(&self) {
        self.0.store(self.0.load(Ordering::Relaxed) | 1, Ordering::Relaxed);
    }

    /// The current step; `None` if the thread waits. If two calls return the same step, the thread
    /// has made no progress in between.
    pub fn step(&self) -> Option<u64> {
        let count = self.0.load(Ordering::Relaxed);
        (count & 1 == 0).then_some(count)
    }

    /// A number that changes with every step. Unlike [`Pulse::step`] it also shows the steps that a
    /// thread made before it waited again.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_differ_and_a_thread_that_waits_is_in_none() {
        let pulse = Pulse::waiting();
        assert_eq!(pulse.step(), None);
        let mut before = None;
        for _ in 0..3 {
            pulse.beat();
            let now = pulse.step();
            assert!(now.is_some() && now != before);
            before = now;
        }
        pulse.rest();
        assert_eq!(pulse.step(), None);
        pulse.rest();
        assert_eq!(pulse.step(), None);
        let count = pulse.count();
        pulse.beat();
        assert!(pulse.step().is_some() && pulse.step() != before);
        pulse.rest();
        assert_ne!(pulse.count(), count);
    }
}
