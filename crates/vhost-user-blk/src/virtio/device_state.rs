//! What the guest has set and relies on, and no frontend repeats to the next daemon. It goes to a
//! successor with the in-flight area, or as the state of a device that is saved and restored
//! (vhost-user specification, "Migrating back-end state").
//!
//! | offset | length | |
//! |---|---|---|
//! | 0 | 8 | `VUBSTAT1` |
//! | 8 | 1 | 1: the write cache is on; 0: it is off, and the guest sends no flush |
//! | 9 | 7 | zeros |

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;

use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::socket::{MsgFlags, recv, send};
use nix::sys::stat::{SFlag, fstat};

const MAGIC: [u8; 8] = *b"VUBSTAT1";

/// Bytes of an encoded state.
pub(crate) const STATE_LEN: usize = 16;

/// State of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceState {
    /// The field `write_cache` of the configuration space.
    pub write_cache: bool,
}

/// A state that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// It is of another device, or damaged.
    #[error("device state of {len} bytes: not one of vhost-user-blk, or of another version")]
    Unknown {
        /// Its length in bytes.
        len: usize,
    },
    /// The frontend's pipe.
    #[error("device state: cannot {what} the frontend's descriptor: {source}")]
    Io {
        /// `read` or `write`.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// CHECK_DEVICE_STATE without anything before it.
    #[error("no device state was transferred")]
    Nothing,
}

impl DeviceState {
    /// As it is stored.
    pub(crate) fn encode(self) -> [u8; STATE_LEN] {
        let mut bytes = [0; STATE_LEN];
        bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
        bytes[MAGIC.len()] = self.write_cache.into();
        bytes
    }

    /// Out of what was stored.
    ///
    /// # Errors
    /// [`StateError::Unknown`]
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        [true, false]
            .map(|write_cache| DeviceState { write_cache })
            .into_iter()
            .find(|state| state.encode() == bytes)
            .ok_or(StateError::Unknown { len: bytes.len() })
    }

    /// Writes it into the frontend's pipe or socket, which has room for it; if not, this does not
    /// wait.
    ///
    /// # Errors
    /// [`StateError::Io`]
    pub(crate) fn save(self, to: File) -> Result<(), StateError> {
        let written = put(&to, self.encode());
        written.map_err(|source| StateError::Io { what: "write", source })
    }

    /// Reads it from the frontend's pipe or socket, whose other end is closed by now. A saved state
    /// may be empty: `None`.
    ///
    /// # Errors
    /// [`StateError`]
    pub(crate) fn load(from: File) -> Result<Option<Self>, StateError> {
        let mut bytes = [0; STATE_LEN + 1];
        let len = take(&from, &mut bytes);
        let len = len.map_err(|source| StateError::Io { what: "read", source })?;
        if len == 0 { Ok(None) } else { Self::decode(&bytes[..len]).map(Some) }
    }
}

/// Writes the bytes to a pipe or socket of the frontend's, all of them or none, without waiting.
fn put(to: &File, bytes: [u8; STATE_LEN]) -> io::Result<()> {
    let written = match own_pipe(to)? {
        None => send(to.as_raw_fd(), &bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?,
        Some((reader, mut writer)) => {
            writer.write_all(&bytes)?;
            splice(&reader, None, to, None, bytes.len(), SpliceFFlags::SPLICE_F_NONBLOCK)?
        }
    };
    if written == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Reads from a pipe or socket of the frontend's what is there, without waiting, until `bytes` is
/// full or the other end closed.
fn take(from: &File, bytes: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    let mut pipe = own_pipe(from)?;
    while len < bytes.len() {
        let left = &mut bytes[len..];
        let read = match &mut pipe {
            None => recv(from.as_raw_fd(), left, MsgFlags::MSG_DONTWAIT)?,
            Some((reader, writer)) => {
                let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
                match splice(from, None, writer, None, left.len(), flags)? {
                    0 => 0,
                    moved => reader.read(&mut left[..moved])?,
                }
            }
        };
        match read {
            0 => break,
            n => len += n,
        }
    }
    Ok(len)
}

/// If `file` is a pipe, one of our own, through which bytes go to it or come from it: splice(2)
/// between pipes does not wait if it is told so, while the frontend can make read(2) and write(2)
/// wait at any moment, as O_NONBLOCK belongs to both sides.
fn own_pipe(file: &File) -> io::Result<Option<(PipeReader, PipeWriter)>> {
    let kind = SFlag::from_bits_truncate(fstat(file)?.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFIFO { io::pipe().map(Some) } else { Ok(None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_encoded_is_decoded() {
        for write_cache in [true, false] {
            let state = DeviceState { write_cache };
            let bytes = state.encode();
            assert_eq!(DeviceState::decode(&bytes).unwrap(), state);
            assert!(DeviceState::decode(&bytes[..15]).is_err());
            for at in 0..STATE_LEN {
                let mut damaged = bytes;
                damaged[at] ^= 2;
                assert!(DeviceState::decode(&damaged).is_err(), "byte {at}");
            }
        }
        assert!(DeviceState::decode(&[0; STATE_LEN]).is_err());
    }
}
