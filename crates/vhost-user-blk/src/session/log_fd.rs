//! SET_LOG_FD: a descriptor to signal when the dirty log is written.
//!
//! The `vhost` crate knows the message and refuses it, so it is received here. None of the
//! frontends that this daemon is tested with sends it.

use std::fs::File;
use std::os::fd::BorrowedFd;

use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use vhost::vhost_user::{Error, Result};

use crate::session::message::{Header, peek, receive};

/// If the next message on `socket` is SET_LOG_FD, receives it, passes its descriptor to `set`, and
/// acknowledges it. Any other message stays where it is: `None`.
///
/// # Errors
/// Those of `set`, of the socket, and [`Error::InvalidMessage`] for a message that does not consist
/// of a header and one descriptor. The connection must end.
pub fn handle(socket: BorrowedFd<'_>, set: impl FnOnce(File) -> Result<()>) -> Option<Result<()>> {
    let header: Header = peek(socket)?;
    // The crate refuses what is longer than any message.
    if !header.is(FrontendReq::SET_LOG_FD) || header.size() > MAX_MSG_SIZE {
        return None;
    }
    Some(receive_descriptor(socket, &header, set))
}

fn receive_descriptor(
    socket: BorrowedFd<'_>,
    header: &Header,
    set: impl FnOnce(File) -> Result<()>,
) -> Result<()> {
    let mut files = receive(socket, &mut [0; size_of::<Header>()])?.into_iter();
    let result = match (files.next(), files.next()) {
        (Some(file), None) if header.is_valid() && header.size() == 0 => set(file),
        _ => Err(Error::InvalidMessage),
    };
    header.acknowledge(socket, result.is_ok())?;
    result
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::session::message::tests::send_with;

    const NEED_REPLY: u32 = 9;

    fn log_fd(flags: u32, size: u32) -> Vec<u8> {
        [7, flags, size].map(u32::to_ne_bytes).concat()
    }

    /// What comes of a message: the result, whether a descriptor was set, and what was answered.
    fn handled(bytes: &[u8], fds: usize) -> (Option<Result<()>>, bool, Vec<u8>) {
        let (mut frontend, backend) = UnixStream::pair().unwrap();
        send_with(&frontend, bytes, fds);
        let mut set = false;
        let result = handle(backend.as_fd(), |_| {
            set = true;
            Ok(())
        });
        drop(backend);
        let mut answer = Vec::new();
        // What was not taken resets the connection instead of ending it.
        _ = frontend.read_to_end(&mut answer);
        (result, set, answer)
    }

    fn acknowledgement(result: u32) -> Vec<u8> {
        [7, 5, 8, result, 0].map(u32::to_ne_bytes).concat()
    }

    #[test]
    fn its_descriptor_is_taken_and_acknowledged() {
        let (result, set, answer) = handled(&log_fd(NEED_REPLY, 0), 1);
        assert!(matches!(result, Some(Ok(()))) && set, "{result:?}");
        assert_eq!(answer, acknowledgement(0));
        let (result, set, answer) = handled(&log_fd(1, 0), 1);
        assert!(matches!(result, Some(Ok(()))) && set && answer.is_empty(), "{result:?}");
    }

    #[test]
    fn another_form_is_refused() {
        for (flags, size, fds) in
            [(NEED_REPLY, 0, 0), (NEED_REPLY, 0, 2), (NEED_REPLY, 0, 200), (NEED_REPLY, 8, 1)]
        {
            let (result, set, answer) = handled(&log_fd(flags, size), fds);
            assert!(matches!(result, Some(Err(Error::InvalidMessage))) && !set, "{result:?}");
            assert_eq!(answer, acknowledgement(1));
        }
        for flags in [0, 2, 5] {
            let (result, set, answer) = handled(&log_fd(flags, 0), 1);
            assert!(matches!(result, Some(Err(Error::InvalidMessage))) && !set, "{result:?}");
            assert!(answer.is_empty(), "{answer:?}");
        }
    }

    #[test]
    fn other_messages_are_left_where_they_are() {
        let other = [6, 1, 0].map(u32::to_ne_bytes).concat();
        for message in [&other, &log_fd(1, 0)[..11], &log_fd(1, u32::MAX)] {
            let (mut frontend, mut backend) = UnixStream::pair().unwrap();
            frontend.write_all(message).unwrap();
            assert!(handle(backend.as_fd(), |_| panic!("was taken")).is_none());
            drop(frontend);
            let mut left = Vec::new();
            backend.read_to_end(&mut left).unwrap();
            assert!(left == message);
        }
    }
}
