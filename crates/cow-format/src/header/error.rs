//! Why a header is refused.

use std::fmt;

/// A header that cannot be used. The caller adds the file's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The file does not begin with a known magic.
    #[error(
        "not a COW file: magic is {}, expected OOOM or MOOO (UML) or 89 43 4f 57 0d 0a 1a 0a (native)",
        Hex(found)
    )]
    NotCow {
        /// The first bytes of the file, up to 8.
        found: Vec<u8>,
    },
    /// The file ends too early.
    #[error("truncated: {part} needs a file of at least {expected} bytes, found {found}")]
    Truncated {
        /// What lies past the end.
        part: Part,
        /// The length of the file in bytes.
        found: u64,
        /// The least length in bytes that holds the part.
        expected: u64,
    },
    /// A field has an invalid value.
    #[error("header field `{field}`: found {found}, expected {expected}")]
    Field {
        /// The field.
        field: Field,
        /// Its content, as text.
        found: String,
        /// What it may hold, and what can be done.
        expected: String,
    },
    /// Neither copy of a native header can be used.
    #[error("both copies of the header are broken: at 0: {first}; at 4096: {second}")]
    BothCopies {
        /// What is wrong with the copy at 0.
        first: Box<HeaderError>,
        /// What is wrong with the copy at 4096.
        second: Box<HeaderError>,
    },
    /// The header is of a version that is read but never written.
    #[error(
        "UML COW version {version} cannot be written: found {version}, expected 3; open it read-only or merge it"
    )]
    ReadOnlyVersion {
        /// 1 or 2.
        version: u32,
    },
}

impl HeaderError {
    pub(crate) fn field(
        field: Field,
        found: impl fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Field { field, found: found.to_string(), expected: expected.into() }
    }
}

/// A part of a COW file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Part {
    /// The header.
    Header,
    /// The (durable) bitmap.
    Bitmap,
    /// The live bitmap.
    LiveBitmap,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "the header",
            Self::Bitmap => "the bitmap",
            Self::LiveBitmap => "the live bitmap",
        })
    }
}

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// A field of a header, by the name that the specifications use.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Field { $($(#[$doc])* $name,)* }

        impl fmt::Display for Field {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$name => $text,)* })
            }
        }
    };
}

fields! {
    /// Format version.
    Version => "version",
    /// Native: length of a copy of the header.
    HeaderLen => "header_len",
    /// Native: checksum of a copy of the header.
    Crc32c => "crc32c",
    /// Native: clean, in use or frozen.
    State => "state",
    /// Native: counts the headers written.
    Generation => "generation",
    /// Native: counts the times that the file was opened for writing.
    ContentGeneration => "content_generation",
    /// Native: feature bits that a reader must know.
    Incompatible => "incompatible",
    /// Path of the backing file.
    BackingPath => "backing path",
    /// Modification time of the backing file.
    Mtime => "mtime",
    /// Native: what the backing file is.
    BackingFormat => "backing format",
    /// Native: how the backing file is identified.
    BackingIdentity => "backing identity",
    /// Native: the kind of digest of the backing file.
    BackingDigest => "backing digest",
    /// UML: size of the virtual disk.
    Size => "size",
    /// Native: size of the virtual disk.
    VirtualSize => "virtual_size",
    /// UML: bytes for each bit.
    SectorSize => "sectorsize",
    /// UML: alignment of bitmap and data.
    Alignment => "alignment",
    /// Native: place of the durable bitmap.
    BitmapOffset => "bitmap_offset",
    /// Native: place of the live bitmap.
    LiveBitmapOffset => "live_bitmap_offset",
    /// Native: room for each bitmap.
    BitmapCapacity => "bitmap_capacity",
    /// Native: place of the journal.
    JournalOffset => "journal_offset",
    /// Native: room for the journal.
    JournalLen => "journal_len",
    /// Native: which records of the journal count.
    JournalEpoch => "journal_epoch",
    /// Place of the data.
    DataOffset => "data_offset",
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}
