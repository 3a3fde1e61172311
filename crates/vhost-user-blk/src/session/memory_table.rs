//! SET_MEM_TABLE with room for more regions than it holds.
//!
//! User Mode Linux sends room for two regions even if it has only one (Linux 6.1,
//! `vhost_user_set_mem_table`). The `vhost` crate treats such a message as malformed, so it is
//! received here. Every other memory table is left to the crate.

use std::fs::File;
use std::os::fd::BorrowedFd;

use vhost::vhost_user::message::{
    FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserMemoryRegion,
};
use vhost::vhost_user::{Error, Result};
use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::session::message::{Header, peek, receive};

/// The header, and the beginning of "Multiple Memory regions description".
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    header: Header,
    num_regions: U32,
    padding: U32,
}
const _: () = assert!(size_of::<Head>() == 20);

/// Bytes of [`Head`] that the header's `size` counts.
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

/// If the next message on `socket` is a memory table with spare room, receives it, passes its
/// regions and their files to `set`, and acknowledges it. Any other message stays where it is:
/// `None`.
///
/// # Errors
/// Those of `set` and of the socket, and [`Error::InvalidMessage`] if the numbers of regions and
/// descriptors differ or the message is cut short. The connection must end.
pub fn handle_padded(
    socket: BorrowedFd<'_>,
    set: impl FnOnce(&[VhostUserMemoryRegion], Vec<File>) -> Result<()>,
) -> Option<Result<()>> {
    let head: Head = peek(socket)?;
    let (size, count) = (head.header.size(), head.num_regions.get() as usize);
    let padded = head.header.is(FrontendReq::SET_MEM_TABLE)
        && (1..=MAX_ATTACHED_FD_ENTRIES).contains(&count)
        && size > COUNTED_IN_HEAD + count * size_of::<RawRegion>()
        && size <= MAX_MSG_SIZE;
    padded.then(|| {
        let (regions, files) = receive_table(socket, size - COUNTED_IN_HEAD, count)?;
        let result = set(&regions, files);
        head.header.acknowledge(socket, result.is_ok())?;
        result
    })
}

/// Receives the message: `count` regions in `room` bytes, and as many files.
fn receive_table(
    socket: BorrowedFd<'_>,
    room: usize,
    count: usize,
) -> Result<(Vec<VhostUserMemoryRegion>, Vec<File>)> {
    let mut message = vec![0; size_of::<Head>() + room];
    let files = receive(socket, &mut message)?;
    if files.len() != count {
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::session::message::tests::send_with;

    const VERSION: u32 = 0x1;
    const NEED_REPLY: u32 = 0x8;

    /// A memory table as it is on the wire: `count` in its head, then these words.
    fn table(request: FrontendReq, flags: u32, count: u32, words: &[u64]) -> Vec<u8> {
        let size = u32::try_from(COUNTED_IN_HEAD + 8 * words.len()).unwrap();
        let head = [u32::from(request), flags, size, count, 0];
        let mut bytes: Vec<u8> = head.iter().flat_map(|field| field.to_ne_bytes()).collect();
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
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
        _ = frontend.read_to_end(&mut answer);
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
        // Also more than the `vhost` crate would take; none of them stays open.
        for files in [0, 2, 33, 253] {
            let message = table(FrontendReq::SET_MEM_TABLE, VERSION, 1, &WORDS);
            let (result, seen, _) = handle(&message, files, Ok(()));
            assert!(matches!(result, Some(Err(Error::InvalidMessage))), "{result:?}");
            assert_eq!(seen, 0);
        }
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
