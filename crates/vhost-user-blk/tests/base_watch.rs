//! A base is opened for writing under a running daemon. A program of its own: a child that another
//! test starts would have the base open for a moment.

#[path = "it/common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::time::Duration;

use common::{Daemon, PROGRAM, image};

const REPORT: &str = "OPENED FOR WRITING";

/// A daemon on a COW file over `base`, and whether it has a lease on that.
fn start(directory: &std::path::Path, base: &std::path::Path) -> (Daemon, bool) {
    let cow = directory.join("disk.cow");
    let image = format!("{},{}", cow.display(), base.display());
    let mut daemon = Daemon::start(directory, [image]);
    let leased = daemon.has_line("leased: an open", "no lease");
    (daemon, leased)
}

#[test]
fn opening_the_base_for_writing_is_reported_and_reading_it_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path());
    let (daemon, leased) = start(directory.path(), &base);
    fs::read(&base).unwrap();
    let log = daemon.terminate();
    assert!(!log.contains(REPORT) && !log.contains("WRITTEN"), "{log}");
    if !leased {
        println!("skipped: {PROGRAM} gets no lease on {}", base.display());
        return;
    }
    let (mut daemon, _) = start(directory.path(), &base);
    // Returns when the daemon has given back its lease.
    let opened = File::options().read(true).write(true).open(&base).unwrap();
    let line = daemon.wait_line(REPORT);
    assert!(line.contains(&*base.to_string_lossy()), "{line}");
    drop(opened);
    let log = daemon.terminate();
    assert!(log.matches(REPORT).count() == 1 && !log.contains("WRITTEN"), "{log}");
}

/// Each time the lease is given back and taken again.
#[test]
fn a_base_that_is_opened_again_and_again_does_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path());
    let (daemon, leased) = start(directory.path(), &base);
    if !leased {
        println!("skipped: {PROGRAM} gets no lease on {}", base.display());
        return;
    }
    for _ in 0..20 {
        drop(File::options().write(true).open(&base).unwrap());
        // Long enough for the next lease; without it nothing is tested, and nothing fails.
        std::thread::sleep(Duration::from_millis(20));
    }
    daemon.terminate();
}
