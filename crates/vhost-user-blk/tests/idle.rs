//! A queue spins while its guest is fast, and uses no CPU once the guest rests.

mod common;

use std::time::Duration;

use common::chains::wait_until;
use common::frontend::{F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend};
use common::ring::{GuestMemory, Ring, set_memory};
use common::{Daemon, sector};

/// Enough for the longest spin to be learned.
const READS: u64 = 200;
/// The threads of a daemon that spins run in any time as long as this.
const REST: Duration = Duration::from_millis(100);

/// How long the daemon's threads have run, in nanoseconds (Linux, Documentation/scheduler/sched-stats.rst).
fn ran_for(daemon: &Daemon) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let ran = |task: std::io::Result<std::fs::DirEntry>| {
        // A thread may end meanwhile.
        let stat = std::fs::read_to_string(task.unwrap().path().join("schedstat")).ok()?;
        stat.split(' ').next()?.parse::<u64>().ok()
    };
    tasks.filter_map(ran).sum()
}

#[test]
fn an_idle_daemon_uses_no_cpu() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &["--poll-us=10000"]);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES, PROTOCOL_FEATURES);
    let memory = GuestMemory::new();
    set_memory(&mut frontend, &memory);
    let mut ring = Ring::new(0);
    ring.set_up(&mut frontend);
    ring.enable(&mut frontend, true);
    for round in 0..3 {
        let before = ran_for(&daemon);
        for at in 0..READS {
            assert_eq!(ring.read_sector(&memory, at), sector(at));
        }
        assert!(ran_for(&daemon) > before, "round {round}: the time that it runs is not seen");
        wait_until("a daemon at rest", || {
            let before = ran_for(&daemon);
            std::thread::sleep(REST);
            ran_for(&daemon) == before
        });
    }
    daemon.terminate();
}
