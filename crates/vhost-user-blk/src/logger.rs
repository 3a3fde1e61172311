//! Log lines to standard error: `LEVEL text`, nothing else. The service manager that keeps the
//! output adds time and name.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // One write per line, so that lines of several threads do not mix. A standard error that
            // is gone must not stop the disk.
            let line = format!("{} {}\n", record.level(), record.args());
            let _ = std::io::stderr().lock().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Sends the process's log to standard error, up to `level`. To be called once; later calls change
/// the level only.
pub fn init(level: LevelFilter) {
    // The only error is "already set", and then it is this logger.
    let _ = log::set_logger(&Stderr);
    log::set_max_level(level);
}
