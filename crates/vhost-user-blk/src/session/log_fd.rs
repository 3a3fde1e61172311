//! SET_LOG_FD: a descriptor to signal when the dirty log is written.
//!
//! The `vhost` crate knows the message and refuses it, so it is handled here. None of the frontends
//! that this daemon is tested with sends it.

use std::fs::File;

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{Error, Result};

use crate::session::message::Message;

/// If the message is SET_LOG_FD, passes its descriptor to `set`; returns the reply, if one was
/// requested, and the outcome. `None`, and nothing happens, if it is another one.
///
/// The outcome is an error of `set`, or [`Error::InvalidMessage`] for a message that does not
/// consist of a header and one descriptor. The connection must then end.
pub fn handle(
    message: &mut Message,
    set: impl FnOnce(File) -> Result<()>,
) -> Option<(Option<Message>, Result<()>)> {
    let header = message.header().filter(|header| header.is(FrontendReq::SET_LOG_FD))?;
    let valid = header.is_valid() && header.size() == 0;
    let mut fds = std::mem::take(&mut message.fds).into_iter();
    let outcome = match (fds.next(), fds.next()) {
        (Some(fd), None) if valid => set(fd.into()),
        _ => Err(Error::InvalidMessage),
    };
    let reply = message.header()?.acknowledgement(outcome.is_ok());
    Some((reply, outcome))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const NEED_REPLY: u32 = 9;

    fn log_fd(flags: u32, size: u32, fds: usize) -> Message {
        let bytes = [7, flags, size].map(u32::to_ne_bytes).concat();
        let fds = (0..fds).map(|_| UnixStream::pair().unwrap().0.into()).collect();
        Message { bytes, fds }
    }

    /// What comes of a message: the outcome, whether a descriptor was set, and what is answered.
    fn handled(mut message: Message) -> (Result<()>, bool, Option<Vec<u8>>) {
        let mut set = false;
        let (reply, outcome) = handle(&mut message, |_| {
            set = true;
            Ok(())
        })
        .unwrap();
        (outcome, set, reply.map(|reply| reply.bytes))
    }

    fn acknowledgement(result: u32) -> Option<Vec<u8>> {
        Some([7, 5, 8, result, 0].map(u32::to_ne_bytes).concat())
    }

    #[test]
    fn its_descriptor_is_taken_and_acknowledged() {
        for (flags, answer) in [(NEED_REPLY, acknowledgement(0)), (1, None)] {
            let (outcome, set, answered) = handled(log_fd(flags, 0, 1));
            assert!(outcome.is_ok() && set, "{outcome:?}");
            assert_eq!(answered, answer);
        }
    }

    #[test]
    fn another_form_is_refused() {
        for (flags, size, fds) in [
            (NEED_REPLY, 0, 0),
            (NEED_REPLY, 0, 2),
            (NEED_REPLY, 8, 1),
            (NEED_REPLY, u32::MAX, 1),
            (0, 0, 1),
            (2, 0, 1),
            (5, 0, 1),
        ] {
            let (outcome, set, answered) = handled(log_fd(flags, size, fds));
            assert!(matches!(outcome, Err(Error::InvalidMessage)) && !set, "{outcome:?}");
            let answer = if flags == NEED_REPLY { acknowledgement(1) } else { None };
            assert_eq!(answered, answer);
        }
    }

    #[test]
    fn other_messages_are_left_as_they_are() {
        let mut message = log_fd(NEED_REPLY, 0, 1);
        message.bytes[0] = 6;
        assert!(handle(&mut message, |_| panic!("was taken")).is_none());
        assert_eq!(message.fds.len(), 1);
    }
}
