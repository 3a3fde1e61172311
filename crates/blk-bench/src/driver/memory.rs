//! The memory that the frontend shares with the backend: what a guest's RAM is to a VMM.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU16;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Where the region starts in the guest's address space. It differs from the address in this
/// process and from 0, so that a backend that mixes the two up, or forgets to translate, is found
/// out.
pub const GUEST_BASE: u64 = 1 << 32;

/// Pages of `--hugepages`.
const HUGE_PAGE: usize = 2 << 20;

/// One shared mapping of a memfd. Offsets into it are what the rest of the driver works with.
#[derive(Debug)]
pub struct SharedMemory {
    start: NonNull<u8>,
    len: usize,
    file: File,
}

// SAFETY: the mapping belongs to this value until it is dropped, and is reached through raw
// pointers and atomics only.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; the callers of `bytes` and `bytes_mut` guarantee that nothing else uses the
// range.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// `len` bytes of zeros, with huge pages if asked for (from the host's pool of reserved ones).
    ///
    /// # Errors
    /// The error of memfd_create, ftruncate or mmap: ENOMEM if too few huge pages are reserved.
    pub fn new(len: usize, hugepages: bool) -> io::Result<Self> {
        let (flags, unit) =
            if hugepages { (MFdFlags::MFD_HUGETLB, HUGE_PAGE) } else { (MFdFlags::empty(), 4096) };
        let len = len.max(1).next_multiple_of(unit);
        let file = File::from(memfd_create("blk-bench", flags | MFdFlags::MFD_CLOEXEC)?);
        file.set_len(len as u64)?;
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE;
        // SAFETY: a fresh mapping at an address of the kernel's choice; nothing else refers to it.
        let start = unsafe {
            mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags, &file, 0)
        }?;
        Ok(Self { start: start.cast(), len, file })
    }

    /// Length in bytes, a multiple of the page size.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a mapping has at least one page.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memfd, to be sent to the backend.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The guest address of an offset.
    pub fn guest_address(&self, offset: usize) -> u64 {
        GUEST_BASE + offset as u64
    }

    /// The address of an offset in this process, which is how vhost-user names rings.
    pub fn user_address(&self, offset: usize) -> u64 {
        self.start.as_ptr() as u64 + offset as u64
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} of {}",
            self.len
        );
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// The 16-bit field at `offset`, which the backend may change at any time.
    pub fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        let field = self.at(offset, 2).cast::<u16>();
        assert!(field.is_aligned());
        // SAFETY: in bounds, aligned, lives as long as self, and both sides use it as an atomic.
        unsafe { AtomicU16::from_ptr(field) }
    }

    /// Stores a plain value that the backend reads only after a later release store.
    pub fn store<T: Copy>(&self, offset: usize, value: T) {
        let field = self.at(offset, size_of::<T>()).cast::<T>();
        // SAFETY: in bounds; volatile because another process reads it.
        unsafe {
            assert!(field.is_aligned());
            field.write_volatile(value);
        }
    }

    /// Loads a plain value that the backend wrote before a release store already seen. `T` must
    /// have no invalid bits.
    pub(crate) fn load<T: Copy + Plain>(&self, offset: usize) -> T {
        let field = self.at(offset, size_of::<T>()).cast::<T>();
        assert!(field.is_aligned());
        // SAFETY: in bounds, aligned, and every bit pattern is a `T`.
        unsafe { field.read_volatile() }
    }

    /// The byte at `offset`, even if it is being written concurrently.
    pub fn byte(&self, offset: usize) -> u8 {
        // SAFETY: in bounds; volatile, because others write it.
        unsafe { self.at(offset, 1).read_volatile() }
    }

    /// The bytes of a range.
    ///
    /// # Safety
    /// Nothing writes to the range while the slice lives: no request in flight covers it.
    pub unsafe fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        // SAFETY: in bounds; not written to, as the caller promises.
        unsafe { std::slice::from_raw_parts(self.at(offset, len), len) }
    }

    /// The bytes of a range, to be filled.
    ///
    /// # Safety
    /// Nothing else reads or writes the range while the slice lives: no request in flight covers
    /// it, and no other slice.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bytes_mut(&self, offset: usize, len: usize) -> &mut [u8] {
        // SAFETY: in bounds; exclusive, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at(offset, len), len) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, and nothing refers to it any more.
        if let Err(error) = unsafe { munmap(self.start.cast(), self.len) } {
            eprintln!("blk-bench: munmap: {error}");
        }
    }
}

/// Types of which every bit pattern is a value.
pub(crate) trait Plain {}
impl Plain for u8 {}
