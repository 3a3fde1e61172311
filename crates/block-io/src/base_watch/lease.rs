//! Read leases (fcntl(2), `F_SETLEASE`): the kernel tells who has one when somebody opens the file for writing, and lets that
//! opening wait until the lease is given back. So it is given back at once.
//!
//! The kernel tells by a signal. It is sent to the thread that took the lease, which has it blocked and polls for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use vmm_sys_util::signal::create_sigset;

// From linux/fcntl.h, which libc does not have.
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

/// `struct f_owner_ex`.
#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    id: libc::pid_t,
}

/// Where the kernel tells a thread of its leases.
pub(crate) struct Leases {
    signals: OwnedFd,
}

/// A file for which there is, or may be, a lease.
pub(crate) struct Lease {
    /// A description of its own: owner and signal belong to the description.
    file: File,
    held: bool,
}

impl Leases {
    /// For the thread that is going to call [`Self::block`].
    pub(crate) fn new() -> io::Result<Self> {
        let signals = signals()?;
        // SAFETY: `signals` is a whole set.
        let fd = unsafe {
            libc::signalfd(-1, &raw const signals, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        let fd = Errno::result(fd)?;
        // SAFETY: the descriptor is new, and nobody else has it.
        Ok(Self { signals: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Blocks the signals in the calling thread, which is the one that polls and has the leases from now on.
    pub(crate) fn block(&self) -> io::Result<()> {
        let signals = signals()?;
        // SAFETY: `signals` is a whole set, and the old one is not asked for.
        let errno = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut())
        };
        if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
    }

    /// Whether a lease may have been broken, since the last call; becomes readable then.
    pub(crate) fn told(&self) -> bool {
        let mut told = false;
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        while nix::unistd::read(&self.signals, &mut info).is_ok_and(|len| len > 0) {
            told = true;
        }
        told
    }
}

impl AsFd for Leases {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

impl Lease {
    /// For the file at `path`.
    pub(crate) fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path)?, held: false })
    }

    /// Lets the kernel tell the calling thread, which has called [`Leases::block`], and takes the lease: to be had by the file's
    /// owner or with CAP_LEASE, where the file system knows leases, and while nobody has the file open for writing.
    pub(crate) fn begin(&mut self, _leases: &Leases) -> io::Result<()> {
        let owner = OwnerEx { kind: F_OWNER_TID, id: nix::unistd::gettid().as_raw() };
        // SAFETY: the command reads such a struct during the call.
        let owned = unsafe { libc::fcntl(self.file.as_raw_fd(), F_SETOWN_EX, &raw const owner) };
        Errno::result(owned)?;
        fcntl(&self.file, F_SETSIG, libc::SIGRTMIN())?;
        self.take()
    }

    pub(crate) fn is_held(&self) -> bool {
        self.held
    }

    /// Takes it again, if it is not held.
    pub(crate) fn take(&mut self) -> io::Result<()> {
        if !self.held {
            fcntl(&self.file, libc::F_SETLEASE, libc::F_RDLCK)?;
            self.held = true;
        }
        Ok(())
    }

    /// Gives it back if somebody waits for that; whether somebody did.
    pub(crate) fn give_back_if_broken(&mut self) -> bool {
        // While it is being broken the kernel names what is to be left of it.
        if !self.held || fcntl(&self.file, libc::F_GETLEASE, 0).ok() == Some(libc::F_RDLCK) {
            return false;
        }
        self.held = false;
        if let Err(err) = fcntl(&self.file, libc::F_SETLEASE, libc::F_UNLCK) {
            log::debug!("giving back a lease: {err}");
        }
        true
    }
}

/// A real-time signal, and SIGIO, which the kernel sends where its queue of those is full and which else would end the
/// process.
fn signals() -> io::Result<libc::sigset_t> {
    Ok(create_sigset(&[libc::SIGRTMIN(), libc::SIGIO])?)
}

fn fcntl(file: &File, command: libc::c_int, argument: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: the commands used here take a number.
    Ok(Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, argument) })?)
}
