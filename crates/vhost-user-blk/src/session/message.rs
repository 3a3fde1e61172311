//! Messages on the frontend's socket (vhost-user specification, "Message Specification"). Nothing
//! here waits: the `vhost` crate, which handles the messages, does and so gets a socket of its own.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, sendmsg};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE, VhostUserHeaderFlag};
use vhost::vhost_user::{Error, Result};
use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::process::descriptor::Foreign;

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
    /// The type of the message.
    pub fn request(&self) -> u32 {
        self.request.get()
    }

    /// Whether the message has this type.
    pub fn is(&self, request: FrontendReq) -> bool {
        self.request.get() == u32::from(request)
    }

    /// Changes the number of bytes after the header; at most [`MAX_MSG_SIZE`].
    pub fn set_size(&mut self, size: usize) {
        self.size = U32::new(u32::try_from(size).unwrap_or(u32::MAX));
    }

    /// Bytes after the header, according to the frontend.
    pub fn size(&self) -> usize {
        self.size.get() as usize
    }

    /// Whether the flags are those of a frontend's message.
    pub fn is_valid(&self) -> bool {
        self.flags.get() & (VERSION_MASK | REPLY) == VERSION
    }

    /// The outcome of the message as a reply, if the frontend has requested one.
    pub fn acknowledgement(&self, ok: bool) -> Option<Message> {
        if self.flags.get() & NEED_REPLY == 0 {
            return None;
        }
        let size = U32::new(8);
        let header = Header { request: self.request, flags: (VERSION | REPLY).into(), size };
        let message = Acknowledgement { header, result: u64::from(!ok).into() };
        Some(Message { bytes: message.as_bytes().to_vec(), fds: Vec::new() })
    }
}

/// A message or a reply, all of it.
#[derive(Debug)]
pub struct Message {
    /// The header, and what follows it.
    pub bytes: Vec<u8>,
    /// The descriptors that come with it. They were looked at.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// Its header.
    pub fn header(&self) -> Option<&Header> {
        Header::ref_from_prefix(&self.bytes).ok().map(|(header, _)| header)
    }

    /// Sends it, in one piece and without waiting.
    ///
    /// # Errors
    /// `WriteZero` if there is no room for it, and what the socket says.
    pub fn send(&self, socket: BorrowedFd<'_>) -> Result<()> {
        let fds: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[] } else { &rights[..] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let bytes = [IoSlice::new(&self.bytes)];
        match sendmsg::<()>(socket.as_raw_fd(), &bytes, rights, flags, None) {
            Ok(sent) if sent == self.bytes.len() => Ok(()),
            Ok(_) | Err(Errno::EAGAIN) => Err(Error::SocketError(io::ErrorKind::WriteZero.into())),
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

/// What has arrived from the frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The next message is complete and its reply has room; or the frontend has gone, or it is not a
    /// message.
    Whole,
    /// Some of the next message is missing.
    Incomplete,
    /// The frontend does not read the replies to its earlier messages.
    RepliesUnread,
    /// A byte out of band (`MSG_OOB`), which vhost-user does not have. It counts as readable, but no
    /// receive gets it.
    OutOfBand,
}

/// Looks at what has arrived.
pub fn arrival(socket: BorrowedFd<'_>) -> Arrival {
    let hangup = PollFlags::from_bits_retain(libc::POLLRDHUP);
    if poll(&mut [PollFd::new(socket, hangup)], PollTimeout::ZERO) != Ok(0) {
        return Arrival::Whole;
    }
    let mut fds = [PollFd::new(socket, PollFlags::POLLPRI | PollFlags::POLLOUT)];
    _ = poll(&mut fds, PollTimeout::ZERO);
    let events = fds[0].revents().unwrap_or(PollFlags::empty());
    if events.contains(PollFlags::POLLPRI) {
        Arrival::OutOfBand
    } else if !is_whole(socket) {
        Arrival::Incomplete
    // A socket can be written while less than a quarter of its buffer is in use (unix_writable() in
    // the kernel), so there is room for any reply.
    } else if !events.contains(PollFlags::POLLOUT) {
        Arrival::RepliesUnread
    } else {
        Arrival::Whole
    }
}

fn is_whole(socket: BorrowedFd<'_>) -> bool {
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

/// Receives a message, all of which has arrived ([`arrival`]), and the descriptors that come with
/// it, of which none was looked at.
///
/// # Errors
/// [`Error::Disconnected`] at the end of the connection, [`Error::InvalidMessage`] if the message
/// is cut short, and those of the socket.
pub fn receive(socket: BorrowedFd<'_>) -> Result<(Vec<u8>, Foreign)> {
    let (mut bytes, mut fds) = (vec![0; size_of::<Header>()], Foreign::default());
    match fill(socket, &mut bytes, &mut fds)? {
        0 => return Err(Error::Disconnected),
        n if n < bytes.len() => return Err(Error::InvalidMessage),
        _ => {}
    }
    let size = Header::ref_from_bytes(&bytes).map_or(0, Header::size);
    // The crate refuses a longer one by its header alone.
    if size <= MAX_MSG_SIZE {
        bytes.resize(size_of::<Header>() + size, 0);
        if fill(socket, &mut bytes[size_of::<Header>()..], &mut fds)? < size {
            return Err(Error::InvalidMessage);
        }
    }
    Ok((bytes, fds))
}

/// Receives into `bytes` what has arrived, without waiting; returns how many there were.
fn fill(socket: BorrowedFd<'_>, bytes: &mut [u8], fds: &mut Foreign) -> Result<usize> {
    let mut filled = 0;
    while filled < bytes.len() {
        match receive_some(socket, &mut bytes[filled..], fds)? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// Receives once, without waiting. 0 if there is nothing.
pub fn receive_some(socket: BorrowedFd<'_>, bytes: &mut [u8], fds: &mut Foreign) -> Result<usize> {
    let mut control = nix::cmsg_space!([RawFd; SCM_FDS_MAX]);
    let mut iov = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let received = match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags) {
        Err(Errno::EAGAIN) => return Ok(0),
        received => received.map_err(|e| Error::SocketError(e.into()))?,
    };
    for message in received.cmsgs().map_err(|e| Error::SocketError(e.into()))? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just made them for this message.
            fds.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    // The system has no room for some of them.
    if received.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(Error::InvalidMessage);
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    use nix::sys::socket::send;

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    /// Sends bytes with so many descriptors.
    fn send_with(frontend: &UnixStream, bytes: &[u8], fds: usize) {
        let fds = (0..fds).map(|_| frontend.as_fd().try_clone_to_owned().unwrap()).collect();
        Message { bytes: bytes.to_vec(), fds }.send(frontend.as_fd()).unwrap();
    }

    /// A message with a body of `size` bytes.
    fn message(size: u32) -> Vec<u8> {
        let header = [1, 1, size].map(u32::to_ne_bytes).concat();
        [header, vec![0; size as usize]].concat()
    }

    #[test]
    fn as_many_descriptors_as_a_message_can_carry_are_taken() {
        let (frontend, backend) = pair();
        send_with(&frontend, &message(0), SCM_FDS_MAX);
        let (bytes, files) = receive(backend.as_fd()).unwrap();
        assert_eq!((bytes, files.kinds().count()), (message(0), SCM_FDS_MAX));
        for file in files.admitted() {
            let flags = FdFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFD).unwrap());
            assert_eq!(flags, FdFlag::FD_CLOEXEC, "no program that is started may have it");
        }
    }

    #[test]
    fn a_message_is_whole_when_nothing_more_will_come() {
        let (frontend, backend) = pair();
        for byte in &message(8)[..19] {
            assert_eq!(arrival(backend.as_fd()), Arrival::Incomplete);
            send_with(&frontend, &[*byte], 0);
        }
        assert_eq!(arrival(backend.as_fd()), Arrival::Incomplete);
        // With the beginning of the next.
        send_with(&frontend, &[0; 3], 0);
        assert_eq!(arrival(backend.as_fd()), Arrival::Whole);
        assert_eq!(receive(backend.as_fd()).unwrap().0.len(), 20);
        assert_eq!(arrival(backend.as_fd()), Arrival::Incomplete);
        drop(frontend);
        assert_eq!(arrival(backend.as_fd()), Arrival::Whole, "its end will not come");
        assert!(matches!(receive(backend.as_fd()), Err(Error::InvalidMessage)));
        assert!(matches!(receive(backend.as_fd()), Err(Error::Disconnected)));

        let (frontend, backend) = pair();
        let endless = [1, 1, 5000].map(u32::to_ne_bytes).concat();
        send_with(&frontend, &endless, 0);
        assert_eq!(arrival(backend.as_fd()), Arrival::Whole, "it is no message");
        assert_eq!(receive(backend.as_fd()).unwrap().0, endless);
    }

    #[test]
    fn one_in_pieces_is_received_with_the_descriptors_of_all() {
        let (frontend, backend) = pair();
        for piece in message(3).chunks(4) {
            send_with(&frontend, piece, 2);
        }
        let (bytes, files) = receive(backend.as_fd()).unwrap();
        assert_eq!((bytes, files.kinds().count()), (message(3), 8));
    }

    #[test]
    fn a_frontend_that_does_not_read_gets_no_more_to_read() {
        let (mut frontend, backend) = pair();
        send_with(&frontend, &message(0), 0);
        let reply = Message { bytes: message(4000), fds: Vec::new() };
        let mut replies = 0;
        while arrival(backend.as_fd()) == Arrival::Whole {
            reply.send(backend.as_fd()).expect("there is room");
            replies += 1;
        }
        assert_eq!(arrival(backend.as_fd()), Arrival::RepliesUnread);
        assert!(replies > 0);
        // Nor does anybody wait if it is sent all the same.
        let refused = (0..1000).find_map(|_| reply.send(backend.as_fd()).err());
        assert!(matches!(refused, Some(Error::SocketError(_))), "{refused:?}");
        // Until it has read.
        frontend.read_exact(&mut vec![0; replies * message(4000).len()]).unwrap();
        frontend.set_nonblocking(true).unwrap();
        _ = frontend.read(&mut vec![0; 1 << 20]).unwrap();
        assert_eq!(arrival(backend.as_fd()), Arrival::Whole);
    }

    #[test]
    fn a_byte_out_of_band_is_seen_and_not_waited_for() {
        let (mut frontend, backend) = pair();
        match send(frontend.as_raw_fd(), b"!", MsgFlags::MSG_OOB) {
            Err(Errno::EOPNOTSUPP) => return println!("skipped: before Linux 5.15 there is none"),
            sent => assert_eq!(sent, Ok(1)),
        }
        frontend.write_all(&message(0)[..11]).unwrap();
        assert_eq!(arrival(backend.as_fd()), Arrival::OutOfBand);
        assert!(receive(backend.as_fd()).is_err());
    }
}
