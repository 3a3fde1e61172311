//! The log stays small whatever guests and frontends do, nothing is left out of it uncounted, and
//! nobody waits for its reader.

use std::io::{BufRead, BufReader, PipeReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::common::{Daemon, PROGRAM, image, sector};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::frontend::{
    F_CONFIG_WCE, F_FLUSH, F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend,
};
use testkit::request::FLUSH;
use testkit::ring::{RING_SIZE, running};
use vhost::vhost_user::message::FrontendReq;

const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH | F_CONFIG_WCE;
/// Place of the write cache byte in the configuration space.
const WCE: u32 = 32;
/// As often as a test does what brings a line into the log.
const TIMES: usize = 300;
/// Lines of one subject that may come at once (`log_limit.rs`).
const BURST: usize = 32;

/// The `n` of "(n more since the last message)", or 0.
fn left_out_before(line: &str) -> usize {
    let text = line
        .rsplit_once('(')
        .and_then(|(_, text)| text.strip_suffix(" more since the last message)"));
    text.map_or(0, |n| n.parse().unwrap())
}

/// Checks that of `expected` lines with `text` few are there, and all the others were counted, in
/// them and at the end as being about `subject`.
fn few_of(log: &str, text: &[&str], expected: usize, subject: &str, since: Instant) {
    let lines: Vec<_> =
        log.lines().filter(|line| text.iter().any(|text| line.contains(text))).collect();
    let seconds = usize::try_from(since.elapsed().as_secs()).unwrap();
    assert!(lines.len() <= BURST + seconds + 1, "{} lines in {seconds} s", lines.len());
    let at_the_end = format!(" more messages about {subject} were suppressed");
    let at_the_end = log.lines().find_map(|line| {
        line.strip_prefix("WARN ")?.strip_suffix(&at_the_end)?.parse::<usize>().ok()
    });
    let counted = lines.iter().map(|line| left_out_before(line)).sum::<usize>();
    let all = lines.len() + counted + at_the_end.unwrap_or(0);
    assert_eq!(all, expected, "lines and what was left out; the log:\n{log}");
}

/// A daemon with the log level that it has by itself. (With `debug` there is no limit.)
fn serve(directory: &Path) -> Daemon {
    let socket = directory.join("socket");
    let mut command = Command::new(PROGRAM);
    command.arg("--socket-path").arg(&socket).arg("--format=raw");
    command.arg("--blk-file").arg(image(directory));
    let mut daemon = Daemon::spawn(command, socket);
    daemon.wait_line("listening");
    daemon
}

#[test]
fn a_guest_that_switches_its_write_cache_again_and_again() {
    let directory = tempfile::tempdir().unwrap();
    let (daemon, since) = (serve(directory.path()), Instant::now());
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
    for number in 0..TIMES {
        frontend.set_config(WCE, &[u8::from(number % 2 == 1)]);
    }
    // And one line when the features were set: the cache is on.
    let log = daemon.terminate();
    few_of(&log, &["write cache o"], TIMES + 1, "the write cache", since);
}

#[test]
fn frontends_that_come_and_send_rubbish() {
    let directory = tempfile::tempdir().unwrap();
    let (daemon, since) = (serve(directory.path()), Instant::now());
    for _ in 0..TIMES {
        let mut stream = daemon.connect();
        stream.write_all(&[0xff; 64]).unwrap();
        RawFrontend::new(stream).wait_closed();
    }
    let log = daemon.terminate();
    // Each comes, and is refused.
    few_of(&log, &["frontend connected", "connection closed"], 2 * TIMES, "connections", since);
}

#[test]
fn a_ring_that_is_given_up_again_and_again() {
    let directory = tempfile::tempdir().unwrap();
    let (daemon, since) = (serve(directory.path()), Instant::now());
    let (mut frontend, memory, mut ring) = running(daemon.connect(), FEATURES);
    let err = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    frontend.send_fd(FrontendReq::SET_VRING_ERR, 0, &err);
    // More available entries than the ring can hold, put there while it is stopped.
    frontend.get_vring_base(0);
    for _ in 0..=RING_SIZE {
        ring.submit(&memory, FLUSH, 0, &[]);
    }
    for _ in 0..TIMES {
        frontend.get_vring_base(0);
        frontend.send_state(FrontendReq::SET_VRING_BASE, 0, 0x8000);
        frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &ring.queue.kick);
        assert_ne!(err.read().unwrap(), 0);
    }
    drop(frontend);
    let log = daemon.terminate();
    few_of(&log, &["the ring is stopped"], TIMES, "rings", since);
}

/// A daemon whose standard error is a pipe that nobody reads; killed when dropped.
struct Unread {
    child: Child,
    stderr: PipeReader,
}

impl Unread {
    /// The smallest pipe there is, so that it is soon full.
    fn start(directory: &Path, socket: &Path) -> Self {
        let (stderr, writer) = std::io::pipe().unwrap();
        // SAFETY: no memory is involved.
        assert!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } > 0);
        let mut command = Command::new(PROGRAM);
        command.arg("--log-level=debug").arg("--socket-path").arg(socket).arg("--format=raw");
        command.arg("--blk-file").arg(image(directory)).stderr(writer);
        Unread { child: command.spawn().unwrap(), stderr }
    }

    fn connect(&mut self, socket: &Path) -> UnixStream {
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                    return stream;
                }
                // It is only just starting.
                Err(_) => assert!(self.child.try_wait().unwrap().is_none(), "it has ended"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_log_that_nobody_reads_holds_up_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut daemon = Unread::start(directory.path(), &socket);
    // With this log level there is no limit.
    for _ in 0..TIMES {
        let mut stream = daemon.connect(&socket);
        stream.write_all(&[0xff; 64]).unwrap();
        RawFrontend::new(stream).wait_closed();
    }
    let (frontend, memory, mut ring) = running(daemon.connect(&socket), FEATURES);
    assert_eq!(ring.read_sector(&memory, 5), sector(5));
    drop(frontend);

    // Read again, it is told what it has missed.
    let mut stderr = BufReader::new(daemon.stderr.try_clone().unwrap());
    let reader = std::thread::spawn(move || {
        let mut line = String::new();
        while !line.contains("log lines were lost: standard error was full") {
            line.clear();
            assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "the log has ended");
        }
        stderr
    });
    while !reader.is_finished() {
        drop(daemon.connect(&socket));
    }
    let _unread = reader.join().unwrap();

    // Full once more, and it ends all the same.
    for _ in 0..TIMES {
        drop(daemon.connect(&socket));
    }
    kill(Pid::from_raw(daemon.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
}
