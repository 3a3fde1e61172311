//! The control socket: who may connect to it may tell the daemon what to do.
//!
//! A client connects, sends its command as words that each end with NUL, shuts down its sending side,
//! and reads the answer: `ok` or `failed`, a blank, and a line of text.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use std::ffi::OsStr;

/// How long a client may take to say all that it wants; meanwhile the frontend's messages wait.
const REQUEST_TIME: Duration = Duration::from_secs(1);
/// Longest request, in bytes: a path and a little more.
const REQUEST_LEN_MAX: usize = 8192;
/// How much longer than the daemon gives the new program a client waits for the answer.
const ANSWER_TIME: Duration = Duration::from_secs(60);

/// What the daemon is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Give the disk and its guest to a new program.
    Upgrade(Upgrade),
}

/// An upgrade.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upgrade {
    /// The program; `None` for the file that the running one was started from, as it is now.
    pub program: Option<PathBuf>,
    /// How long it may take to say that it is able.
    pub time: Duration,
}

impl Request {
    fn encode(&self) -> Vec<u8> {
        let Request::Upgrade(Upgrade { program, time }) = self;
        let program = program.as_deref().unwrap_or(Path::new("")).as_os_str().as_bytes();
        let millis = time.as_millis().to_string();
        [b"upgrade", program, millis.as_bytes()]
            .iter()
            .flat_map(|word| [word, &b"\0"[..]].concat())
            .collect()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let words: Vec<&[u8]> = bytes.strip_suffix(b"\0")?.split(|byte| *byte == 0).collect();
        let [b"upgrade", program, millis] = words[..] else { return None };
        let program = (!program.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(program)));
        let millis = std::str::from_utf8(millis).ok()?.parse().ok()?;
        Some(Request::Upgrade(Upgrade { program, time: Duration::from_millis(millis) }))
    }

    /// Takes a client's request.
    ///
    /// # Errors
    /// What the socket says; `TimedOut` if the request is not whole after [`REQUEST_TIME`];
    /// `InvalidData` for something that is no request.
    pub fn receive(mut client: &UnixStream) -> io::Result<Self> {
        client.set_nonblocking(false)?;
        let deadline = Instant::now() + REQUEST_TIME;
        let mut bytes = Vec::new();
        let mut piece = [0; 512];
        while bytes.len() <= REQUEST_LEN_MAX {
            // The time is that of the whole request: a client that sends byte by byte gets no more.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            client.set_read_timeout(Some(left))?;
            match client.read(&mut piece) {
                Ok(0) => {
                    return Self::decode(&bytes).ok_or_else(|| io::ErrorKind::InvalidData.into());
                }
                Ok(n) => bytes.extend(&piece[..n]),
                // A socket with a limit of time is not read again by the kernel after a signal.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::ErrorKind::InvalidData.into())
    }

    /// Has the daemon at `socket` do it, and returns what it says: in the one case that it was done,
    /// in the other that it was not.
    ///
    /// # Errors
    /// If there is no daemon, or no answer.
    pub fn send(&self, socket: &Path) -> io::Result<Result<String, String>> {
        let Request::Upgrade(Upgrade { time, .. }) = self;
        let mut daemon = UnixStream::connect(socket)?;
        daemon.write_all(&self.encode())?;
        daemon.shutdown(Shutdown::Write)?;
        daemon.set_read_timeout(Some(*time + ANSWER_TIME))?;
        let mut answer = String::new();
        daemon.read_to_string(&mut answer)?;
        match answer.trim_end().split_once(' ') {
            Some(("ok", text)) => Ok(Ok(text.to_owned())),
            Some(("failed", text)) => Ok(Err(text.to_owned())),
            _ => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the daemon ended without an answer",
            )),
        }
    }
}

/// Answers a client. It may have gone, and must not hold up the daemon.
pub fn answer(mut client: &UnixStream, outcome: &Result<String, String>) {
    let line = match outcome {
        Ok(text) => format!("ok {text}\n"),
        Err(text) => format!("failed {text}\n"),
    };
    let sent = client
        .set_write_timeout(Some(REQUEST_TIME))
        .and_then(|()| client.write_all(line.as_bytes()));
    if let Err(e) = sent {
        log::debug!("control socket: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_encoded_is_decoded() {
        for program in [None, Some(PathBuf::from("/a b/c\nd"))] {
            let time = Duration::from_millis(1500);
            let request = Request::Upgrade(Upgrade { program, time });
            let bytes = request.encode();
            assert_eq!(Request::decode(&bytes), Some(request));
            assert_eq!(Request::decode(&bytes[..bytes.len() - 1]), None);
            assert_eq!(Request::decode(&bytes[1..]), None);
        }
        for odd in [&b""[..], b"upgrade\0", b"upgrade\0\0x\0", b"upgrade\0\x001\x002\0"] {
            assert_eq!(Request::decode(odd), None);
        }
    }

    #[test]
    fn a_client_that_sends_byte_by_byte_is_given_up() {
        let (mut client, daemon) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            // It goes on until it is given up: until the other end is closed.
            scope.spawn(move || {
                while client.write_all(b"u").is_ok() {
                    std::thread::sleep(REQUEST_TIME / 20);
                }
            });
            let received = Request::receive(&daemon);
            drop(daemon);
            assert!(received.is_err(), "{received:?}");
        });
    }

    #[test]
    fn a_request_without_end_is_refused() {
        let (mut client, daemon) = UnixStream::pair().unwrap();
        client.write_all(&[b'u'; 2 * REQUEST_LEN_MAX]).unwrap();
        let error = Request::receive(&daemon).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
