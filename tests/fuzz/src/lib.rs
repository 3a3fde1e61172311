//! What the fuzz targets share.

pub mod image;

use std::fs::File;
use std::os::fd::AsRawFd;

use cow_format::{Geometry, Sector, SectorCount, SectorRange, VIRTUAL_SIZE_MAX};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// An input, taken apart from the front. Where it has ended, everything is zero or empty: so every
/// input means something, and a short one is as good as a long one.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// The whole input.
    pub fn new(bytes: &'a [u8]) -> Self {
        Input(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to `len` bytes, as many as are left.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.bytes(usize::MAX)
    }

    /// `N` bytes, filled up with zeros.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Bytes with their length, a `u8`, in front.
    pub fn short(&mut self) -> &'a [u8] {
        let len = self.u8();
        self.bytes(len.into())
    }

    /// Bytes with their length, a `u16`, in front.
    pub fn long(&mut self) -> &'a [u8] {
        let len = self.u16();
        self.bytes(len.into())
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        // One byte reaches everything small; more bytes are taken only where they are needed.
        let number = match end {
            0..=0x100 => self.u8().into(),
            0x101..=0x1_0000 => self.u16().into(),
            0x1_0001..=0x1_0000_0000 => self.u32().into(),
            _ => self.u64(),
        };
        number % end
    }
}

/// What everything else relies on once a header was accepted for a file of `file_len` bytes.
pub fn check_places(geometry: &Geometry, file_len: u64) {
    assert!((1..=VIRTUAL_SIZE_MAX).contains(&geometry.virtual_size()));
    let data = geometry.data_offset().get();
    let bitmap = geometry.bitmap_offset().get();
    let bitmap_end = bitmap.checked_add(geometry.bitmap_len()).unwrap();
    assert!(bitmap_end <= file_len && bitmap_end <= data);
    if let Some(live) = geometry.live_bitmap_offset() {
        let live_end = live.get().checked_add(geometry.bitmap_len()).unwrap();
        assert!(live_end <= file_len && live_end <= data);
        assert!(live.get() >= bitmap_end || live_end <= bitmap);
    }
    let data_end = geometry.sectors().checked_bytes().and_then(|len| data.checked_add(len));
    assert!(data_end.is_some_and(|end| i64::try_from(end).is_ok()));
    assert_eq!(geometry.all().count(), geometry.sectors());
}

/// Makes the checksum of one copy of a native header right.
pub fn seal_header(copy: &mut [u8]) {
    copy[16..20].fill(0);
    let crc = crc32c::crc32c(copy);
    copy[16..20].copy_from_slice(&crc.to_le_bytes());
}

/// `count` sectors from `start` on, all below 2^64 bytes.
pub fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

/// A file in memory, of `len` zeros.
pub fn memfd(len: u64) -> File {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// The same file, for reading only.
pub fn reopen_read_only(file: &File) -> File {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}
