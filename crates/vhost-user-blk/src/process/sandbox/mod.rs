//! What the process and each of its threads give up before they serve, so that taking one of them
//! over is of little use: files (`landlock.rs`) and system calls (`seccomp.rs`).
//!
//! All of it is inherited by threads and by programs, so it is entered before the first thread
//! starts, and once: a program that takes over is inside from its beginning. (Landlock can be
//! entered sixteen times, and each filter costs a little.) Only its threads narrow themselves
//! again.

mod landlock;
mod seccomp;

use std::io::Write;
use std::sync::OnceLock;

use block_io::threads::{self, Task};
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use seccompiler::SeccompAction;

use crate::cli::Sandbox;
use crate::fault;
pub use landlock::Places;
pub use seccomp::Thread;

/// Why the sandbox cannot be entered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// The rules for files are refused.
    #[error("cannot confine the process to its files (Landlock): {0}")]
    Files(#[from] ::landlock::RulesetError),
    /// The filter for system calls is refused.
    #[error("cannot filter system calls (seccomp): {0}")]
    Calls(#[from] seccompiler::Error),
    /// The handler cannot be installed.
    #[error("cannot handle SIGSYS: {0}")]
    Handler(Errno),
}

/// What happens to a system call that is not allowed, once the sandbox has been entered.
static REFUSED: OnceLock<SeccompAction> = OnceLock::new();

/// Enters the sandbox. The calling thread must be the only one.
pub fn enter(mode: Sandbox, places: &Places) -> Result<(), SandboxError> {
    let files = match mode {
        Sandbox::Off => return Ok(()),
        // Landlock has no mode that only logs.
        Sandbox::Log => "files not confined (--sandbox=log)".to_owned(),
        Sandbox::On => match landlock::confine(places)? {
            Some(version) => format!("files confined (Landlock {version})"),
            None => {
                log::warn!(
                    "this kernel has no Landlock, or it is not enabled: a daemon that is taken over \
                     can open all files that its user may"
                );
                "files not confined".to_owned()
            }
        },
    };
    resume(mode)?;
    if let Some(refused) = REFUSED.get() {
        let main = Thread::Main { upgrades: !places.programs.is_empty() };
        seccomp::confine(main, refused.clone())?;
    }
    log::debug!("sandbox: {files}, system calls filtered");
    Ok(())
}

/// Continues in a sandbox that this process has entered as another program.
pub fn resume(mode: Sandbox) -> Result<(), SandboxError> {
    let refused = match mode {
        Sandbox::Off => return Ok(()),
        Sandbox::Log => SeccompAction::Log,
        Sandbox::On => SeccompAction::Trap,
    };
    report_refusals().map_err(SandboxError::Handler)?;
    _ = REFUSED.set(refused);
    threads::at_start(|task| {
        narrow(match task {
            Task::Operations => Thread::Operations,
            Task::Metadata => Thread::Metadata,
            Task::BaseWatch => Thread::BaseWatch,
        });
    });
    Ok(())
}

/// Whether this process is in the sandbox, or runs as if it were (`--sandbox=log`).
#[must_use]
pub fn is_entered() -> bool {
    REFUSED.get().is_some()
}

/// Takes from the calling thread what threads of its kind do not need, if the sandbox has been
/// entered.
pub fn narrow(thread: Thread) {
    if let Some(refused) = REFUSED.get()
        && let Err(e) = seccomp::confine(thread, refused.clone())
    {
        // The process's filter remains.
        log::warn!("cannot filter a thread's system calls: {e}");
    }
    fault::foreign_code();
}

/// Makes a refused system call end the process with a message. After a program was replaced by
/// another, the kernel ends it without one until this is called.
fn report_refusals() -> Result<(), Errno> {
    // The handler is reset and SIGSYS not blocked when it runs, so the second SIGSYS ends the
    // process.
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_RESETHAND | SaFlags::SA_NODEFER;
    let action = SigAction::new(SigHandler::SigAction(on_refusal), flags, SigSet::empty());
    // SAFETY: the handler does only what is async-signal-safe.
    unsafe { sigaction(Signal::SIGSYS, &action) }.map(drop)
}

/// What a handler of SIGSYS gets (sigaction(2)).
#[repr(C)]
struct Refusal {
    head: [libc::c_int; 4],
    at: usize,
    call: libc::c_int,
    arch: libc::c_uint,
}

extern "C" fn on_refusal(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes 128 bytes, aligned for a pointer, and those of SIGSYS are these.
    let call = unsafe { (*info.cast::<Refusal>()).call };
    let mut name = [0u8; 16];
    let mut line = [0u8; 256];
    let room = line.len();
    let mut rest = &mut line[..];
    // SAFETY: the call writes up to 16 bytes, with a NUL at the end.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    // Formatting numbers and slices into a slice allocates nothing and takes no lock.
    _ = write!(rest, "ERROR system call {call} ({}) refused in thread ", std::env::consts::ARCH);
    _ = rest.write_all(name);
    _ = rest.write_all(b": a bug or an attack; --sandbox=log allows and logs such calls\n");
    let len = room - rest.len();
    // SAFETY: `line` has `len` bytes. All of these are async-signal-safe.
    unsafe {
        let mut stderr =
            libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
        // A full pipe takes nothing, and must not keep the process alive.
        if libc::poll(&raw mut stderr, 1, 0) == 1 {
            libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), len);
        }
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGSYS);
        libc::_exit(128 + libc::SIGSYS);
    }
}
