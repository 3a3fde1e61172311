//! The few messages that the `vhost` crate cannot take are received and acknowledged here
//! (vhost-user specification, "Message Specification").

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recv, recvmsg, send};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{Error, Result};
use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Most descriptors that one message can carry (Linux: SCM_MAX_FD). With less room the kernel would
/// say that there were more, but not close those that it has given.
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

/// Bits of the flags: the protocol's version, of which there is 1, this is a reply, a reply is asked for.
const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 0x1;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;

impl Header {
    /// The type of the message.
    pub fn is(&self, request: FrontendReq) -> bool {
        self.request.get() == u32::from(request)
    }

    /// Bytes after the header, as the frontend says.
    pub fn size(&self) -> usize {
        self.size.get() as usize
    }

    /// Whether it is a message as a frontend sends it.
    pub fn is_valid(&self) -> bool {
        self.flags.get() & (VERSION_MASK | REPLY) == VERSION
    }

    /// Says what came of the message, if the frontend wants to know.
    ///
    /// # Errors
    /// Those of the socket.
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

/// The beginning of the next message, without taking it. `None` if not all of it is there, and when
/// something is wrong with the socket: the crate finds that out.
pub fn peek<T: FromBytes + IntoBytes>(socket: BorrowedFd<'_>) -> Option<T> {
    let mut beginning = T::new_zeroed();
    let bytes = beginning.as_mut_bytes();
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let peeked = recv(socket.as_raw_fd(), bytes, flags).ok()?;
    (peeked == bytes.len()).then_some(beginning)
}

/// Takes as many bytes from the socket, and the descriptors that come with them.
///
/// # Errors
/// Those of the socket, and [`Error::InvalidMessage`] if the message is cut short.
pub fn receive(socket: BorrowedFd<'_>, message: &mut [u8]) -> Result<Vec<File>> {
    let mut control = nix::cmsg_space!([RawFd; SCM_FDS_MAX]);
    let len = message.len();
    let mut iov = [IoSliceMut::new(message)];
    let flags = MsgFlags::MSG_WAITALL | MsgFlags::MSG_CMSG_CLOEXEC;
    let socket_error = |e: nix::Error| Error::SocketError(e.into());
    let received =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags)
            .map_err(socket_error)?;
    let mut files = Vec::new();
    for control in received.cmsgs().map_err(socket_error)? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made these descriptors for this message.
            files.extend(fds.into_iter().map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) })));
        }
    }
    if received.bytes == len { Ok(files) } else { Err(Error::InvalidMessage) }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    /// Sends bytes with so many descriptors.
    pub(crate) fn send_with(frontend: &UnixStream, bytes: &[u8], fds: usize) {
        let fds = vec![frontend.as_raw_fd(); fds];
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &rights[..0] } else { &rights };
        let flags = MsgFlags::empty();
        let iov = [IoSlice::new(bytes)];
        let sent = sendmsg::<()>(frontend.as_raw_fd(), &iov, rights, flags, None).unwrap();
        assert_eq!(sent, bytes.len());
    }

    #[test]
    fn as_many_descriptors_as_a_message_can_carry_are_taken() {
        let (frontend, backend) = UnixStream::pair().unwrap();
        send_with(&frontend, &[1; 12], SCM_FDS_MAX);
        let files = receive(backend.as_fd(), &mut [0; 12]).unwrap();
        assert_eq!(files.len(), SCM_FDS_MAX);
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
