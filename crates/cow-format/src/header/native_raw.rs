//! The native header as it is on disk (`docs/spec/format-native.md` section 2). Layout only.

use zerocopy::byteorder::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Not valid in any text encoding, and damaged by every conversion of line ends.
pub const MAGIC: [u8; 8] = *b"\x89COW\r\n\x1a\n";

/// True if `prefix` begins with the native magic.
pub fn has_magic(prefix: &[u8]) -> bool {
    prefix.starts_with(&MAGIC)
}

/// True if the second copy has the native magic, which decides if the first is broken.
pub fn has_second_magic(prefix: &[u8]) -> bool {
    prefix.get(COPY_LEN..).is_some_and(has_magic)
}

/// The version that this crate reads and writes.
pub const VERSION: u32 = 1;

/// Bytes of a copy of the header. There are two, at 0 and at 4096.
pub const COPY_LEN: usize = HEADER_LEN as usize;
/// The same, as the field `header_len` has it.
pub const HEADER_LEN: u32 = 4096;

/// Compatible: the live bitmap of this clean file has no bit that the durable one lacks.
pub const LIVE_SETTLED: u64 = 1;

/// Incompatible: the journal of the epoch in the header may hold flushed sectors that are not in
/// place.
pub const JOURNAL: u64 = 1;

/// Bytes of the path field: what the fixed fields leave of a copy, so that a copy is one block of
/// the file system.
pub const PATH_LEN: usize = 3584;

/// One copy of the header.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    // These fields, up to `crc32c`, are the same in every version.
    pub magic: [u8; 8],
    pub version: U32,
    pub header_len: U32,
    pub crc32c: U32,
    pub state: U32,
    pub generation: U64,
    pub incompatible: U64,
    pub compatible: U64,
    pub virtual_size: U64,
    pub bitmap_offset: U64,
    pub live_bitmap_offset: U64,
    pub bitmap_capacity: U64,
    pub data_offset: U64,
    pub content_generation: U64,
    pub uuid: [u8; 16],
    pub live_boot_id: [u8; 16],
    pub backing: RawBacking,
    pub journal_offset: U64,
    pub journal_len: U64,
    pub journal_epoch: [u8; 16],
    pub live_witness: RawCacheWitness,
    pub reserved: [u8; 112],
    pub witness: RawWitness,
    pub reserved2: [u8; 64],
    pub backing_path: [u8; PATH_LEN],
}

/// The reference to the backing file; all zero without one.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawBacking {
    pub format: U32,
    pub path_len: U32,
    pub identity_kind: U32,
    pub digest_kind: U32,
    pub size: U64,
    pub mtime_secs: I64,
    pub mtime_nanos: U32,
    pub reserved: [u8; 4],
    pub uuid: [u8; 16],
    pub content_generation: U64,
    pub digest: [u8; 32],
}

/// What distinguishes the backing file from another of the same size and mtime; all zero if nothing
/// is known.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawWitness {
    pub sample_kind: U32,
    pub inode_kind: U32,
    pub inode: U64,
    pub born_secs: I64,
    pub born_nanos: U32,
    pub reserved: [u8; 4],
    pub sample: [u8; 32],
}

/// The lifetime, within the boot, of the page cache that holds the live bitmap; all zero if it is
/// unknown.
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawCacheWitness {
    pub kind: U32,
    pub reserved: [u8; 4],
    pub id: U64,
}

/// Values of `live_witness.kind`; 0 is no witness.
pub mod cache_witness {
    pub const MEMORY: u32 = 1;
    pub const SUPERBLOCK: u32 = 2;
    pub const MOUNT: u32 = 3;
}

/// Values of `state`.
pub mod state {
    pub const CLEAN: u32 = 0;
    pub const IN_USE: u32 = 1;
    pub const FROZEN: u32 = 2;
}

/// Values of `backing.format`; 0 is no backing file.
pub mod format {
    pub const NONE: u32 = 0;
    pub const RAW: u32 = 1;
    pub const UML: u32 = 2;
    pub const NATIVE: u32 = 3;
    pub const QCOW2: u32 = 4;
}

/// Values of `backing.identity_kind`; 0 is no backing file.
pub mod identity {
    pub const IMAGE: u32 = 1;
    pub const LAYER: u32 = 2;
}

/// Values of `backing.digest_kind`.
pub mod digest {
    pub const NONE: u32 = 0;
    pub const BLAKE3: u32 = 1;
}

/// Values of `witness.sample_kind`; 0, and whatever is not known, counts as absent.
pub mod sample {
    pub const BLOCKS: u32 = 1;
}

/// Values of `witness.inode_kind`; 0, and whatever is not known, counts as absent.
pub mod inode {
    pub const NUMBER_AND_BIRTH: u32 = 1;
}

const _: () = assert!(size_of::<RawBacking>() == 96);
const _: () = assert!(size_of::<RawWitness>() == 64);
const _: () = assert!(std::mem::offset_of!(RawHeader, witness) == 384);
const _: () = assert!(size_of::<RawHeader>() == COPY_LEN);
const _: () = assert!(std::mem::offset_of!(RawHeader, crc32c) == 16);
const _: () = assert!(std::mem::offset_of!(RawHeader, backing) == 128);
const _: () = assert!(size_of::<RawCacheWitness>() == 16);
const _: () = assert!(std::mem::offset_of!(RawHeader, live_witness) == 256);
const _: () = assert!(std::mem::offset_of!(RawHeader, backing_path) == 512);
