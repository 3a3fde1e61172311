//! The UML COW header as it is on disk (`docs/spec/format-uml.md`). Layout only.

use zerocopy::byteorder::{big_endian as be, little_endian as le};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `OOOM` read as big-endian, `MOOO` read as little-endian.
pub const MAGIC: u32 = 0x4f4f_4f4d;

/// Bytes of the path field of version 1.
pub const PATH_LEN_V1: usize = 256;
/// Bytes of the path field of versions 2 and 3.
pub const PATH_LEN: usize = 4096;

/// Version 1: packed, in the byte order of the host that wrote it. This crate reads it as
/// little-endian, as all hosts on which UML runs today are.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawV1 {
    pub magic: [u8; 4],
    pub version: [u8; 4],
    pub backing_path: [u8; PATH_LEN_V1],
    pub mtime: le::U32,
    pub size: le::U64,
    pub sectorsize: le::U32,
}

/// Version 2.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawV2 {
    pub magic: [u8; 4],
    pub version: [u8; 4],
    pub backing_path: [u8; PATH_LEN],
    pub mtime: be::U32,
    pub size: be::U64,
    pub sectorsize: be::U32,
}

/// Version 3.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawV3 {
    pub magic: [u8; 4],
    pub version: [u8; 4],
    pub mtime: be::U32,
    pub size: be::U64,
    pub sectorsize: be::U32,
    pub alignment: be::U32,
    pub cow_format: be::U32,
    pub backing_path: [u8; PATH_LEN],
}

/// Version 3 as 64-bit hosts wrote it before December 2005, with the compiler's padding.
#[derive(FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RawV3Padded {
    pub magic: [u8; 4],
    pub version: [u8; 4],
    pub mtime: be::U32,
    pub pad: [u8; 4],
    pub size: be::U64,
    pub sectorsize: be::U32,
    pub alignment: be::U32,
    pub cow_format: be::U32,
    pub backing_path: [u8; PATH_LEN],
}

// The V3 structs end with the path; the four bytes that make 4132 a multiple of 8 belong to the
// padded header too, as it was written with sizeof.
const _: () = assert!(size_of::<RawV1>() == 280);
const _: () = assert!(size_of::<RawV2>() == 4120);
const _: () = assert!(size_of::<RawV3>() == 4128);
const _: () = assert!(size_of::<RawV3Padded>() == 4132);
