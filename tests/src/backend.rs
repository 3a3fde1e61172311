//! vhost-user backends under test: this project's daemon, or another to compare with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::process::Process;
use crate::programs::vhost_user_blk;

/// How long a backend may take to listen, and to end.
const BACKEND_TIMEOUT: Duration = Duration::from_secs(60);

/// What a backend has of what it could lose track of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Belongings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads of its own.
    pub threads: usize,
    /// Mappings of QEMU's guest memory.
    pub memory: usize,
}

/// A backend that listens on its socket.
pub struct Backend {
    process: Process,
    socket: PathBuf,
}

impl Backend {
    /// Starts `command`, which must come to listen on `socket`.
    pub fn start(name: &str, command: Command, socket: &Path) -> Self {
        let mut process = Process::spawn(name, command);
        let deadline = Instant::now() + BACKEND_TIMEOUT;
        while !is_listening(socket) {
            if let Some(status) = process.ended() {
                panic!("{name} ended before it listened: {status}");
            }
            assert!(Instant::now() < deadline, "{name} does not listen on {}", socket.display());
            thread::sleep(Duration::from_millis(5));
        }
        Self { process, socket: socket.to_owned() }
    }

    /// Starts this project's daemon on `socket` with further arguments.
    pub fn daemon<S: AsRef<std::ffi::OsStr>>(socket: &Path, args: &[S]) -> Self {
        let mut command = vhost_user_blk();
        command.arg("--socket-path").arg(socket).args(args);
        Self::start("vhost-user-blk", command, socket)
    }

    /// Starts qemu-storage-daemon with a raw image on `socket`: the second implementation.
    pub fn storage_daemon(socket: &Path, image: &Path, queues: u16) -> Self {
        let (image, path) = (image.display(), socket.display());
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev");
        command.arg(format!("driver=file,node-name=disk,filename={image},discard=unmap"));
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},\
             addr.type=unix,addr.path={path}"
        ));
        Self::start("qemu-storage-daemon", command, socket)
    }

    /// Where a frontend connects.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it has written so far.
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// Waits until it has written `text`.
    pub fn wait_for(&self, text: &str) {
        self.process.wait_for(text, BACKEND_TIMEOUT);
    }

    /// Waits until it has written `text` this many times.
    pub fn wait_for_times(&self, text: &str, times: usize) {
        self.process.wait_for_times(text, times, BACKEND_TIMEOUT);
    }

    /// Its descriptors, its threads, and its mappings of guest memory, all of them counted.
    pub fn belongings(&self) -> Belongings {
        let dir = |what: &str| PathBuf::from(format!("/proc/{}/{what}", self.process.id()));
        let entries = |what: &str| fs::read_dir(dir(what)).expect("a running daemon").flatten();
        // The kernel's own, for io_uring, come and go; a queue's waits for the next frontend.
        let is_own = |task: &fs::DirEntry| {
            let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            !name.is_empty() && !name.starts_with("iou-") && !name.starts_with("queue-")
        };
        let maps = fs::read_to_string(dir("maps")).expect("a running daemon");
        let memory = maps.lines().filter(|line| line.contains("memfd:memory-backend")).count();
        let threads = entries("task").filter(is_own).count();
        Belongings { descriptors: entries("fd").count(), threads, memory }
    }

    /// Waits until these are its belongings.
    pub fn wait_for_belongings(&self, expected: Belongings) {
        let deadline = Instant::now() + BACKEND_TIMEOUT;
        while self.belongings() != expected {
            let found = self.belongings();
            assert!(Instant::now() < deadline, "{found:?}, expected {expected:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Kills it, and waits until it is gone.
    pub fn kill(self) {
        self.process.signal(Signal::SIGKILL);
        self.process.wait(BACKEND_TIMEOUT);
    }

    /// Ends it with SIGTERM, whatever its status then is.
    pub fn end(self) {
        self.process.signal(Signal::SIGTERM);
        self.process.wait(BACKEND_TIMEOUT);
    }

    /// Ends it with SIGTERM, after which it must exit with status 0; returns its output.
    pub fn stop(self) -> String {
        self.process.signal(Signal::SIGTERM);
        let (status, output) = self.process.wait(BACKEND_TIMEOUT);
        assert!(status.success(), "backend: {status} after SIGTERM; output:\n{output}");
        output
    }
}

/// Looked up in the kernel's list, because a trial connection would be the backend's first.
fn is_listening(socket: &Path) -> bool {
    /// `__SO_ACCEPTCON` in the column "Flags".
    const LISTENS: &str = "00010000";
    let list = fs::read_to_string("/proc/net/unix").expect("the kernel lists its sockets");
    list.lines().any(|line| {
        let mut columns = line.split_ascii_whitespace();
        columns.nth(3) == Some(LISTENS) && columns.nth(3).map(Path::new) == Some(socket)
    })
}
