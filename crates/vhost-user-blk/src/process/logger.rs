//! Writes log lines to standard error as `LEVEL text`. The service manager that collects them adds
//! time and name.
//!
//! A line is written only if standard error accepts it at once. All threads log, including those of
//! the queues, and a pipe without a reader must not stop the disk. Other lines are lost, and their
//! number is logged as soon as a line can be written again.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The longest line, in bytes. A writable pipe takes this much at once (pipe(7), PIPE_BUF). A
/// longer line, for example with long paths, is cut.
const LINE_MAX: usize = libc::PIPE_BUF;

/// Lines that were lost and not reported yet.
static LOST: AtomicU64 = AtomicU64::new(0);

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            print(&format!("{} {}", record.level(), record.args()));
        }
    }

    fn flush(&self) {}
}

/// Sends the process's log to standard error, up to `level`. To be called once; later calls change
/// the level only.
pub fn init(level: LevelFilter) {
    // The only error is "already set", and then this logger is set.
    _ = log::set_logger(&Stderr);
    log::set_max_level(level);
}

/// Writes a line to standard error at any log level, if it can be written at once.
pub fn print(line: &str) {
    // Locked from the check to the write, so that no other thread uses up the room. One write per
    // line, so that lines of several threads do not mix.
    let mut stderr = io::stderr().lock();
    let lost = LOST.swap(0, Ordering::Relaxed);
    if lost > 0 {
        let text = format!("{} {lost} log lines were lost: standard error was full", Level::Warn);
        if !put(&mut stderr, &text) {
            LOST.fetch_add(lost, Ordering::Relaxed);
        }
    }
    if !put(&mut stderr, line) {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes a line if `to` has room for it. Returns whether it had.
fn put<W: Write + AsFd>(to: &mut W, line: &str) -> bool {
    let mut fds = [PollFd::new(to.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::ZERO) == Ok(0) {
        return false;
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.truncate(LINE_MAX - 1);
    bytes.push(b'\n');
    // A closed standard error must not stop the disk.
    _ = to.write_all(&bytes);
    true
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_full_pipe_takes_no_line_and_one_that_was_read_does() {
        let (mut reader, mut writer) = io::pipe().unwrap();
        let mut lines = 0;
        while put(&mut writer, &"x".repeat(100)) {
            lines += 1;
        }
        assert!(lines > 0);
        // It may hold a little more, but not in one piece for sure.
        assert!(!put(&mut writer, "one more"));
        let mut bytes = vec![0; lines * 101];
        reader.read_exact(&mut bytes).unwrap();
        assert!(put(&mut writer, "one more"));
        drop(writer);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "one more\n");
    }

    #[test]
    fn a_long_line_is_cut_to_what_a_pipe_takes_at_once() {
        let (mut reader, mut writer) = io::pipe().unwrap();
        assert!(put(&mut writer, &"é".repeat(LINE_MAX)));
        drop(writer);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert_eq!((bytes.len(), bytes.last()), (LINE_MAX, Some(&b'\n')));
    }

    #[test]
    fn a_reader_that_has_gone_is_no_harm() {
        let (reader, mut writer) = io::pipe().unwrap();
        drop(reader);
        assert!(put(&mut writer, "nobody reads this"));
    }
}
