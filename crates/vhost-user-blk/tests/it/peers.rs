//! Which frontends are let in, and which of them is served.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use nix::unistd::geteuid;
use testkit::frontend::RawFrontend;
use testkit::wait::{PATIENCE, is_readable};
use vhost::vhost_user::message::FrontendReq;

use crate::common::{Daemon, NOBODY, PROGRAM, image, upgrade_ok, with_fd};

/// A group that the other user is also in.
const GROUP: u32 = 4242;

fn frontend(daemon: &Daemon) -> RawFrontend {
    RawFrontend::new(daemon.connect())
}

fn is_served(frontend: &mut RawFrontend) {
    assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
}

/// A connection of nobody's, with one more group, from a thread that becomes that user.
fn connect_as_nobody(socket: &Path) -> UnixStream {
    let connect = || {
        let (one, group) = (1usize, GROUP);
        // SAFETY: unlike the functions of the C library these change the calling thread only; the
        // list has one element.
        let results = unsafe {
            [
                libc::syscall(libc::SYS_setgroups, one, &raw const group),
                libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY),
                libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY),
            ]
        };
        assert_eq!(results, [0; 3], "{}", Errno::last());
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    std::thread::scope(|scope| scope.spawn(connect).join().unwrap())
}

/// A daemon to whose socket everybody can connect; None, and a word, unless the tests run as root.
fn open_to_all(directory: &Path, args: &[&str]) -> Option<Daemon> {
    if !geteuid().is_root() {
        println!("skipped: only root can be another user");
        return None;
    }
    let daemon = Daemon::with_image(directory, args);
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&daemon.socket, fs::Permissions::from_mode(0o666)).unwrap();
    Some(daemon)
}

#[test]
fn the_log_says_who_connects() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    is_served(&mut frontend(&daemon));
    let line = daemon.wait_line("frontend connected");
    let user = geteuid();
    assert!(line.contains(&format!("user {user}, ")), "{line}");
    assert!(line.contains(&format!("process {}", std::process::id())), "{line}");
    daemon.terminate();
}

#[test]
fn who_says_nothing_is_replaced_and_who_owns_the_disk_is_not() {
    let directories = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let kept = Daemon::with_image(directories[0].path(), &[]);
    let mut daemon = Daemon::with_image(directories[1].path(), &[]);
    let mut owner = frontend(&kept);
    owner.send(FrontendReq::SET_OWNER, &[], &[]);
    is_served(&mut owner);
    let mut waiting = frontend(&kept);
    waiting.send(FrontendReq::GET_FEATURES, &[], &[]);

    // One has asked something, one stops in the middle of a message, the others are silent.
    let mut first = frontend(&daemon);
    is_served(&mut first);
    let mut half = frontend(&daemon);
    half.send_half(FrontendReq::SET_FEATURES);
    let silent: Vec<_> = (0..20).map(|_| frontend(&daemon)).collect();
    let mut speaks = frontend(&daemon);
    speaks.send(FrontendReq::SET_OWNER, &[], &[]);
    is_served(&mut speaks);
    for replaced in silent.into_iter().chain([first, half]) {
        replaced.wait_closed();
    }
    daemon.wait_line("it has sent no SET_OWNER, and another one waits");

    // The other owner has been connected longer than those that were replaced.
    is_served(&mut owner);
    assert!(!is_readable(&waiting.stream), "two are served at once");
    drop(owner);
    is_readable_soon(&waiting);
    drop((waiting, speaks));
    kept.terminate();
    daemon.terminate();
}

fn is_readable_soon(frontend: &RawFrontend) {
    testkit::wait::wait_until("an answer", || is_readable(&frontend.stream));
}

/// Nothing but SET_OWNER is known of it.
#[test]
fn an_owner_stays_one_through_an_upgrade() {
    let directory = tempfile::tempdir().unwrap();
    let control = format!("--control={}", directory.path().join("control").display());
    let daemon = Daemon::with_image(directory.path(), &[&control]);
    let mut owner = frontend(&daemon);
    owner.send(FrontendReq::SET_OWNER, &[], &[]);
    is_served(&mut owner);
    upgrade_ok(directory.path());
    let rival = frontend(&daemon);
    // A silent one of another daemon is replaced meanwhile.
    let other = tempfile::tempdir().unwrap();
    let other_daemon = Daemon::with_image(other.path(), &[]);
    let silent = frontend(&other_daemon);
    let mut next = frontend(&other_daemon);
    is_served(&mut next);
    silent.wait_closed();
    is_served(&mut owner);
    drop((owner, rival, next));
    daemon.terminate();
    other_daemon.terminate();
}

#[test]
fn only_frontends_of_the_users_and_groups_that_are_named_are_served() {
    let named = [
        format!("--allow-uid=0123456,{NOBODY}"),
        format!("--allow-gid={NOBODY}"),
        format!("--allow-gid=7,{GROUP}"),
    ];
    for option in &named {
        let directory = tempfile::tempdir().unwrap();
        let control = format!("--control={}", directory.path().join("control").display());
        let Some(mut daemon) = open_to_all(directory.path(), &[option, &control]) else { return };
        for _ in 0..2 {
            frontend(&daemon).wait_closed();
            let line = daemon.wait_line("frontend refused");
            assert!(line.contains("user 0, ") && line.contains("--allow-uid"), "{line}");
            is_served(&mut RawFrontend::new(connect_as_nobody(&daemon.socket)));
            // A successor does the same.
            upgrade_ok(directory.path());
        }
        daemon.terminate();
    }
}

#[test]
fn root_is_not_let_in_by_the_name_of_another() {
    let directory = tempfile::tempdir().unwrap();
    let Some(daemon) = open_to_all(directory.path(), &["--allow-uid=root"]) else { return };
    RawFrontend::new(connect_as_nobody(&daemon.socket)).wait_closed();
    is_served(&mut frontend(&daemon));
    daemon.terminate();
}

/// Whoever is refused is no reason to close the connection of one that is let in.
#[test]
fn a_refused_one_replaces_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let allow = format!("--allow-uid={NOBODY}");
    let Some(daemon) = open_to_all(directory.path(), &[&allow]) else { return };
    let mut slow = RawFrontend::new(connect_as_nobody(&daemon.socket));
    // Not before the time of the first is over.
    (0..3).for_each(|_| frontend(&daemon).wait_closed());
    is_served(&mut slow);
    drop(slow);
    let log = daemon.terminate();
    assert!(!log.contains("another one waits"), "{log}");
}

#[test]
fn a_connected_socket_does_not_tell_who_uses_it() {
    let directory = tempfile::tempdir().unwrap();
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("--format=raw").arg(format!("--blk-file={}", image(directory.path()).display()));
    command.arg("--allow-uid=root");
    let output = with_fd(command, theirs.into()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("--fd=100") && said.contains("--allow-uid"), "{said}");
}

#[test]
fn a_user_that_does_not_exist_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    for option in ["--allow-uid=no such user", "--allow-gid=root,no such group"] {
        let mut command = Command::new(PROGRAM);
        command.arg("--socket-path").arg(&socket).arg(option);
        command.arg("--format=raw").arg("--blk-file").arg(image(directory.path()));
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("no such") && said.contains("--allow"), "{said}");
        assert!(!socket.exists());
    }
}
