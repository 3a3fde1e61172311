//! The frontend's side of a dirty log.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::frontend::RawFrontend;
use crate::memory::{GUEST, Memory, PAGE, memfd};

/// A dirty log: one bit a page, from guest address 0 on.
pub struct Log {
    /// What the daemon maps. A test that shortens it must not take marks from it any more.
    pub file: File,
    /// Bytes of it.
    pub len: u64,
    map: *mut u8,
}

impl Log {
    /// An empty log of `len` bytes. It stays mapped until the test ends.
    pub fn new(len: u64) -> Self {
        let file = memfd(len);
        // SAFETY: a new mapping of the whole file, at an address that the kernel chooses.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                usize::try_from(len).unwrap(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(map, libc::MAP_FAILED);
        Log { file, len, map: map.cast() }
    }

    /// Gives it to the daemon.
    pub fn set(&self, frontend: &mut RawFrontend) {
        frontend.set_log_base(self.len, 0, &self.file);
    }

    /// Takes the marks: the marked pages, counted from the beginning of guest memory.
    pub fn take(&self) -> BTreeSet<u64> {
        let byte = |at: u64| {
            // SAFETY: `at` is below `len`, so the byte is inside the mapping, which is never
            // unmapped and whose file is as long (see `file`); all changes of it are atomic.
            let byte = unsafe { AtomicU8::from_ptr(self.map.add(usize::try_from(at).unwrap())) };
            byte.swap(0, Ordering::AcqRel)
        };
        let pages = (0..self.len).flat_map(|at| {
            let bits = byte(at);
            (0..8).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| 8 * at + bit)
        });
        pages.map(|page| page.checked_sub(GUEST / PAGE).expect("a page below memory")).collect()
    }
}

impl Memory {
    /// A log that is just large enough for this memory.
    pub fn log(&self) -> Log {
        Log::new((GUEST + self.len).div_ceil(8 * PAGE))
    }
}
