//! The device configuration space and the feature bits (virtio 1.3, section 5.2: block device).

use std::mem::offset_of;

use vhost::vhost_user::message::VhostUserVirtioFeatures;
use virtio_bindings::{virtio_blk as blk, virtio_config, virtio_ring};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

/// The largest part of a configuration space that vhost-user can ask for, in bytes (vhost-user
/// specification, "Virtio device config space").
pub(crate) const CONFIG_SPACE_LEN: u32 = 256;
/// cloud-hypervisor names the first byte of the device's own space by its place in a virtio-mmio
/// register file, 0x100. Everything there lies past [`CONFIG_SPACE_LEN`], so the two cannot be
/// confused.
const MMIO_CONFIG_OFFSET: u32 = 0x100;

/// Physical block, in bytes, if the logical one is not larger: the block of the file systems that
/// hold the image, and the unit of holes in it.
const PHYSICAL_BLOCK_LEN: u32 = 4096;
/// In what segments of DISCARD and WRITE_ZEROES are counted, in bytes.
const SECTOR_LEN: u32 = 512;

/// Most data segments in a request. With header and status that makes 128 descriptors: the default
/// ring of QEMU and cloud-hypervisor, which a chain must not exceed when INDIRECT_DESC is off.
pub(crate) const SEGMENTS_MAX: u16 = 126;
/// Most sectors in one segment of a DISCARD: 1 GiB. Bounds how long one request can keep a queue
/// busy, and is large enough for a whole disk to be trimmed in few requests.
pub(crate) const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// Most sectors in one segment of a WRITE_ZEROES: 64 MiB. Smaller than for DISCARD because where
/// the file system cannot zero a range by itself the zeros are written.
pub(crate) const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 17;
/// Most segments in one DISCARD or WRITE_ZEROES: 512 bytes of segments.
pub(crate) const RANGES_MAX: u32 = 32;

/// `VHOST_USER_F_PROTOCOL_FEATURES`: not a virtio feature, but travels among them.
pub(crate) const F_PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// `VHOST_F_LOG_ALL`: what is written into guest memory is logged. No virtio feature either.
pub(crate) const F_LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();
/// `VIRTIO_BLK_F_FLUSH`.
pub(crate) const F_FLUSH: u64 = 1 << blk::VIRTIO_BLK_F_FLUSH;
/// `VIRTIO_BLK_F_CONFIG_WCE`.
pub(crate) const F_CONFIG_WCE: u64 = 1 << blk::VIRTIO_BLK_F_CONFIG_WCE;
/// `VIRTIO_BLK_F_SEG_MAX`.
pub(crate) const F_SEG_MAX: u64 = 1 << blk::VIRTIO_BLK_F_SEG_MAX;
/// `VIRTIO_F_INDIRECT_DESC`.
pub(crate) const F_INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// `VIRTIO_F_EVENT_IDX`.
pub(crate) const F_EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;

const F_COMMON: u64 = F_PROTOCOL_FEATURES
    | F_LOG_ALL
    | F_EVENT_IDX
    | 1 << virtio_config::VIRTIO_F_VERSION_1
    | F_INDIRECT_DESC
    | F_SEG_MAX
    | 1 << blk::VIRTIO_BLK_F_BLK_SIZE
    | 1 << blk::VIRTIO_BLK_F_TOPOLOGY
    | 1 << blk::VIRTIO_BLK_F_MQ
    | F_FLUSH;
const F_WRITABLE: u64 =
    F_CONFIG_WCE | 1 << blk::VIRTIO_BLK_F_DISCARD | 1 << blk::VIRTIO_BLK_F_WRITE_ZEROES;
const F_READ_ONLY: u64 = 1 << blk::VIRTIO_BLK_F_RO;

/// The features of a disk: what writes and discards is not offered for a read-only one.
#[must_use]
pub(crate) fn features(read_only: bool) -> u64 {
    F_COMMON | if read_only { F_READ_ONLY } else { F_WRITABLE }
}

/// `struct virtio_blk_config` up to `unused1` (virtio 1.3, section 5.2.4).
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct RawConfig {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    geometry_sectors: u8,
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    wce: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

const _: () = assert!(size_of::<RawConfig>() == 60);
const _: () =
    assert!(size_of::<RawConfig>() == offset_of!(blk::virtio_blk_config, max_secure_erase_sectors));
const _: () = assert!(offset_of!(RawConfig, wce) == WCE_OFFSET as usize);
const _: () = assert!(offset_of!(blk::virtio_blk_config, wce) == WCE_OFFSET as usize);
/// Place of the one byte that a driver may write.
const WCE_OFFSET: u32 = 32;

/// What differs from disk to disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiskShape {
    /// 512-byte sectors.
    pub(crate) capacity: u64,
    /// Queues offered.
    pub(crate) num_queues: u16,
    /// Largest ring accepted, in descriptors.
    pub(crate) queue_size_max: u16,
    /// No request may change the disk.
    pub(crate) read_only: bool,
    /// Logical block in bytes, a power of two: what every address and length of a request is a
    /// multiple of. Those of a driver that does not care (firmware) are served all the same.
    pub(crate) logical_block: u32,
}

/// The configuration space of the device.
#[derive(Clone)]
pub(crate) struct DeviceConfig {
    raw: RawConfig,
}

impl DeviceConfig {
    /// The space as it is after a reset: write cache on.
    #[must_use]
    pub(crate) fn new(shape: &DiskShape) -> Self {
        let seg_max = SEGMENTS_MAX.min(shape.queue_size_max.saturating_sub(2).max(1));
        let ranges = if shape.read_only { 0 } else { RANGES_MAX };
        let physical = shape.logical_block.max(PHYSICAL_BLOCK_LEN);
        let per_physical = physical / shape.logical_block.max(1);
        let if_writable = |value: u32| U32::new(if shape.read_only { 0 } else { value });
        DeviceConfig {
            raw: RawConfig {
                capacity: U64::new(shape.capacity),
                size_max: U32::ZERO,
                seg_max: U32::new(seg_max.into()),
                cylinders: U16::ZERO,
                heads: 0,
                geometry_sectors: 0,
                blk_size: U32::new(shape.logical_block),
                // A power of two, at most 8.
                physical_block_exp: u8::try_from(per_physical.trailing_zeros()).unwrap_or(0),
                alignment_offset: 0,
                min_io_size: U16::new(u16::try_from(per_physical).unwrap_or(1)),
                // No preferred size: guests take it for a RAID stripe and align to it.
                opt_io_size: U32::ZERO,
                wce: 1,
                unused0: 0,
                num_queues: U16::new(shape.num_queues),
                max_discard_sectors: if_writable(DISCARD_SECTORS_MAX),
                max_discard_seg: U32::new(ranges),
                discard_sector_alignment: if_writable(physical / SECTOR_LEN),
                max_write_zeroes_sectors: if_writable(WRITE_ZEROES_SECTORS_MAX),
                max_write_zeroes_seg: U32::new(ranges),
                write_zeroes_may_unmap: u8::from(!shape.read_only),
                unused1: [0; 3],
            },
        }
    }

    /// `size` bytes from `offset`. What lies past the structure reads as zeros, so that a driver
    /// that knows a longer one sees its features absent. `None` if the range leaves the space.
    #[must_use]
    pub(crate) fn read(&self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let offset = space_offset(offset, size)?;
        let bytes = self.raw.as_bytes();
        let start = usize::try_from(offset).ok()?;
        let size = usize::try_from(size).ok()?;
        let mut out = vec![0; size];
        let known = bytes.get(start..).unwrap_or_default();
        let n = known.len().min(size);
        out[..n].copy_from_slice(&known[..n]);
        Some(out)
    }

    /// A write by the driver. Only the write cache byte can change; a write to any other is without
    /// effect, as on hardware. `None` if the range leaves the space, otherwise whether the byte was
    /// written.
    pub(crate) fn write(&mut self, offset: u32, data: &[u8]) -> Option<bool> {
        let offset = space_offset(offset, u32::try_from(data.len()).ok()?)?;
        let wce = WCE_OFFSET.checked_sub(offset).and_then(|at| data.get(usize::try_from(at).ok()?));
        if let Some(&wce) = wce {
            self.set_write_cache(wce != 0);
        }
        Some(wce.is_some())
    }

    /// Descriptors of the longest request that the driver may make: data, header and status.
    #[must_use]
    pub(crate) fn chain_len_max(&self) -> u32 {
        self.raw.seg_max.get() + 2
    }

    /// Whether writes may stay in the host's cache until a flush.
    #[must_use]
    pub(crate) fn write_cache(&self) -> bool {
        self.raw.wce != 0
    }

    /// Switches the write cache.
    pub(crate) fn set_write_cache(&mut self, on: bool) {
        self.raw.wce = u8::from(on);
    }
}

/// `offset` within the device's own space, if `size` bytes from there lie in it.
fn space_offset(offset: u32, size: u32) -> Option<u32> {
    let offset = offset.checked_sub(MMIO_CONFIG_OFFSET).unwrap_or(offset);
    (offset.checked_add(size)? <= CONFIG_SPACE_LEN).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: DiskShape = DiskShape {
        capacity: 0x1234_5678,
        num_queues: 3,
        queue_size_max: 1024,
        read_only: false,
        logical_block: 512,
    };

    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let bytes = DeviceConfig::new(&SHAPE).read(0, 60).unwrap();
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()), 0x1234_5678);
        assert_eq!(u32_at(12), 126);
        assert_eq!(u32_at(20), 512);
        assert_eq!((bytes[24], bytes[25]), (3, 0));
        assert_eq!(u16::from_le_bytes([bytes[26], bytes[27]]), 8);
        assert_eq!(bytes[32], 1);
        assert_eq!(u16::from_le_bytes([bytes[34], bytes[35]]), 3);
        assert_eq!(u32_at(36), DISCARD_SECTORS_MAX);
        assert_eq!((u32_at(40), u32_at(44)), (RANGES_MAX, 8));
        assert_eq!((u32_at(48), u32_at(52)), (WRITE_ZEROES_SECTORS_MAX, RANGES_MAX));
        assert_eq!(bytes[56], 1);
    }

    #[test]
    fn large_logical_blocks_are_told() {
        for (block, exponent, per_physical, alignment) in
            [(512, 3, 8, 8), (1024, 2, 4, 8), (4096, 0, 1, 8), (65536, 0, 1, 128)]
        {
            let shape = DiskShape { logical_block: block, ..SHAPE };
            let bytes = DeviceConfig::new(&shape).read(0, 60).unwrap();
            let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            assert_eq!((u32_at(20), bytes[24], u32_at(44)), (block, exponent, alignment));
            assert_eq!(u16::from_le_bytes([bytes[26], bytes[27]]), per_physical);
            assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()), SHAPE.capacity);
        }
    }

    #[test]
    fn any_window_of_the_space_reads_as_the_structure_then_zeros() {
        let config = DeviceConfig::new(&SHAPE);
        let whole = config.read(0, CONFIG_SPACE_LEN).unwrap();
        assert!(whole[60..].iter().all(|&byte| byte == 0));
        for offset in 0..CONFIG_SPACE_LEN {
            for size in 0..=CONFIG_SPACE_LEN - offset {
                let (from, to) = (offset as usize, (offset + size) as usize);
                assert_eq!(config.read(offset, size).unwrap(), whole[from..to]);
                assert_eq!(config.read(0x100 + offset, size).unwrap(), whole[from..to]);
            }
            assert_eq!(config.read(offset, CONFIG_SPACE_LEN - offset + 1), None);
        }
        assert_eq!(config.read(u32::MAX, 1), None);
        assert_eq!(config.read(0x200, 1), None);
    }

    #[test]
    fn only_the_write_cache_byte_can_be_written() {
        let mut config = DeviceConfig::new(&SHAPE);
        let before = config.read(0, 60).unwrap();
        assert_eq!(config.write(0, &[0xff; 32]), Some(false));
        assert_eq!(config.write(33, &[0xff; 27]), Some(false));
        assert_eq!(config.read(0, 60).unwrap(), before);
        assert_eq!(config.write(32, &[0]), Some(true));
        assert!(!config.write_cache());
        assert_eq!(config.write(30, &[0, 0, 2, 0]), Some(true));
        assert_eq!(config.read(0, 60).unwrap(), before);
        assert_eq!(config.write(250, &[0; 7]), None);
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        let shape = DiskShape { read_only: true, ..SHAPE };
        assert_eq!(DeviceConfig::new(&shape).read(36, 21).unwrap(), [0; 21]);
        let offered = features(true);
        assert_ne!(offered & F_READ_ONLY, 0);
        assert_eq!(offered & F_WRITABLE, 0);
        assert_eq!(features(false) & F_READ_ONLY, 0);
    }

    #[test]
    fn segments_fit_a_small_ring() {
        let shape = DiskShape { queue_size_max: 16, ..SHAPE };
        assert_eq!(DeviceConfig::new(&shape).read(12, 4).unwrap(), [14, 0, 0, 0]);
    }
}
