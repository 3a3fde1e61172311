//! `struct virtio_blk_config` (virtio 1.3, section 5.2.4), as far as this driver uses it.

use serde::Serialize;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

/// Bytes up to and including the write-zeroes fields.
pub(crate) const CONFIG_LEN: u32 = 60;
/// Offset of the `writeback` byte.
pub(crate) const WRITEBACK_AT: u32 = 32;

/// Limits of discard or write-zeroes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RangeLimits {
    /// Most sectors in one range.
    pub max_sectors: u32,
    /// Most ranges in one request.
    pub max_segments: u32,
}

/// The device's configuration; a field whose feature is not negotiated is `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Size of the disk in sectors.
    pub capacity: u64,
    /// Most bytes in one data segment.
    pub size_max: Option<u32>,
    /// Most data segments in one request.
    pub seg_max: Option<u32>,
    /// Logical block size in bytes.
    pub block_size: Option<u32>,
    /// Logical blocks per physical block, as a power of two.
    pub physical_block_exp: Option<u8>,
    /// Number of queues; 1 without the MQ feature.
    pub num_queues: u16,
    /// Whether the disk cannot be written.
    pub read_only: bool,
    /// Limits of discard requests.
    pub discard: Option<RangeLimits>,
    /// Limits of write-zeroes requests.
    pub write_zeroes: Option<RangeLimits>,
}

impl Config {
    /// Reads the fields from `CONFIG_LEN` bytes; missing ones count as 0.
    pub fn parse(bytes: &[u8], features: u64) -> Self {
        let has = |bit: u32| features >> bit & 1 == 1;
        let get =
            |bit: u32, at: usize| has(bit).then(|| field::<4>(bytes, at)).map(u32::from_le_bytes);
        let limits = |bit: u32, at: usize| {
            let max_sectors = get(bit, at)?;
            Some(RangeLimits { max_sectors, max_segments: get(bit, at + 4)? })
        };
        Self {
            capacity: u64::from_le_bytes(field(bytes, 0)),
            // qemu-storage-daemon offers SIZE_MAX and leaves the field 0; Linux takes that as no
            // limit, too.
            size_max: get(VIRTIO_BLK_F_SIZE_MAX, 8).filter(|&max| max > 0),
            seg_max: get(VIRTIO_BLK_F_SEG_MAX, 12).filter(|&max| max > 0),
            block_size: get(VIRTIO_BLK_F_BLK_SIZE, 20),
            physical_block_exp: has(VIRTIO_BLK_F_TOPOLOGY).then(|| field::<1>(bytes, 24)[0]),
            num_queues: if has(VIRTIO_BLK_F_MQ) { u16::from_le_bytes(field(bytes, 34)) } else { 1 },
            read_only: has(VIRTIO_BLK_F_RO),
            discard: limits(VIRTIO_BLK_F_DISCARD, 36),
            write_zeroes: limits(VIRTIO_BLK_F_WRITE_ZEROES, 48),
        }
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|field| field.try_into().ok()).unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_virtio_says() {
        let mut bytes = [0; CONFIG_LEN as usize];
        bytes[..8].copy_from_slice(&1234_u64.to_le_bytes());
        bytes[12..16].copy_from_slice(&126_u32.to_le_bytes());
        bytes[34..36].copy_from_slice(&4_u16.to_le_bytes());
        bytes[36..40].copy_from_slice(&1000_u32.to_le_bytes());
        bytes[40..44].copy_from_slice(&2_u32.to_le_bytes());
        let features = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_MQ | 1 << VIRTIO_BLK_F_DISCARD;
        let config = Config::parse(&bytes, features);
        assert_eq!(config.capacity, 1234);
        assert_eq!(config.seg_max, Some(126));
        assert_eq!(config.size_max, None);
        assert_eq!(config.num_queues, 4);
        assert_eq!(config.discard, Some(RangeLimits { max_sectors: 1000, max_segments: 2 }));
        assert_eq!(config.write_zeroes, None);
        assert_eq!(Config::parse(&bytes, 0).num_queues, 1);
    }
}
