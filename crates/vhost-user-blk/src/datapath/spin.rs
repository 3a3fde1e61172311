//! How long a queue that ran dry looks for more before it sleeps.
//!
//! A sleep costs two system calls and two context switches; a spin costs the
//! core. So the time adapts, as KVM's halt polling does: it grows when a sleep
//! turned out to be shorter than what spinning could have bridged, and shrinks
//! when it was longer. A queue without work soon spins not at all.
//!
//! What a wait is for makes a difference. A guest that is waited for longer has to
//! pay for waking us: its kick is an exit from the guest and often wakes a core from
//! its idle state, so that spinning pays up to [`POLL_US`]. The kernel that moves the
//! data of a request has a worker thread awake or an interrupt to take in any case.

use std::time::{Duration, Instant};

/// The limit if the user sets none, in microseconds: as KVM's halt polling.
pub(crate) const POLL_US: u32 = 200;

/// Never longer than this for the disk: longer than a page cache or a fast disk takes,
/// shorter than a flush.
const DISK_MAX: Duration = Duration::from_micros(50);

/// The first step up from not spinning.
const STEP: Duration = Duration::from_micros(4);

/// Looks at the clock only once in so many turns: reading it costs more than
/// looking at the ring.
const TURNS_PER_CLOCK: u32 = 16;

/// What a dry queue waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum For {
    /// The guest's next request: nothing is in flight.
    Guest,
    /// The end of what is in flight, or more requests.
    Disk,
}

/// The spinning of one queue.
#[derive(Debug)]
pub(crate) struct Spin {
    guest: Adaptive,
    disk: Adaptive,
}

impl Spin {
    /// Spins for at most `limit`, and at first not at all; zero turns spinning off.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { guest: Adaptive::new(limit), disk: Adaptive::new(limit.min(DISK_MAX)) }
    }

    /// Calls `ready` again and again, for the present time at most, until it
    /// says true; what it said last.
    pub(crate) fn until(&self, wait: For, mut ready: impl FnMut() -> bool) -> bool {
        let longest = match wait {
            For::Guest => self.guest.now,
            For::Disk => self.disk.now,
        };
        if longest.is_zero() {
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
            if start.elapsed() >= longest {
                return false;
            }
            // What is waited for may want this very core.
            std::thread::yield_now();
        }
    }

    /// Learns from one sleep of length `slept` that followed a spin in vain.
    pub(crate) fn slept(&mut self, wait: For, slept: Duration) {
        match wait {
            For::Guest => self.guest.slept(slept),
            For::Disk => self.disk.slept(slept),
        }
    }
}

/// A time that follows what it would have brought.
#[derive(Debug)]
struct Adaptive {
    limit: Duration,
    now: Duration,
}

impl Adaptive {
    fn new(limit: Duration) -> Self {
        Self { limit, now: Duration::ZERO }
    }

    fn slept(&mut self, slept: Duration) {
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

    const LIMIT: Duration = Duration::from_micros(200);

    #[test]
    fn short_sleeps_teach_spinning_and_long_ones_unteach_it() {
        let mut spin = Spin::new(LIMIT);
        assert_eq!(spin.guest.now, Duration::ZERO);
        for _ in 0..10 {
            spin.slept(For::Guest, Duration::from_micros(120));
        }
        assert_eq!(spin.guest.now, LIMIT);
        for _ in 0..10 {
            spin.slept(For::Guest, Duration::from_millis(1));
        }
        assert_eq!(spin.guest.now, Duration::ZERO);
    }

    #[test]
    fn a_disk_that_takes_long_is_not_spun_for_and_says_nothing_of_the_guest() {
        let mut spin = Spin::new(LIMIT);
        for _ in 0..10 {
            spin.slept(For::Disk, Duration::from_micros(20));
        }
        assert_eq!((spin.disk.now, spin.guest.now), (DISK_MAX, Duration::ZERO));
        for _ in 0..10 {
            spin.slept(For::Guest, Duration::from_micros(20));
            spin.slept(For::Disk, Duration::from_micros(120));
        }
        assert_eq!((spin.disk.now, spin.guest.now), (Duration::ZERO, LIMIT));
    }

    #[test]
    fn a_limit_of_zero_never_spins() {
        for wait in [For::Guest, For::Disk] {
            let mut spin = Spin::new(Duration::ZERO);
            spin.slept(wait, Duration::ZERO);
            let mut calls = 0;
            assert!(!spin.until(wait, || {
                calls += 1;
                false
            }));
            assert_eq!(calls, 1);
        }
    }

    #[test]
    fn spinning_ends_as_soon_as_there_is_work() {
        for wait in [For::Guest, For::Disk] {
            let mut spin = Spin::new(Duration::from_secs(3600));
            spin.slept(wait, Duration::ZERO);
            let mut calls = 0;
            assert!(spin.until(wait, || {
                calls += 1;
                calls == 5
            }));
            assert_eq!(calls, 5);
        }
    }
}
