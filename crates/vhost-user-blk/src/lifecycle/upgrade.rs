//! The old program's side of an upgrade (docs/architecture.md, "Upgrade").
//!
//! The process stays and its program changes, by execve(2): so the process id, parent, cgroup, file
//! locks and connections stay. There is no way back from execve. So the new program first has to
//! show, in a process of its own and while the guest is being served, that it can take over exactly
//! this disk and this session: the rehearsal. If that fails or takes too long, nothing has changed.

use std::ffi::{CString, OsString};
use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use block_io::Disk;
use block_io::storage::hidden_boot_id;
use nix::poll::PollTimeout;
use nix::sys::prctl;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, execve, getpid, getppid};

use crate::cli::TAKEOVER;
use crate::lifecycle::handover::{Handover, HandoverError, Listening};
use crate::lifecycle::trusted_program;
use crate::process::control::Upgrade;
use crate::process::fd::set_inherited;
use crate::process::log_limit;
use crate::process::peer::Admission;
use crate::process::sandbox;
use crate::process::signals;
use crate::process::socket::Listener;
use crate::session::connection::{Readable, lock, wait_readable};
use crate::session::replay::Message;
use crate::session::{Device, Session};

/// Longest answer of a rehearsal, in bytes.
const ANSWER_LEN_MAX: usize = 4096;
/// How often to look for the exit of a child that closed its end of the pipe.
const CHILD_INTERVAL: Duration = Duration::from_millis(1);

/// Why an upgrade failed. The old program continues.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UpgradeError {
    /// A sync has failed.
    #[error("the disk has failed; only a restart of the daemon opens it again")]
    DiskFailed,
    /// There is no disk to hand over.
    #[error("the disk is not open, because its guest is elsewhere (live migration)")]
    DiskElsewhere,
    /// The session cannot be handed over at the moment.
    #[error("{0}")]
    Session(&'static str),
    /// The program's file cannot be read or started.
    #[error("cannot start {}: {source}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The program has not shown that it can take over.
    #[error("{}: {source}", program.display())]
    Rehearsal {
        /// The program.
        program: PathBuf,
        /// The outcome of its rehearsal.
        source: RehearsalError,
    },
    /// The operator has not allowed to run it.
    #[error(
        "{}: neither the daemon's own program ({}), nor directly in the directory of the daemon's \
         --upgrade-dir", program.display(), own.display()
    )]
    NotNamed {
        /// The program, as the client names it.
        program: PathBuf,
        /// The file that the running program was started from.
        own: PathBuf,
    },
    /// Another user could have put it there.
    #[error(
        "{}: {why}; an upgrade runs only a regular file that, like all directories above it, nobody \
         but root and the daemon's user can write to", path.display()
    )]
    Replaceable {
        /// The program, or a directory above it.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file is not the one that was rehearsed.
    #[error("{} has changed since its rehearsal", program.display())]
    Changed {
        /// The program.
        program: PathBuf,
    },
    /// A signal has asked the daemon to end.
    #[error("the daemon is shutting down")]
    Stopping,
    /// The handover cannot be written.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// An argument that execve(2) cannot pass.
    #[error("an argument contains NUL")]
    Argument,
}

impl UpgradeError {
    pub(crate) fn start(program: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| UpgradeError::Start { program: program.to_owned(), source }
    }
}

/// Why a rehearsal failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RehearsalError {
    /// The program cannot take over, for this reason.
    #[error("{0}")]
    Refused(String),
    /// It did not answer in time.
    #[error("did not answer in time")]
    NoAnswer,
    /// It exited.
    #[error("exited without an answer: {0}{hint}", hint = refused_call(*.0))]
    Ended(ExitStatus),
    /// Its answer is not one of a rehearsal.
    #[error("answered neither \"ready\" nor \"refused\"")]
    Nonsense,
    /// A signal has asked the daemon to end.
    #[error("the daemon is shutting down")]
    Stopping,
    /// The system refused an operation that the rehearsal needs.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What it means if the kernel has ended a program because of a system call.
fn refused_call(status: ExitStatus) -> &'static str {
    match status.signal() {
        Some(libc::SIGSYS) => {
            "; it made a system call that the sandbox of the running daemon does not allow, which is \
             for all programs of this process; restart the daemon with the new program instead"
        }
        _ => "",
    }
}

/// What a daemon hands over besides its session.
pub struct Handoff<'a> {
    /// The disk.
    pub disk: &'a Disk,
    /// The socket for frontends, unless there is only one frontend.
    pub listener: Option<&'a Listener>,
    /// The control socket.
    pub control: &'a Listener,
    /// The file that the running program was started from.
    pub program: &'a Path,
    /// `--upgrade-dir`: where other programs may be.
    pub upgrade_dir: Option<&'a Path>,
    /// Whose frontends are let in.
    pub admission: &'a Admission,
}

impl Handoff<'_> {
    /// Makes another program continue with all this, the session, and the frontend at `connection`.
    /// That program answers `client`. Returns only if that is not possible, with the reason; the
    /// session is then served as before.
    pub fn hand_over<D: Device>(
        &self,
        request: &Upgrade,
        session: &Mutex<Session<D>>,
        connection: Option<BorrowedFd<'_>>,
        client: BorrowedFd<'_>,
    ) -> UpgradeError {
        let mut session = lock(session);
        let named = request.program.as_deref();
        let program = match trusted_program::choose(named, self.program, self.upgrade_dir) {
            Ok(program) => program,
            Err(why) => return why,
        };
        let tried = match self.try_out(&program, request.time, &session, connection, client) {
            Ok(tried) => tried,
            Err(why) => return why,
        };
        session.pause();
        log_limit::report_suppressed();
        let why = match identity(&program) {
            Ok(now) if now != tried => UpgradeError::Changed { program },
            Ok(_) if signals::stopping() => UpgradeError::Stopping,
            Ok(_) => replace(&program, &self.handover(&session, connection, client)),
            Err(why) => why,
        };
        if let Err(e) = session.resume() {
            log::error!("cannot resume the session: {e}");
        }
        why
    }

    /// Rehearses the program while the session is being served; returns the identity of its file.
    fn try_out<D: Device>(
        &self,
        program: &Path,
        time: Duration,
        session: &Session<D>,
        connection: Option<BorrowedFd<'_>>,
        client: BorrowedFd<'_>,
    ) -> Result<Identity, UpgradeError> {
        if self.disk.is_failed() {
            return Err(UpgradeError::DiskFailed);
        }
        if let Some(why) = session.upgrade_blocker() {
            return Err(UpgradeError::Session(why));
        }
        let tried = identity(program)?;
        rehearse(program, self.handover(session, connection, client), time)?;
        Ok(tried)
    }

    fn handover<D: Device>(
        &self,
        session: &Session<D>,
        connection: Option<BorrowedFd<'_>>,
        client: BorrowedFd<'_>,
    ) -> Handover {
        let listening = |listener: &Listener| Listening {
            fd: listener.as_fd().as_raw_fd(),
            file: listener.file_id(),
        };
        let raw = |message: Message<BorrowedFd<'_>>| Message {
            request: message.request,
            body: message.body,
            fds: message.fds.iter().map(AsRawFd::as_raw_fd).collect(),
        };
        let descriptions = self.disk.layers().iter().map(|layer| {
            let direct = layer.file().direct().map(|(fd, _)| fd.as_raw_fd());
            std::iter::once(layer.file().buffered().as_raw_fd()).chain(direct)
        });
        let mut descriptions = descriptions;
        // The successor opens a read-only disk again, because its lock is shared.
        let top = if self.disk.read_only() {
            Vec::new()
        } else {
            descriptions.next().into_iter().flatten().collect()
        };
        Handover {
            from: env!("CARGO_PKG_VERSION").to_owned(),
            boot: hidden_boot_id(),
            rehearsal: None,
            paused: now(),
            wake: signals::wake_fd().map(|fd| fd.as_raw_fd()),
            listener: self.listener.map(listening),
            control: Some(listening(self.control)),
            admission: self.admission.clone(),
            connection: connection.map(|fd| fd.as_raw_fd()),
            top,
            hold: descriptions.flatten().collect(),
            reply: Some(client.as_raw_fd()),
            write_cache: session.device_state().write_cache,
            sandbox: sandbox::is_entered(),
            messages: session.export().into_iter().map(raw).collect(),
        }
    }
}

/// The time since the host's start (`CLOCK_MONOTONIC`).
pub fn now() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_MONOTONIC).ok().map(Duration::from)
}

/// The path of the file that this program was started from, also if that file was replaced since:
/// the kernel then reports the path with " (deleted)" after it.
pub fn running_program() -> PathBuf {
    const DELETED: &[u8] = b" (deleted)";
    let path = std::env::current_exe().unwrap_or_default();
    match path.as_os_str().as_bytes().strip_suffix(DELETED) {
        Some(before) if !path.exists() => PathBuf::from(OsString::from_vec(before.to_vec())),
        _ => path,
    }
}

/// Identifies a file's content: device, inode, length, times of the last changes. A program can set
/// its mtime back, but not its ctime.
type Identity = [i64; 7];

fn identity(program: &Path) -> Result<Identity, UpgradeError> {
    let found = fs::metadata(program).map_err(UpgradeError::start(program))?;
    let numbers = [found.dev(), found.ino(), found.len()].map(u64::cast_signed);
    let [dev, ino, len] = numbers;
    let (mtime, ctime) = (found.mtime(), found.ctime());
    Ok([dev, ino, len, mtime, found.mtime_nsec(), ctime, found.ctime_nsec()])
}

/// The command line of the successor: this program's, with the handover in front.
fn arguments(program: &Path, handover: RawFd) -> Vec<OsString> {
    let is_takeover = |arg: &OsString| arg.as_bytes().starts_with(TAKEOVER.as_bytes());
    let own = std::env::args_os().skip(1).filter(|arg| !is_takeover(arg));
    let takeover = OsString::from(format!("{TAKEOVER}{handover}"));
    [program.as_os_str().to_owned(), takeover].into_iter().chain(own).collect()
}

/// Starts the program as a child, which answers whether it could take over.
fn rehearse(program: &Path, mut handover: Handover, time: Duration) -> Result<(), UpgradeError> {
    let failed = |source| UpgradeError::Rehearsal { program: program.to_owned(), source };
    let (mut ours, theirs) = io::pipe().map_err(|e| failed(e.into()))?;
    handover.rehearsal = Some(theirs.as_raw_fd());
    // If this process is killed, the child must not keep the sockets open: a frontend that
    // connects, or the next daemon, would take it for alive.
    (handover.listener, handover.control) = (None, None);
    let file = handover.store()?;
    let mut fds = handover.fds();
    fds.push(file.as_raw_fd());
    let mut command = Command::new(program);
    // A process group of its own, so that its children can be killed with it.
    command.args(&arguments(program, file.as_raw_fd())[1..]).process_group(0);
    let parent = getpid();
    // SAFETY: system calls only, which are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            // It holds the disk's lock, so it must die with this process.
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            if getppid() != parent {
                return Err(io::ErrorKind::NotFound.into());
            }
            Ok(set_inherited(&fds, true)?)
        });
    }
    let mut child = command.spawn().map_err(UpgradeError::start(program))?;
    drop(theirs);
    let verdict = await_verdict(&mut ours, &child, Instant::now() + time);
    // Its work is done. Until it is reaped, no other process can get its number.
    if let Ok(group) = i32::try_from(child.id()) {
        _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    let status = child.wait();
    match (verdict, status) {
        (Ok(Verdict::Ready), _) => Ok(()),
        (Ok(Verdict::Ended), Ok(status)) => Err(failed(RehearsalError::Ended(status))),
        (Ok(Verdict::Ended), Err(e)) => Err(failed(e.into())),
        (Err(e), _) => Err(failed(e)),
    }
}

/// How a rehearsal ends, if not with an error.
enum Verdict {
    /// The child can take over.
    Ready,
    /// The child has exited without an answer, and is not reaped yet.
    Ended,
}

/// Waits for the answer of the rehearsing child.
fn await_verdict(
    pipe: &mut PipeReader,
    child: &Child,
    deadline: Instant,
) -> Result<Verdict, RehearsalError> {
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") && answer.len() < ANSWER_LEN_MAX {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match wait_readable(&[pipe.as_fd()], left)? {
            Readable::Fd(_) => {}
            Readable::Timeout => return Err(RehearsalError::NoAnswer),
            Readable::Stop => return Err(RehearsalError::Stopping),
        }
        let mut bytes = [0; 512];
        match pipe.read(&mut bytes)? {
            0 => return wait_for_end(child, deadline),
            n => answer.extend(&bytes[..n]),
        }
    }
    let answer = String::from_utf8_lossy(&answer);
    match answer.trim_end().split_once(' ') {
        Some(("ready", _)) => Ok(Verdict::Ready),
        Some(("refused", why)) => Err(RehearsalError::Refused(why.to_owned())),
        _ => Err(RehearsalError::Nonsense),
    }
}

/// Waits until the child has exited, without reaping it.
fn wait_for_end(child: &Child, deadline: Instant) -> Result<Verdict, RehearsalError> {
    let child = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while Instant::now() < deadline {
        match waitid(Id::Pid(child), flags).map_err(io::Error::from)? {
            WaitStatus::StillAlive => std::thread::sleep(CHILD_INTERVAL),
            _ => return Ok(Verdict::Ended),
        }
    }
    Err(RehearsalError::NoAnswer)
}

/// Continues as another program. Returns only if that is not possible, with the reason.
fn replace(program: &Path, handover: &Handover) -> UpgradeError {
    let file = match handover.store() {
        Ok(file) => file,
        Err(e) => return e.into(),
    };
    let mut fds = handover.fds();
    fds.push(file.as_raw_fd());
    let strings = |all: &mut dyn Iterator<Item = OsString>| {
        all.map(|one| CString::new(one.into_vec())).collect::<Result<Vec<_>, _>>()
    };
    let variables = &mut std::env::vars_os().map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    let arguments = &mut arguments(program, file.as_raw_fd()).into_iter();
    let (Ok(arguments), Ok(variables)) = (strings(arguments), strings(variables)) else {
        return UpgradeError::Argument;
    };
    // Signals from here on are blocked and left to the successor.
    let result = signals::hold().and_then(|()| {
        if signals::stopping() {
            // Its handler has closed the listening socket.
            return Err(nix::Error::EINTR);
        }
        set_inherited(&fds, true)?;
        execve(&arguments[0], &arguments, &variables)
    });
    _ = (set_inherited(&fds, false), signals::release());
    let Err(e) = result;
    UpgradeError::start(program)(e.into())
}
