//! SIGTERM, SIGINT and SIGHUP end the daemon cleanly. If SIGINT or SIGHUP was ignored at the start,
//! it stays ignored.
//!
//! The `vhost` crate receives and sends with blocking calls that it repeats after EINTR, and a
//! frontend may stop in the middle of a message. So the handler wakes the main loop and also shuts
//! the connection down, which makes any call of the main thread on it return. `shutdown` and
//! `write` are async-signal-safe. The kernel delivers a signal for the process to the main thread
//! unless that blocks it, so the handler never runs while the main thread is between closing a
//! connection and [`Connection`]'s drop.
//!
//! A frontend may connect again the moment it sees the end of its connection. Some give up their
//! disk if they then get into the queue of a process that is ending. So the handler closes the
//! listening socket before the connection ([`Entrance`]).

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering};
use std::sync::{Once, OnceLock};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::sys::pthread::pthread_kill;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::register_signal_handler;

use crate::process::socket::Listener;
use crate::virtio::notify::EventDescriptor;

const NO_FD: RawFd = -1;

static STOPPING: AtomicBool = AtomicBool::new(false);
static WAKE: OnceLock<EventFd> = OnceLock::new();
static WAKE_FD: AtomicI32 = AtomicI32::new(NO_FD);
static CONNECTION_FD: AtomicI32 = AtomicI32::new(NO_FD);
/// Null, or what an [`Entrance`] borrows.
static LISTENER: AtomicPtr<Listener> = AtomicPtr::new(ptr::null_mut());

extern "C" fn on_signal(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let errno = Errno::last_raw();
    STOPPING.store(true, Ordering::SeqCst);
    close_entrance();
    let one = 1u64;
    // SAFETY: `one` outlives the call and has the eight bytes that an eventfd takes; both calls are
    // async-signal-safe and take any fd number, -1 included.
    unsafe {
        libc::write(WAKE_FD.load(Ordering::SeqCst), (&raw const one).cast(), size_of::<u64>());
        libc::shutdown(CONNECTION_FD.load(Ordering::SeqCst), libc::SHUT_RDWR);
    }
    Errno::set_raw(errno);
}

/// Closes the listening socket, if there is one. Async-signal-safe.
fn close_entrance() {
    let listener = LISTENER.swap(ptr::null_mut(), Ordering::SeqCst);
    // SAFETY: an `Entrance` borrows it. Its drop, in this same thread, would have reset the
    // pointer.
    if let Some(listener) = unsafe { listener.as_ref() } {
        listener.close_in_handler(WAKE_FD.load(Ordering::SeqCst));
    }
}

/// Handles the signals that end the process, and ignores SIGXFSZ, so that a write past the file
/// size limit fails with EFBIG instead of killing the daemon. To be called from the main thread.
///
/// `inherited` is the [`wake_fd`] of the predecessor, whose handler may have run too late for the
/// predecessor to end.
pub fn install(inherited: Option<OwnedFd>) -> io::Result<()> {
    let wake = match inherited {
        // SAFETY: `fd` is owned and given up here. If it is not an eventfd, reads and writes fail.
        Some(fd) => unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) },
        None => EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
    };
    if wake.read().is_ok_and(|signals| signals > 0) {
        STOPPING.store(true, Ordering::SeqCst);
        wake.write(1)?;
    }
    let wake = WAKE.get_or_init(|| wake);
    WAKE_FD.store(wake.as_raw_fd(), Ordering::SeqCst);
    for signal in ENDING.into_iter().filter(|&signal| !stays_ignored(signal)) {
        // The handler does only what is async-signal-safe. The crate blocks all signals meanwhile,
        // so one handler runs at a time, and does not set SA_RESTART, so poll and the like return.
        register_signal_handler(signal as libc::c_int, on_signal)?;
    }
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: ignoring a signal runs no code.
    unsafe { sigaction(Signal::SIGXFSZ, &ignore)? };
    Ok(release()?)
}

/// Whether a signal was ignored when the process was started and must stay ignored: SIGHUP under
/// nohup(1), SIGINT in a background job of a shell. SIGTERM is always handled.
fn stays_ignored(signal: Signal) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: no new action is set, and `action` has room for the old one.
    let asked = unsafe { libc::sigaction(signal as libc::c_int, ptr::null(), action.as_mut_ptr()) };
    if signal == Signal::SIGTERM || asked != 0 {
        return false;
    }
    // SAFETY: the kernel has filled it.
    unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// The signals that end the daemon.
const ENDING: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// Blocks the signals that end the daemon, so that they wait for the next program (execve(2)).
pub fn hold() -> nix::Result<()> {
    SigSet::from_iter(ENDING).thread_block()
}

/// Runs `start`, which starts threads that block the signals that end the daemon. So the main
/// thread gets these signals, or holds them for its successor.
pub fn starting_threads<T>(start: impl FnOnce() -> T) -> T {
    let held = hold();
    let result = start();
    if held.is_ok() {
        _ = release();
    }
    result
}

/// Unblocks the signals that [`hold`] blocks.
pub fn release() -> nix::Result<()> {
    SigSet::from_iter(ENDING).thread_unblock()
}

/// Whether a signal has asked for the end.
#[must_use]
pub fn stopping() -> bool {
    STOPPING.load(Ordering::SeqCst)
}

/// Makes the system call in which `thread` may sleep return with EINTR, if that is possible. What
/// is lost is an interruption just before such a call, so the caller repeats it.
///
/// SIGURG, because without a handler it is ignored, and programs expect to get it for no reason.
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    static HANDLED: Once = Once::new();
    HANDLED.call_once(|| {
        if let Err(e) = register_signal_handler(libc::SIGURG, on_interrupt) {
            log::error!("cannot interrupt threads: {e}");
        }
    });
    // The thread was not joined, so it still has its handle, if it has ended as well.
    _ = pthread_kill(thread.as_pthread_t(), Signal::SIGURG);
}

/// The signal has done its work by arriving.
extern "C" fn on_interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Lets this thread be interrupted, whatever it has inherited.
pub fn be_interruptible() {
    _ = SigSet::from(Signal::SIGURG).thread_unblock();
}

/// Readable once a signal has asked for the end; `None` before [`install`].
#[must_use]
pub fn wake_fd() -> Option<BorrowedFd<'static>> {
    WAKE.get().map(EventDescriptor::fd)
}

/// While this lives, a signal shuts the connection down.
#[derive(Debug)]
pub struct Connection(());

impl Connection {
    /// Registers the connection. The value must be dropped before `socket` is closed. An earlier
    /// signal has not shut it down, so check [`stopping`] afterwards.
    #[must_use]
    pub fn new(socket: BorrowedFd<'_>) -> Self {
        CONNECTION_FD.store(socket.as_raw_fd(), Ordering::SeqCst);
        Connection(())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        CONNECTION_FD.store(NO_FD, Ordering::SeqCst);
    }
}

/// While this lives, a signal closes the listening socket, before it shuts the connection down.
#[derive(Debug)]
pub struct Entrance<'a>(PhantomData<&'a Listener>);

impl<'a> Entrance<'a> {
    /// Registers the listener, in the main thread. If a signal has already come, the listener is
    /// closed at once.
    #[must_use]
    pub fn new(listener: &'a Listener) -> Self {
        LISTENER.store(ptr::from_ref(listener).cast_mut(), Ordering::SeqCst);
        if stopping() {
            close_entrance();
        }
        Entrance(PhantomData)
    }
}

impl Drop for Entrance<'_> {
    fn drop(&mut self) {
        LISTENER.store(ptr::null_mut(), Ordering::SeqCst);
    }
}
