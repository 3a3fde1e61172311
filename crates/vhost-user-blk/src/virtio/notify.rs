//! The event descriptors of a ring: the guest's kick, our call, and the like. Each is an eventfd, a
//! pipe (with UML) or a unix socket; `session/admission.rs` admits nothing else.
//!
//! `EventConsumer` and `EventNotifier` of the `vmm-sys-util` crate own their descriptors. Reading
//! and writing is done here: the crate's `consume` and `notify` sleep where the other side lets
//! them.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{read, write};
use vmm_sys_util::event::{EventConsumer, EventNotifier};
use vmm_sys_util::eventfd::EventFd;

/// What one look into a pipe or socket takes out of it, in bytes: many kicks at once.
const READ_LEN: usize = 512;

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

impl EventDescriptor for Bell<File> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
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

/// How a descriptor takes or gives events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// An eventfd, which counts.
    Counter,
    Pipe,
    Socket,
}

impl Kind {
    fn of(fd: BorrowedFd<'_>) -> Self {
        // None of the three asks a file system. Others do not come here (`session/admission.rs`).
        let mode = fstat(fd).map_or(0, |found| found.st_mode);
        match SFlag::from_bits_truncate(mode) & SFlag::S_IFMT {
            SFlag::S_IFIFO => Self::Pipe,
            SFlag::S_IFSOCK => Self::Socket,
            _ => Self::Counter,
        }
    }
}

/// The guest's kick descriptor.
#[derive(Debug)]
pub(crate) struct Kick<'a> {
    fd: BorrowedFd<'a>,
    kind: Kind,
}

impl<'a> Kick<'a> {
    /// The kick descriptor `fd`.
    pub(crate) fn new(fd: BorrowedFd<'a>) -> Self {
        Self { fd, kind: Kind::of(fd) }
    }

    /// To be called once the descriptor is known to be signalled. An eventfd only counts
    /// on, which costs nothing; a pipe or a socket would fill up.
    pub(crate) fn consume(&self) {
        let mut events = [0; READ_LEN];
        match self.kind {
            Kind::Counter => {}
            Kind::Pipe if !is_ready(self.fd, PollFlags::POLLIN) => {}
            Kind::Pipe => _ = read(self.fd, &mut events),
            Kind::Socket => _ = recv(self.fd.as_raw_fd(), &mut events, MsgFlags::MSG_DONTWAIT),
        }
    }
}

/// A descriptor that signals the frontend: the call, the error or the log descriptor.
#[derive(Debug)]
pub(crate) struct Bell<F> {
    fd: F,
    kind: Kind,
    /// A write never waits as long as the description stays as it was: non-blocking.
    never_waits: bool,
    /// It has blocked: it was full, so it is signalled, and the frontend has made it blocking.
    silent: AtomicBool,
}

impl<F: AsFd> Bell<F> {
    /// The bell behind `fd`.
    pub(crate) fn new(fd: F) -> Self {
        let kind = Kind::of(fd.as_fd());
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_truncate);
        let never_waits = flags.contains(OFlag::O_NONBLOCK);
        Self { fd, kind, never_waits, silent: AtomicBool::new(false) }
    }

    /// Signals it. One that is full is signalled already.
    ///
    /// There is no write to an eventfd or a pipe that is sure not to sleep: the frontend has the
    /// same description, and can take O_NONBLOCK away or fill it at any moment. A frontend that
    /// does so stops its own queue until the thread is interrupted (`WorkerHandle::stop`), from
    /// when on the bell is silent. So only a queue's thread may call this.
    pub(crate) fn signal(&self) {
        let fd = self.fd.as_fd();
        let one = 1u64.to_ne_bytes();
        let rung = match self.kind {
            Kind::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                send(fd.as_raw_fd(), &one, flags)
            }
            _ if self.silent.load(Ordering::Relaxed) => return,
            _ if !self.never_waits && !is_ready(fd, PollFlags::POLLOUT) => return,
            _ => write(fd, &one),
        };
        match rung {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(Errno::EINTR) => self.silent.store(true, Ordering::Relaxed),
            Err(e) => log::debug!("cannot notify the frontend: {e}"),
        }
    }
}

fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> bool {
    poll(&mut [PollFd::new(fd, flags)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    #[test]
    fn a_full_call_descriptor_does_not_block() {
        for flags in [EfdFlags::empty(), EfdFlags::EFD_NONBLOCK] {
            let event = EventFd::from_flags(flags).unwrap();
            event.write(u64::MAX - 1).unwrap();
            Bell::new(event.as_fd()).signal();
            assert_eq!(event.read().unwrap(), u64::MAX - 1);
            Bell::new(event.as_fd()).signal();
            assert_eq!(event.read().unwrap(), 1);
        }
    }

    #[test]
    fn a_pipe_is_emptied_and_an_eventfd_is_left_alone() {
        let (reader, writer) = std::io::pipe().unwrap();
        let call = Bell::new(writer.as_fd());
        call.signal();
        call.signal();
        let kick = Kick::new(reader.as_fd());
        kick.consume();
        assert!(!is_ready(reader.as_fd(), PollFlags::POLLIN));
        // With nothing in it, it does not wait either.
        kick.consume();

        let event = EventFd::from_value(3).unwrap();
        Kick::new(event.as_fd()).consume();
        assert_eq!(event.read().unwrap(), 3);
    }

    #[test]
    fn a_frontend_that_closed_its_end_is_no_error() {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        // Rust ignores SIGPIPE.
        Bell::new(writer.as_fd()).signal();
    }

    #[test]
    fn a_socket_is_never_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let bell = Bell::new(ours.as_fd());
        // Full after some of them. A socket's own flags do not matter.
        (0..100_000).for_each(|_| bell.signal());
        theirs.set_nonblocking(true).unwrap();
        let mut word = [0; 8];
        theirs.read_exact(&mut word).unwrap();
        assert_eq!(word, 1u64.to_ne_bytes());

        let kick = Kick::new(ours.as_fd());
        kick.consume();
        // A reader that waits for 512 bytes would wait here.
        testkit::socket::set_low_water(&ours, 512);
        theirs.write_all(b"k").unwrap();
        assert!(is_ready(ours.as_fd(), PollFlags::POLLIN));
        kick.consume();
        assert!(!is_ready(ours.as_fd(), PollFlags::POLLIN));
        drop(theirs);
        bell.signal();
    }
}
