//! The sandbox as a whole. What each thread may do in it: `tests/faults/foreign_code.rs`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::common::{
    Daemon, PROGRAM, SECTORS, has_landlock, image, outcome, sector, upgrade, upgrade_ok,
};
use testkit::frontend::{F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend};
use testkit::memory::Memory;
use testkit::ring::Ring;
use testkit::wait::wait_until;

/// With a base, so that there is a thread that watches it.
fn start(directory: &Path, args: &[&str]) -> Daemon {
    let mut command = Command::new(PROGRAM);
    let at = directory.display();
    command.arg(format!("--socket-path={at}/socket")).arg(format!("--control={at}/control"));
    command.arg(format!("--upgrade-dir={at}")).arg("--log-level=debug").args(args);
    command.arg(format!("{at}/cow,{}", image(directory).display()));
    let mut daemon = Daemon::spawn(command, directory.join("socket"));
    daemon.wait_line("listening");
    daemon
}

fn connect(daemon: &Daemon) -> (RawFrontend, Memory, Ring) {
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES, PROTOCOL_FEATURES);
    let memory = Memory::default();
    memory.set(&mut frontend);
    let mut ring = Ring::new(0);
    ring.set_up(&mut frontend);
    ring.enable(&mut frontend, true);
    assert_eq!(ring.read_sector(&memory, 5), sector(5));
    (frontend, memory, ring)
}

/// The number of filters of each thread, sorted by the thread's name, without those of the engine
/// that has threads.
fn filters(daemon: &Daemon) -> Vec<(String, u32)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let filters = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("status")).unwrap();
        let value = |key: &str| {
            let found = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            found.trim().to_owned()
        };
        (value("Name:"), value("Seccomp_filters:").parse().unwrap())
    };
    let mut found: Vec<_> = tasks.map(|task| filters(task.unwrap())).collect();
    found.retain(|(name, _)| name != "block-io");
    found.sort();
    found
}

fn ours() -> u32 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let found = text.lines().find_map(|line| line.strip_prefix("Seccomp_filters:")).unwrap();
    found.trim().parse().unwrap()
}

#[test]
fn every_thread_has_its_filter_and_upgrades_add_none() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = start(directory.path(), &[]);
    let (_frontend, memory, mut ring) = connect(&daemon);
    // A thread gets its name and its filters when it runs.
    let own = |name: &str| (name.to_owned(), ours() + 4);
    let main = ("vhost-user-blk".to_owned(), ours() + 2);
    let expected = [own("base-watch"), own("committer"), own("queue-0"), main];
    wait_until("the filters", || filters(&daemon) == expected);
    // More than Landlock could be entered.
    for _ in 0..20 {
        upgrade_ok(directory.path());
    }
    assert_eq!(ring.read_sector(&memory, 6), sector(6));
    wait_until("the filters", || filters(&daemon) == expected);
    let log = daemon.terminate();
    assert_eq!(log.matches("sandbox: files ").count(), 1, "{log}");
}

#[test]
fn without_the_sandbox_there_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = start(directory.path(), &["--sandbox=off"]);
    assert!(filters(&daemon).iter().all(|(_, filters)| *filters == ours()));
    upgrade_ok(directory.path());
    assert!(filters(&daemon).iter().all(|(_, filters)| *filters == ours()));
    daemon.terminate();
}

#[test]
fn a_program_that_needs_what_is_forbidden_does_not_take_over() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = start(directory.path(), &[]);
    let (_frontend, memory, mut ring) = connect(&daemon);
    let program = |name: &str, text: &str| {
        let path = directory.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let program = format!("--program={}", path.display());
        let (status, said) = outcome(upgrade(directory.path(), &[&program]));
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains("the daemon continues unchanged"), "{said}");
        said
    };
    let said = program("calls", "exec mkdir made");
    assert!(said.contains("a system call that the sandbox"), "{said}");
    if has_landlock() {
        let said = program("writes", "echo >made || exit 44");
        assert!(said.contains("exit status: 44"), "{said}");
    }
    assert!(!directory.path().join("made").exists() && !Path::new("made").exists());
    assert_eq!(ring.read_sector(&memory, 6), sector(6));
    upgrade_ok(directory.path());
    assert_eq!(ring.read_sector(&memory, SECTORS - 1), sector(SECTORS - 1));
    daemon.terminate();
}

#[test]
fn a_log_only_sandbox_serves_and_upgrades() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = start(directory.path(), &["--sandbox=log"]);
    let (_frontend, memory, mut ring) = connect(&daemon);
    assert!(filters(&daemon).iter().all(|(_, filters)| *filters > ours()));
    upgrade_ok(directory.path());
    assert_eq!(ring.read_sector(&memory, 6), sector(6));
    daemon.terminate();
}
