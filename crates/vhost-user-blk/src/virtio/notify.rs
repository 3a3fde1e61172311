//! The two event descriptors of a ring: the guest's kick and our call. Each is an eventfd
//! or, with UML, a pipe.
//!
//! `EventConsumer` and `EventNotifier` of the `vmm-sys-util` crate own their descriptors. Reading
//! and writing is done here: the crate's `consume` and `notify` sleep where the other side lets
//! them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{read, write};
use vmm_sys_util::event::{EventConsumer, EventNotifier};
use vmm_sys_util::eventfd::EventFd;

/// What one look into a pipe takes out of it, in bytes: many kicks at once.
const PIPE_READ_LEN: usize = 512;

/// The descriptor of an event, which the crate's types give out by number only.
pub(crate) trait EventDescriptor {
    /// The descriptor.
    fn fd(&self) -> BorrowedFd<'_>;
}

impl EventDescriptor for EventConsumer {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `self` owns it, and is borrowed as long.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

impl EventDescriptor for EventNotifier {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: as above.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

/// One that only this daemon has.
impl EventDescriptor for EventFd {
    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: as above.
        unsafe { BorrowedFd::borrow_raw(self.as_raw_fd()) }
    }
}

/// A notifier of ours behind a descriptor that came in a message.
pub(crate) fn notifier(file: File) -> EventNotifier {
    // SAFETY: `file` owns the descriptor and gives it up.
    unsafe { EventNotifier::from_raw_fd(file.into_raw_fd()) }
}

/// The guest's kick descriptor.
#[derive(Debug)]
pub(crate) struct Kick<'a> {
    fd: BorrowedFd<'a>,
    is_pipe: bool,
}

impl<'a> Kick<'a> {
    /// # Errors
    /// What fstat(2) says; or the descriptor is of a kind that cannot be waited for. A regular
    /// file, say, or /dev/null, is ready at any time, and its queue would never sleep.
    pub(crate) fn new(fd: BorrowedFd<'a>) -> io::Result<Self> {
        if let Err(e) = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?.add(fd, EpollEvent::empty()) {
            let what = "the kick descriptor cannot be waited for (expected an eventfd or a pipe)";
            return Err(io::Error::other(format!("{what}: {e}")));
        }
        let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
        Ok(Self { fd, is_pipe: kind == SFlag::S_IFIFO || kind == SFlag::S_IFSOCK })
    }

    /// To be called once the descriptor is known to be signalled. An eventfd only counts
    /// on, which costs nothing; a pipe would fill up.
    pub(crate) fn consume(&self) {
        if self.is_pipe && is_ready(self.fd, PollFlags::POLLIN) {
            _ = read(self.fd, &mut [0; PIPE_READ_LEN]);
        }
    }
}

/// Our call descriptor.
#[derive(Debug)]
pub(crate) struct CallFd<'a> {
    fd: BorrowedFd<'a>,
    /// A write never waits: the description is non-blocking.
    never_waits: bool,
}

impl<'a> CallFd<'a> {
    /// The call descriptor `fd`.
    pub(crate) fn new(fd: BorrowedFd<'a>) -> Self {
        let flags = fcntl(fd, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_truncate);
        Self { fd, never_waits: flags.contains(OFlag::O_NONBLOCK) }
    }

    /// Signals it. One that is full is signalled already; a frontend that leaves it full
    /// must not hold up the queue.
    pub(crate) fn signal(&self) {
        if !self.never_waits && !is_ready(self.fd, PollFlags::POLLOUT) {
            return;
        }
        match write(self.fd, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(e) => log::debug!("cannot notify the frontend: {e}"),
        }
    }
}

fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> bool {
    poll(&mut [PollFd::new(fd, flags)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    #[test]
    fn what_is_always_ready_is_no_kick_descriptor() {
        let null = std::fs::File::open("/dev/null").unwrap();
        for file in [tempfile::tempfile().unwrap(), null] {
            let error = Kick::new(file.as_fd()).unwrap_err().to_string();
            assert!(error.contains("eventfd"), "{error}");
        }
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(Kick::new(reader.as_fd()).unwrap().is_pipe);
        assert!(!Kick::new(EventFd::new().unwrap().as_fd()).unwrap().is_pipe);
    }

    #[test]
    fn a_full_call_descriptor_does_not_block() {
        for flags in [EfdFlags::empty(), EfdFlags::EFD_NONBLOCK] {
            let event = EventFd::from_flags(flags).unwrap();
            event.write(u64::MAX - 1).unwrap();
            CallFd::new(event.as_fd()).signal();
            assert_eq!(event.read().unwrap(), u64::MAX - 1);
            CallFd::new(event.as_fd()).signal();
            assert_eq!(event.read().unwrap(), 1);
        }
    }

    #[test]
    fn a_pipe_is_emptied_and_an_eventfd_is_left_alone() {
        let (reader, writer) = std::io::pipe().unwrap();
        let call = CallFd::new(writer.as_fd());
        call.signal();
        call.signal();
        let kick = Kick::new(reader.as_fd()).unwrap();
        kick.consume();
        assert!(!is_ready(reader.as_fd(), PollFlags::POLLIN));
        // With nothing in it, it does not wait either.
        kick.consume();

        let event = EventFd::from_value(3).unwrap();
        Kick::new(event.as_fd()).unwrap().consume();
        assert_eq!(event.read().unwrap(), 3);
    }

    #[test]
    fn a_frontend_that_closed_its_end_is_no_error() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        // Rust ignores SIGPIPE.
        CallFd::new(writer.as_fd()).signal();
    }
}
