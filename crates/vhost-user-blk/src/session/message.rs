//! Receives and acknowledges the few messages that the `vhost` crate cannot handle (vhost-user
//! specification, "Message Specification").

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE, VhostUserHeaderFlag};
use vhost::vhost_user::{Error, Result};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most descriptors that one message can carry (Linux: SCM_MAX_FD). With less room they would all
/// be closed, and the message lost.
pub const SCM_FDS_MAX: usize = 253;

/// vhost-user specification, "Header".
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    request: U32,
    flags: U32,
    /// Bytes after this field.
    size: U32,
}
const _: () = assert!(size_of::<Header>() == 12);

/// An acknowledgement: a reply with the result.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Acknowledgement {
    header: Header,
    result: U64,
}
const _: () = assert!(size_of::<Acknowledgement>() == 20);

/// Bits of the flags: the protocol's version (always 1), "this is a reply", "a reply is requested".
const VERSION_MASK: u32 = VhostUserHeaderFlag::VERSION.bits();
const VERSION: u32 = 0x1;
const REPLY: u32 = VhostUserHeaderFlag::REPLY.bits();
const NEED_REPLY: u32 = VhostUserHeaderFlag::NEED_REPLY.bits();

impl Header {
    /// Whether the message has this type.
    pub fn is(&self, request: FrontendReq) -> bool {
        self.request.get() == u32::from(request)
    }

    /// Bytes after the header, according to the frontend.
    pub fn size(&self) -> usize {
        self.size.get() as usize
    }

    /// Whether the flags are those of a frontend's message.
    pub fn is_valid(&self) -> bool {
        self.flags.get() & (VERSION_MASK | REPLY) == VERSION
    }

    /// Sends the outcome of the message, if the frontend has requested a reply.
    pub fn acknowledge(&self, socket: BorrowedFd<'_>, ok: bool) -> Result<()> {
        if self.flags.get() & NEED_REPLY == 0 {
            return Ok(());
        }
        let size = U32::new(8);
        let header = Header { request: self.request, flags: (VERSION | REPLY).into(), size };
        let message = Acknowledgement { header, result: u64::from(!ok).into() };
        let bytes = message.as_bytes();
        match send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(_) => Err(Error::SocketError(io::ErrorKind::WriteZero.into())),
            Err(e) => Err(Error::SocketError(e.into())),
        }
    }
}

/// Peeks at the beginning of the next message. `None` if it is not complete or the socket has an
/// error, which the crate then reports.
pub fn peek<T: FromBytes + IntoBytes>(socket: BorrowedFd<'_>) -> Option<T> {
    let mut beginning = T::new_zeroed();
    let bytes = beginning.as_mut_bytes();
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let peeked = recv(socket.as_raw_fd(), bytes, flags).ok()?;
    (peeked == bytes.len()).then_some(beginning)
}

/// Whether receiving the next message would not block: it is complete, the frontend has gone, or it
/// is not a message.
pub fn is_whole(socket: BorrowedFd<'_>) -> bool {
    let hangup = PollFlags::from_bits_retain(libc::POLLRDHUP);
    if poll(&mut [PollFd::new(socket, hangup)], PollTimeout::ZERO) != Ok(0) {
        return true;
    }
    let Some(there) = bytes_to_read(socket) else { return true };
    let header: Option<Header> = peek(socket);
    let expected = header.map_or(0, |header| header.size());
    // A message that is too long is refused by its header alone.
    there >= size_of::<Header>()
        && (expected > MAX_MSG_SIZE || there - size_of::<Header>() >= expected)
}

fn bytes_to_read(socket: BorrowedFd<'_>) -> Option<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: `count` is valid for the write of an int.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result < 0 { None } else { usize::try_from(count).ok() }
}

/// Gives a borrowed socket the crate's way to receive descriptors.
struct Socket<'a>(BorrowedFd<'a>);

impl ScmSocket for Socket<'_> {
    fn socket_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Receives a message, all of which has arrived ([`is_whole`]), and the descriptors that come with
/// it.
///
/// # Errors
/// Those of the socket, and [`Error::InvalidMessage`] if the message is cut short.
pub fn receive(socket: BorrowedFd<'_>, message: &mut [u8]) -> Result<Vec<File>> {
    let mut iov = [libc::iovec { iov_base: message.as_mut_ptr().cast(), iov_len: message.len() }];
    let mut fds = [0; SCM_FDS_MAX];
    // SAFETY: the iovec is `message`, which takes any bytes.
    let received = unsafe { Socket(socket).recv_with_fds(&mut iov, &mut fds) };
    let (bytes, count) = received.map_err(|e| Error::SocketError(e.into()))?;
    // SAFETY: the kernel has just made these descriptors for this message.
    let files = fds[..count].iter().map(|&fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    let files: Vec<File> = files.collect();
    for file in &files {
        // The crate does not set close-on-exec. No program can start in between, because only this
        // thread starts programs.
        let set = fcntl(file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
        set.map_err(|e| Error::SocketError(e.into()))?;
    }
    if bytes == message.len() { Ok(files) } else { Err(Error::InvalidMessage) }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Sends bytes with so many descriptors.
    pub(crate) fn send_with(frontend: &UnixStream, bytes: &[u8], fds: usize) {
        let fds = vec![frontend.as_raw_fd(); fds];
        assert_eq!(frontend.send_with_fds(&[bytes], &fds).unwrap(), bytes.len());
    }

    #[test]
    fn as_many_descriptors_as_a_message_can_carry_are_taken() {
        let (frontend, backend) = UnixStream::pair().unwrap();
        send_with(&frontend, &[1; 12], SCM_FDS_MAX);
        let files = receive(backend.as_fd(), &mut [0; 12]).unwrap();
        assert_eq!(files.len(), SCM_FDS_MAX);
        for file in &files {
            let flags = FdFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFD).unwrap());
            assert_eq!(flags, FdFlag::FD_CLOEXEC, "no program that is started may have it");
        }
    }

    #[test]
    fn a_message_is_whole_when_nothing_more_will_come() {
        let [message, endless] = [8, 5000].map(|size| [1, 1, size].map(u32::to_ne_bytes).concat());
        let message = [message, vec![0; 8]].concat();
        let (frontend, backend) = UnixStream::pair().unwrap();
        for byte in &message[..19] {
            assert!(!is_whole(backend.as_fd()));
            send_with(&frontend, &[*byte], 0);
        }
        assert!(!is_whole(backend.as_fd()));
        // With the beginning of the next.
        send_with(&frontend, &[0; 3], 0);
        assert!(is_whole(backend.as_fd()));
        receive(backend.as_fd(), &mut [0; 20]).unwrap();
        assert!(!is_whole(backend.as_fd()));
        drop(frontend);
        assert!(is_whole(backend.as_fd()), "its end will not come");

        let (frontend, backend) = UnixStream::pair().unwrap();
        send_with(&frontend, &endless, 0);
        assert!(is_whole(backend.as_fd()), "it is no message");
    }

    #[test]
    fn half_a_header_is_left_where_it_is() {
        let (frontend, backend) = UnixStream::pair().unwrap();
        send_with(&frontend, &[1; 11], 0);
        assert!(peek::<Header>(backend.as_fd()).is_none());
        send_with(&frontend, &[1; 1], 0);
        assert!(peek::<Header>(backend.as_fd()).is_some());
    }
}
