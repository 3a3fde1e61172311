//! Read leases (fcntl(2), `F_SETLEASE`): when another process opens the file for writing, the
//! kernel notifies the lease holder and delays that open until the lease is released. It is
//! therefore released at once.
//!
//! The notification is a signal. It is sent to the thread that took the lease; that thread blocks
//! the signal and polls for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

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

/// Selects the thread to which the kernel sends lease signals.
pub(crate) struct Leases {
    signals: OwnedFd,
}

/// A file that has, or may get, a lease.
pub(crate) struct Lease {
    /// Owner and signal are properties of the description, which the disk reads from: nothing else
    /// uses these two, and it need not be opened again.
    file: File,
    held: bool,
}

impl Leases {
    /// Must be created on the thread that is going to call [`Self::block`].
    pub(crate) fn new() -> io::Result<Self> {
        let signals = signals()?;
        // SAFETY: `signals` is a whole set.
        let fd = unsafe {
            libc::signalfd(-1, &raw const signals, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        let fd = Errno::result(fd)?;
        // SAFETY: the descriptor is new and has no other owner.
        Ok(Self { signals: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Blocks the signals in the calling thread, which from now on holds the leases and polls for
    /// them.
    pub(crate) fn block(&self) -> io::Result<()> {
        let signals = signals()?;
        // SAFETY: `signals` is a whole set, and the old set is not requested.
        let errno = unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut())
        };
        if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
    }

    /// Whether a lease may have been broken since the last call; the descriptor becomes readable
    /// then.
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
    /// For the file that is open here, for reading only.
    pub(crate) fn new(file: impl AsFd) -> io::Result<Self> {
        let file = File::from(file.as_fd().try_clone_to_owned()?);
        // One that a predecessor has left on the description; usually there is none.
        _ = fcntl(&file, libc::F_SETLEASE, libc::F_UNLCK);
        Ok(Self { file, held: false })
    }

    /// Takes the lease, unless it is held, and makes the kernel notify the calling thread, which
    /// has called [`Leases::block`]. That requires owning the file or CAP_LEASE, a file system that
    /// supports leases, and that no process has the file open for writing.
    pub(crate) fn take(&mut self, _leases: &Leases) -> io::Result<()> {
        if self.held {
            return Ok(());
        }
        // Each time: a lease that ends takes these settings with it, and a new one would notify the
        // whole process, by SIGIO, which kills it.
        let owner = OwnerEx { kind: F_OWNER_TID, id: nix::unistd::gettid().as_raw() };
        // SAFETY: the command reads such a struct during the call.
        let owned = unsafe { libc::fcntl(self.file.as_raw_fd(), F_SETOWN_EX, &raw const owner) };
        Errno::result(owned)?;
        fcntl(&self.file, F_SETSIG, libc::SIGRTMIN())?;
        fcntl(&self.file, libc::F_SETLEASE, libc::F_RDLCK)?;
        self.held = true;
        Ok(())
    }

    pub(crate) fn is_held(&self) -> bool {
        self.held
    }

    /// Releases the lease if another process is waiting for it; returns whether one was.
    pub(crate) fn give_back_if_broken(&mut self) -> bool {
        // While a lease is being broken, the kernel reports the type that it is to be reduced to.
        if !self.held || fcntl(&self.file, libc::F_GETLEASE, 0).ok() == Some(libc::F_RDLCK) {
            return false;
        }
        self.release();
        true
    }

    fn release(&mut self) {
        if std::mem::take(&mut self.held)
            && let Err(err) = fcntl(&self.file, libc::F_SETLEASE, libc::F_UNLCK)
        {
            log::debug!("releasing a lease: {err}");
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The disk may keep the description.
        self.release();
    }
}

/// A real-time signal, and SIGIO, which the kernel sends when its queue of real-time signals is
/// full and which would otherwise kill the process.
fn signals() -> io::Result<libc::sigset_t> {
    Ok(create_sigset(&[libc::SIGRTMIN(), libc::SIGIO])?)
}

fn fcntl(file: &File, command: libc::c_int, argument: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: the commands used here take a number.
    Ok(Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, argument) })?)
}
