//! Detects threads that make no progress, among the queues' threads and the committer.
//!
//! A thread that waits for work is healthy, and so is one that waits for the kernel to complete its
//! I/O: a slow disk is not the daemon's fault. A thread that has not returned from a step for a
//! long time is stuck, in a system call or in a loop, and its guest would wait for ever.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use block_io::pulse::Pulse;

static THREADS: Mutex<Vec<Thread>> = Mutex::new(Vec::new());

/// A thread, as it was at the last check.
#[derive(Debug)]
struct Thread {
    name: String,
    /// Gone when the thread is.
    pulse: Weak<Pulse>,
    /// Its step, and when it was first seen in that step.
    step: Option<(u64, Instant)>,
    /// It was logged that the thread is stuck.
    reported: bool,
}

/// Watches `pulse` from now on, until its other owners drop it.
pub fn watch(name: &str, pulse: &Arc<Pulse>) {
    let thread =
        Thread { name: name.to_owned(), pulse: Arc::downgrade(pulse), step: None, reported: false };
    let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    threads.retain(|thread| thread.pulse.strong_count() > 0);
    threads.push(thread);
}

/// Checks all threads. False if one of them has been in the same step for `limit`. To be called
/// more often than that.
pub fn all_make_progress(limit: Duration) -> bool {
    let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Instant::now();
    let mut all = true;
    // All of them, even after a stuck one: each check is the basis of the next.
    for thread in threads.iter_mut() {
        all &= !thread.is_stuck(now, limit);
    }
    all
}

impl Thread {
    fn is_stuck(&mut self, now: Instant, limit: Duration) -> bool {
        let step = self.pulse.upgrade().and_then(|pulse| pulse.step());
        let since = match (step, self.step) {
            (Some(step), Some((before, since))) if step == before => since,
            _ => now,
        };
        self.step = step.map(|step| (step, since));
        let stuck = step.is_some() && now.duration_since(since) >= limit;
        if stuck != self.reported {
            self.reported = stuck;
            self.report(limit);
        }
        stuck
    }

    fn report(&self, limit: Duration) {
        let name = &self.name;
        if self.reported {
            log::error!(
                "{name} is stuck: no progress for {} s; withholding WATCHDOG=1",
                limit.as_secs_f32()
            );
        } else {
            log::info!("{name} makes progress again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn thread(pulse: &Arc<Pulse>) -> Thread {
        let pulse = Arc::downgrade(pulse);
        Thread { name: "test".to_owned(), pulse, step: None, reported: false }
    }

    #[test]
    fn a_thread_that_stays_in_a_step_is_stuck_until_it_leaves_it() {
        let pulse = Arc::new(Pulse::waiting());
        let mut thread = thread(&pulse);
        let begin = Instant::now();
        let mut is_stuck = |seconds| thread.is_stuck(begin + Duration::from_secs(seconds), LIMIT);
        pulse.beat();
        assert!(!is_stuck(30), "it was in this step for the first time");
        assert!(!is_stuck(60));
        assert!(!is_stuck(89));
        assert!(is_stuck(90));
        assert!(is_stuck(120));
        pulse.beat();
        assert!(!is_stuck(150));
        assert!(!is_stuck(180));
        assert!(is_stuck(210));
        pulse.rest();
        assert!(!is_stuck(240));
    }

    #[test]
    fn one_that_waits_or_has_ended_is_not() {
        let pulse = Arc::new(Pulse::waiting());
        let mut thread = thread(&pulse);
        let begin = Instant::now();
        let mut is_stuck = |seconds| thread.is_stuck(begin + Duration::from_secs(seconds), LIMIT);
        assert!(!is_stuck(0));
        assert!(!is_stuck(1000));
        pulse.beat();
        assert!(!is_stuck(2000));
        drop(pulse);
        assert!(!is_stuck(3000));
    }
}
