//! Limits the log lines that others can cause without end: a guest, a frontend, a failing disk.
//! Each kind of line is a [`Subject`] with a limited rate. Suppressed lines are counted, and their
//! number is logged with the next line or when the daemon ends. With the log level `debug` nothing
//! is suppressed.

use std::fmt::{Arguments, Display};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter};

/// Lines of one subject that may come at once: enough for the usual life of a guest, which is a
/// start and some reconnections.
const BURST: u32 = 32;

/// The time after which one more line may come. So a subject logs at most some 10 MB a day.
const EVERY: Duration = Duration::from_secs(1);

/// Requests that failed, or that are malformed in a way worth logging.
pub static REQUESTS: Subject = Subject::new("failed requests");
/// Rings that are given up, or that start with a predecessor's unfinished requests.
pub static RINGS: Subject = Subject::new("rings");
/// Frontends that connect, disconnect, or send something that is refused.
pub static CONNECTIONS: Subject = Subject::new("connections");
/// The guest switches its write cache.
pub static WRITE_CACHE: Subject = Subject::new("the write cache");
/// The disk that a migration closes and opens.
pub static DISK: Subject = Subject::new("opening and closing the disk");
/// Requests on the control socket.
pub static CONTROL: Subject = Subject::new("the control socket");

const ALL: [&Subject; 6] = [&REQUESTS, &RINGS, &CONNECTIONS, &WRITE_CACHE, &DISK, &CONTROL];

/// One kind of line.
#[derive(Debug)]
pub struct Subject {
    name: &'static str,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Lines that may be written now.
    left: u32,
    /// When `left` last grew; `None` while it is full.
    since: Option<Instant>,
    /// Lines that were suppressed and not reported yet.
    suppressed: u64,
}

impl Subject {
    const fn new(name: &'static str) -> Self {
        Self { name, state: Mutex::new(State { left: BURST, since: None, suppressed: 0 }) }
    }

    /// Logs a line at this level, unless there were too many lately.
    pub fn say(&self, level: Level, line: Arguments<'_>) {
        if level > log::max_level() {
            return;
        }
        if log::max_level() >= LevelFilter::Debug {
            return log::log!(level, "{line}");
        }
        match self.admit(Instant::now()) {
            None => {}
            Some(0) => log::log!(level, "{line}"),
            Some(n) => log::log!(level, "{line} ({n} more since the last message)"),
        }
    }

    /// If one more line may be written now, the number of lines suppressed before it.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.refill(now);
        match state.left.checked_sub(1) {
            Some(left) => {
                state.left = left;
                state.since.get_or_insert(now);
                Some(std::mem::take(&mut state.suppressed))
            }
            None => {
                state.suppressed += 1;
                None
            }
        }
    }

    fn take_suppressed(&self) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut state.suppressed)
    }
}

impl State {
    fn refill(&mut self, now: Instant) {
        let Some(since) = self.since else { return };
        // After u32::MAX seconds it is full anyway.
        let due = now.saturating_duration_since(since).as_nanos() / EVERY.as_nanos();
        let due = u32::try_from(due).unwrap_or(u32::MAX).min(BURST);
        self.left = self.left.saturating_add(due).min(BURST);
        self.since = (self.left < BURST).then(|| since + EVERY * due);
    }
}

/// Logs how many lines were suppressed and not reported yet. To be called before the log ends.
pub fn report_suppressed() {
    for subject in ALL {
        let (name, n) = (subject.name, subject.take_suppressed());
        if n > 0 {
            log::warn!("{n} more messages about {name} were suppressed");
        }
    }
}

/// Logs a failed request of this queue.
pub fn request_failed(queue: usize, what: &str, why: &dyn Display) {
    REQUESTS.say(Level::Warn, format_args!("queue {queue}: {what}: {why}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_one_line_each_interval() {
        let (subject, start) = (Subject::new("tests"), Instant::now());
        for _ in 0..BURST {
            assert_eq!(subject.admit(start), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(subject.admit(start + EVERY / 2), None);
        }
        assert_eq!(subject.admit(start + EVERY), Some(5), "what was suppressed is reported once");
        assert_eq!(subject.admit(start + EVERY), None);
        assert_eq!(subject.admit(start + EVERY * 2 - Duration::from_nanos(1)), None);
        assert_eq!(subject.admit(start + EVERY * 2), Some(2));
    }

    #[test]
    fn after_a_rest_there_is_a_burst_again_and_no_more() {
        let (subject, start) = (Subject::new("tests"), Instant::now());
        for _ in 0..BURST {
            subject.admit(start);
        }
        let later = start + EVERY * (10 * BURST);
        let passed = (0..3 * BURST).filter(|_| subject.admit(later).is_some()).count();
        assert_eq!(passed, BURST as usize);
        assert_eq!(subject.take_suppressed(), u64::from(2 * BURST));
        assert_eq!(subject.take_suppressed(), 0);
        // A clock that is behind gives nothing.
        assert_eq!(subject.admit(start), None);
    }
}
