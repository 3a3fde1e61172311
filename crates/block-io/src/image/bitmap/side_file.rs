//! The side file of a UML COW file, `<COW>.live`: a header and the live bitmap, for which UML's
//! layout has no room.
//!
//! It exists while the COW file is open for writing, and after the death of the process that had it
//! open; a clean close removes it. It is used only under the COW file's exclusive lock, or read
//! under its shared lock. It is never synced on purpose: it is valid only for one page cache, and
//! lives in it. Specified in `docs/spec/format-side-file.md`.

use std::io;
use std::path::{Path, PathBuf};

use cow_format::header::CacheWitness;
use cow_format::{BITMAP_PAGE_LEN, ByteOffset, Geometry};
use zerocopy::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::storage::{BootId, FileStat, Storage};

/// The first bytes of a side file.
const MAGIC: [u8; 8] = *b"COWLIVE\n";
const VERSION: u32 = 2;
/// Where the live bitmap begins: after one page for the header.
pub(crate) const BITMAP_AT: ByteOffset = ByteOffset::new(BITMAP_PAGE_LEN as u64);

/// The header on disk, little-endian.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawSideHeader {
    magic: [u8; 8],
    version: U32,
    /// See `cow_born_secs`.
    cow_born_nanos: U32,
    boot_id: [u8; 16],
    cow_dev: U64,
    cow_ino: U64,
    /// When the COW file's inode was created, so that a new file with a reused inode number is not
    /// mistaken for it; nanoseconds 2^32-1 if the file system does not record it.
    cow_born_secs: I64,
    /// Offset of the live bitmap in the side file; the other offsets are in the COW file.
    live_offset: U64,
    virtual_size: U64,
    data_offset: U64,
    durable_offset: U64,
    bitmap_len: U64,
    /// Identifies the instance of the page cache within the boot, as in a native header.
    witness: [u8; WITNESS_LEN],
    reserved: U32,
    /// CRC32C of everything before.
    crc: U32,
}

const RAW_LEN: usize = 120;
const WITNESS_LEN: usize = 16;
const WITNESS_AT: usize = 96;
const _: () = assert!(std::mem::offset_of!(RawSideHeader, witness) == WITNESS_AT);
const _: () = assert!(size_of::<RawSideHeader>() == RAW_LEN);
const CRC_AT: usize = RAW_LEN - size_of::<U32>();
const BORN_UNKNOWN: u32 = u32::MAX;

impl RawSideHeader {
    /// The header that the side file of this COW file has in this page cache. It is unique, so a
    /// side file is valid if its header is equal.
    pub(crate) fn new(
        boot: BootId,
        witness: Option<CacheWitness>,
        cow: &FileStat,
        geometry: &Geometry,
    ) -> Self {
        let (born_secs, born_nanos) =
            cow.born.map_or((0, BORN_UNKNOWN), |born| (born.secs(), born.nanos()));
        let mut raw = RawSideHeader {
            magic: MAGIC,
            version: VERSION.into(),
            cow_born_nanos: born_nanos.into(),
            boot_id: boot.0,
            cow_dev: cow.id.dev.into(),
            cow_ino: cow.id.ino.into(),
            cow_born_secs: born_secs.into(),
            live_offset: BITMAP_AT.get().into(),
            virtual_size: geometry.virtual_size().into(),
            data_offset: geometry.data_offset().get().into(),
            durable_offset: geometry.bitmap_offset().get().into(),
            bitmap_len: geometry.bitmap_len().into(),
            witness: witness.map_or([0; WITNESS_LEN], CacheWitness::to_bytes),
            reserved: U32::ZERO,
            crc: U32::ZERO,
        };
        raw.crc = crc32c::crc32c(&raw.as_bytes()[..CRC_AT]).into();
        raw
    }

    /// The encoded bytes.
    pub(crate) fn bytes(&self) -> &[u8; RAW_LEN] {
        zerocopy::transmute_ref!(self)
    }

    /// The witness in an encoded header.
    pub(crate) fn witness_in(read: &[u8; RAW_LEN]) -> Option<CacheWitness> {
        let bytes = read[WITNESS_AT..].first_chunk()?;
        CacheWitness::from_bytes(*bytes)
    }

    /// A buffer for reading a header; if written, it is a header that matches no file.
    pub(crate) fn buffer() -> [u8; RAW_LEN] {
        [0; RAW_LEN]
    }
}

/// The side file's path for the COW file at `cow` (with symbolic links resolved).
pub(crate) fn path_for(cow: &Path) -> PathBuf {
    let mut path = cow.as_os_str().to_owned();
    path.push(".live");
    PathBuf::from(path)
}

/// Makes a side file permanently invalid.
pub(crate) fn make_void(side_file: &impl Storage) -> io::Result<()> {
    side_file.write_all_at(&RawSideHeader::buffer(), ByteOffset::new(0))?;
    side_file.write_durably(&RawSideHeader::buffer(), ByteOffset::new(0))
}
