//! What a daemon does where the system shows or gives it less than usual: no /proc, no /proc/sys,
//! no inotify. Namespaces of its own play that, so that nobody else is disturbed.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::common::{Daemon, NOBODY, PROGRAM, image, upgrade_ok};
use testkit::frontend::RawFrontend;
use testkit::wait::wait_until;
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
    refused(command, &["disk.img", "direct I/O", "no /proc here"]);
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

/// A container's own boot id lies over the host's. The daemon reads the host's beneath it, which
/// takes a privilege that its successor does not have.
#[test]
fn a_successor_without_privileges_knows_the_hosts_boot_id() {
    const OWN_ID: &str = "echo 11111111-2222-3333-4444-555555555555 >id &&
        mount --bind id /proc/sys/kernel/random/boot_id";
    let directory = tempfile::tempdir().unwrap();
    image(directory.path());
    let args = ["--control=control", "new.cow,disk.img"];
    let Some(command) = program(directory.path(), OWN_ID, &args) else { return };
    let mut daemon = Daemon::spawn(command, directory.path().join("socket"));
    daemon.wait_line("listening");
    const WARNING: &str = "is the container's and not the host's";
    if daemon.said().contains(WARNING) {
        println!("skipped: the host's boot id cannot be read here");
        return;
    }
    for _ in 0..2 {
        upgrade_ok(directory.path());
    }
    let log = daemon.terminate();
    assert!(!log.contains(WARNING), "{log}");
}

/// Comes before the C library's: a file system that has no locks, or none that are shared.
const LOCKLESS: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int fcntl(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (command == F_OFD_SETLK) {
        struct flock *lock = argument;
        if (lock->l_type == F_RDLCK || getenv("NO_LOCKS")) {
            errno = ENOLCK;
            return -1;
        }
    }
    return syscall(SYS_fcntl, fd, command, argument);
}

int fcntl64(int fd, int command, ...) __attribute__((alias("fcntl")));
"#;

/// The daemon on a file system without locks; None, and a word, where there is no C compiler.
fn without_locks(directory: &Path, all: bool, args: &[&str]) -> Option<Command> {
    let (source, library) = (directory.join("lockless.c"), directory.join("lockless.so"));
    fs::write(&source, LOCKLESS).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
    if !compiler.status().is_ok_and(|status| status.success()) {
        println!("skipped: no C compiler");
        return None;
    }
    let mut command = Command::new(PROGRAM);
    command.current_dir(directory).env("LD_PRELOAD", library).args(["--socket-path=socket"]);
    command.args(args).arg("--control=control");
    if all {
        command.env("NO_LOCKS", "1");
    }
    Some(command)
}

#[test]
fn a_base_that_cannot_be_locked_is_a_warning() {
    let directory = tempfile::tempdir().unwrap();
    image(directory.path());
    let args = ["new.cow,disk.img"];
    let Some(command) = without_locks(directory.path(), false, &args) else { return };
    let mut daemon = Daemon::spawn(command, directory.path().join("socket"));
    assert!(daemon.wait_line("has no locks").contains("disk.img"));
    daemon.wait_line("listening");
    let log = daemon.terminate();
    assert!(!log.contains("new.cow: its file system"), "{log}");
}

#[test]
fn a_disk_that_cannot_be_locked_is_refused_unless_that_is_allowed() {
    let directory = tempfile::tempdir().unwrap();
    image(directory.path());
    for args in [&["new.cow,disk.img"][..], &["--blk-file=disk.img", "--format=raw"]] {
        let Some(command) = without_locks(directory.path(), true, args) else { return };
        refused(command, &["no locks", "destroy", "--allow-unlocked"]);
        let allowed = [args, &["--allow-unlocked"]].concat();
        let Some(command) = without_locks(directory.path(), true, &allowed) else { return };
        let mut daemon = Daemon::spawn(command, directory.path().join("socket"));
        daemon.wait_line("would destroy it");
        daemon.wait_line("listening");
        upgrade_ok(directory.path());
        let mut frontend = RawFrontend::new(daemon.connect());
        assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
        daemon.terminate();
    }
}

#[test]
fn a_uml_file_in_a_directory_that_is_not_to_be_written_is_refused_with_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    image(here);
    let files = format!("{0}/uml.cow,{0}/disk.img", here.display());
    Daemon::start(here, ["--format=uml", &files]).terminate();
    let owned = std::os::unix::fs::chown(here.join("uml.cow"), Some(NOBODY), Some(NOBODY));
    let opened = fs::set_permissions(here, fs::Permissions::from_mode(0o755));
    if owned.and(opened).is_err() {
        println!("skipped: cannot give a file to another user");
        return;
    }
    let elsewhere = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(elsewhere.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let program = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.uid(NOBODY).gid(NOBODY).current_dir(here).args(args);
        command.arg("--socket-path").arg(elsewhere.path().join("socket")).arg("uml.cow");
        command
    };
    refused(program(&[]), &["uml.cow.live", "directory", "native", "read-only"]);
    let mut daemon = Daemon::spawn(program(&["--read-only"]), elsewhere.path().join("socket"));
    daemon.wait_line("listening");
    daemon.terminate();
}
