//! Bad command lines and bad files: a clear message, the right status, and nothing changed on disk.

use std::ffi::OsString;
use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::{Command, Output};

use crate::common::{Daemon, PROGRAM, image, with_fd};

/// Every name under `directory`, with kind and content.
fn snapshot(directory: &Path) -> Vec<(OsString, fs::FileType, Option<Vec<u8>>)> {
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name(), entry.file_type().unwrap(), fs::read(entry.path()).ok())
    };
    let mut all: Vec<_> = fs::read_dir(directory).unwrap().map(entry).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// Runs the program in `directory`, where it must fail and change nothing.
fn refused(directory: &Path, mut command: Command, status: i32, expected: &[&str]) {
    let before = snapshot(directory);
    let Output { status: found, stdout, stderr } = command.current_dir(directory).output().unwrap();
    let message = String::from_utf8(stderr).unwrap();
    assert_eq!(found.code(), Some(status), "{message}");
    assert!(stdout.is_empty());
    for text in expected {
        assert!(message.contains(text), "no {text:?} in: {message}");
    }
    assert_eq!(snapshot(directory), before, "{message}");
}

fn program(args: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(args);
    command
}

#[test]
fn help_and_version_and_capabilities() {
    let text = |args: &[&str]| {
        let output = program(args).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stderr.is_empty());
        String::from_utf8(output.stdout).unwrap()
    };
    let help = text(&["--help"]);
    for option in [
        "--socket-path",
        "--fd",
        "--blk-file",
        "--format",
        "--read-only",
        "--num-queues",
        "--queue-size",
        "--serial",
        "--base-cache",
        "--cow-cache",
        "--allow-uid",
        "--allow-gid",
        "--upgrade-dir",
        "--user",
        "--group",
        "--poll-us",
        "--sandbox",
        "--log-level",
        "--print-capabilities",
        "COW[,BASE]",
        "Examples:",
    ] {
        assert!(help.contains(option), "no {option} in\n{help}");
    }
    assert!(text(&["--version"]).starts_with("vhost-user-blk "));
    let expected = "{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n";
    assert_eq!(text(&["--print-capabilities"]), expected);
    assert_eq!(text(&["--fd=x", "--print-capabilities", "--bad", "a", "b"]), expected);
}

#[test]
fn wrong_usage() {
    let directory = tempfile::tempdir().unwrap();
    image(directory.path());
    let cases: [(&[&str], &[&str]); 6] = [
        (&[], &["--socket-path", "--fd"]),
        (&["disk.img"], &["--socket-path", "--fd"]),
        (&["--socket-path=s"], &["COW[,BASE]", "--blk-file"]),
        (&["--socket-path=s", "--fd=100", "a.cow"], &["--fd", "cannot be used"]),
        (&["--socket-path=s", "a.cow", "--blk-file=b"], &["--blk-file", "cannot be used"]),
        (&["--socket-path=s", "a.cow,disk.img", "--queue-size=100"], &["--queue-size", "100"]),
    ];
    for (args, expected) in cases {
        refused(directory.path(), program(args), 2, expected);
    }
}

#[test]
fn what_a_header_names_elsewhere_is_refused_with_the_option_that_allows_it() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    image(here);
    fs::create_dir(here.join("vms")).unwrap();
    let serves = |args: &[&str]| {
        let mut command = program(args);
        command.current_dir(here);
        let mut daemon = Daemon::spawn(command, here.join("s"));
        daemon.wait_line("listening");
        daemon.terminate();
    };
    serves(&["--socket-path=s", "vms/cow,disk.img"]);
    let dir = fs::canonicalize(here).unwrap();
    let hint = format!("--backing-dir={}, or give the files below: COW,", dir.display());
    let alone = ["--socket-path=s", "vms/cow"];
    refused(here, program(&alone), 1, &["vms/cow: its header names", "disk.img", &hint]);
    let gone = [&alone[..], &["--backing-dir=gone"]].concat();
    refused(here, program(&gone), 2, &["--backing-dir: gone", "No such file"]);
    serves(&[&alone[..], &["--backing-dir=."]].concat());
}

#[test]
fn a_socket_path_that_cannot_be_used_makes_no_cow_file() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    image(here);
    let _alive = UnixListener::bind(here.join("alive")).unwrap();
    fs::write(here.join("file"), "text").unwrap();
    fs::create_dir(here.join("directory")).unwrap();
    symlink("alive", here.join("link")).unwrap();
    let long = "x".repeat(108);
    let cases: [(&str, i32, &[&str]); 6] = [
        ("alive", 1, &["--socket-path: alive", "another process is listening"]),
        ("file", 1, &["--socket-path: file", "a regular file", "not a socket"]),
        ("directory", 1, &["--socket-path: directory", "a directory"]),
        ("link", 1, &["--socket-path: link", "a symbolic link"]),
        ("nowhere/socket", 1, &["--socket-path: nowhere/socket", "No such file or directory"]),
        (&long, 2, &["108 bytes", "107", "shorter"]),
    ];
    for (path, status, expected) in cases {
        let socket = format!("--socket-path={path}");
        refused(here, program(&[&socket, "new.cow,disk.img"]), status, expected);
    }
}

#[test]
fn a_descriptor_that_is_no_fit_socket() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let image = image(here);
    let args = ["new.cow,disk.img"];
    let file = fs::File::open(&image).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    let unconnected = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let cases: [(OwnedFd, &str); 4] = [
        (file.into(), "not a socket"),
        (tcp.into(), "not a unix socket"),
        (datagram.into(), "not a stream socket"),
        (unconnected, "neither listens nor is connected"),
    ];
    for (fd, expected) in cases {
        refused(here, with_fd(program(&args), fd), 2, &["--fd=100", expected]);
    }
    refused(here, program(&["--fd=77", "new.cow,disk.img"]), 2, &["--fd=77", "not open"]);
    refused(here, program(&["--fd=-1", "new.cow,disk.img"]), 2, &["--fd=-1"]);
}

#[test]
fn a_disk_that_cannot_be_opened_leaves_no_socket() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    image(here);
    fs::create_dir(here.join("directory")).unwrap();
    fs::write(here.join("empty"), "").unwrap();
    fs::write(here.join("image.qcow2"), b"QFI\xfb and more").unwrap();
    fs::write(here.join("other.cow"), [b"\x89COW\r\n\x1a\n".as_slice(), &[0; 4096]].concat())
        .unwrap();
    let cases: [(&[&str], &[&str]); 12] = [
        (&["new.cow"], &["new.cow"]),
        (&["new.cow,image.qcow2"], &["image.qcow2", "qcow2", "cow create"]),
        (&["new.cow,other.cow"], &["other.cow", "COW file", "cow create"]),
        (&["new.cow,missing"], &["missing", "No such file or directory"]),
        (&["new.cow,directory"], &["directory"]),
        (&["nowhere/new.cow,disk.img"], &["nowhere"]),
        (&["--read-only", "new.cow,disk.img"], &["new.cow"]),
        (&["disk.img,disk.img"], &["disk.img"]),
        (&["empty"], &["empty"]),
        (&["--blk-file=missing", "--format=raw"], &["missing", "No such file or directory"]),
        (&["--blk-file=disk.img"], &["disk.img", "--format=raw"]),
        (&["--blk-file=directory", "--format=raw"], &["directory"]),
    ];
    for (args, expected) in cases {
        let mut command = program(&["--socket-path=socket"]);
        command.args(args);
        refused(here, command, 1, expected);
    }
}

#[test]
fn a_cow_file_is_of_the_format_that_was_named() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let base = image(here);
    let spec = format!("{},{}", here.join("uml.cow").display(), base.display());
    crate::common::Daemon::start(here, [&spec, "--format=uml"]).terminate();
    for args in [["uml.cow", "--format=native"], ["--blk-file=uml.cow", "--format=native"]] {
        let mut command = program(&["--socket-path=socket"]);
        command.args(args);
        refused(here, command, 1, &["uml.cow", "--format", "Uml", "Native"]);
    }
    let blk_file = format!("--blk-file={}", here.join("uml.cow").display());
    crate::common::Daemon::start(here, [&blk_file, "--format=uml"]).terminate();
    crate::common::Daemon::start(here, [&blk_file]).terminate();
}

#[test]
fn one_daemon_for_one_cow_file() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let base = image(here);
    let spec = format!("{},{}", here.join("a.cow").display(), base.display());
    let daemon = crate::common::Daemon::start(here, [&spec]);
    let args = ["--socket-path=other", &spec];
    let Output { status, stderr, .. } = program(&args).current_dir(here).output().unwrap();
    assert_eq!(status.code(), Some(1));
    let message = String::from_utf8(stderr).unwrap();
    assert!(message.contains("a.cow"), "{message}");
    assert!(!here.join("other").exists());
    // The base is there for others.
    let second = format!("{},{}", here.join("b.cow").display(), base.display());
    let other = tempfile::tempdir().unwrap();
    crate::common::Daemon::start(other.path(), [&second]).terminate();
    daemon.terminate();
}
