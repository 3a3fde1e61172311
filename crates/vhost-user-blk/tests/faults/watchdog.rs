//! The service manager's watchdog hears of it when a queue's thread is stuck, and only then.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::common::{Daemon, PROGRAM, image, sector};
use testkit::frontend::{F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend};
use testkit::memory::Memory;
use testkit::request::IN;
use testkit::ring::Ring;
use vhost::vhost_user::message::FrontendReq;

/// What the manager waits for a sign of life, in microseconds; one comes after half of that.
const WATCHDOG_USEC: u64 = 40_000;
/// So many times may a sign be due before one can be said not to come.
const SIGNS: u32 = 20;

/// A manager, and its daemon on the image in `directory`, which stops as `fault` says
/// (src/fault.rs).
fn watched(directory: &Path, fault: &str) -> (UnixDatagram, Daemon) {
    let notify = directory.join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let socket = directory.join("socket");
    let mut command = Command::new(PROGRAM);
    command.env("NOTIFY_SOCKET", &notify).env("WATCHDOG_USEC", WATCHDOG_USEC.to_string());
    command.env("VHOST_USER_BLK_FAULT", fault);
    command.arg("--socket-path").arg(&socket).arg("--num-queues=2").arg("--format=raw");
    command.arg("--blk-file").arg(image(directory));
    // A queue's thread must not look for the file that it waits for.
    command.arg("--sandbox=off");
    let mut daemon = Daemon::spawn(command, socket);
    daemon.wait_line("listening");
    (manager, daemon)
}

fn await_sign(manager: &UnixDatagram) {
    let mut bytes = [0; 64];
    loop {
        let len = manager.recv(&mut bytes).expect("no sign of life");
        if bytes[..len] == *b"WATCHDOG=1" {
            return;
        }
    }
}

/// Forgets what has come already.
fn drain(manager: &UnixDatagram) {
    manager.set_nonblocking(true).unwrap();
    while manager.recv(&mut [0; 64]).is_ok() {}
    manager.set_nonblocking(false).unwrap();
}

#[test]
fn no_sign_of_life_comes_while_a_queue_is_stuck() {
    let directory = tempfile::tempdir().unwrap();
    let go_on = directory.path().join("go-on");
    let fault = format!("status:3:{}", go_on.display());
    let (manager, mut daemon) = watched(directory.path(), &fault);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES, PROTOCOL_FEATURES);
    let memory = Memory::default();
    memory.set(&mut frontend);
    let mut rings = [Ring::new(0), Ring::new(1)];
    for ring in &mut rings {
        ring.set_up(&mut frontend);
        ring.enable(&mut frontend, true);
        assert_eq!(ring.read_sector(&memory, 5), sector(5));
    }
    // Both have nothing to do, for longer than the manager would wait.
    drain(&manager);
    (0..SIGNS).for_each(|_| await_sign(&manager));

    let [stuck, other] = &mut rings;
    stuck.submit(&memory, IN, 6, &[0; 512]);
    stuck.kick();
    // On a machine that is busy enough it may have been thought stuck before.
    daemon.wait_line("at a fault point");
    daemon.wait_line("queue-0 is stuck");
    drain(&manager);
    manager.set_nonblocking(true).unwrap();
    for _ in 0..SIGNS {
        std::thread::sleep(Duration::from_micros(WATCHDOG_USEC / 2));
        // The main thread and the other queue are well.
        assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
        assert_eq!(other.read_sector(&memory, 7), sector(7));
        assert!(manager.recv(&mut [0; 64]).is_err(), "a sign of life of a daemon that is stuck");
    }
    manager.set_nonblocking(false).unwrap();

    std::fs::write(go_on, "").unwrap();
    assert_eq!(stuck.wait::<512>(&memory), (0, sector(6)));
    daemon.wait_line("queue-0 makes progress again");
    await_sign(&manager);
    daemon.terminate();
}
