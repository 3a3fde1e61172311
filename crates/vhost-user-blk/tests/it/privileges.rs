//! What a daemon gives up before it serves, and that it still does its work.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::unistd::geteuid;

use crate::common::{Daemon, NOBODY, PROGRAM, image, sector, upgrade_ok};
use testkit::frontend::{F_PROTOCOL_FEATURES, F_VERSION_1};
use testkit::ring::running;
use testkit::wait::wait_until;

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
        // It may end meanwhile.
        let text = fs::read_to_string(task.path().join("status")).ok()?;
        let line =
            text.lines().find_map(|line| line.strip_prefix(key)).expect("a line of this key");
        Some(line.trim_start_matches(':').trim().to_owned())
    };
    tasks.filter_map(|task| value(task.unwrap())).collect()
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

/// Capabilities as bits, linux/capability.h.
const FOR_FOREIGN_BASES: u64 = 1 << 28;
const FOR_FOREIGN_FILES: u64 = 1 << 28 | 1 << 3 | 1 << 1;

/// Whether all threads have these capabilities, and their programs can have no others.
fn has_only(daemon: &Daemon, capabilities: u64) {
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        for value in status(daemon.pid(), set) {
            assert_eq!(u64::from_str_radix(&value, 16), Ok(capabilities), "{set}");
        }
    }
}

/// Whether all threads are nobody's, with one group.
fn is_nobodys(daemon: &Daemon) {
    let four = [NOBODY.to_string().as_str(); 4].join("\t");
    for (key, expected) in [("Uid", four.as_str()), ("Gid", &four), ("Groups", "")] {
        assert!(status(daemon.pid(), key).iter().all(|value| value == expected), "{key}");
    }
}

/// A directory that others may enter, with a base, both root's; None, and a word, unless the tests
/// run as root.
fn roots_directory() -> Option<tempfile::TempDir> {
    if !geteuid().is_root() {
        println!("skipped: only root can become another user");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(image(directory.path()), fs::Permissions::from_mode(0o644)).unwrap();
    Some(directory)
}

const TO_NOBODY: [&str; 2] = ["--user=65534", "--group=65534"];

/// On a new COW file over that base.
fn start_cow(directory: &Path, args: &[&str]) -> Daemon {
    let control = format!("--control={}", directory.join("control").display());
    let files = format!("{0}/cow,{0}/disk.img", directory.display());
    Daemon::start(directory, [&[control.as_str(), files.as_str()], args].concat())
}

fn read_and_write(daemon: &Daemon, sector_number: u64) {
    let (_frontend, memory, mut ring) =
        running(daemon.connect(), F_VERSION_1 | F_PROTOCOL_FEATURES);
    assert_eq!(ring.read_sector(&memory, 5), sector(5));
    ring.write_sector(&memory, sector_number, &sector(77));
    assert_eq!(ring.read_sector(&memory, sector_number), sector(77));
}

#[test]
fn a_daemon_becomes_another_user_and_goes_on_through_upgrades() {
    let Some(directory) = roots_directory() else { return };
    let here = directory.path();
    for direct in [&[][..], &["--cow-cache=direct"]] {
        let mut daemon = start_cow(here, &[&TO_NOBODY[..], direct].concat());
        for name in ["cow", "socket", "control"] {
            let found = fs::metadata(here.join(name)).unwrap();
            assert_eq!((found.uid(), found.gid()), (NOBODY, NOBODY), "{name}");
        }
        for round in 0..3 {
            is_nobodys(&daemon);
            has_only(&daemon, FOR_FOREIGN_BASES);
            confined(&daemon);
            read_and_write(&daemon, 20 + round);
            upgrade_ok(here);
        }
        // The lease works that the capability is for. A child that another test is just starting
        // may have the base open: then it comes later.
        wait_until("a report", || {
            drop(fs::File::options().write(true).open(here.join("disk.img")).unwrap());
            daemon.said().contains("OPENED FOR WRITING")
        });
        // The directory is root's.
        let log = daemon.end();
        assert!(log.contains("cannot remove the socket"), "{log}");
    }
}

#[test]
fn its_own_directory_is_left_clean() {
    let Some(directory) = roots_directory() else { return };
    for path in [directory.path(), &directory.path().join("disk.img")] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let daemon = start_cow(directory.path(), &[&TO_NOBODY[..], &["--format=uml"]].concat());
    let side_file = directory.path().join("cow.live");
    assert_eq!(fs::metadata(&side_file).unwrap().uid(), NOBODY);
    upgrade_ok(directory.path());
    has_only(&daemon, 0);
    read_and_write(&daemon, 20);
    let log = daemon.terminate();
    assert!(!side_file.exists() && !log.contains("WARN"), "{log}");
}

#[test]
fn root_keeps_what_it_needs_for_files_of_others_and_nothing_else() {
    let Some(directory) = roots_directory() else { return };
    let here = directory.path();
    let daemon = start_cow(here, &[]);
    has_only(&daemon, 0);
    upgrade_ok(here);
    has_only(&daemon, 0);
    daemon.terminate();
    for path in [here, &here.join("cow"), &here.join("disk.img")] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
    }
    let daemon = start_cow(here, &[]);
    has_only(&daemon, FOR_FOREIGN_FILES);
    // It opens the files again.
    upgrade_ok(here);
    has_only(&daemon, FOR_FOREIGN_FILES);
    read_and_write(&daemon, 20);
    daemon.terminate();
}

#[test]
fn a_user_that_cannot_be_become_or_cannot_open_the_disk_is_refused() {
    let Some(directory) = roots_directory() else { return };
    let here = directory.path();
    start_cow(here, &[]).terminate();
    let refused = |user: u32, args: &[&str], why: &str| {
        let mut command = Command::new(PROGRAM);
        command.arg("--socket-path").arg(here.join("socket")).args(args).uid(user);
        let (status, said) = Daemon::spawn(command, here.join("socket")).wait();
        assert_eq!(status, Some(1), "{said}");
        assert!(said.contains(why), "no {why:?} in {said}");
        assert!(!here.join("new").exists(), "{said}");
    };
    let at = |name: &str| here.join(name).display().to_string();
    let new = format!("{},{}", at("new"), at("disk.img"));
    refused(0, &["--user=no such user", &new], "no such user");
    refused(NOBODY, &["--user=0", &new], "become the user of --user");
    // Now it is root's and opens; its guest could not come.
    fs::set_permissions(here.join("cow"), fs::Permissions::from_mode(0o600)).unwrap();
    refused(0, &[&TO_NOBODY[..], &["--incoming", &at("cow")]].concat(), "cannot open it");
    let mut daemon = start_cow(here, &TO_NOBODY);
    assert!(daemon.said().contains("cannot open it"));
    read_and_write(&daemon, 20);
    daemon.end();
}
