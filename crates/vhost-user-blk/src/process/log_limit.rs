//! Log lines that somebody else can cause as often as they like: a guest, a frontend, a disk that
//! fails. Each kind of them is a [`Subject`], of which only so many lines are written in a time. What
//! was left out is counted, and said with the next line or when the daemon ends. Who asks for the log
//! level `debug` gets everything.

use std::fmt::{Arguments, Display};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter};

/// Lines of one subject that may come at once. As many as make up the usual life of a guest: a start,
/// some reconnections.
const BURST: u32 = 32;

/// How long it takes until one more may come. So a subject fills the log with some 10 MB a day at
/// most.
const EVERY: Duration = Duration::from_secs(1);

/// Requests that failed or that are malformed in a way that is worth a word.
pub static REQUESTS: Subject = Subject::new("failed requests");
/// Rings: given up, or begun with work that a predecessor left.
pub static RINGS: Subject = Subject::new("rings");
/// Frontends that come, go, and send what is refused.
pub static CONNECTIONS: Subject = Subject::new("connections");
/// The guest switches its write cache.
pub static WRITE_CACHE: Subject = Subject::new("the write cache");
/// A migration has the disk closed and opened.
pub static DISK: Subject = Subject::new("opening and closing the disk");
/// What clients of the control socket want.
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
    /// Lines that may come at once.
    left: u32,
    /// Since when a further one is on its way; `None` while there are as many as there can be.
    since: Option<Instant>,
    /// Not written, and nothing said of it.
    left_out: u64,
}

impl Subject {
    const fn new(name: &'static str) -> Self {
        Self { name, state: Mutex::new(State { left: BURST, since: None, left_out: 0 }) }
    }

    /// Logs a line at this level, unless there were too many.
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

    /// Whether one more line may be written now; how many were left out before it.
    fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.refill(now);
        match state.left.checked_sub(1) {
            Some(left) => {
                state.left = left;
                state.since.get_or_insert(now);
                Some(std::mem::take(&mut state.left_out))
            }
            None => {
                state.left_out += 1;
                None
            }
        }
    }

    fn take_left_out(&self) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut state.left_out)
    }
}

impl State {
    fn refill(&mut self, now: Instant) {
        let Some(since) = self.since else { return };
        // More than u32 seconds are more than enough.
        let due = now.saturating_duration_since(since).as_nanos() / EVERY.as_nanos();
        let due = u32::try_from(due).unwrap_or(u32::MAX).min(BURST);
        self.left = self.left.saturating_add(due).min(BURST);
        self.since = (self.left < BURST).then(|| since + EVERY * due);
    }
}

/// Says what was left out and not mentioned. To be called when no more comes.
pub fn say_what_was_left_out() {
    for subject in ALL {
        let (name, n) = (subject.name, subject.take_left_out());
        if n > 0 {
            log::warn!("{n} more messages about {name} were left out");
        }
    }
}

/// A request of this queue failed.
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
        assert_eq!(subject.admit(start + EVERY), Some(5), "what was left out is told once");
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
        assert_eq!(subject.take_left_out(), u64::from(2 * BURST));
        assert_eq!(subject.take_left_out(), 0);
        // A clock that is behind gives nothing.
        assert_eq!(subject.admit(start), None);
    }
}
