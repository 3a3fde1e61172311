//! What a daemon hands to its successor (docs/architecture.md, "Upgrade"): a text in a memory file,
//! one item per line, and open descriptors, which the text names by number.
//!
//! | line | |
//! |---|---|
//! | `vhost-user-blk handover 1` | always the first; the number is the version of all this |
//! | `from VERSION` | the version of the program that hands over |
//! | `boot HEX` | the boot id of the host, where a process without privileges sees another |
//! | `rehearsal FD` | only a rehearsal: write to this pipe whether a takeover is possible, and exit |
//! | `paused NANOSECONDS` | when the rings were stopped (`CLOCK_MONOTONIC`) |
//! | `wake FD` | readable if a signal has asked for the end |
//! | `listener FD DEV INO` | the listening socket, and which file it made; 0 0 for none |
//! | `control FD DEV INO` | the same for the control socket |
//! | `allow-uid UID...`, `allow-gid GID...` | whose frontends are let in; all if both are missing |
//! | `connection FD` | the frontend |
//! | `top FD [FD]` | the description of the top file, and the direct one |
//! | `hold FD` | carries a lock: keep it open until the disk is open |
//! | `reply FD` | the client that asked for the upgrade and waits for the answer |
//! | `write-cache 0` or `1` | the guest's setting |
//! | `sandbox` | the process is in the sandbox, which programs cannot leave |
//! | `message REQUEST HEX [FD]...` | a message of the frontend, in order; HEX is `-` for an empty body |
//!
//! An unknown line makes the whole handover invalid.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::str::SplitAsciiWhitespace;
use std::time::Duration;

use block_io::storage::BootId;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::process::fd;
use crate::process::peer::Admission;
use crate::session::replay::Message;

const FIRST_LINE: &str = "vhost-user-blk handover 1";

/// Longest text, in bytes: room for 256 queues and 509 memory regions.
const LEN_MAX: u64 = 1 << 20;

/// A listening socket and its file, by device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// The descriptor's number.
    pub fd: RawFd,
    /// The file to remove at the end, if it is still the same.
    pub file: Option<(u64, u64)>,
}

/// What is handed over. Descriptors are numbers here, which are the same in both programs: the
/// successor inherits them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handover {
    /// Version of the program that hands over.
    pub from: String,
    /// See [`block_io::storage::hidden_boot_id`].
    pub boot: Option<BootId>,
    /// The pipe for the answer, if this is a rehearsal.
    pub rehearsal: Option<RawFd>,
    /// When the rings stopped, since the host's start.
    pub paused: Option<Duration>,
    /// An eventfd, signalled if a signal has asked the daemon to end.
    pub wake: Option<RawFd>,
    /// The socket for frontends.
    pub listener: Option<Listening>,
    /// The control socket.
    pub control: Option<Listening>,
    /// Whose frontends are let in. A name need not be known to the successor.
    pub admission: Admission,
    /// The frontend.
    pub connection: Option<RawFd>,
    /// The top file's descriptions.
    pub top: Vec<RawFd>,
    /// Descriptions of other files.
    pub hold: Vec<RawFd>,
    /// The client that waits for the answer.
    pub reply: Option<RawFd>,
    /// See [`crate::virtio::device_state::DeviceState::write_cache`].
    pub write_cache: bool,
    /// The process has entered the sandbox.
    pub sandbox: bool,
    /// The frontend's messages.
    pub messages: Vec<Message<RawFd>>,
}

/// A handover that cannot be written or understood.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// It cannot be read or written.
    #[error("cannot {what} the handover: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// It has another version, or none.
    #[error("the handover begins with {found:?}, expected {FIRST_LINE:?}")]
    Version {
        /// Its first line.
        found: String,
    },
    /// A line that this program does not know.
    #[error("unknown line in the handover: {line:?}")]
    Line {
        /// The line.
        line: String,
    },
    /// A descriptor that is not open.
    #[error("descriptor {fd} of the handover: {source}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// The system's reason.
        source: io::Error,
    },
}

impl Handover {
    /// Writes it to a memory file.
    pub fn store(&self) -> Result<File, HandoverError> {
        let io = |source| HandoverError::Io { what: "write", source };
        let file = memfd_create(c"handover", MFdFlags::MFD_CLOEXEC).map_err(|e| io(e.into()))?;
        let mut file = File::from(file);
        file.write_all(self.encode().as_bytes()).map_err(io)?;
        Ok(file)
    }

    /// Reads the handover of a predecessor from the memory file `fd`.
    pub fn fetch(fd: RawFd) -> Result<Self, HandoverError> {
        let io = |source| HandoverError::Io { what: "read", source };
        let mut file = File::from(inherit(fd)?);
        let mut text = String::new();
        file.rewind().map_err(io)?;
        file.take(LEN_MAX).read_to_string(&mut text).map_err(io)?;
        Self::decode(&text)
    }

    /// The text.
    pub fn encode(&self) -> String {
        let mut text = format!("{FIRST_LINE}\nfrom {}\n", self.from);
        if let Some(BootId(id)) = self.boot {
            _ = writeln!(text, "boot {:032x}", u128::from_be_bytes(id));
        }
        let mut line = |key: &str, values: &[u64]| {
            text += key;
            values.iter().for_each(|value| _ = write!(text, " {value}"));
            text.push('\n');
        };
        // Descriptors are not negative.
        let number = |fd: RawFd| u64::try_from(fd).unwrap_or(u64::MAX);
        let mut one = |key, fd: Option<RawFd>| fd.map(|fd| line(key, &[number(fd)]));
        one("rehearsal", self.rehearsal);
        one("wake", self.wake);
        one("connection", self.connection);
        one("reply", self.reply);
        self.hold.iter().for_each(|&fd| _ = one("hold", Some(fd)));
        if let Some(paused) = self.paused {
            line("paused", &[u64::try_from(paused.as_nanos()).unwrap_or(u64::MAX)]);
        }
        for (key, listening) in [("listener", self.listener), ("control", self.control)] {
            if let Some(Listening { fd, file }) = listening {
                let (dev, ino) = file.unwrap_or_default();
                line(key, &[number(fd), dev, ino]);
            }
        }
        for (key, ids) in [("allow-uid", &self.admission.uids), ("allow-gid", &self.admission.gids)]
        {
            if !ids.is_empty() {
                line(key, &ids.iter().copied().map(u64::from).collect::<Vec<_>>());
            }
        }
        if !self.top.is_empty() {
            line("top", &self.top.iter().copied().map(number).collect::<Vec<_>>());
        }
        line("write-cache", &[self.write_cache.into()]);
        if self.sandbox {
            line("sandbox", &[]);
        }
        for Message { request, body, fds } in &self.messages {
            _ = write!(text, "message {request} ");
            body.iter().for_each(|byte| _ = write!(text, "{byte:02x}"));
            if body.is_empty() {
                text.push('-');
            }
            fds.iter().for_each(|fd| _ = write!(text, " {fd}"));
            text.push('\n');
        }
        text
    }

    /// Reads the text.
    ///
    /// # Errors
    /// Another version, or a line that is not as above.
    pub fn decode(text: &str) -> Result<Self, HandoverError> {
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        if first != FIRST_LINE {
            return Err(HandoverError::Version { found: first.chars().take(80).collect() });
        }
        let mut handover = Handover::default();
        for line in lines {
            let unknown = || HandoverError::Line { line: line.chars().take(80).collect() };
            handover.take_line(line).ok_or_else(unknown)?;
        }
        Ok(handover)
    }

    fn take_line(&mut self, line: &str) -> Option<()> {
        let mut words = line.split_ascii_whitespace();
        let words = &mut words;
        match words.next()? {
            "from" => self.from = words.next()?.to_owned(),
            "boot" => {
                let id = u128::from_str_radix(words.next()?, 16).ok()?;
                self.boot = Some(BootId(id.to_be_bytes()));
            }
            "rehearsal" => self.rehearsal = Some(descriptor(words)?),
            "wake" => self.wake = Some(descriptor(words)?),
            "connection" => self.connection = Some(descriptor(words)?),
            "reply" => self.reply = Some(descriptor(words)?),
            "hold" => self.hold.push(descriptor(words)?),
            "paused" => self.paused = Some(Duration::from_nanos(number(words)?)),
            "listener" => self.listener = Some(listening(words)?),
            "control" => self.control = Some(listening(words)?),
            "top" => self.top = descriptors(words)?,
            "allow-uid" => self.admission.uids = rest(words)?,
            "allow-gid" => self.admission.gids = rest(words)?,
            "sandbox" => self.sandbox = true,
            "write-cache" => self.write_cache = number::<u8>(words)? == 1,
            "message" => {
                let (request, body) = (number(words)?, from_hex(words.next()?)?);
                self.messages.push(Message { request, body, fds: descriptors(words)? });
            }
            _ => return None,
        }
        // No words may be left over.
        words.next().is_none().then_some(())
    }

    /// All descriptors that the handover names.
    pub fn fds(&self) -> Vec<RawFd> {
        let listening = [self.listener, self.control].into_iter().flatten().map(|l| l.fd);
        let single = [self.rehearsal, self.wake, self.connection, self.reply].into_iter().flatten();
        let messages = self.messages.iter().flat_map(|message| message.fds.iter().copied());
        let files = self.top.iter().chain(&self.hold).copied();
        listening.chain(single).chain(messages).chain(files).collect()
    }
}

/// A duplicate of a descriptor that the handover names.
pub fn inherit(fd: RawFd) -> Result<OwnedFd, HandoverError> {
    fd::duplicate(fd).map_err(|source| HandoverError::Descriptor { fd, source })
}

fn number<T: std::str::FromStr>(words: &mut SplitAsciiWhitespace<'_>) -> Option<T> {
    words.next()?.parse().ok()
}

/// None has a negative number.
fn descriptor(words: &mut SplitAsciiWhitespace<'_>) -> Option<RawFd> {
    number(words).filter(|fd| *fd >= 0)
}

fn descriptors(words: &mut SplitAsciiWhitespace<'_>) -> Option<Vec<RawFd>> {
    rest(words).filter(|fds| fds.iter().all(|fd: &RawFd| *fd >= 0))
}

fn listening(words: &mut SplitAsciiWhitespace<'_>) -> Option<Listening> {
    let (fd, file) = (descriptor(words)?, (number(words)?, number(words)?));
    Some(Listening { fd, file: (file != (0, 0)).then_some(file) })
}

fn rest<T: std::str::FromStr>(words: &mut SplitAsciiWhitespace<'_>) -> Option<Vec<T>> {
    words.map(|word| word.parse().ok()).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if text == "-" {
        return Some(Vec::new());
    }
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    rest.is_empty().then(|| pairs.iter().map(byte).collect())?
}

#[cfg(test)]
mod tests {
    use vhost::vhost_user::message::FrontendReq;

    use super::*;

    fn sample() -> Handover {
        Handover {
            from: "0.1.0".to_owned(),
            boot: Some(BootId([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255])),
            rehearsal: Some(3),
            paused: Some(Duration::new(12, 34)),
            wake: Some(15),
            listener: Some(Listening { fd: 4, file: Some((5, 6)) }),
            control: Some(Listening { fd: 7, file: None }),
            connection: Some(8),
            admission: Admission { uids: vec![1000, 0], gids: vec![36] },
            top: vec![9, 10],
            hold: vec![11, 12],
            reply: Some(13),
            write_cache: true,
            sandbox: true,
            messages: vec![
                Message::new(FrontendReq::GET_FEATURES, &[]),
                Message::new(FrontendReq::ADD_MEM_REG, &[0, 1, u64::MAX]).with(14),
                Message::state(FrontendReq::SET_VRING_ENABLE, 1, 1),
            ],
        }
    }

    #[test]
    fn what_is_stored_is_fetched() {
        use std::os::fd::AsRawFd;
        for handover in [sample(), Handover { from: "x".to_owned(), ..Handover::default() }] {
            let file = handover.store().unwrap();
            assert_eq!(Handover::fetch(file.as_raw_fd()).unwrap(), handover);
        }
        assert_eq!(sample().fds(), [4, 7, 3, 15, 8, 13, 14, 9, 10, 11, 12]);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let text = sample().encode();
        let other = text.replace("handover 1", "handover 2");
        assert!(matches!(Handover::decode(&other), Err(HandoverError::Version { .. })));
        assert!(matches!(Handover::decode(""), Err(HandoverError::Version { .. })));
        for line in [
            "odd 1",
            "message 1 0",
            "message 1 zz",
            "reply x",
            "reply 1 2",
            "listener 4",
            "sandbox 1",
            "",
            // Found by fuzzing.
            "wake -1",
            "top 9 -1",
            "listener -1 0 0",
            "message 1 - -1",
        ] {
            let more = format!("{text}{line}\n");
            assert!(matches!(Handover::decode(&more), Err(HandoverError::Line { .. })), "{line}");
        }
    }
}
