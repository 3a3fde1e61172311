//! User Mode Linux's COW header, checked (`docs/spec/format-uml.md`). Versions 1 and 2 are read,
//! version 3 and its padded form are read and written.

use zerocopy::byteorder::big_endian as be;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::check_size;
use super::error::{Field, HeaderError, Part};
use super::uml_raw::{MAGIC, PATH_LEN, RawV1, RawV2, RawV3, RawV3Padded};
use crate::geometry::Geometry;
use crate::identity::{BackingIdentity, Timestamp};
use crate::units::SECTOR_SIZE;

/// The alignment that today's writers use; the bitmap then begins at 8192.
const ALIGNMENT: u32 = 4096;

/// Which of UML's headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UmlVersion {
    /// Version 1.
    V1,
    /// Version 2.
    V2,
    /// Version 3: what is written today.
    V3,
    /// Version 3 with the padding of 64-bit hosts before December 2005.
    V3Padded,
}

impl UmlVersion {
    /// The number in the header.
    pub const fn number(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
            Self::V3 | Self::V3Padded => 3,
        }
    }

    /// The shortest readable header in bytes: the bitmap begins here or later.
    const fn header_len(self) -> u64 {
        match self {
            Self::V1 => 280,
            Self::V2 => 4120,
            Self::V3 => 4128,
            Self::V3Padded => 4136,
        }
    }
}

/// A checked UML header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UmlHeader {
    version: UmlVersion,
    little_endian_magic: bool,
    backing_path: Vec<u8>,
    mtime: u32,
    alignment: u32,
    /// Not interpreted; preserved when the header is rewritten.
    cow_format: u32,
    geometry: Geometry,
}

/// The fields of all versions, before they are checked.
struct Fields<'a> {
    version: UmlVersion,
    little_endian_magic: bool,
    path_field: &'a [u8],
    mtime: u32,
    size: u64,
    sectorsize: u32,
    alignment: u32,
    cow_format: u32,
}

/// True if `prefix` begins with UML's magic in either byte order.
pub(super) fn has_magic(prefix: &[u8]) -> bool {
    prefix.starts_with(&MAGIC.to_be_bytes()) || prefix.starts_with(&MAGIC.to_le_bytes())
}

impl UmlHeader {
    /// The header of a new version 3 file, as `uml_mkcow` writes it: over the image `backing_path`
    /// of `size` bytes, modified at `mtime`.
    pub fn create(backing_path: &[u8], size: u64, mtime: Timestamp) -> Result<Self, HeaderError> {
        check_new_path(backing_path)?;
        check_size(Field::Size, size)?;
        Ok(Self {
            version: UmlVersion::V3,
            little_endian_magic: false,
            backing_path: backing_path.to_vec(),
            mtime: check_new_mtime(mtime)?,
            alignment: ALIGNMENT,
            cow_format: 0,
            geometry: geometry(UmlVersion::V3, size, ALIGNMENT)?,
        })
    }

    /// The same file over a backing file at another path or with another mtime. Layout and size
    /// stay.
    pub fn with_backing(&self, backing_path: &[u8], mtime: Timestamp) -> Result<Self, HeaderError> {
        check_new_path(backing_path)?;
        let mtime = check_new_mtime(mtime)?;
        Ok(Self { backing_path: backing_path.to_vec(), mtime, ..self.clone() })
    }

    /// See [`super::Header::check`].
    pub(super) fn check(prefix: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        let header = Self::check_fields(&Fields::read(prefix)?)?;
        let geometry = &header.geometry;
        // Checked by `geometry`: far below 2^63.
        let bitmap_end = geometry.bitmap_offset + geometry.bitmap_len;
        if file_len < bitmap_end {
            return Err(HeaderError::Truncated {
                part: Part::Bitmap,
                found: file_len,
                expected: bitmap_end,
            });
        }
        Ok(header)
    }

    fn check_fields(fields: &Fields<'_>) -> Result<Self, HeaderError> {
        if u64::from(fields.sectorsize) != SECTOR_SIZE {
            return Err(HeaderError::field(
                Field::SectorSize,
                fields.sectorsize,
                "512: UML counts 512 bytes for each bit whatever this field says, so another value leaves open \
                 which sectors the bitmap means",
            ));
        }
        if fields.alignment == 0 {
            return Err(HeaderError::field(
                Field::Alignment,
                0,
                "a number above 0 (today's writers use 4096)",
            ));
        }
        check_size(Field::Size, fields.size)?;
        let Some(end) = fields.path_field.iter().position(|&byte| byte == 0) else {
            let len = fields.path_field.len();
            return Err(HeaderError::field(
                Field::BackingPath,
                format_args!("{len} bytes without a NUL"),
                format!("a path that ends with a NUL within {len} bytes"),
            ));
        };
        if end == 0 {
            return Err(empty_path());
        }
        Ok(Self {
            version: fields.version,
            little_endian_magic: fields.little_endian_magic,
            backing_path: fields.path_field[..end].to_vec(),
            mtime: fields.mtime,
            alignment: fields.alignment,
            cow_format: fields.cow_format,
            geometry: geometry(fields.version, fields.size, fields.alignment)?,
        })
    }

    /// Which header it is.
    pub const fn version(&self) -> UmlVersion {
        self.version
    }

    /// True if the file may only be read: versions 1 and 2, whose writers are gone and whose bitmap
    /// UML itself destroys.
    pub const fn is_read_only(&self) -> bool {
        matches!(self.version, UmlVersion::V1 | UmlVersion::V2)
    }

    /// Where bitmap and data are.
    pub const fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The path of the backing file, as bytes without the NUL; never empty.
    pub fn backing_path(&self) -> &[u8] {
        &self.backing_path
    }

    /// What the backing file must be: of the disk's size and of this mtime.
    pub const fn backing_identity(&self) -> BackingIdentity {
        BackingIdentity::ImageSeconds { size: self.geometry.virtual_size, mtime_secs: self.mtime }
    }

    /// The bytes to write at offset 0: 4128, or 4136 for a padded header. Nothing else in the file
    /// changes.
    pub fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        let (magic, version) = if self.little_endian_magic {
            (MAGIC.to_le_bytes(), 3u32.to_le_bytes())
        } else {
            (MAGIC.to_be_bytes(), 3u32.to_be_bytes())
        };
        let (mtime, size) = (be::U32::new(self.mtime), be::U64::new(self.geometry.virtual_size));
        let (sectorsize, alignment) = (be::U32::new(512), be::U32::new(self.alignment));
        let cow_format = be::U32::new(self.cow_format);
        let mut backing_path = [0; PATH_LEN];
        // Checked when the header was made: shorter than the field.
        backing_path[..self.backing_path.len()].copy_from_slice(&self.backing_path);
        match self.version {
            UmlVersion::V1 | UmlVersion::V2 => {
                Err(HeaderError::ReadOnlyVersion { version: self.version.number() })
            }
            UmlVersion::V3 => {
                let raw = RawV3 {
                    magic,
                    version,
                    mtime,
                    size,
                    sectorsize,
                    alignment,
                    cow_format,
                    backing_path,
                };
                Ok(raw.as_bytes().to_vec())
            }
            UmlVersion::V3Padded => {
                let mut raw = RawV3Padded::new_zeroed();
                (raw.magic, raw.version, raw.mtime, raw.size) = (magic, version, mtime, size);
                (raw.sectorsize, raw.alignment, raw.cow_format) =
                    (sectorsize, alignment, cow_format);
                raw.backing_path = backing_path;
                let mut bytes = raw.as_bytes().to_vec();
                bytes.resize(4136, 0);
                Ok(bytes)
            }
        }
    }
}

impl<'a> Fields<'a> {
    fn read(prefix: &'a [u8]) -> Result<Self, HeaderError> {
        let short = |expected| HeaderError::Truncated {
            part: Part::Header,
            found: prefix.len() as u64,
            expected,
        };
        let (Some(magic), Some(number)) =
            (prefix.first_chunk::<4>(), prefix[4..].first_chunk::<4>())
        else {
            return Err(short(8));
        };
        let little_endian_magic = *magic == MAGIC.to_le_bytes();
        let number = if little_endian_magic {
            u32::from_le_bytes(*number)
        } else {
            u32::from_be_bytes(*number)
        };
        let version = match number {
            1 => UmlVersion::V1,
            2 => UmlVersion::V2,
            // The padded header's path begins 4 bytes later, so here it has its (zero) cow_format.
            3 if prefix.get(32..36) == Some(&[0; 4]) => UmlVersion::V3Padded,
            3 => UmlVersion::V3,
            found => return Err(HeaderError::field(Field::Version, found, "1, 2 or 3")),
        };
        if (prefix.len() as u64) < version.header_len() {
            return Err(short(version.header_len()));
        }
        // Versions 1 and 2 have neither alignment nor cow_format.
        macro_rules! fields {
            ($raw:ty, |$header:ident| $alignment:expr, $cow_format:expr) => {
                <$raw>::ref_from_prefix(prefix).ok().map(|($header, _)| Self {
                    version,
                    little_endian_magic,
                    path_field: &$header.backing_path,
                    mtime: $header.mtime.get(),
                    size: $header.size.get(),
                    sectorsize: $header.sectorsize.get(),
                    alignment: $alignment,
                    cow_format: $cow_format,
                })
            };
        }
        let fields = match version {
            UmlVersion::V1 => fields!(RawV1, |raw| 512, 0),
            UmlVersion::V2 => fields!(RawV2, |raw| 512, 0),
            UmlVersion::V3 => fields!(RawV3, |raw| raw.alignment.get(), raw.cow_format.get()),
            UmlVersion::V3Padded => {
                let fields = fields!(RawV3Padded, |raw| raw.alignment.get(), raw.cow_format.get());
                // A plain header with an empty path looks padded as well; its sector size stands 4
                // bytes earlier.
                let plain =
                    RawV3::ref_from_prefix(prefix).ok().map(|(raw, _)| raw.sectorsize.get());
                if plain == Some(512)
                    && fields.as_ref().is_some_and(|fields| fields.sectorsize != 512)
                {
                    return Err(empty_path());
                }
                fields
            }
        };
        fields.ok_or_else(|| short(version.header_len()))
    }
}

fn empty_path() -> HeaderError {
    HeaderError::field(Field::BackingPath, "an empty path", "the path of the backing file")
}

fn check_new_path(path: &[u8]) -> Result<(), HeaderError> {
    if path.is_empty() {
        return Err(empty_path());
    }
    if path.len() >= PATH_LEN || path.contains(&0) {
        return Err(HeaderError::field(
            Field::BackingPath,
            format_args!("a path of {} bytes", path.len()),
            format!("at most {} bytes without a NUL", PATH_LEN - 1),
        ));
    }
    Ok(())
}

fn check_new_mtime(mtime: Timestamp) -> Result<u32, HeaderError> {
    let found = || format!("{mtime}");
    u32::try_from(mtime.secs()).map_err(|_| {
        HeaderError::field(
            Field::Mtime,
            found(),
            "a time that fits 32 bits (1970 to 2106); the native format has no such limit",
        )
    })
}

/// The layout rules of `docs/spec/format-uml.md`. `alignment` is not 0 and `size` is checked.
fn geometry(version: UmlVersion, size: u64, alignment: u32) -> Result<Geometry, HeaderError> {
    let alignment = u64::from(alignment);
    let places = match version {
        // These round the bitmap's length down: the last sectors can be without a bit.
        UmlVersion::V1 | UmlVersion::V2 => size
            .checked_add(SECTOR_SIZE - 1)
            .map(|size| (version.header_len(), size / (8 * SECTOR_SIZE))),
        UmlVersion::V3 | UmlVersion::V3Padded => version
            .header_len()
            .checked_next_multiple_of(alignment)
            .map(|offset| (offset, size.div_ceil(SECTOR_SIZE).div_ceil(8))),
    };
    places
        .and_then(|(bitmap_offset, bitmap_len)| {
            let data_offset =
                bitmap_offset.checked_add(bitmap_len)?.checked_next_multiple_of(alignment)?;
            let end = data_offset.checked_add(size.checked_next_multiple_of(SECTOR_SIZE)?)?;
            i64::try_from(end).ok()?;
            Some(Geometry {
                virtual_size: size,
                bitmap_offset,
                bitmap_len,
                live_bitmap_offset: None,
                data_offset,
            })
        })
        .ok_or_else(|| {
            HeaderError::field(Field::DataOffset, "2^63 or more", "a file that ends below 2^63")
        })
}
