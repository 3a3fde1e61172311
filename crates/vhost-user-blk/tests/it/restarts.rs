//! A restart costs no disk: not by SIGTERM and not by SIGKILL, however the daemon got its socket,
//! under a frontend that gives its disk up when it is connected to a daemon that ends
//! (cloud-hypervisor 53).
//!
//! `RESTARTS` restarts of each kind (20 if it is not set), with the random numbers of
//! `RECOVERY_SEED`.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use crate::common::soak::restarts::Way;
use crate::common::soak::{End, Soak, from_env};
use crate::common::{Daemon, PROGRAM};
use nix::sys::signal::Signal;

/// A daemon gives so many answers at most before it ends.
const ANSWERS_MAX: u64 = 200;

fn restarted(way: fn(&Path) -> Way, upgraded: bool) {
    let restarts = from_env("RESTARTS").unwrap_or(20);
    let directory = tempfile::tempdir().unwrap();
    let mut soak = Soak::new(directory.path(), &[], &End::Killed { after: 0 });
    soak.go_on_with(way);
    let mut lost = Vec::new();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut count = 0;
        for _ in 0..restarts {
            if upgraded {
                soak.upgrade();
            }
            let answers = 1 + soak.rng.below(ANSWERS_MAX);
            count += u64::from(soak.restart_by(&[], signal, answers));
        }
        println!("{restarts} times {signal}: {count} disks lost");
        lost.push(count);
    }
    assert!(soak.interrupted > 0, "the daemon was idle when it ended");
    soak.finish();
    assert_eq!(lost, [0, 0], "disks lost by SIGTERM and by SIGKILL");
}

#[test]
fn with_a_socket_that_the_daemon_made() {
    restarted(|_| Way::Path, false);
}

#[test]
fn with_a_socket_of_a_parent_that_keeps_nothing_of_it() {
    restarted(|_| Way::Fd, false);
}

#[test]
fn with_a_socket_that_the_service_manager_keeps() {
    restarted(
        |socket| {
            _ = std::fs::remove_file(socket);
            Way::Held(UnixListener::bind(socket).unwrap())
        },
        false,
    );
}

#[test]
fn after_an_upgrade_with_a_socket_that_the_daemon_made() {
    restarted(|_| Way::Path, true);
}

#[test]
fn after_an_upgrade_with_a_socket_of_a_parent() {
    restarted(|_| Way::Fd, true);
}

/// One that waits for its predecessor's I/O may end without its disk.
#[test]
fn nobody_can_connect_to_a_daemon_that_has_no_disk_yet() {
    let directory = tempfile::tempdir().unwrap();
    let first = Daemon::with_image(directory.path(), &[]);
    let socket = directory.path().join("second");
    let mut command = Command::new(PROGRAM);
    command.arg("--socket-path").arg(&socket).arg("--format=raw");
    command.arg("--blk-file").arg(directory.path().join("disk.img"));
    let mut second = Daemon::spawn(command, socket.clone());
    second.wait_line("in use; waiting");
    assert!(UnixStream::connect(&socket).is_err());
    drop(first);
    second.wait_line("listening");
    second.connect();
    second.terminate();
}
