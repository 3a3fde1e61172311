//! What a daemon gives up before it serves, and that it still does its work.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::unistd::geteuid;

use crate::common::{Daemon, NOBODY, PROGRAM, image, upgrade_ok};

/// A directory into which any user may write, with an image that any user may.
fn open_to_all() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(directory.path(), 0o777);
    mode(&image(directory.path()), 0o666);
    directory
}

/// The daemon on that image. If the tests run as root, it is nobody's, so that the owner of its
/// files in /proc shows whether it can be dumped.
fn spawn(directory: &Path, args: &[&str]) -> Daemon {
    let mut command = Command::new(PROGRAM);
    let socket = directory.join("socket");
    command.arg("--socket-path").arg(&socket).arg("--control").arg(directory.join("control"));
    command.arg(format!("--blk-file={}", directory.join("disk.img").display()));
    command.arg("--format=raw").args(args);
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut daemon = Daemon::spawn(command, socket);
    daemon.wait_line("listening");
    daemon
}

/// The value in this line of the status of each thread of a process.
fn status(process: u32, key: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let value = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("status")).unwrap();
        let line =
            text.lines().find_map(|line| line.strip_prefix(key)).expect("a line of this key");
        line.trim_start_matches(':').trim().to_owned()
    };
    tasks.map(|task| value(task.unwrap())).collect()
}

fn confined(daemon: &Daemon) {
    assert!(daemon.threads() > 1);
    assert!(status(daemon.pid(), "NoNewPrivs").iter().all(|value| value == "1"));
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().filter(|word| *word == "0").count(), 2, "{core}");
    assert_eq!(owner(daemon), 0, "it can be dumped");
}

/// The owner of its files in /proc: root if it cannot be dumped.
fn owner(daemon: &Daemon) -> u32 {
    fs::metadata(format!("/proc/{}/environ", daemon.pid())).unwrap().uid()
}

#[test]
fn a_daemon_gains_no_privileges_and_cannot_be_dumped() {
    let directory = open_to_all();
    let daemon = spawn(directory.path(), &[]);
    confined(&daemon);
    upgrade_ok(directory.path());
    confined(&daemon);
    daemon.terminate();
}

#[test]
fn with_the_sandbox_off_it_stays_as_it_was() {
    let directory = open_to_all();
    let daemon = spawn(directory.path(), &["--sandbox=off"]);
    // The tests may run without new privileges themselves.
    let ours = status(std::process::id(), "NoNewPrivs");
    assert!(status(daemon.pid(), "NoNewPrivs").iter().all(|value| *value == ours[0]));
    assert_ne!(owner(&daemon), 0);
    daemon.terminate();
}
