//! The header of a qcow2 image: what it names, read without opening any of it. It is also checked
//! before the library gets the image, which allocates what a header asks for.
//!
//! Offsets and limits are those of QEMU, docs/interop/qcow2.txt.

use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use block_io::storage::Storage;
use cow_format::{ByteOffset, VIRTUAL_SIZE_MAX};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a header of version 2, which ends before the features.
const V2_LEN: usize = 72;
/// Bytes of a header of version 3 at least.
const V3_LEN: usize = 104;
/// Header, extensions and names are in the first cluster.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// QEMU takes no L1 table of more than 32 MiB.
const L1_ENTRIES_MAX: u64 = (32 << 20) / 8;
const BACKING_NAME_MAX: u32 = 1023;
/// An entry of the feature name table; the library expects whole ones.
const FEATURE_NAME_LEN: usize = 48;

const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// The entries of L2 tables have 16 bytes instead of 8.
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_DATA_FILE: u32 = 0x4441_5441;

#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U32,
    backing_name_offset: U64,
    backing_name_len: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_entries: U32,
    l1_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    snapshots: U32,
    snapshots_offset: U64,
    /// Of version 3, like all that follows.
    incompatible: U64,
    compatible: U64,
    autoclear: U64,
    refcount_order: U32,
    header_len: U32,
}

const _: () = assert!(size_of::<RawHeader>() == V3_LEN);

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// The size of the disk in bytes.
    pub virtual_size: u64,
    /// The clusters are encrypted.
    pub encrypted: bool,
    /// The image below.
    pub backing: Option<Backing>,
    /// The clusters are in another file.
    pub data_file: Option<DataFile>,
}

/// The image that an image is based on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// As it is in the header.
    pub name: PathBuf,
    /// Its format, if the header has it.
    pub format: Option<String>,
}

/// An external data file; the header need not name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile(pub Option<PathBuf>);

/// Why a header cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2HeaderError {
    /// It could not be read.
    #[error("cannot read the header: {0}")]
    Io(#[from] io::Error),
    /// It does not begin with the magic.
    #[error("not a qcow2 image: it does not begin with QFI\\xfb")]
    NotQcow2,
    /// A field has an invalid value.
    #[error("{what} at byte {at} of the header: found {found}, expected {expected}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// Where it is in the file.
        at: u64,
        /// What is there.
        found: u64,
        /// What should be.
        expected: String,
    },
}

fn invalid(
    what: &'static str,
    at: usize,
    found: impl Into<u64>,
    expected: impl ToString,
) -> Qcow2HeaderError {
    let (at, found) = (at as u64, found.into());
    Qcow2HeaderError::Invalid { what, at, found, expected: expected.to_string() }
}

impl Qcow2Header {
    /// Reads the header of `file`; nothing else of it, and no other file.
    pub fn read(file: &impl Storage) -> Result<Self, Qcow2HeaderError> {
        let mut fixed = [0; V3_LEN];
        file.read_zero_filled(&mut fixed, ByteOffset::new(0))?;
        let cluster_len = cluster_len(&fixed)?;
        let mut cluster = vec![0; cluster_len];
        file.read_zero_filled(&mut cluster, ByteOffset::new(0))?;
        Self::check(&cluster)
    }

    /// Checks the header at the start of an image's first `cluster`.
    fn check(cluster: &[u8]) -> Result<Self, Qcow2HeaderError> {
        let Ok((raw, _)) = RawHeader::ref_from_prefix(cluster) else {
            return Err(Qcow2HeaderError::NotQcow2);
        };
        let (version, size) = (raw.version.get(), raw.size.get());
        let header_len = match (version, raw.header_len.get()) {
            (2, _) => V2_LEN,
            (3, len) => usize::try_from(len)
                .ok()
                .filter(|len| (V3_LEN..=cluster.len()).contains(len))
                .ok_or_else(|| {
                    let expected = format!("{V3_LEN} to {}, a cluster", cluster.len());
                    invalid("header length", 100, len, expected)
                })?,
            (other, _) => return Err(invalid("version", 4, other, "2 or 3")),
        };
        if size > VIRTUAL_SIZE_MAX {
            let expected = format!("at most {VIRTUAL_SIZE_MAX} bytes (256 TiB)");
            return Err(invalid("size of the disk", 24, size, expected));
        }
        let incompatible = if version == 2 { 0 } else { raw.incompatible.get() };
        let cluster_len = cluster.len() as u64;
        let l2_entry_len = if incompatible & INCOMPATIBLE_EXTENDED_L2 != 0 { 16 } else { 8 };
        // What an entry of the L1 table, one L2 table, covers. QEMU refuses fewer entries as well;
        // the library would go through the rest of the disk in steps of this.
        let span = cluster_len * (cluster_len / l2_entry_len);
        let l1_entries = size.div_ceil(span)..=L1_ENTRIES_MAX;
        if !l1_entries.contains(&raw.l1_entries.get().into()) {
            let expected = format!("{} to {}", l1_entries.start(), l1_entries.end());
            return Err(invalid("entries of the L1 table", 36, raw.l1_entries.get(), expected));
        }
        let name = raw.backing_name(cluster)?;
        // QEMU lets the extensions of version 2 end where the name begins.
        let extensions = match (version, &name) {
            (2, Some(name)) => header_len..name.start.max(header_len),
            _ => header_len..cluster.len(),
        };
        let found = Extensions::check(cluster, extensions)?;
        let external = incompatible & INCOMPATIBLE_DATA_FILE != 0;
        Ok(Qcow2Header {
            virtual_size: size,
            encrypted: raw.crypt_method.get() != 0,
            backing: name.map(|name| Backing {
                name: path(&cluster[name]),
                format: found.backing_format.map(|name| String::from_utf8_lossy(name).into_owned()),
            }),
            data_file: external.then(|| DataFile(found.data_file.map(path))),
        })
    }
}

/// Bytes of a cluster, from the first bytes of an image.
fn cluster_len(fixed: &[u8; V3_LEN]) -> Result<usize, Qcow2HeaderError> {
    let raw = RawHeader::read_from_bytes(fixed).map_err(|_| Qcow2HeaderError::NotQcow2)?;
    let bits = raw.cluster_bits.get();
    match raw.magic == MAGIC {
        false => Err(Qcow2HeaderError::NotQcow2),
        true if CLUSTER_BITS.contains(&bits) => Ok(1 << bits),
        true => Err(invalid("cluster bits", 20, bits, "9 to 21")),
    }
}

impl RawHeader {
    /// Where the name of the backing file is, if there is one.
    fn backing_name(&self, cluster: &[u8]) -> Result<Option<Range<usize>>, Qcow2HeaderError> {
        let (start, len) = (self.backing_name_offset.get(), self.backing_name_len.get());
        if start == 0 {
            return Ok(None);
        }
        if len > BACKING_NAME_MAX {
            let expected = format!("at most {BACKING_NAME_MAX} bytes");
            return Err(invalid("length of the backing file's name", 16, len, expected));
        }
        let outside =
            || invalid("place of the backing file's name", 8, start, "inside the first cluster");
        let start = usize::try_from(start).map_err(|_| outside())?;
        let len = usize::try_from(len).map_err(|_| outside())?;
        let end = start.checked_add(len).filter(|end| *end <= cluster.len());
        Ok(Some(start..end.ok_or_else(outside)?))
    }
}

/// The extensions of a header that matter here.
#[derive(Default)]
struct Extensions<'a> {
    backing_format: Option<&'a [u8]>,
    data_file: Option<&'a [u8]>,
}

impl<'a> Extensions<'a> {
    fn check(cluster: &'a [u8], range: Range<usize>) -> Result<Self, Qcow2HeaderError> {
        let mut found = Extensions::default();
        let mut at = range.start;
        while let Some([kind, len]) = cluster.get(at..range.end).and_then(words) {
            if kind == EXT_END {
                break;
            }
            let data = at + 8;
            let inside = usize::try_from(len).ok().and_then(|len| data.checked_add(len));
            let Some(end) = inside.filter(|end| *end <= range.end) else {
                let expected = format!("at most {} bytes", range.end - data);
                return Err(invalid("length of a header extension", at + 4, len, expected));
            };
            let content = &cluster[data..end];
            match kind {
                EXT_BACKING_FORMAT => found.backing_format = Some(content),
                EXT_DATA_FILE => found.data_file = Some(content),
                EXT_FEATURE_NAMES if !content.len().is_multiple_of(FEATURE_NAME_LEN) => {
                    let expected = format!("a multiple of {FEATURE_NAME_LEN} bytes");
                    return Err(invalid("length of the feature names", at + 4, len, expected));
                }
                _ => {}
            }
            at = end.next_multiple_of(8);
        }
        Ok(found)
    }
}

/// The first two numbers of `bytes`.
fn words(bytes: &[u8]) -> Option<[u32; 2]> {
    let (words, _) = <[U32; 2]>::ref_from_prefix(bytes).ok()?;
    Some(words.map(U32::get))
}

fn path(name: &[u8]) -> PathBuf {
    OsStr::from_bytes(name).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cluster of 512 bytes with a header of version 3 and these extensions.
    fn image(extensions: &[(u32, &[u8])]) -> Vec<u8> {
        let mut cluster = vec![0; 512];
        let mut put =
            |at: usize, bytes: &[u8]| cluster[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"QFI\xfb\0\0\0\x03");
        put(20, &[0, 0, 0, 9]);
        put(24, &(1u64 << 30).to_be_bytes());
        // Each covers 64 clusters.
        put(36, &(1u32 << 15).to_be_bytes());
        put(100, &[0, 0, 0, 104]);
        let mut at = 104;
        for (kind, data) in extensions {
            put(at, &kind.to_be_bytes());
            put(at + 4, &u32::try_from(data.len()).unwrap().to_be_bytes());
            put(at + 8, data);
            at = (at + 8 + data.len()).next_multiple_of(8);
        }
        cluster
    }

    fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut image = image(&[(EXT_BACKING_FORMAT, b"raw")]);
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    }

    #[test]
    fn what_it_names_is_found() {
        let mut image = image(&[(EXT_BACKING_FORMAT, b"raw"), (EXT_DATA_FILE, b"/etc/\xff")]);
        let plain = Qcow2Header::check(&image).unwrap();
        assert_eq!((plain.virtual_size, plain.encrypted), (1 << 30, false));
        assert_eq!((&plain.backing, &plain.data_file), (&None, &None));
        image[79] = 4;
        image[8..20].copy_from_slice(&[0, 0, 0, 0, 0, 0, 1, 0x80, 0, 0, 0, 5]);
        image[0x180..0x185].copy_from_slice(b"../ab");
        let found = Qcow2Header::check(&image).unwrap();
        let backing = Backing { name: "../ab".into(), format: Some("raw".into()) };
        assert_eq!(found.backing, Some(backing));
        assert_eq!(found.data_file, Some(DataFile(Some(path(b"/etc/\xff")))));
        // Version 2: the extensions begin earlier, and end where the name begins.
        image[7] = 2;
        image[72..80].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 5]);
        image[80..85].copy_from_slice(b"qcow2");
        let found = Qcow2Header::check(&image).unwrap();
        assert_eq!(found.backing.unwrap().format.unwrap(), "qcow2");
        assert_eq!(found.data_file, None);
    }

    #[test]
    fn what_would_harm_is_refused() {
        assert!(Qcow2Header::check(&with(511, &[1])).is_ok());
        for (word, image) in [
            ("version", with(7, &[4])),
            ("header length", with(103, &[103])),
            ("header length", with(102, &[2])),
            ("size of the disk", with(24, &[0xff; 8])),
            ("L1 table", with(36, &[0, 0x40, 0, 1])),
            ("L1 table", with(36, &[0, 0, 0x7f, 0xff])),
            ("L1 table", with(79, &[16])),
            ("place", with(8, &[0xff; 8])),
            ("place", with(14, &[1, 0xff, 0, 0, 0, 2])),
            ("length of the backing", with(15, &[200, 0, 0, 4, 0])),
            ("extension", with(108, &[0xff; 4])),
            ("extension", with(108, &[0, 0, 1, 0x91])),
            ("feature names", image(&[(EXT_FEATURE_NAMES, &[0; 49])])),
        ] {
            let refused = Qcow2Header::check(&image).unwrap_err().to_string();
            assert!(refused.contains(word), "{word}: {refused}");
        }
        let mut fixed = *image(&[]).first_chunk().unwrap();
        assert_eq!(cluster_len(&fixed).unwrap(), 512);
        fixed[23] = 22;
        assert!(matches!(cluster_len(&fixed), Err(Qcow2HeaderError::Invalid { at: 20, .. })));
        fixed[0] = 0;
        assert!(matches!(cluster_len(&fixed), Err(Qcow2HeaderError::NotQcow2)));
    }
}
