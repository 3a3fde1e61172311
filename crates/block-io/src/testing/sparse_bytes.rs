//! Sparse bytes in memory, by sector: the storage of the simulated disk.

use std::collections::BTreeMap;
use std::ops::Range;

use cow_format::SECTOR_SIZE;

use crate::storage::SECTOR;

/// The unit that a disk writes atomically.
pub(crate) type SectorBytes = [u8; SECTOR];
pub(crate) const ZERO_SECTOR: SectorBytes = [0; SECTOR];

/// A byte array with holes. Sectors of zeros take no space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SparseBytes {
    sectors: BTreeMap<u64, SectorBytes>,
    len: u64,
}

impl SparseBytes {
    /// Length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The content of one sector; zeros in a hole and past the end.
    pub(crate) fn sector(&self, sector: u64) -> SectorBytes {
        self.sectors.get(&sector).copied().unwrap_or(ZERO_SECTOR)
    }

    /// Replaces the content of one sector; the length stays.
    pub(crate) fn set_sector(&mut self, sector: u64, bytes: SectorBytes) {
        if bytes == ZERO_SECTOR {
            self.sectors.remove(&sector);
        } else {
            self.sectors.insert(sector, bytes);
        }
    }

    /// The sectors that hold anything but zeros.
    pub(crate) fn present(&self, sectors: Range<u64>) -> impl Iterator<Item = u64> {
        self.sectors.range(sectors).map(|(sector, _)| *sector)
    }

    /// Number of sectors that hold anything but zeros.
    pub(crate) fn sectors_present(&self) -> usize {
        self.sectors.len()
    }

    /// Reads from `at`; fewer bytes than `buf` only at the end.
    pub(crate) fn read(&self, buf: &mut [u8], at: u64) -> usize {
        let left = usize::try_from(self.len.saturating_sub(at)).unwrap_or(usize::MAX);
        let n = buf.len().min(left);
        for (sector, inside, piece) in pieces(at, n) {
            buf[piece].copy_from_slice(&self.sector(sector)[inside]);
        }
        n
    }

    /// Writes `buf` at `at`, extending the length; calls `touched` with each sector's new content.
    pub(crate) fn write(&mut self, buf: &[u8], at: u64, mut touched: impl FnMut(u64, SectorBytes)) {
        for (sector, inside, piece) in pieces(at, buf.len()) {
            let mut bytes = self.sector(sector);
            bytes[inside].copy_from_slice(&buf[piece]);
            self.set_sector(sector, bytes);
            touched(sector, bytes);
        }
        self.len = self.len.max(at + buf.len() as u64);
    }

    /// Zeros `len` bytes at `at` up to the length, which stays; calls `touched` with each sector
    /// that changed.
    pub(crate) fn zero(&mut self, at: u64, len: u64, mut touched: impl FnMut(u64, SectorBytes)) {
        let end = at.saturating_add(len).min(self.len);
        let present =
            self.sectors.range(at / SECTOR_SIZE..end.div_ceil(SECTOR_SIZE).max(at / SECTOR_SIZE));
        for sector in present.map(|(sector, _)| *sector).collect::<Vec<_>>() {
            let mut bytes = self.sector(sector);
            let start = sector * SECTOR_SIZE;
            for (byte, at_byte) in bytes.iter_mut().zip(start..) {
                if (at..end).contains(&at_byte) {
                    *byte = 0;
                }
            }
            self.set_sector(sector, bytes);
            touched(sector, bytes);
        }
    }

    /// Sets the length; what is cut off reads as zeros when the length grows again.
    pub(crate) fn set_len(&mut self, len: u64, touched: impl FnMut(u64, SectorBytes)) {
        if len < self.len {
            self.zero(len, self.len - len, touched);
        }
        self.len = len;
    }

    /// The next run of sectors with content at or after `from`, in bytes.
    pub(crate) fn next_data(&self, from: u64) -> Option<Range<u64>> {
        let mut run = self.sectors.range(from / SECTOR_SIZE..).map(|(sector, _)| *sector);
        let first = run.next()?;
        let mut end = first + 1;
        for sector in run {
            if sector != end {
                break;
            }
            end += 1;
        }
        let range = (first * SECTOR_SIZE).max(from)..(end * SECTOR_SIZE).min(self.len);
        (!range.is_empty()).then_some(range)
    }
}

/// Cuts `len` bytes at `at` at sector boundaries: the sector, the bytes inside it, the bytes of the
/// buffer.
fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let here = at + done as u64;
        let inside = usize::try_from(here % SECTOR_SIZE).unwrap_or(0);
        let n = (SECTOR - inside).min(len - done);
        let piece = (here / SECTOR_SIZE, inside..inside + n, done..done + n);
        done += n;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_writes_and_lengths() {
        let mut bytes = SparseBytes::default();
        let mut touched = Vec::new();
        bytes.write(&[7; 600], 1000, |sector, _| touched.push(sector));
        assert_eq!(touched, [1, 2, 3]);
        assert_eq!(bytes.len(), 1600);
        let mut buf = [1; 2000];
        assert_eq!(bytes.read(&mut buf, 0), 1600);
        assert!(buf[..1000].iter().all(|b| *b == 0) && buf[1000..1600].iter().all(|b| *b == 7));
        assert_eq!(bytes.next_data(0), Some(512..1600));
        bytes.zero(1024, 512, |_, _| ());
        assert_eq!(bytes.next_data(1024), Some(1536..1600));
        bytes.set_len(1540, |_, _| ());
        bytes.set_len(1600, |_, _| ());
        assert_eq!(bytes.read(&mut buf, 1536), 64);
        assert_eq!(buf[..64], [[7; 4].as_slice(), &[0; 60]].concat());
        assert_eq!(bytes.next_data(1600), None);
    }
}
