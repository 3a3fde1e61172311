//! Descriptors that pass from one program to the next.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Duplicates an inherited descriptor; no further program inherits the duplicate. The original
/// stays open: until an upgrade is complete it belongs to another process.
///
/// # Errors
/// `InvalidInput` for a negative number, else what fcntl(2) says: EBADF if it is not open.
pub fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: borrowed only to ask the kernel, which answers EBADF for a number that is not open.
    let inherited = unsafe { BorrowedFd::borrow_raw(fd) };
    let own = fcntl(inherited, FcntlArg::F_DUPFD_CLOEXEC(0))?;
    // SAFETY: the kernel has just made it.
    Ok(unsafe { OwnedFd::from_raw_fd(own) })
}

/// Sets whether the next program inherits these descriptors, which are open. Async-signal-safe.
pub fn set_inherited(fds: &[RawFd], inherited: bool) -> nix::Result<()> {
    let flags = if inherited { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
    fds.iter().try_for_each(|&fd| {
        // SAFETY: the caller keeps it open.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl(fd, FcntlArg::F_SETFD(flags)).map(|_| ())
    })
}

/// Sets close-on-exec on a descriptor that came in a message: the `vhost` crate receives without
/// it, and a program that is started must get only what it is handed.
pub fn received<F: AsFd>(fd: F) -> F {
    if let Err(e) = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        log::debug!("cannot set close-on-exec: {e}");
    }
    fd
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn is_inherited(fd: RawFd) -> bool {
        // SAFETY: the test keeps it open.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let flags = FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD).unwrap());
        !flags.contains(FdFlag::FD_CLOEXEC)
    }

    #[test]
    fn a_duplicate_is_not_inherited_unless_that_is_asked_for() {
        let (reader, _writer) = io::pipe().unwrap();
        let duplicate = duplicate(reader.as_raw_fd()).unwrap();
        let fd = duplicate.as_raw_fd();
        assert!(fd != reader.as_raw_fd() && !is_inherited(fd));
        set_inherited(&[fd], true).unwrap();
        assert!(is_inherited(fd));
        set_inherited(&[fd], false).unwrap();
        assert!(!is_inherited(fd));
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_refused() {
        assert_eq!(duplicate(-1).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(duplicate(RawFd::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
