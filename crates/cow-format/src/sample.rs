//! A digest of a few blocks of an image: distinguishes images of the same size without reading them
//! whole (`docs/spec/format-native.md` section 5).

use std::fmt;
use std::iter::successors;

use crate::units::ByteOffset;

/// Bytes of a sampled block.
const BLOCK_LEN: usize = 4096;
const BLOCK: u64 = BLOCK_LEN as u64;
/// Blocks from the beginning on: partition table, boot loader, and the superblock of a file system
/// without partitions.
const HEAD_BLOCKS: u64 = 8;
/// The first partition of a modern disk begins here, and many others at a power of two times this;
/// a superblock is at its beginning and changes with each mount.
const FIRST_PARTITION: u64 = 1 << 20;
/// Blocks in the middles of this many equal parts. In total there are fewer than a hundred blocks:
/// milliseconds, or half a second on a cold spinning disk.
const SPREAD: u64 = 48;

/// BLAKE3 of the size of an image and of some of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample([u8; 32]);

impl Sample {
    /// As stored in a header.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// As stored in a header.
    pub const fn to_bytes(self) -> [u8; 32] {
        self.0
    }

    /// Takes the sample of an image of `size` bytes. `read` fills a block from an offset, with
    /// zeros past the end of the image.
    pub fn take<E>(
        size: u64,
        mut read: impl FnMut(ByteOffset, &mut [u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&size.to_le_bytes());
        let mut block = [0; BLOCK_LEN];
        for at in places(size) {
            read(ByteOffset::new(at), &mut block)?;
            hasher.update(&block);
        }
        Ok(Self(*hasher.finalize().as_bytes()))
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Where the sampled blocks begin, in the order of hashing. One that occurs twice is hashed twice.
fn places(size: u64) -> impl Iterator<Item = u64> {
    let head = (0..HEAD_BLOCKS).map(|n| n * BLOCK);
    let partitions = successors(Some(FIRST_PARTITION), |at| at.checked_mul(2));
    let half_part = size / (2 * SPREAD);
    let spread = (0..SPREAD).map(move |n| half_part * (2 * n + 1));
    let last = size.saturating_sub(1);
    let all = head
        .chain(partitions.take_while(move |at| *at < size))
        .chain(spread)
        .chain([last.saturating_sub(BLOCK), last]);
    all.map(|at| at / BLOCK * BLOCK).filter(move |at| *at < size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(image: &[u8]) -> Sample {
        let read = |at: ByteOffset, block: &mut [u8]| {
            let rest = &image[usize::try_from(at.get()).unwrap()..];
            let n = rest.len().min(block.len());
            block.fill(0);
            block[..n].copy_from_slice(&rest[..n]);
            Ok::<(), ()>(())
        };
        Sample::take(image.len() as u64, read).unwrap()
    }

    #[test]
    fn the_blocks_are_where_the_document_says() {
        assert_eq!(places(0).count(), 0);
        assert!(places(1).all(|at| at == 0) && places(1).count() == 1 + 48 + 2);
        let found: Vec<_> = places(3 << 30).collect();
        assert_eq!(found[..9], [0, 4096, 8192, 12288, 16384, 20480, 24576, 28672, 1 << 20]);
        assert_eq!(found[9..20], (1..12).map(|n| 1 << (20 + n)).collect::<Vec<u64>>());
        assert_eq!(found[20..22], [32 << 20, 96 << 20]);
        assert_eq!(found[found.len() - 2..], [(3 << 30) - 8192, (3 << 30) - 4096]);
        assert_eq!(found.len(), 8 + 12 + 48 + 2);
        for size in [4095, 4096, 4097, 1 << 20, (1 << 20) + 1, 1 << 48, u64::MAX] {
            assert!(places(size).all(|at| at < size && at % BLOCK == 0), "{size}");
            assert!(places(size).count() < 110, "{size}");
        }
    }

    /// Made by another implementation, in Python, from the document.
    #[test]
    fn the_digest_is_the_documents() {
        let image: Vec<u8> = (0..5_000_001u32).map(|n| (n / 4096 % 251) as u8).collect();
        assert_eq!(
            sample(&image).to_string(),
            "9323751ff9757b30a2791a67d8f4eadb004fc387ebbf7a05b11d8f8bce6d0711"
        );
        assert_eq!(
            sample(&[]).to_string(),
            "71e0a99173564931c0b8acc52d2685a8e39c64dc52e3d02390fdac2a12b155cb"
        );
    }

    #[test]
    fn size_beginning_end_and_partitions_count() {
        let mut image = vec![7; 5_000_001];
        let before = sample(&image);
        assert_ne!(sample(&image[..5_000_000]), before);
        for at in [0, 32767, 1 << 20, 4 << 20, 5_000_000 - 4096, 5_000_000] {
            image[at] ^= 1;
            assert_ne!(sample(&image), before, "{at}");
            image[at] ^= 1;
        }
        assert_eq!(sample(&image), before);
    }
}
