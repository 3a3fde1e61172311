//! The control socket. Every process that may connect to it may give the daemon commands.
//!
//! A client connects, sends its command as words that each end with NUL, shuts down its sending
//! side, and reads the answer: `ok` or `failed`, a space, and a line of text. The first word names
//! the command, the others are its arguments.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::process::signals;

/// How long a client may take to send its whole request; meanwhile the frontend's messages wait.
const REQUEST_TIME: Duration = Duration::from_secs(1);
/// Longest request, in bytes: a path and a little more.
const REQUEST_LEN_MAX: usize = 8192;
/// How long a client waits for the answer, besides the time that the command itself may take.
const ANSWER_TIME: Duration = Duration::from_secs(60);

/// A command for the daemon.
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
    /// How long the program may take to show that it can take over.
    pub time: Duration,
}

/// The daemon's answer to a command, one line of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The command was carried out.
    Done(String),
    /// It was not, for this reason.
    Failed(String),
}

impl Request {
    /// The bytes that a client sends.
    pub fn encode(&self) -> Vec<u8> {
        let (name, arguments) = match self {
            Request::Upgrade(upgrade) => (Upgrade::NAME, upgrade.arguments()),
        };
        let words = std::iter::once(name.to_vec()).chain(arguments);
        words.flat_map(|word| [word.as_slice(), b"\0"].concat()).collect()
    }

    /// Reads what a client has sent; `None` if it is not a request.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut words = bytes.strip_suffix(b"\0")?.split(|byte| *byte == 0);
        let name = words.next()?;
        let arguments: Vec<&[u8]> = words.collect();
        match name {
            Upgrade::NAME => Upgrade::from_arguments(&arguments).map(Request::Upgrade),
            _ => None,
        }
    }

    /// The time that the daemon may take to carry it out.
    fn time(&self) -> Duration {
        match self {
            Request::Upgrade(upgrade) => upgrade.time,
        }
    }

    /// Receives a client's request.
    ///
    /// # Errors
    /// What the socket says; `TimedOut` if the request is not complete after one second;
    /// `InvalidData` for something that is not a request.
    pub fn receive(mut client: &UnixStream) -> io::Result<Self> {
        client.set_nonblocking(false)?;
        let deadline = Instant::now() + REQUEST_TIME;
        let mut bytes = Vec::new();
        let mut piece = [0; 512];
        while bytes.len() <= REQUEST_LEN_MAX {
            // The limit is for the whole request: a client that sends byte by byte gets no more.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            client.set_read_timeout(Some(left))?;
            match client.read(&mut piece) {
                Ok(0) => {
                    return Self::decode(&bytes)
                        .ok_or_else(|| invalid("not a command that this program knows"));
                }
                Ok(n) => bytes.extend(&piece[..n]),
                // The kernel does not restart a read with a timeout after a signal.
                Err(e) if e.kind() == io::ErrorKind::Interrupted && !signals::stopping() => {}
                Err(e) => return Err(e),
            }
        }
        Err(invalid("a request is longer than any command"))
    }

    /// Sends the request to the daemon at `socket` and waits for its answer.
    ///
    /// # Errors
    /// What the socket says; `UnexpectedEof` if the daemon ends without an answer.
    pub fn send(&self, socket: &Path) -> io::Result<Reply> {
        let mut daemon = UnixStream::connect(socket)?;
        daemon.set_read_timeout(Some(self.time() + ANSWER_TIME))?;
        let mut answer = Vec::new();
        // A daemon that refuses this user answers without having read anything.
        let done = daemon
            .write_all(&self.encode())
            .and_then(|()| daemon.shutdown(Shutdown::Write))
            .and(daemon.read_to_end(&mut answer));
        if let Some(reply) = Reply::decode(&String::from_utf8_lossy(&answer)) {
            return Ok(reply);
        }
        done?;
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the daemon ended without an answer"))
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Upgrade {
    const NAME: &[u8] = b"upgrade";

    fn arguments(&self) -> Vec<Vec<u8>> {
        let program = self.program.as_deref().unwrap_or(Path::new(""));
        let millis = self.time.as_millis().to_string();
        vec![program.as_os_str().as_bytes().to_vec(), millis.into_bytes()]
    }

    fn from_arguments(arguments: &[&[u8]]) -> Option<Self> {
        let &[program, millis] = arguments else { return None };
        let program = (!program.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(program)));
        let millis = std::str::from_utf8(millis).ok()?.parse().ok()?;
        Some(Upgrade { program, time: Duration::from_millis(millis) })
    }
}

impl Reply {
    fn encode(&self) -> String {
        match self {
            Reply::Done(text) => format!("ok {text}\n"),
            Reply::Failed(text) => format!("failed {text}\n"),
        }
    }

    /// Reads what the daemon has sent; `None` if it is not an answer.
    pub fn decode(line: &str) -> Option<Self> {
        match line.trim_end().split_once(' ')? {
            ("ok", text) => Some(Reply::Done(text.to_owned())),
            ("failed", text) => Some(Reply::Failed(text.to_owned())),
            _ => None,
        }
    }

    /// Sends the answer. A client that is gone, or does not read, must not hold up the daemon.
    pub fn send(&self, mut client: &UnixStream) {
        let sent = client
            .set_write_timeout(Some(REQUEST_TIME))
            .and_then(|()| client.write_all(self.encode().as_bytes()));
        if let Err(e) = sent {
            log::debug!("control socket: {e}");
        }
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
        for odd in
            [&b""[..], b"upgrade\0", b"upgrade\0\0x\0", b"upgrade\0\x001\x002\0", b"stop\0\x001\0"]
        {
            assert_eq!(Request::decode(odd), None);
        }
    }

    #[test]
    fn a_reply_arrives_as_it_was_sent() {
        for reply in [Reply::Done("a b".to_owned()), Reply::Failed("c; d e".to_owned())] {
            assert_eq!(Reply::decode(&reply.encode()), Some(reply));
        }
        for odd in ["", "ok", "no answer"] {
            assert_eq!(Reply::decode(odd), None);
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
