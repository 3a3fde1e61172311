//! What a queue logs of requests that failed: not each one, for a full disk can fail many
//! thousands a second.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// How often a queue logs failed requests.
const EVERY: Duration = Duration::from_secs(1);

/// Of one queue.
#[derive(Debug)]
pub struct Complaints {
    queue: usize,
    last: Option<Instant>,
    /// Failed since, without a word.
    not_said: u64,
}

impl Complaints {
    /// Of the queue with this number.
    pub fn new(queue: usize) -> Self {
        Self { queue, last: None, not_said: 0 }
    }

    /// Logs that a request failed, unless that was done a moment ago.
    pub fn say(&mut self, what: &str, why: &dyn Display) {
        if self.last.is_some_and(|last| last.elapsed() < EVERY) {
            self.not_said += 1;
            return;
        }
        let queue = self.queue;
        match std::mem::take(&mut self.not_said) {
            0 => log::warn!("queue {queue}: {what}: {why}"),
            n => log::warn!("queue {queue}: {what}: {why} ({n} more since the last message)"),
        }
        self.last = Some(Instant::now());
    }
}
