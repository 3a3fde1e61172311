//! Whether a thread gets on: what it says of itself, and what another can see of that.

use std::sync::atomic::{AtomicU64, Ordering};

/// The pulse of one thread: a count of the steps that it has begun, odd while it waits for
/// something to do.
///
/// Nothing is ordered by it. It has a cache line of its own, for it is stored to at every step.
#[derive(Debug)]
#[repr(align(64))]
pub struct Pulse(AtomicU64);

impl Pulse {
    /// The pulse of a thread that waits.
    pub const fn waiting() -> Self {
        Pulse(AtomicU64::new(1))
    }

    /// A step begins. Only the thread itself may say so.
    #[inline]
    pub fn beat(&self) {
        // No read-modify-write: there is one writer.
        self.0.store((self.0.load(Ordering::Relaxed) | 1).wrapping_add(1), Ordering::Relaxed);
    }

    /// It waits for something to do, from here to the next [`Pulse::beat`].
    #[inline]
    pub fn rest(&self) {
        self.0.store(self.0.load(Ordering::Relaxed) | 1, Ordering::Relaxed);
    }

    /// The step that it is in; `None` if it waits. Two looks that find the same step mean that it
    /// has not got on between them.
    pub fn step(&self) -> Option<u64> {
        let count = self.0.load(Ordering::Relaxed);
        (count & 1 == 0).then_some(count)
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
        pulse.beat();
        assert!(pulse.step().is_some() && pulse.step() != before);
    }
}
