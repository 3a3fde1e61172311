//! The daemon as a service: what it tells the manager, and the socket it is passed.

use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use crate::common::{Daemon, PROGRAM, image, upgrade_ok};
use nix::sys::signal::Signal;
use testkit::frontend::{F_PROTOCOL_FEATURES, F_VERSION_1, RawFrontend};
use vhost::vhost_user::message::FrontendReq;

/// What the manager hears next.
fn hear(manager: &UnixDatagram) -> String {
    let mut bytes = [0; 256];
    let len = manager.recv(&mut bytes).expect("the daemon says nothing");
    String::from_utf8(bytes[..len].to_vec()).unwrap()
}

#[test]
fn the_manager_is_told_of_readiness_life_and_end() {
    let directory = tempfile::tempdir().unwrap();
    let notify = directory.path().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let socket = directory.path().join("socket");
    let mut command = Command::new(PROGRAM);
    command.env("NOTIFY_SOCKET", &notify).env("WATCHDOG_USEC", "40000");
    command.arg("--socket-path").arg(&socket).arg("--format=raw");
    command.arg("--control").arg(directory.path().join("control"));
    command.arg("--blk-file").arg(image(directory.path()));
    let daemon = Daemon::spawn(command, socket);
    assert_eq!(hear(&manager), "READY=1\nSTATUS=serving");
    // With nobody connected, and with a frontend that says nothing.
    for _ in 0..3 {
        assert_eq!(hear(&manager), "WATCHDOG=1");
    }
    let mut frontend = RawFrontend::new(daemon.connect());
    assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
    for _ in 0..3 {
        assert_eq!(hear(&manager), "WATCHDOG=1");
    }
    // A frontend that stops in the middle of a message is not the daemon's fault.
    frontend.send_half(FrontendReq::SET_FEATURES);
    for _ in 0..3 {
        assert_eq!(hear(&manager), "WATCHDOG=1");
    }
    // Another program in the same process is no other service.
    upgrade_ok(directory.path());
    while hear(&manager) != "READY=1\nSTATUS=serving" {}
    // The rest of the message comes to the new program.
    frontend.stream.write_all(&[0; 6]).unwrap();
    assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
    for _ in 0..3 {
        assert_eq!(hear(&manager), "WATCHDOG=1");
    }
    daemon.signal(Signal::SIGTERM);
    while hear(&manager) != "STOPPING=1" {}
    assert_eq!(daemon.wait().0, Some(0));
}

#[test]
fn a_manager_that_is_not_there_is_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut command = Command::new(PROGRAM);
    command.env("NOTIFY_SOCKET", directory.path().join("nobody"));
    command.arg("--socket-path").arg(&socket).arg("--format=raw");
    command.arg("--blk-file").arg(image(directory.path()));
    let mut daemon = Daemon::spawn(command, socket);
    daemon.wait_line("cannot notify the service manager");
    daemon.wait_line("listening");
    daemon.terminate();
}

#[test]
fn a_socket_that_the_manager_opened_is_served_and_left() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    // A process knows its own id only when it runs.
    let mut command = Command::new("sh");
    command.args(["-c", "LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"", "sh", PROGRAM]);
    command.arg("--format=raw").arg("--blk-file").arg(image(directory.path()));
    command.arg("--control").arg(directory.path().join("control"));
    let passed = OwnedFd::from(listener.try_clone().unwrap());
    // SAFETY: the closure makes two system calls, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            let there = libc::dup2(passed.as_raw_fd(), 3) == 3;
            // Where it had that number before, it would be closed.
            let stays = libc::fcntl(3, libc::F_SETFD, 0) == 0;
            if there && stays { Ok(()) } else { Err(ErrorKind::Other.into()) }
        });
    }
    let daemon = Daemon::spawn(command, socket.clone());
    for _ in 0..2 {
        let mut frontend = RawFrontend::new(daemon.connect());
        let features = frontend.get_u64(FrontendReq::GET_FEATURES);
        assert_eq!(features & F_VERSION_1, F_VERSION_1);
        assert_eq!(features & F_PROTOCOL_FEATURES, F_PROTOCOL_FEATURES);
        upgrade_ok(directory.path());
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().0, Some(0));
    // It is the manager's.
    assert!(socket.exists());
}
