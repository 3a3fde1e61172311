//! A queue's thread that does not stop, whatever it is asked.

use nix::sys::signal::Signal;
use std::process::Command;
use testkit::frontend::{F_PROTOCOL_FEATURES, F_VERSION_1};
use testkit::request::IN;
use testkit::ring::running;

use crate::common::{Daemon, PROGRAM, image, sector};

#[test]
fn the_daemon_ends_without_it_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let never = directory.path().join("never");
    let socket = directory.path().join("socket");
    let mut command = Command::new(PROGRAM);
    command.env("VHOST_USER_BLK_FAULT", format!("status:2:{}", never.display()));
    command.arg("--socket-path").arg(&socket).arg("--format=raw");
    command.arg("--blk-file").arg(image(directory.path()));
    // A queue's thread must not look for the file that it waits for.
    command.arg("--sandbox=off");
    let mut daemon = Daemon::spawn(command, socket.clone());
    daemon.wait_line("listening");
    let features = F_VERSION_1 | F_PROTOCOL_FEATURES;
    let (_frontend, memory, mut ring) = running(daemon.connect(), features);
    assert_eq!(ring.read_sector(&memory, 5), sector(5));
    ring.submit(&memory, IN, 6, &[0; 512]);
    ring.kick();
    daemon.wait_line("at a fault point");
    daemon.signal(Signal::SIGTERM);
    let (status, log) = daemon.wait();
    assert_eq!(status, Some(1), "{log}");
    assert!(log.contains("queue-0 does not stop"), "{log}");
    assert!(log.contains("ended as if killed") && log.contains("was flushed"), "{log}");
    assert!(!socket.exists(), "the socket is still there");
}
