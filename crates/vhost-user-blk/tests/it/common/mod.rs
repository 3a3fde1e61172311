//! A daemon under test.

#![allow(dead_code, reason = "base_watch.rs and tests/faults use parts of this as well")]

pub mod soak;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::frontend::RawFrontend;
use testkit::wait::PATIENCE;

/// Sectors of the raw image that most tests serve.
pub const SECTORS: u64 = 2048;

/// A user who is nobody.
pub const NOBODY: u32 = 65534;

/// The daemon's program.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-user-blk");

/// `command` with `fd` as its descriptor 100, and `--fd=100`.
pub fn with_fd(command: Command, fd: OwnedFd) -> Command {
    with_fd_as(100, command, fd)
}

/// `command` with `fd` as its descriptor `number`, and `--fd=NUMBER`.
pub fn with_fd_as(number: RawFd, mut command: Command, fd: OwnedFd) -> Command {
    command.arg(format!("--fd={number}"));
    // SAFETY: dup2 and fcntl are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            let there = libc::dup2(fd.as_raw_fd(), number) == number;
            // Where it had that number before, it would be closed.
            let stays = there && libc::fcntl(number, libc::F_SETFD, 0) == 0;
            if stays { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        });
    }
    command
}

/// `command` in a process that is refused io_uring, as by the seccomp profiles of containers. So
/// are all that come of it.
pub fn without_io_uring(mut command: Command) -> Command {
    // SAFETY: prctl is async-signal-safe, and nothing is allocated.
    unsafe {
        command.pre_exec(|| Ok(refuse_io_uring()?));
    }
    command
}

/// Installs the filter in this thread.
fn refuse_io_uring() -> nix::Result<()> {
    let op = |code: u32, k: u32, jt: u8, jf: u8| {
        // The instructions' codes have eight bits.
        libc::sock_filter { code: u16::try_from(code).unwrap_or(0), jt, jf, k }
    };
    // io_uring_setup, io_uring_enter, io_uring_register.
    let number = |call: libc::c_long| u32::try_from(call).unwrap_or(u32::MAX);
    let (first, last) = (number(libc::SYS_io_uring_setup), number(libc::SYS_io_uring_register));
    let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
    let mut program = [
        // The system call's number is the first field of what is filtered.
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, first, 0, 2),
        op(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, last, 1, 0),
        op(libc::BPF_RET | libc::BPF_K, refused, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let filter = libc::sock_fprog { len: 5, filter: program.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs()?;
    // SAFETY: the program is valid and outlives the call, which copies it.
    let result =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    nix::errno::Errno::result(result).map(|_| ())
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    pub socket: PathBuf,
}

impl Daemon {
    /// Starts it with a socket in `directory`, and waits until it listens.
    pub fn start<S: AsRef<OsStr>>(directory: &Path, args: impl IntoIterator<Item = S>) -> Self {
        let socket = directory.join("socket");
        let mut command = Command::new(PROGRAM);
        command.arg("--log-level=debug").arg("--socket-path").arg(&socket).args(args);
        let mut daemon = Self::spawn(command, socket);
        daemon.wait_line("listening");
        daemon
    }

    /// Runs a command line, with the I/O engine of `TEST_IO_ENGINE` unless it names one.
    pub fn spawn(mut command: Command, socket: PathBuf) -> Self {
        let names_one =
            command.get_args().any(|arg| arg.to_string_lossy().starts_with("--io-engine"));
        if let (Ok(engine), false) = (std::env::var("TEST_IO_ENGINE"), names_one) {
            command.arg(format!("--io-engine={engine}"));
        }
        Self::spawn_as_is(command, socket)
    }

    /// Runs a command line.
    pub fn spawn_as_is(mut command: Command, socket: PathBuf) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines() {
                let Ok(()) = sender.send(line.unwrap()) else { break };
            }
        });
        Daemon { child, lines, seen: Vec::new(), socket }
    }

    /// Starts it on a raw image of [`SECTORS`] sectors in `directory`; sector n is full of n.
    pub fn with_image(directory: &Path, args: &[&str]) -> Self {
        let image = image(directory);
        let mut all = vec![format!("--blk-file={}", image.display()), "--format=raw".to_owned()];
        all.extend(args.iter().map(|&arg| arg.to_owned()));
        Self::start(directory, all)
    }

    /// Waits for a log line that contains `text`, and returns it.
    pub fn wait_line(&mut self, text: &str) -> String {
        loop {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else {
                panic!("no line with {text:?} in\n{}", self.seen.join("\n"));
            };
            self.seen.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Waits until the connection of `frontend` is closed, for which the log must give this reason.
    pub fn closes(&mut self, frontend: RawFrontend, why: &str) {
        frontend.wait_closed();
        let line = self.wait_line("connection closed");
        assert!(line.contains(why), "{why}: {line}");
        self.wait_line("connection ended");
    }

    /// Waits for a log line that contains `yes` or `no`; whether it is `yes`. Earlier lines count.
    pub fn has_line(&mut self, yes: &str, no: &str) -> bool {
        let answer = |line: &String| match (line.contains(yes), line.contains(no)) {
            (false, false) => None,
            (yes, _) => Some(yes),
        };
        loop {
            if let Some(answer) = self.seen.iter().find_map(answer) {
                return answer;
            }
            self.seen.push(self.lines.recv_timeout(PATIENCE).unwrap());
        }
    }

    /// Waits until it listens or has ended; whether it listens.
    pub fn listens(&mut self) -> bool {
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            let listens = line.contains("listening") && !line.contains("another process");
            self.seen.push(line);
            if listens {
                return true;
            }
        }
        false
    }

    /// What it has logged so far.
    pub fn said(&mut self) -> String {
        self.seen.extend(self.lines.try_iter());
        self.seen.join("\n")
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn open_files(&self) -> usize {
        self.kinds_of_files().len()
    }

    /// What its open files are, without numbers. None, and a word, unless root asks: it cannot be
    /// inspected.
    pub fn kinds_of_files(&self) -> Vec<String> {
        let files = match std::fs::read_dir(format!("/proc/{}/fd", self.pid())) {
            Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                println!("skipped: only root may see a daemon's open files");
                return Vec::new();
            }
            files => files.unwrap(),
        };
        // One may be closed meanwhile.
        let links = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
        let mut kinds: Vec<_> = links.map(|link| link.display().to_string()).collect();
        kinds.sort();
        kinds
    }

    pub fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().count()
    }

    /// How many of its threads have this name.
    pub fn threads_named(&self, name: &str) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        // One may end meanwhile.
        let names =
            tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|found| found.trim_end() == name).count()
    }

    /// The id of its only thread of this name.
    pub fn thread_named(&self, name: &str) -> u32 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let mut found = tasks.filter_map(|task| {
            let task = task.ok()?;
            let comm = std::fs::read_to_string(task.path().join("comm")).ok()?;
            (comm.trim_end() == name).then(|| task.file_name().into_string().unwrap())
        });
        let (first, second) = (found.next(), found.next());
        assert_eq!(second, None);
        first.unwrap().parse().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid().try_into().unwrap()), signal).unwrap();
    }

    /// Waits for its end, which was brought about.
    pub fn reap(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Waits for its end; the status and everything it logged.
    pub fn wait(mut self) -> (Option<i32>, String) {
        // The log ends with the process. That it does is what a test may wait for.
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.seen.push(line),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(_) => panic!("does not end; it said\n{}", self.seen.join("\n")),
            }
        }
        let status = self.child.wait().unwrap();
        println!("ended: {status}");
        (status.code(), self.seen.join("\n"))
    }

    /// Asks it to end, and checks that it ends cleanly.
    pub fn end(self) -> String {
        self.signal(Signal::SIGTERM);
        let (status, log) = self.wait();
        assert_eq!(status, Some(0), "{log}");
        log
    }

    /// The same of one that made its socket.
    pub fn terminate(self) -> String {
        let socket = self.socket.clone();
        let log = self.end();
        assert!(!socket.exists(), "the socket is still there");
        log
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether the kernel confines files (Landlock).
pub fn has_landlock() -> bool {
    const VERSION: libc::c_long = 1;
    // SAFETY: no attributes are passed, and only the version is asked for.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<()>(), 0, VERSION)
    };
    if version < 0 {
        println!("skipped: no Landlock ({})", std::io::Error::last_os_error());
    }
    version > 0
}

/// A raw image in which sector n is full of n.
pub fn image(directory: &Path) -> PathBuf {
    let path = directory.join("disk.img");
    std::fs::write(&path, content()).unwrap();
    path
}

/// What the image holds.
pub fn content() -> Vec<u8> {
    (0..SECTORS).flat_map(sector).collect()
}

/// One sector of the image.
pub fn sector(number: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&number.to_le_bytes()));
    bytes
}

/// `vhost-user-blk upgrade` on the daemon whose control socket is `control` in `directory`.
pub fn upgrade(directory: &Path, args: &[&str]) -> Child {
    let mut command = Command::new(PROGRAM);
    command.arg("upgrade").arg("--control").arg(directory.join("control")).args(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The status of such a command, and what it said.
pub fn outcome(command: Child) -> (Option<i32>, String) {
    let output = command.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

/// Upgrades the daemon, which must succeed.
pub fn upgrade_ok(directory: &Path) -> String {
    let (status, said) = outcome(upgrade(directory, &[]));
    assert_eq!(status, Some(0), "{said}");
    said
}
