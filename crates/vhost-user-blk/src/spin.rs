//! How long a queue that ran dry looks for more before it sleeps.
//!
//! A sleep costs two system calls and two context switches; a spin costs the
//! core. So the time adapts, as KVM's halt polling does: it grows when a sleep
//! turned out to be shorter than what spinning could have bridged, and shrinks
//! when it was longer. A queue without work soon spins not at all.

use std::time::{Duration, Instant};

/// The first step up from not spinning.
const STEP: Duration = Duration::from_micros(4);

/// Looks at the clock only once in so many turns: reading it costs more than
/// looking at the ring.
const TURNS_PER_CLOCK: u32 = 16;

/// The spinning of one queue.
#[derive(Debug)]
pub struct Spin {
    /// Never longer than this; zero turns spinning off.
    limit: Duration,
    now: Duration,
}

impl Spin {
    /// Spins for at most `limit`, and at first not at all.
    pub fn new(limit: Duration) -> Self {
        Self { limit, now: Duration::ZERO }
    }

    /// Calls `ready` again and again, for the present time at most, until it
    /// says true; what it said last.
    pub fn until(&self, mut ready: impl FnMut() -> bool) -> bool {
        if self.now.is_zero() {
            return ready();
        }
        let start = Instant::now();
        loop {
            for _ in 0..TURNS_PER_CLOCK {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.now {
                return false;
            }
            // What is waited for may want this very core.
            std::thread::yield_now();
        }
    }

    /// Learns from one sleep of length `slept` that followed a spin in vain.
    pub fn slept(&mut self, slept: Duration) {
        if slept < self.limit {
            self.now = (self.now * 2).max(STEP).min(self.limit);
        } else {
            self.now /= 2;
            if self.now < STEP {
                self.now = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(50);

    #[test]
    fn short_sleeps_teach_spinning_and_long_ones_unteach_it() {
        let mut spin = Spin::new(LIMIT);
        assert_eq!(spin.now, Duration::ZERO);
        for _ in 0..10 {
            spin.slept(Duration::from_micros(20));
        }
        assert_eq!(spin.now, LIMIT);
        for _ in 0..10 {
            spin.slept(Duration::from_millis(1));
        }
        assert_eq!(spin.now, Duration::ZERO);
    }

    #[test]
    fn a_limit_of_zero_never_spins() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.slept(Duration::ZERO);
        assert_eq!(spin.now, Duration::ZERO);
        let mut calls = 0;
        assert!(!spin.until(|| {
            calls += 1;
            false
        }));
        assert_eq!(calls, 1);
    }

    #[test]
    fn spinning_ends_as_soon_as_there_is_work() {
        let mut spin = Spin::new(Duration::from_secs(3600));
        spin.slept(Duration::ZERO);
        let mut calls = 0;
        assert!(spin.until(|| {
            calls += 1;
            calls == 5
        }));
        assert_eq!(calls, 5);
    }
}
