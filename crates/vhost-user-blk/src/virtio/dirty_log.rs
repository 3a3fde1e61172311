//! The log of dirty pages, from which a live migration learns what it has to send again (vhost-user
//! specification, "Migration").
//!
//! One bit for each 4096 bytes of guest memory, counted from guest address 0, in memory that the
//! frontend shares. It clears a bit before it sends the page, so a bit is set after the page was
//! written: then the page is either sent as it was written, or sent again. The frontend and all
//! queues change the same bytes; each change is atomic.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::guest_memory::memory::{GuestAddress, Loss, Memory, MemoryError, RegionInfo};
use crate::virtio::notify::Bell;

/// Bytes of guest memory for which one bit stands (`VHOST_LOG_PAGE`).
pub(crate) const PAGE_LEN: u64 = 4096;

/// A log that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    /// It has no bit for something that the daemon may write.
    #[error(
        "dirty log of {found} bytes; {needed} are needed for guest memory up to {end:#x}, one bit \
         for each {PAGE_LEN} bytes"
    )]
    TooSmall {
        /// Its length in bytes.
        found: u64,
        /// What it has to be at least, in bytes.
        needed: u64,
        /// The first guest address for which it needs no bit.
        end: u64,
    },
    /// It cannot be mapped to be written: too short, not a file, and the like.
    #[error("dirty log: {0}")]
    Memory(#[from] MemoryError),
}

/// A mapped log.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    /// Its bytes, from address 0.
    bytes: Memory,
    /// How many.
    len: u64,
}

impl DirtyLog {
    /// Maps `len` bytes of `file` at `offset`.
    ///
    /// # Errors
    /// [`LogError::Memory`]
    pub(crate) fn map(len: u64, offset: u64, file: File) -> Result<Self, LogError> {
        Ok(DirtyLog { bytes: Memory::of_file(file, offset, len)?, len })
    }

    /// Where it is, and its file.
    pub(crate) fn file(&self) -> Option<(RegionInfo, &File)> {
        self.bytes.files().next()
    }

    /// Whether every page below the guest address `end` has a bit.
    ///
    /// # Errors
    /// [`LogError::TooSmall`]
    pub(crate) fn check(&self, end: u64) -> Result<(), LogError> {
        let needed = end.div_ceil(PAGE_LEN).div_ceil(8);
        if needed > self.len {
            return Err(LogError::TooSmall { found: self.len, needed, end });
        }
        Ok(())
    }

    /// Marks the pages of `len` bytes at the guest address `address`, which were written before.
    /// Pages without a bit are left out.
    pub(crate) fn mark(&self, address: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|rest| address.checked_add(rest)) else {
            return;
        };
        let (first, last) = (address / PAGE_LEN, last / PAGE_LEN);
        for byte in first / 8..=last / 8 {
            let from = first.saturating_sub(8 * byte);
            let to = (last - 8 * byte).min(7);
            let bits = u8::MAX << from & u8::MAX >> (7 - to);
            if let Some(place) = self.bytes.contiguous_mut(GuestAddress(byte), 1) {
                // SAFETY: a byte of the mapping, which `bytes` keeps; all accesses to it from here
                // are atomic, and the frontend deserves what it reads if its own are not.
                let place = unsafe { AtomicU8::from_ptr(place) };
                // Release: a frontend that finds the bit finds the data.
                place.fetch_or(bits, Ordering::Release);
            }
        }
    }

    /// Whether a page of its file was lost, and so maybe marks.
    #[inline]
    pub(crate) fn poisoned(&self) -> bool {
        self.bytes.poisoned()
    }

    /// What became of it.
    pub(crate) fn loss(&self) -> Option<Loss> {
        self.bytes.loss()
    }
}

/// The log as one ring uses it.
#[derive(Clone, Debug)]
pub(crate) struct RingLog {
    /// What all rings share.
    pub(crate) log: Arc<DirtyLog>,
    /// The guest address under which the used ring is marked.
    pub(crate) used: u64,
    /// Rings when there are new marks (SET_LOG_FD).
    pub(crate) call: Option<Arc<Bell<File>>>,
}

impl RingLog {
    /// Marks `len` bytes at `offset` of the used ring.
    pub(crate) fn mark_used(&self, offset: usize, len: usize) {
        // The log holds the whole used ring, so this is inside.
        self.log.mark(self.used.saturating_add(offset as u64), len as u64);
    }

    /// Signals new marks to the frontend, if it has asked for that.
    pub(crate) fn announce(&self) {
        if let Some(call) = &self.call {
            call.signal();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn file(len: u64) -> File {
        let file = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn log(len: u64) -> (DirtyLog, File) {
        let file = file(len);
        (DirtyLog::map(len, 0, file.try_clone().unwrap()).unwrap(), file)
    }

    fn marked(file: &File) -> Vec<u64> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let is_set = |page: &u64| bytes[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 != 0;
        (0..8 * bytes.len() as u64).filter(is_set).collect()
    }

    #[test]
    fn the_pages_of_a_range_are_marked_and_no_others() {
        for (address, len, pages) in [
            (0, 0, 0..0),
            (0, 1, 0..1),
            (4095, 1, 0..1),
            (4095, 2, 0..2),
            (4096, 4096, 1..2),
            (7 * 4096, 2 * 4096, 7..9),
            (3 * 4096 + 1, 30 * 4096, 3..34),
            (8 * 4096, 8 * 4096, 8..16),
            // Past the end: what is inside is marked.
            (62 * 4096, 4096 * 4096, 62..64),
            (u64::MAX, 1, 0..0),
            (u64::MAX, 2, 0..0),
        ] {
            let (log, file) = log(8);
            log.mark(address, len);
            assert_eq!(marked(&file), pages.collect::<Vec<_>>(), "{len} bytes at {address:#x}");
        }
    }

    #[test]
    fn marks_stay_beside_those_of_others() {
        let (log, file) = log(1);
        file.write_all_at(&[0x81], 0).unwrap();
        log.mark(4096, 2 * 4096);
        assert_eq!(marked(&file), [0, 1, 2, 7]);
    }

    #[test]
    fn it_must_reach_to_the_end_of_what_is_written() {
        let (log, _) = log(2);
        let end = 16 * PAGE_LEN;
        log.check(0).unwrap();
        log.check(end).unwrap();
        let error = log.check(end + 1).unwrap_err().to_string();
        assert!(error.starts_with("dirty log of 2 bytes; 3 are needed"), "{error}");
        log.check(u64::MAX).unwrap_err();
    }

    #[test]
    fn a_file_that_does_not_hold_it_is_refused() {
        for (len, offset) in [(0, 0), (4097, 0), (4096, 1), (4096, u64::MAX), (u64::MAX, 1)] {
            let error = DirtyLog::map(len, offset, file(4096)).unwrap_err().to_string();
            assert!(error.starts_with("dirty log: "), "{error}");
        }
        DirtyLog::map(96, 4000, file(4096)).unwrap();
    }

    #[test]
    fn a_shortened_file_is_noticed() {
        let (log, file) = log(3 * 4096);
        log.mark(0, 1);
        assert!(!log.poisoned());
        file.set_len(4096).unwrap();
        log.mark(8 * PAGE_LEN * 5000, 1);
        assert!(log.poisoned());
    }
}
