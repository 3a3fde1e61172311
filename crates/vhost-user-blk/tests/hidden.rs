//! What a daemon does where the system shows or gives it less than usual: no /proc, no /proc/sys,
//! no inotify. Namespaces of its own play that, so that nobody else is disturbed.

mod common;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use common::chains::wait_until;
use common::frontend::RawFrontend;
use common::{Daemon, PROGRAM, image};
use vhost::vhost_user::message::FrontendReq;

/// systemd's `ProcSubset=pid`.
const NO_SYS: &str = "mount -t tmpfs none /proc/sys";
/// A chroot without it.
const NO_PROC: &str = "mount -t tmpfs none /proc";
const NO_INOTIFY: &str = "echo 0 >/proc/sys/user/max_inotify_instances";

/// The daemon, with a socket in `directory`, where `hide` has been done before; None, and a word,
/// where that cannot be done.
fn program(directory: &Path, hide: &str, args: &[&str]) -> Option<Command> {
    let within = |program: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c"]);
        command.arg(format!("{hide} && exec \"$@\"")).args(["sh", program]);
        command.current_dir(directory);
        command
    };
    if !within("true").output().is_ok_and(|output| output.status.success()) {
        println!("skipped: no namespace in which to do: {hide}");
        return None;
    }
    let mut command = within(PROGRAM);
    command.args(["--log-level=debug", "--socket-path=socket"]).args(args);
    Some(command)
}

fn refused(command: Command, expected: &[&str]) {
    let (status, said) = Daemon::spawn(command, "socket".into()).wait();
    assert_eq!(status, Some(1), "{said}");
    for text in expected {
        assert!(said.contains(text), "no {text:?} in\n{said}");
    }
}

#[test]
fn a_cow_file_without_a_boot_id_is_refused_with_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    image(directory.path());
    for args in [["new.cow,disk.img", "--format=native"], ["uml.cow,disk.img", "--format=uml"]] {
        let Some(command) = program(directory.path(), NO_SYS, &args) else { return };
        refused(command, &["/proc/sys", "ProcSubset=all"]);
    }
}

#[test]
fn without_proc_direct_io_is_refused_and_all_else_works() {
    let directory = tempfile::tempdir().unwrap();
    image(directory.path());
    let raw = ["--blk-file=disk.img", "--format=raw"];
    let direct = [&raw[..], &["--cow-cache=direct"]].concat();
    let Some(command) = program(directory.path(), NO_PROC, &direct) else { return };
    refused(command, &["disk.img", "direct I/O", "there is no /proc here"]);
    let Some(command) = program(directory.path(), NO_PROC, &raw) else { return };
    let mut daemon = Daemon::spawn(command, directory.path().join("socket"));
    daemon.wait_line("listening");
    let mut frontend = RawFrontend::new(daemon.connect());
    assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
    daemon.terminate();
}

#[test]
fn without_inotify_the_base_is_leased_all_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let base = image(directory.path());
    let Some(command) = program(directory.path(), NO_INOTIFY, &["new.cow,disk.img"]) else {
        return;
    };
    let mut daemon = Daemon::spawn(command, directory.path().join("socket"));
    daemon.wait_line("fs.inotify.max_user_instances");
    daemon.wait_line("listening");
    let refused = |line: &str| line.contains("no lease") && !line.contains("os error 11");
    if daemon.said().lines().any(refused) {
        println!("skipped: no lease on {}", base.display());
    } else {
        // A child that another test is just starting may have the base open: then the lease comes
        // later.
        wait_until("a report", || {
            drop(File::options().read(true).write(true).open(&base).unwrap());
            daemon.said().contains("OPENED FOR WRITING")
        });
        fs::read(&base).unwrap();
    }
    let log = daemon.terminate();
    assert_eq!(
        log.matches("max_user_instances").count(),
        2,
        "one warning, which names it twice\n{log}"
    );
}
