//! SET_MEM_TABLE with room for more regions than it holds.
//!
//! User Mode Linux sends room for two regions also when it has only one (Linux 6.1,
//! `vhost_user_set_mem_table`). The `vhost` crate takes such a message for a malformed one, so it is
//! received here; every other is left to the crate.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recv, recvmsg, send};
use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserMemoryRegion,
};
use vhost::vhost_user::{Error, Result};
use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// vhost-user specification, "Header"; then the beginning of "Multiple Memory regions description".
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    request: U32,
    flags: U32,
    /// Bytes after this field.
    size: U32,
    num_regions: U32,
    padding: U32,
}
const _: () = assert!(size_of::<Head>() == 20);

/// Bytes of [`Head`] that its field `size` counts.
const COUNTED_IN_HEAD: usize = 8;

/// vhost-user specification, "Memory region description".
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRegion {
    guest_address: U64,
    size: U64,
    user_address: U64,
    mmap_offset: U64,
}
const _: () = assert!(size_of::<RawRegion>() == 32);

/// An acknowledgement: a reply with the result.
#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct Acknowledgement {
    request: U32,
    flags: U32,
    size: U32,
    result: U64,
}

/// Most descriptors that one message can carry (Linux: SCM_MAX_FD).
pub const SCM_FDS_MAX: usize = 253;

/// Bits of the flags: protocol version 1, this is a reply, a reply is asked for.
const VERSION: u32 = 0x1;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;

/// If the next message on `socket` is a memory table with spare room, takes it, hands its regions
/// and their files to `set`, and acknowledges it. `None`, with nothing taken, for another message.
///
/// # Errors
/// Those of `set`, of the socket, and [`Error::InvalidMessage`] where the regions and the descriptors
/// that came along are not equal in number or the message is cut short. The connection must end.
pub fn handle_padded(
    socket: BorrowedFd<'_>,
    set: impl FnOnce(&[VhostUserMemoryRegion], Vec<File>) -> Result<()>,
) -> Option<Result<()>> {
    let mut bytes = [0; size_of::<Head>()];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    // What is wrong with the socket, or with less than this, is found by the crate.
    let peeked = recv(socket.as_raw_fd(), &mut bytes, flags).ok()?;
    if peeked < bytes.len() {
        return None;
    }
    let head: Head = zerocopy::transmute!(bytes);
    let (size, count) = (head.size.get() as usize, head.num_regions.get() as usize);
    let padded = head.request.get() == u32::from(FrontendReq::SET_MEM_TABLE)
        && (1..=MAX_ATTACHED_FD_ENTRIES).contains(&count)
        && size > COUNTED_IN_HEAD + count * size_of::<RawRegion>()
        && size <= MAX_MSG_SIZE;
    padded.then(|| {
        let (regions, files) = receive(socket, size - COUNTED_IN_HEAD, count)?;
        let result = set(&regions, files);
        if head.flags.get() & NEED_REPLY != 0 {
            acknowledge(socket, result.is_ok())?;
        }
        result
    })
}

/// Takes the message: `count` regions in `room` bytes, and as many files.
fn receive(
    socket: BorrowedFd<'_>,
    room: usize,
    count: usize,
) -> Result<(Vec<VhostUserMemoryRegion>, Vec<File>)> {
    let mut message = vec![0; size_of::<Head>() + room];
    // Room for more than may come: what does not fit the kernel has half made, and nobody closes it.
    let mut control = nix::cmsg_space!([i32; SCM_FDS_MAX]);
    let mut iov = [IoSliceMut::new(&mut message)];
    let flags = MsgFlags::MSG_WAITALL | MsgFlags::MSG_CMSG_CLOEXEC;
    let received =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags)
            .map_err(|e| Error::SocketError(e.into()))?;
    let mut files = Vec::new();
    for control in received.cmsgs().map_err(|e| Error::SocketError(e.into()))? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made these descriptors for this message.
            files.extend(fds.into_iter().map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) })));
        }
    }
    let complete = received.bytes == message.len();
    if !complete || files.len() != count {
        return Err(Error::InvalidMessage);
    }
    let table = &message[size_of::<Head>()..][..count * size_of::<RawRegion>()];
    let regions = <[RawRegion]>::ref_from_bytes(table).map_err(|_| Error::InvalidMessage)?;
    Ok((regions.iter().map(RawRegion::to_message).collect(), files))
}

impl RawRegion {
    fn to_message(&self) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(
            self.guest_address.get(),
            self.size.get(),
            self.user_address.get(),
            self.mmap_offset.get(),
        )
    }
}

fn acknowledge(socket: BorrowedFd<'_>, ok: bool) -> Result<()> {
    let message = Acknowledgement {
        request: u32::from(FrontendReq::SET_MEM_TABLE).into(),
        flags: (VERSION | REPLY).into(),
        size: 8.into(),
        result: u64::from(!ok).into(),
    };
    let bytes = message.as_bytes();
    match send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(Error::SocketError(io::ErrorKind::WriteZero.into())),
        Err(e) => Err(Error::SocketError(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    /// A memory table as it is on the wire: `count` in its head, then these words.
    fn table(request: FrontendReq, flags: u32, count: u32, words: &[u64]) -> Vec<u8> {
        let size = u32::try_from(COUNTED_IN_HEAD + 8 * words.len()).unwrap();
        let head = [u32::from(request), flags, size, count, 0];
        let mut bytes: Vec<u8> = head.iter().flat_map(|field| field.to_ne_bytes()).collect();
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    fn send_with(frontend: &UnixStream, bytes: &[u8], fds: usize) {
        let fds = vec![frontend.as_raw_fd(); fds];
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &rights[..0] } else { &rights };
        let flags = MsgFlags::empty();
        let iov = [IoSlice::new(bytes)];
        let sent = sendmsg::<()>(frontend.as_raw_fd(), &iov, rights, flags, None).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// What comes of one message: the regions with the number of files, and what was answered.
    fn handle(
        bytes: &[u8],
        fds: usize,
        outcome: Result<()>,
    ) -> (Option<Result<()>>, usize, Vec<u8>) {
        let (mut frontend, backend) = UnixStream::pair().unwrap();
        send_with(&frontend, bytes, fds);
        let mut seen = 0;
        let result = handle_padded(backend.as_fd(), |regions, files| {
            assert_eq!(regions.len(), files.len());
            let region = regions[0];
            let fields =
                [region.guest_phys_addr, region.memory_size, region.user_addr, region.mmap_offset];
            assert_eq!(fields, [1, 2, 3, 4]);
            seen = regions.len();
            outcome
        });
        drop(backend);
        let mut answer = Vec::new();
        // What was not taken resets the connection instead of ending it.
        let _ = frontend.read_to_end(&mut answer);
        (result, seen, answer)
    }

    const WORDS: [u64; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0];

    fn acknowledgement(result: u8) -> Vec<u8> {
        [[5, 0, 0, 0], [5, 0, 0, 0], [8, 0, 0, 0], [result, 0, 0, 0], [0; 4]].concat()
    }

    #[test]
    fn a_table_with_room_for_another_region_is_taken_and_acknowledged() {
        let request = FrontendReq::SET_MEM_TABLE;
        for (count, words) in [(1, &WORDS[..8]), (2, &WORDS[..])] {
            let message = table(request, VERSION | NEED_REPLY, count, words);
            let (result, seen, answer) = handle(&message, count as usize, Ok(()));
            assert!(matches!(result, Some(Ok(()))), "{result:?}");
            assert_eq!((seen, answer), (count as usize, acknowledgement(0)));
        }
        let (result, _, answer) = handle(&table(request, VERSION, 1, &WORDS), 1, Ok(()));
        assert!(matches!(result, Some(Ok(()))) && answer.is_empty(), "{result:?}");
    }

    #[test]
    fn a_refusal_is_told() {
        let message = table(FrontendReq::SET_MEM_TABLE, VERSION | NEED_REPLY, 1, &WORDS);
        let (result, _, answer) = handle(&message, 1, Err(Error::InvalidParam));
        assert!(matches!(result, Some(Err(Error::InvalidParam))), "{result:?}");
        assert_eq!(answer, acknowledgement(1));
    }

    #[test]
    fn files_must_be_as_many_as_regions() {
        for files in [0, 2] {
            let message = table(FrontendReq::SET_MEM_TABLE, VERSION, 1, &WORDS);
            let (result, seen, _) = handle(&message, files, Ok(()));
            assert!(matches!(result, Some(Err(Error::InvalidMessage))), "{result:?}");
            assert_eq!(seen, 0);
        }
    }

    #[test]
    fn more_files_than_there_can_be_regions_are_closed() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let (frontend, backend) = UnixStream::pair().unwrap();
        let fds = vec![writer.as_raw_fd(); MAX_ATTACHED_FD_ENTRIES + 8];
        let message = table(FrontendReq::SET_MEM_TABLE, VERSION, 1, &WORDS);
        let rights = [ControlMessage::ScmRights(&fds)];
        let iov = [IoSlice::new(&message)];
        let flags = MsgFlags::empty();
        sendmsg::<()>(frontend.as_raw_fd(), &iov, &rights, flags, None).unwrap();
        drop(writer);
        let result = handle_padded(backend.as_fd(), |_, _| panic!("was handed on"));
        assert!(matches!(result, Some(Err(Error::InvalidMessage))), "{result:?}");
        // As long as one of them is open the pipe has no end, and reading would wait.
        let nonblocking = FcntlArg::F_SETFL(OFlag::O_NONBLOCK);
        fcntl(&reader, nonblocking).unwrap();
        assert_eq!(reader.read(&mut [0]).map_err(|e| e.kind()), Ok(0));
    }

    #[test]
    fn a_message_that_is_cut_short_is_invalid() {
        let (frontend, backend) = UnixStream::pair().unwrap();
        let message = table(FrontendReq::SET_MEM_TABLE, VERSION, 1, &WORDS);
        send_with(&frontend, &message[..message.len() - 1], 1);
        drop(frontend);
        let result = handle_padded(backend.as_fd(), |_, _| panic!("half a message was handed on"));
        assert!(matches!(result, Some(Err(Error::InvalidMessage))), "{result:?}");
    }

    #[test]
    fn other_messages_are_left_where_they_are() {
        let exact = table(FrontendReq::SET_MEM_TABLE, VERSION, 1, &WORDS[..4]);
        let short = table(FrontendReq::SET_MEM_TABLE, VERSION, 3, &WORDS[..8]);
        let none = table(FrontendReq::SET_MEM_TABLE, VERSION, 0, &WORDS);
        let endless = table(FrontendReq::SET_MEM_TABLE, VERSION, 1, &[0; 600]);
        let other = table(FrontendReq::SET_VRING_ADDR, VERSION, 1, &WORDS);
        for message in [exact, short, none, endless, other] {
            let (mut frontend, mut backend) = UnixStream::pair().unwrap();
            frontend.write_all(&message).unwrap();
            assert!(handle_padded(backend.as_fd(), |_, _| panic!("was taken")).is_none());
            drop(frontend);
            let mut left = Vec::new();
            backend.read_to_end(&mut left).unwrap();
            assert!(left == message);
        }
    }
}
