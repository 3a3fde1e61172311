//! Progress, notes and warnings, all on standard error; the facts are on standard output.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::size::Human;

/// The shortest time between two updates of the progress line.
const REDRAW: Duration = Duration::from_millis(100);
/// Erases the line the cursor is in.
const CLEAR_LINE: &str = "\r\x1b[K";

/// Prints messages for the user, or is quiet.
#[derive(Clone, Copy, Debug)]
pub struct Ui {
    quiet: bool,
    /// Notes are for a terminal.
    notes: bool,
    progress: bool,
}

impl Ui {
    /// Notes and progress are for a terminal only, and not if the user wants it `quiet`; but
    /// `progress` can be asked for.
    pub fn new(quiet: bool, progress: bool) -> Self {
        let notes = !quiet && std::io::stderr().is_terminal();
        Ui { quiet, notes, progress: notes || progress }
    }

    /// Whether only warnings and errors are printed.
    pub fn is_quiet(self) -> bool {
        self.quiet
    }

    /// Prints what was done.
    pub fn note(self, text: impl std::fmt::Display) {
        if self.notes {
            eprintln!("{text}");
        }
    }

    /// Prints a warning, even if quiet.
    pub fn warn(self, text: impl std::fmt::Display) {
        eprintln!("cow: warning: {text}");
    }

    /// A progress line for work on `total` bytes; gone when dropped.
    pub fn progress(self, what: &'static str, total: u64) -> Progress {
        Progress {
            what,
            total,
            done: AtomicU64::new(0),
            drawn: self.progress.then(|| Mutex::new(None)),
        }
    }
}

/// A line like `merge  42 %  1.7 GiB of 4 GiB`.
pub struct Progress {
    what: &'static str,
    total: u64,
    done: AtomicU64,
    /// When it was last drawn; `None` on the outside if it never is.
    drawn: Option<Mutex<Option<Instant>>>,
}

impl Progress {
    /// `bytes` more are done. From any thread.
    pub fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Relaxed) + bytes;
        let Some(drawn) = &self.drawn else { return };
        // If the lock is taken, another thread is drawing.
        let Ok(mut last) = drawn.try_lock() else { return };
        if last.is_some_and(|at| at.elapsed() < REDRAW) {
            return;
        }
        *last = Some(Instant::now());
        let percent = u128::from(done) * 100 / u128::from(self.total.max(1));
        let line = format!("{} {percent:3} %  {} of {}", self.what, Human(done), Human(self.total));
        // Nothing depends on the line being seen.
        _ = write!(std::io::stderr(), "{CLEAR_LINE}{line}");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            _ = write!(std::io::stderr(), "{CLEAR_LINE}");
        }
    }
}
