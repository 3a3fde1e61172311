//! Sectors, counts of sectors and byte offsets, each a type of its own.

use std::fmt;

/// Bytes in a sector: the unit of the bitmap and of virtio-blk, whatever the disk's block size.
pub const SECTOR_SIZE: u64 = 512;

/// The largest virtual disk that any header may announce, in bytes (256 TiB).
///
/// A hostile header names a size; what is allocated for a disk before anything is read from it (16
/// bytes for each 16 GiB, see [`crate::Bitmap`]) must stay bounded. 256 TiB costs 256 KiB.
pub const VIRTUAL_SIZE_MAX: u64 = 256 << 40;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident, $suffix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a raw value; every value is valid.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The raw value.
            pub const fn get(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{}", $suffix), self.0)
            }
        }
    };
}

unit! {
    /// The number of a 512-byte sector of a virtual disk.
    Sector, ""
}
unit! {
    /// A number of 512-byte sectors.
    SectorCount, " sectors"
}
unit! {
    /// An offset in bytes, in a file or in a virtual disk.
    ByteOffset, ""
}

impl Sector {
    /// The sector `count` further on; `None` past 2^64.
    pub fn checked_add(self, count: SectorCount) -> Option<Self> {
        self.0.checked_add(count.0).map(Self)
    }
}

impl SectorCount {
    /// The sectors that hold `bytes` bytes; the last may be partial.
    pub const fn covering(bytes: u64) -> Self {
        Self(bytes.div_ceil(SECTOR_SIZE))
    }

    /// The length in bytes; `None` past 2^64.
    pub fn checked_bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_SIZE)
    }
}

impl ByteOffset {
    /// The offset `bytes` further on; `None` past 2^64.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }
}

/// A range of sectors whose end, in bytes, fits a file offset (`i64`). May be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SectorRange {
    start: Sector,
    count: SectorCount,
}

impl SectorRange {
    /// `count` sectors from `start`; `None` if the range ends past 2^63 - 1 bytes.
    pub fn new(start: Sector, count: SectorCount) -> Option<Self> {
        let end = start.0.checked_add(count.0)?.checked_mul(SECTOR_SIZE)?;
        i64::try_from(end).ok()?;
        Some(Self { start, count })
    }

    /// The sectors `start..end` of an already valid range or disk; empty if `end` is not past
    /// `start`.
    pub(crate) fn from_bounds(start: u64, end: u64) -> Self {
        debug_assert!(end <= i64::MAX.unsigned_abs() / SECTOR_SIZE);
        Self { start: Sector(start), count: SectorCount(end.saturating_sub(start)) }
    }

    /// The first sector.
    pub const fn start(self) -> Sector {
        self.start
    }

    /// The number of sectors.
    pub const fn count(self) -> SectorCount {
        self.count
    }

    /// The first sector after the range.
    pub const fn end(self) -> Sector {
        Sector(self.start.0 + self.count.0)
    }

    /// The offset of the first sector in the virtual disk, in bytes.
    pub const fn start_bytes(self) -> ByteOffset {
        ByteOffset(self.start.0 * SECTOR_SIZE)
    }

    /// The length in bytes.
    pub const fn len_bytes(self) -> u64 {
        self.count.0 * SECTOR_SIZE
    }

    /// True if the range holds no sector.
    pub const fn is_empty(self) -> bool {
        self.count.0 == 0
    }

    /// The smallest range that holds both.
    #[must_use]
    pub fn hull(self, other: Self) -> Self {
        let (start, end) = (self.start.0.min(other.start.0), self.end().0.max(other.end().0));
        Self::from_bounds(start, end)
    }

    /// The part of the range before sector `end`; possibly empty.
    #[must_use]
    pub fn clipped_to(self, end: Sector) -> Self {
        let start = self.start.0.min(end.0);
        Self::from_bounds(start, self.end().0.min(end.0))
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sectors {}..{}", self.start, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_within_a_file_offset() {
        let last = i64::MAX.unsigned_abs() / SECTOR_SIZE;
        assert!(SectorRange::new(Sector(last), SectorCount(0)).is_some());
        assert!(SectorRange::new(Sector(last), SectorCount(1)).is_none());
        assert!(SectorRange::new(Sector(u64::MAX), SectorCount(1)).is_none());
        assert!(SectorRange::new(Sector(1 << 55), SectorCount(0)).is_none());
        let range = SectorRange::new(Sector(3), SectorCount(4)).unwrap();
        assert_eq!((range.end(), range.len_bytes()), (Sector(7), 2048));
        assert_eq!(range.clipped_to(Sector(5)).count(), SectorCount(2));
        assert!(range.clipped_to(Sector(2)).is_empty());
        let other = SectorRange::new(Sector(5), SectorCount(9)).unwrap();
        assert_eq!(
            (range.hull(other), other.hull(range)),
            (SectorRange::from_bounds(3, 14), range.hull(other))
        );
    }

    #[test]
    fn a_partial_sector_counts() {
        assert_eq!(SectorCount::covering(0), SectorCount(0));
        assert_eq!(SectorCount::covering(513), SectorCount(2));
        assert_eq!(SectorCount::covering(u64::MAX), SectorCount(1 << 55));
    }
}
