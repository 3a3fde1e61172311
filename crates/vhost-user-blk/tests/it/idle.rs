//! A queue spins while its guest is fast, and uses no CPU once the guest rests.

use std::time::Duration;

use crate::common::{Daemon, sector};
use blk_bench::server::{Sample, Server, cpu_between};
use testkit::frontend::{F_PROTOCOL_FEATURES, F_VERSION_1};
use testkit::ring::running;
use testkit::wait::wait_until;

/// Enough for the longest spin to be learned.
const READS: u64 = 200;
/// The threads of a daemon that spins run in any time as long as this.
const REST: Duration = Duration::from_millis(100);

#[test]
fn an_idle_daemon_uses_no_cpu() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &["--poll-us=10000"]);
    let (_frontend, memory, mut ring) =
        running(daemon.connect(), F_VERSION_1 | F_PROTOCOL_FEATURES);
    let process = Server::new(i32::try_from(daemon.pid()).unwrap()).unwrap();
    let ran_since = |before: &Sample| cpu_between(before, &process.sample());
    for round in 0..3 {
        let before = process.sample();
        for at in 0..READS {
            assert_eq!(ring.read_sector(&memory, at), sector(at));
        }
        assert!(
            ran_since(&before) > Duration::ZERO,
            "round {round}: the time that it runs is not seen"
        );
        wait_until("a daemon at rest", || {
            let before = process.sample();
            std::thread::sleep(REST);
            ran_since(&before) == Duration::ZERO
        });
    }
    daemon.terminate();
}
