//! The two engines that do the I/O, and hosts that refuse io_uring.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use crate::common::{Daemon, PROGRAM, image, outcome, sector, upgrade, without_io_uring};
use testkit::frontend::{
    F_FLUSH, F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend,
};
use testkit::memory::Memory;
use testkit::request::FLUSH;
use testkit::ring::{Ring, running};
use testkit::wait::wait_until;
use vhost::vhost_user::message::FrontendReq;

const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH;
/// What the threads of the engine without io_uring are called.
const THREAD: &str = "block-io";
/// Bytes: more than what `inline_write` takes, less than what a ring of the tests has for data.
const LONG: usize = 40 << 10;

fn command(directory: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    let at = directory.display();
    command.arg(format!("--socket-path={at}/socket")).arg(format!("--control={at}/control"));
    command.arg(format!("--upgrade-dir={at}"));
    command.args(args).arg(format!("{at}/cow,{}", image(directory).display()));
    command
}

fn spawn(directory: &Path, command: Command) -> Daemon {
    Daemon::spawn_as_is(command, directory.join("socket"))
}

/// Reads what the base holds, writes something that is too long for the queue's own thread,
/// flushes, and reads it back.
fn serves(memory: &Memory, ring: &mut Ring) {
    assert_eq!(ring.read_sector(memory, 7), sector(7));
    let long: Vec<u8> = (0..LONG).map(|i| u8::try_from(i % 251).unwrap()).collect();
    ring.submit(memory, testkit::request::OUT, 16, &long);
    ring.kick();
    assert_eq!(ring.wait::<0>(memory).0, 0);
    ring.submit(memory, FLUSH, 0, &[]);
    ring.kick();
    assert_eq!(ring.wait::<0>(memory).0, 0);
    let read = ring.read_sector(memory, 17);
    assert_eq!(read[..], long[512..1024]);
    ring.write_sector(memory, 17, &sector(17));
}

fn connect(daemon: &Daemon) -> (RawFrontend, Memory, Ring) {
    running(daemon.connect(), FEATURES)
}

#[test]
fn where_io_uring_is_refused_threads_serve_and_one_warning_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon =
        spawn(directory.path(), without_io_uring(command(directory.path(), &["--num-queues=2"])));
    daemon.wait_line("listening");
    for _ in 0..2 {
        let (frontend, memory, mut ring) = connect(&daemon);
        serves(&memory, &mut ring);
        assert!(daemon.threads_named(THREAD) > 0);
        drop(frontend);
        wait_until("the end of its threads", || daemon.threads_named(THREAD) == 0);
    }
    let log = daemon.terminate();
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("io_uring")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    assert!(warnings[0].contains("Operation not permitted") && warnings[0].contains("seccomp"));
}

#[test]
fn whoever_asks_for_io_uring_gets_it_or_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let args = ["--io-engine=io_uring"];
    let daemon = spawn(directory.path(), without_io_uring(command(directory.path(), &args)));
    let (status, log) = daemon.wait();
    assert_eq!(status, Some(1), "{log}");
    assert!(
        log.contains("--io-engine=io_uring: cannot make one: Operation not permitted"),
        "{log}"
    );
    assert!(log.contains("--io-engine=sync"), "{log}");
    assert!(!directory.path().join("cow").exists(), "a COW file was made");
    assert!(!directory.path().join("socket").exists(), "the socket was left");
}

#[test]
fn an_upgrade_keeps_the_engine_that_was_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut daemon = spawn(directory, command(directory, &["--io-engine=sync"]));
    daemon.wait_line("listening");
    let (_frontend, memory, mut ring) = connect(&daemon);
    serves(&memory, &mut ring);
    let (status, said) = outcome(upgrade(directory, &[]));
    assert_eq!(status, Some(0), "{said}");
    serves(&memory, &mut ring);
    assert!(daemon.threads_named(THREAD) > 0);
    let log = daemon.terminate();
    assert!(!log.contains("WARN"), "{log}");
}

/// The successor, and its rehearsal, are refused io_uring as the daemon was.
#[test]
fn a_successor_that_gets_no_ring_falls_back_or_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut daemon = spawn(directory, without_io_uring(command(directory, &[])));
    daemon.wait_line("listening");
    let (_frontend, memory, mut ring) = connect(&daemon);
    serves(&memory, &mut ring);

    let wants_it = directory.join("wants-it");
    let text = format!("#!/bin/sh\nexec {PROGRAM} \"$@\" --io-engine=io_uring\n");
    fs::write(&wants_it, text).unwrap();
    fs::set_permissions(&wants_it, fs::Permissions::from_mode(0o755)).unwrap();
    let program = format!("--program={}", wants_it.display());
    let (status, said) = outcome(upgrade(directory, &[&program]));
    assert_eq!(status, Some(1), "{said}");
    assert!(
        said.contains("Operation not permitted") && said.contains("continues unchanged"),
        "{said}"
    );
    serves(&memory, &mut ring);

    let (status, said) = outcome(upgrade(directory, &[]));
    assert_eq!(status, Some(0), "{said}");
    serves(&memory, &mut ring);
    let log = daemon.terminate();
    // The daemon's own, and the successor's; none of a rehearsal.
    assert_eq!(log.matches("io_uring cannot be used").count(), 2, "{log}");
}

/// The descriptors that are io_urings, by number.
fn urings(daemon: &Daemon) -> BTreeSet<String> {
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let files = files.map(|file| file.unwrap().path());
    let urings = files.filter(|file| {
        // One may be closed meanwhile.
        fs::read_link(file).is_ok_and(|link| link.as_os_str() == "anon_inode:[io_uring]")
    });
    urings.map(|file| file.display().to_string()).collect()
}

/// After its start a daemon needs to make none, so it can be forbidden to.
#[test]
fn each_queue_uses_the_io_uring_and_the_thread_that_it_had_first() {
    const QUEUES: usize = 3;
    let directory = tempfile::tempdir().unwrap();
    let mut daemon =
        spawn(directory.path(), command(directory.path(), &[&format!("--num-queues={QUEUES}")]));
    daemon.wait_line("listening");
    let before = urings(&daemon);
    if before.is_empty() {
        println!("skipped: no io_uring here");
        return;
    }
    assert_eq!(before.len(), QUEUES);
    let mut thread = None;
    for _ in 0..3 {
        let (mut frontend, memory, mut ring) = connect(&daemon);
        for _ in 0..20 {
            serves(&memory, &mut ring);
            let found = daemon.thread_named("queue-0");
            assert_eq!(*thread.get_or_insert(found), found);
            assert_eq!(urings(&daemon), before);
            ring.enable(&mut frontend, false);
            ring.enable(&mut frontend, true);
        }
    }
    assert_eq!(daemon.threads_named("queue-1"), 0, "a thread for a queue that was not used");
    daemon.terminate();
}

/// What a ring had registered would otherwise be kept open, and with it a frontend's memory or its
/// end of a pipe.
#[test]
fn a_ring_that_was_stopped_has_given_up_the_frontends_descriptors() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
    let (memory, ring) = (Memory::default(), Ring::new(0));
    memory.set(&mut frontend);
    ring.set_up(&mut frontend);
    let (kick, mut watched) = UnixStream::pair().unwrap();
    frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &kick);
    drop(kick);
    ring.enable(&mut frontend, true);
    frontend.get_vring_base(0);
    // The end of the stream.
    assert_eq!(watched.read(&mut [0]).unwrap(), 0);
    daemon.terminate();
}
