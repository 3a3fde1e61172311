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
use std::io::{self, Read, Write};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

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

    /// Writes it into the frontend's pipe, which has room for it; if not, this does not wait.
    ///
    /// # Errors
    /// [`StateError::Io`]
    pub(crate) fn save(self, mut pipe: File) -> Result<(), StateError> {
        never_wait(&pipe)
            .and_then(|()| pipe.write_all(&self.encode()))
            .map_err(|source| StateError::Io { what: "write", source })
    }

    /// Reads it from the frontend's pipe, whose other end is closed by now. A saved state may be
    /// empty: `None`.
    ///
    /// # Errors
    /// [`StateError`]
    pub(crate) fn load(pipe: File) -> Result<Option<Self>, StateError> {
        let mut bytes = Vec::new();
        never_wait(&pipe)
            .and_then(|()| pipe.take(STATE_LEN as u64 + 1).read_to_end(&mut bytes))
            .map_err(|source| StateError::Io { what: "read", source })?;
        if bytes.is_empty() { Ok(None) } else { Self::decode(&bytes).map(Some) }
    }
}

/// A frontend that does not hold its end of the bargain must not hold up the daemon.
fn never_wait(pipe: &File) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(pipe, FcntlArg::F_GETFL)?);
    fcntl(pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
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
