//! Guest memory that is shared with the daemon. A test reads and writes it by system calls only: it
//! may be shortened without killing the test.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::FrontendReq;

use crate::driver::GuestMemory;
use crate::frontend::RawFrontend;

/// Where guest memory begins for the guest. Not 0, so that a place in the file is no guest address.
pub const GUEST: u64 = 0x10_0000;
/// The frontend's address for it, by its own account. Nothing is ever mapped there.
pub const VMM: u64 = 0x7f12_3450_0000;
/// Bytes of a page: what the dirty log has a bit for.
pub const PAGE: u64 = 4096;
/// Bytes of a [`Memory`] if a test does not ask for another size.
pub const DEFAULT_LEN: u64 = 1 << 20;

/// Guest memory of one region, and where its next free page is. Places are counted from its
/// beginning, as are the pages of the dirty log.
pub struct Memory {
    /// What the daemon maps.
    pub file: File,
    /// Bytes of it.
    pub len: u64,
    free: u64,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new(DEFAULT_LEN / PAGE)
    }
}

impl Memory {
    /// Memory of `pages` free pages.
    pub fn new(pages: u64) -> Self {
        let len = pages * PAGE;
        Memory { file: memfd(len), len, free: 0 }
    }

    /// Takes `len` bytes, from the beginning of a page on.
    pub fn take(&mut self, len: u64) -> u64 {
        let at = self.free;
        self.free += len.next_multiple_of(PAGE);
        assert!(self.free <= self.len, "guest memory is full");
        at
    }

    /// Sends the memory table.
    pub fn set(&self, frontend: &mut RawFrontend) {
        frontend.send(FrontendReq::SET_MEM_TABLE, &table(self.len), &[self.file.as_raw_fd()]);
    }

    /// The body of ADD_MEM_REG and REM_MEM_REG.
    pub fn region(&self) -> Vec<u8> {
        single_region(self.len)
    }

    /// Writes at a place.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, at).unwrap();
    }

    /// Reads at a place.
    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// One page as it is now.
    pub fn page(&self, page: u64) -> Vec<u8> {
        self.read::<4096>(page * PAGE).to_vec()
    }

    /// All pages as they are now.
    pub fn copy(&self) -> Vec<Vec<u8>> {
        (0..self.len / PAGE).map(|page| self.page(page)).collect()
    }

    /// The pages that differ from a copy.
    pub fn changed_since(&self, copy: &[Vec<u8>]) -> BTreeSet<u64> {
        let differs = |page: &u64| self.page(*page) != copy[usize::try_from(*page).unwrap()];
        (0..self.len / PAGE).filter(differs).collect()
    }
}

impl GuestMemory for Memory {
    fn write_guest(&self, address: u64, bytes: &[u8]) {
        self.write(address - GUEST, bytes);
    }

    fn read_guest(&self, address: u64, bytes: &mut [u8]) {
        self.file.read_exact_at(bytes, address - GUEST).unwrap();
    }
}

/// Memory with a name, of `len` bytes.
pub fn memfd(len: u64) -> File {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// The pages that a range touches.
pub fn pages(at: u64, len: u64) -> impl Iterator<Item = u64> {
    at / PAGE..(at + len).div_ceil(PAGE)
}

/// A region of `len` bytes: guest address, size, frontend address, offset in the file.
fn region(len: u64) -> Vec<u8> {
    [GUEST, len, VMM, 0].map(u64::to_ne_bytes).concat()
}

/// The body of SET_MEM_TABLE for memory of `len` bytes.
pub fn table(len: u64) -> Vec<u8> {
    let count_and_padding = [1u32, 0].map(u32::to_ne_bytes).concat();
    [count_and_padding, region(len)].concat()
}

/// The body of ADD_MEM_REG and REM_MEM_REG for memory of `len` bytes.
pub fn single_region(len: u64) -> Vec<u8> {
    [vec![0; 8], region(len)].concat()
}
