//! SET_LOG_FD: the frontend is told when the dirty log is written.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;

use crate::common::{Daemon, upgrade_ok};
use testkit::dirty_log::Log;
use testkit::frontend::{
    F_EVENT_IDX, F_FLUSH, F_LOG_ALL, F_PROTOCOL_FEATURES, F_VERSION_1, RawFrontend, message,
};
use testkit::memory::{Memory, PAGE};
use testkit::queue::{Queue, running};
use testkit::wait::wait_until;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH | F_EVENT_IDX;

fn call() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn set_log_fd(frontend: &mut RawFrontend, call: &EventFd) {
    frontend.send(FrontendReq::SET_LOG_FD, &[], &[call.as_raw_fd()]);
}

/// Has the ring answer a request, waits for the call, and looks whether the log has it then.
fn rings(memory: &Memory, queue: &mut Queue, status: u64, call: &EventFd, log: &Log) {
    queue.offer(memory, 0);
    // The marks of a buffer come before those of its answer, and all of them before the call.
    let mut marked = BTreeSet::new();
    wait_until("the call", || {
        let rang = call.read().is_ok();
        if rang {
            marked.extend(log.take());
        }
        rang && marked.contains(&(status / PAGE))
    });
    queue.wait(memory);
}

#[test]
fn the_bell_rings_when_the_log_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let (mut frontend, memory, mut queue, status) = running(daemon.connect(), FEATURES);
    let (first, second) = (call(), call());
    // Before there is a log.
    set_log_fd(&mut frontend, &first);
    queue.offer(&memory, 0);
    queue.wait(&memory);
    let log = memory.log();
    log.set(&mut frontend);
    // Acknowledged: whatever could have rung has.
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES);
    assert!(first.read().is_err(), "it rings without a log");
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
    for _ in 0..3 {
        rings(&memory, &mut queue, status, &first, &log);
    }
    // Another one in the middle of it.
    set_log_fd(&mut frontend, &second);
    let _ = first.read();
    for _ in 0..3 {
        rings(&memory, &mut queue, status, &second, &log);
    }
    assert!(first.read().is_err(), "the old call rings");
    // Without a log, and so without a call.
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES);
    let _ = second.read();
    queue.offer(&memory, 0);
    queue.wait(&memory);
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES);
    assert!(second.read().is_err(), "it rings without a log");
    daemon.terminate();
}

#[test]
fn a_daemon_that_was_upgraded_knows_the_bell() {
    let directory = tempfile::tempdir().unwrap();
    let control = format!("--control={}/control", directory.path().display());
    let daemon = Daemon::with_image(directory.path(), &[&control]);
    let (mut frontend, memory, mut queue, status) = running(daemon.connect(), FEATURES);
    let call = call();
    set_log_fd(&mut frontend, &call);
    upgrade_ok(directory.path());
    let log = memory.log();
    log.set(&mut frontend);
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
    rings(&memory, &mut queue, status, &call, &log);
    daemon.terminate();
}

#[test]
fn a_bell_that_nobody_empties_holds_nobody_up() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let (mut frontend, memory, mut queue, _) = running(daemon.connect(), FEATURES);
    let full = EventFd::new(0).unwrap();
    full.write(u64::MAX - 1).unwrap();
    memory.log().set(&mut frontend);
    set_log_fd(&mut frontend, &full);
    frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | F_LOG_ALL);
    for _ in 0..5 {
        queue.offer(&memory, 0);
        queue.wait(&memory);
    }
    daemon.terminate();
}

#[test]
fn no_descriptor_is_left_open() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut before = None;
    for round in 0..40 {
        let (mut frontend, _memory, _queue, _) = running(daemon.connect(), FEATURES);
        for _ in 0..3 {
            set_log_fd(&mut frontend, &call());
        }
        let file = call();
        let many = vec![file.as_raw_fd(); 100];
        let (request, body) = (FrontendReq::SET_LOG_FD.into(), [0; 8]);
        let refused = match round % 3 {
            // None at all, too many, and one with a body.
            0 => (message(request, 1, &[]), &many[..0]),
            1 => (message(request, 1, &[]), &many[..]),
            _ => (message(request, 1, &body), &many[..1]),
        };
        frontend.send_raw(&refused.0, refused.1);
        daemon.closes(frontend, "SET_LOG_FD");
        let before = *before.get_or_insert_with(|| daemon.open_files());
        // A thread closes what was refused.
        wait_until(&format!("{before} after round {round}"), || daemon.open_files() == before);
    }
    daemon.terminate();
}
