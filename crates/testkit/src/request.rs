//! Requests of a block device (virtio 1.3, 5.2.6).

use virtio_bindings::virtio_blk;

/// A read.
pub const IN: u32 = virtio_blk::VIRTIO_BLK_T_IN;
/// A write.
pub const OUT: u32 = virtio_blk::VIRTIO_BLK_T_OUT;
/// A flush.
pub const FLUSH: u32 = virtio_blk::VIRTIO_BLK_T_FLUSH;
/// The device's serial number.
pub const GET_ID: u32 = virtio_blk::VIRTIO_BLK_T_GET_ID;
/// A discard.
pub const DISCARD: u32 = virtio_blk::VIRTIO_BLK_T_DISCARD;
/// Zeros to be written.
pub const WRITE_ZEROES: u32 = virtio_blk::VIRTIO_BLK_T_WRITE_ZEROES;

/// Bytes of [`header`].
pub const HEADER_LEN: u32 = 16;

/// The header of a request: type, reserved, sector.
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// One segment of a discard or of zeros to be written: sector, count of sectors, flags.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}
