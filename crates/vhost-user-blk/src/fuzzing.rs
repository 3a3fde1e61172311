//! What `tests/fuzz` reaches that is no part of the crate otherwise, and the targets that need the
//! inside of the daemon.

mod inflight;
mod session;

pub use inflight::inflight;
pub use session::vhost_user;

pub use crate::lifecycle::handover::Handover;

/// An input, taken apart from the front. Where it has ended, everything is zero or empty.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Bytes with their length, a `u8`, in front.
    fn short(&mut self) -> &'a [u8] {
        let len = self.u8();
        self.bytes(len.into())
    }
}
