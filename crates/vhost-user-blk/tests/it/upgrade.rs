//! A daemon goes on as another program, and whoever it serves sees nothing of it; or it cannot, and
//! serves on.
//!
//! `UPGRADES` is how often in the tests that repeat it (100 if it is not set).

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::soak::{End, Soak, from_env};
use crate::common::{Daemon, NOBODY, PROGRAM, image, outcome, sector, upgrade, upgrade_ok};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use testkit::frontend::{
    F_CONFIG_WCE, F_FLUSH, F_PROTOCOL_FEATURES, F_VERSION_1, NO_FD, PROTOCOL_FEATURES, RawFrontend,
};
use testkit::memory::Memory;
use testkit::request::IN;
use testkit::ring::{RING_SIZE, Ring};
use testkit::wait::is_readable;
use vhost::vhost_user::message::FrontendReq;

/// Under load.
fn upgrade_loaded(soak: &mut Soak, directory: &Path, args: &[&str]) -> (Option<i32>, String) {
    let mut command = upgrade(directory, args);
    soak.load_while(|_| command.try_wait().unwrap().is_none());
    outcome(command)
}

/// Some requests more.
fn load(soak: &mut Soak, requests: u64) {
    let until = soak.completed + requests;
    while soak.completed < until {
        let mut turns = 1..3;
        soak.load_while(|_| turns.next().is_some());
    }
}

/// A shell script as the new program; `real` in it is the daemon's.
fn script(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\nreal={PROGRAM}\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn long_life() -> End {
    End::Killed { after: u64::MAX }
}

fn again_and_again(args: &[&str], inflight: bool) {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut soak = Soak::with_inflight(directory, args, &long_life(), inflight);
    // A successor has the live bitmap open for reading as well; and each queue's thread has opened
    // what it needs.
    let (status, said) = upgrade_loaded(&mut soak, directory, &[]);
    assert_eq!(status, Some(0), "{said}");
    load(&mut soak, 2000);
    soak.load_until_each_queue_answers();
    let (pid, files) = (soak.daemon.pid(), soak.daemon.open_files());
    let kinds = soak.daemon.kinds_of_files();
    let mut pauses = Vec::new();
    for round in 0..from_env("UPGRADES").unwrap_or(100) {
        load(&mut soak, round % 50);
        let (status, said) = upgrade_loaded(&mut soak, directory, &[]);
        assert_eq!(status, Some(0), "{said}");
        let waited =
            said.trim_end().strip_suffix(" ms").and_then(|text| text.split(' ').next_back());
        pauses.push(waited.unwrap_or_else(|| panic!("{said}")).parse::<f64>().unwrap());
        // The command's own connection goes when it is answered.
        let deadline = Instant::now() + Duration::from_secs(60);
        soak.load_while(|daemon| {
            let now = daemon.open_files();
            let found = || format!("{:#?}\nnot\n{kinds:#?}", daemon.kinds_of_files());
            assert!(now <= files || Instant::now() < deadline, "{}", found());
            now > files
        });
    }
    assert_eq!(soak.daemon.pid(), pid);
    pauses.sort_by(f64::total_cmp);
    println!(
        "{} upgrades, {} requests; pause in ms: median {}, longest {}",
        pauses.len(),
        soak.completed,
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
    soak.finish();
}

#[test]
fn a_load_sees_nothing_of_upgrades() {
    again_and_again(&[], true);
}

#[test]
fn nor_without_an_account_of_what_is_in_flight() {
    again_and_again(&["--cow-cache=direct", "--format=uml", "--poll-us=0"], false);
}

#[test]
fn what_cannot_take_over_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    // The programs change files, which the sandbox forbids.
    let mut soak = Soak::with_inflight(directory, &["--sandbox=off"], &long_life(), false);
    let file = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    let other_version = "for arg; do case $arg in --takeover=*) fd=${arg#*=} ;; esac; done
        printf 'vhost-user-blk handover 9' 1<>/proc/self/fd/$fd
        exec $real \"$@\"";
    // Its mtime is the same again.
    let back = "touch -r $0 $0.t; touch $0; touch -r $0.t $0; exec $real \"$@\"";
    let cases = [
        (file("none"), "No such file"),
        (file("base"), "ermission denied"),
        (script(directory, "exits", "exit 3"), "exited without an answer: exit status: 3"),
        (script(directory, "hangs", "exec sleep 1000"), "did not answer in time"),
        (script(directory, "killed", "kill -KILL $$"), "exited without an answer: signal: 9"),
        (script(directory, "old", "exec $real --option-of-old \"$@\""), "exit status: 2"),
        (script(directory, "version", other_version), "exit status: 1"),
        (script(directory, "other", "exec $real \"$@\" --read-only"), "were not offered"),
        (script(directory, "queues", "exec $real \"$@\" --num-queues=1"), "exit status: 2"),
        (script(directory, "goes", "rm $0; exec $real \"$@\""), "No such file"),
        (script(directory, "changes", "echo >>$0; exec $real \"$@\""), "has changed"),
        (script(directory, "locked", "chmod a-x $0; exec $real \"$@\""), "has changed"),
        (script(directory, "back", back), "has changed"),
    ];
    for (program, why) in cases {
        let timeout = if program.ends_with("hangs") { "--timeout=1" } else { "--timeout=60" };
        let args = [format!("--program={program}"), timeout.to_owned()];
        let args = args.each_ref().map(String::as_str);
        let (status, said) = upgrade_loaded(&mut soak, directory, &args);
        assert_eq!(status, Some(1), "{program}: {said}");
        assert!(said.contains(why) && said.contains("continues unchanged"), "{program}: {said}");
        load(&mut soak, 500);
    }
    let (status, said) = upgrade_loaded(&mut soak, directory, &[]);
    assert_eq!(status, Some(0), "{said}");
    soak.finish();
}

#[test]
fn a_daemon_that_dies_while_it_is_upgraded_is_followed_by_another() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    // The program makes a file, which the sandbox forbids.
    let mut soak = Soak::new(directory, &["--sandbox=off"], &long_life());
    // The new program holds the disk's lock while it is tried.
    let begun = directory.join("begun");
    let hangs = script(directory, "hangs", &format!("touch {}; exec sleep 1000", begun.display()));
    let program = format!("--program={hangs}");
    let command = upgrade(directory, &[&program, "--timeout=600"]);
    soak.load_while(|_| !begun.exists());
    soak.kill(&[]);
    assert_eq!(outcome(command).0, Some(1));
    for _ in 0..from_env("UPGRADES").unwrap_or(100) / 2 {
        load(&mut soak, 20);
        let mut command = upgrade(directory, &[]);
        let end = Instant::now() + Duration::from_micros(soak.rng.below(40_000));
        soak.load_while(|_| Instant::now() < end && command.try_wait().unwrap().is_none());
        soak.kill(&[]);
        outcome(command);
    }
    soak.finish();
}

#[test]
fn a_daemon_that_is_told_to_end_while_it_is_upgraded_ends() {
    for round in 0..from_env("UPGRADES").unwrap_or(100) / 4 {
        let directory = tempfile::tempdir().unwrap();
        let control = directory.path().join("control");
        let control = format!("--control={}", control.display());
        let daemon = Daemon::with_image(directory.path(), &[&control]);
        let command = upgrade(directory.path(), &[]);
        std::thread::sleep(Duration::from_millis(round));
        daemon.terminate();
        outcome(command);
    }
}

#[test]
fn a_control_socket_is_its_users_and_goes_with_the_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("control");
    let mut daemon =
        Daemon::with_image(directory.path(), &[&format!("--control={}", path.display())]);
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // What is no request, and who says nothing, is in nobody's way.
    let mut client = UnixStream::connect(&path).unwrap();
    std::io::Write::write_all(&mut client, b"GET / HTTP/1.1\r\n").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    daemon.wait_line("control socket");
    let silent = UnixStream::connect(&path).unwrap();
    daemon.wait_line("control socket");
    drop(silent);
    let (status, said) = outcome(upgrade(directory.path(), &[]));
    assert_eq!(status, Some(0), "{said}");
    daemon.terminate();
    assert!(!path.exists());
    let (status, said) = outcome(upgrade(directory.path(), &[]));
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("control"), "{said}");
}

/// Whoever may give commands has no more choice than the operator left.
#[test]
fn an_upgrade_runs_only_what_the_operator_has_named() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let control = format!("--control={}", here.join("control").display());
    let other = script(here, "other", "touch $0.ran; exec $real \"$@\"");
    let own = PROGRAM.to_owned();
    let refused = |program: &str, why: &str| {
        let (status, said) = outcome(upgrade(here, &[&format!("--program={program}")]));
        assert_eq!(status, Some(1), "{program}: {said}");
        assert!(said.contains(why) && said.contains("continues unchanged"), "{program}: {said}");
        assert!(!here.join("other.ran").exists());
    };
    let accepted = |program: &str| {
        let (status, said) = outcome(upgrade(here, &[&format!("--program={program}")]));
        assert_eq!(status, Some(0), "{program}: {said}");
    };
    let mut daemon = Daemon::with_image(here, &[&control]);
    refused(&other, "--upgrade-dir");
    accepted(&own);
    let line = daemon.wait_line("upgrade asked for by");
    assert!(line.contains(&format!("user {}, ", nix::unistd::geteuid())), "{line}");
    daemon.terminate();

    let programs = here.join("programs");
    fs::create_dir(&programs).unwrap();
    let named = script(&programs, "named", "exec $real \"$@\"");
    let upgrade_dir = format!("--upgrade-dir={}", programs.display());
    let daemon = Daemon::with_image(here, &[&control, &upgrade_dir]);
    refused(&other, "--upgrade-dir");
    fs::set_permissions(&programs, fs::Permissions::from_mode(0o777)).unwrap();
    refused(&named, "nobody but root");
    fs::set_permissions(&programs, fs::Permissions::from_mode(0o755)).unwrap();
    // The program that runs then is the daemon's own, which it may always be.
    accepted(&named);
    accepted(&own);
    daemon.terminate();
}

/// The socket's mode keeps other users away; if that was changed, the daemon does.
#[test]
fn only_root_and_the_daemons_user_give_commands() {
    let directory = tempfile::tempdir().unwrap();
    let control = directory.path().join("control");
    let mut daemon =
        Daemon::with_image(directory.path(), &[&format!("--control={}", control.display())]);
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can be another user");
        return;
    }
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&control, fs::Permissions::from_mode(0o666)).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["upgrade", "--control"]).arg(&control).uid(NOBODY).gid(NOBODY);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("only root and the daemon's user"), "{said}");
    daemon.wait_line(&format!("refused user {NOBODY}"));
    upgrade_ok(directory.path());
    daemon.terminate();
}

/// Where the write cache's byte is in the configuration space.
const WCE: u32 = 32;

/// A client of a newer version may ask for what this daemon does not know.
#[test]
fn an_unknown_command_is_answered() {
    let directory = tempfile::tempdir().unwrap();
    let control = directory.path().join("control");
    let daemon =
        Daemon::with_image(directory.path(), &[&format!("--control={}", control.display())]);
    let mut client = UnixStream::connect(&control).unwrap();
    client.write_all(b"levitate\0").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "failed not a command that this program knows\n");
    daemon.terminate();
}

/// Nothing of a frontend's stays open in a successor that is not handed to it.
#[test]
fn an_upgrade_leaks_no_descriptor_of_the_frontend() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let control = format!("--control={}", directory.join("control").display());
    let daemon = Daemon::with_image(directory, &[&control]);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES, PROTOCOL_FEATURES);
    let memory = Memory::default();
    memory.set(&mut frontend);
    frontend.set_log_base(4096, 0, &memory.file);
    upgrade_ok(directory);
    let memory_files =
        || daemon.kinds_of_files().iter().filter(|kind| kind.contains("memfd")).count();
    let before = memory_files();
    for _ in 0..3 {
        frontend.set_log_base(4096, 0, &memory.file);
        upgrade_ok(directory);
    }
    assert_eq!(memory_files(), before);
}

#[test]
fn whatever_the_frontend_has_said_so_far_the_new_program_knows_it() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let control = format!("--control={}", directory.join("control").display());
    let daemon = Daemon::with_image(directory, &[&control]);
    let pid = daemon.pid();
    upgrade_ok(directory);
    let mut frontend = RawFrontend::new(daemon.connect());
    let (memory, mut ring) = (Memory::default(), Ring::new(0));
    let next = || _ = upgrade_ok(directory);
    next();
    frontend.send(FrontendReq::SET_OWNER, &[], &[]);
    assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
    next();
    assert_eq!(frontend.get_u64(FrontendReq::GET_PROTOCOL_FEATURES), PROTOCOL_FEATURES);
    frontend.send_u64(FrontendReq::SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES);
    next();
    let features = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH | F_CONFIG_WCE;
    frontend.send_u64(FrontendReq::SET_FEATURES, features);
    next();
    // From here on each message is acknowledged: the new program knows that, too.
    frontend.need_reply = true;
    let (ours, theirs) = UnixStream::pair().unwrap();
    frontend.send(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()]);
    drop(theirs);
    next();
    frontend.send_state(FrontendReq::SET_VRING_NUM, 0, RING_SIZE.into());
    next();
    frontend.send(FrontendReq::SET_VRING_ADDR, &ring.addresses(), &[]);
    next();
    memory.set(&mut frontend);
    next();
    ring.set_up(&mut frontend);
    let err = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    frontend.send_fd(FrontendReq::SET_VRING_ERR, 0, &err);
    next();
    // Work that waits for the ring to be enabled.
    ring.submit(&memory, IN, 5, &[0; 512]);
    ring.kick();
    next();
    assert!(!ring.is_done(&memory));
    ring.enable(&mut frontend, true);
    assert_eq!(ring.wait::<512>(&memory), (0, sector(5)));
    next();
    ring.write_sector(&memory, 6, &sector(66));
    frontend.set_config(WCE, &[0]);
    next();
    assert_eq!(frontend.get_config(WCE, 1), Some(vec![0]));
    assert_eq!(ring.read_sector(&memory, 6), sector(66));
    // Without kicks.
    frontend.send_u64(FrontendReq::SET_VRING_KICK, NO_FD);
    next();
    ring.submit(&memory, IN, 7, &[0; 512]);
    assert_eq!(ring.wait::<512>(&memory), (0, sector(7)));
    assert_eq!(frontend.get_vring_base(0), 4);
    next();
    ring.submit(&memory, IN, 8, &[0; 512]);
    frontend.get_u64(FrontendReq::GET_FEATURES);
    assert!(!ring.is_done(&memory), "a stopped ring was served");
    frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &ring.queue.kick);
    assert_eq!(ring.wait::<512>(&memory), (0, sector(8)));
    assert!(!is_readable(&ours), "the channel for requests was closed");
    frontend.send(FrontendReq::RESET_DEVICE, &[], &[]);
    next();
    drop(frontend);
    // The channel goes with the connection.
    ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(std::io::Read::read(&mut &ours, &mut [0]).unwrap(), 0);
    next();
    let mut frontend = RawFrontend::new(daemon.connect());
    assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
    assert_eq!(daemon.pid(), pid);
    drop(frontend);
    daemon.terminate();
}

/// What is said on the control socket is heard before all that a frontend has to say, which may
/// never come to an end.
#[test]
fn a_frontend_that_never_pauses_does_not_keep_commands_away() {
    const MESSAGES: usize = 200;
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let control = directory.join("control");
    let daemon = Daemon::with_image(directory, &[&format!("--control={}", control.display())]);
    let mut frontend = RawFrontend::new(daemon.connect());
    let features = F_VERSION_1 | F_PROTOCOL_FEATURES;
    frontend.negotiate(features, PROTOCOL_FEATURES);
    daemon.signal(Signal::SIGSTOP);
    let pid = Pid::from_raw(daemon.pid().try_into().unwrap());
    let stopped = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
    assert!(matches!(stopped, WaitStatus::Stopped(..)), "{stopped:?}");
    frontend.need_reply = false;
    (0..MESSAGES).for_each(|_| frontend.send_u64(FrontendReq::SET_FEATURES, features));
    let mut client = UnixStream::connect(control).unwrap();
    client.write_all(b"no command").unwrap();
    drop(client);
    daemon.signal(Signal::SIGCONT);
    // When this is answered everything was heard.
    assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
    let log = daemon.terminate();
    let (_, after) = log.split_once("control socket").expect("the command was heard");
    // One may have been on its way.
    assert!(after.matches("features 0x").count() >= MESSAGES - 1, "{log}");
}

#[test]
fn a_daemon_with_one_connection_keeps_it_and_ends_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs = OwnedFd::from(theirs);
    let mut command = Command::new(PROGRAM);
    command.args(["--format=raw", "--fd=100"]);
    command.arg(format!("--blk-file={}", image(directory.path()).display()));
    command.arg(format!("--control={}", directory.path().join("control").display()));
    // SAFETY: dup2 is async-signal-safe.
    unsafe {
        command.pre_exec(move || match libc::dup2(theirs.as_raw_fd(), 100) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let daemon = Daemon::spawn(command, directory.path().join("none"));
    let mut frontend = RawFrontend::new(ours);
    for _ in 0..3 {
        assert_ne!(frontend.get_u64(FrontendReq::GET_FEATURES), 0);
        upgrade_ok(directory.path());
    }
    drop(frontend);
    assert_eq!(daemon.wait().0, Some(0));
}
