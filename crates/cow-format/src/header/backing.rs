//! The native header's reference to a backing file (`docs/spec/format-native.md` section 5).

use uuid::Uuid;

use super::error::{Field, HeaderError};
use super::native_raw::{
    PATH_LEN, RawBacking, RawWitness, digest, format, identity, inode, sample,
};
use crate::identity::{BackingIdentity, Inode, Timestamp, Witness};
use crate::sample::Sample;

/// The longest backing path of a native header, in bytes.
pub const NATIVE_PATH_MAX: usize = PATH_LEN;

/// The format of a backing file. Always given, never guessed: a guest can write any magic into a
/// raw image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// A raw image.
    Raw,
    /// A UML COW file.
    Uml,
    /// A native COW file.
    Native,
    /// A qcow2 image.
    Qcow2,
}

impl BackingFormat {
    fn from_code(code: u32) -> Option<Self> {
        match code {
            format::RAW => Some(Self::Raw),
            format::UML => Some(Self::Uml),
            format::NATIVE => Some(Self::Native),
            format::QCOW2 => Some(Self::Qcow2),
            _ => None,
        }
    }

    const fn code(self) -> u32 {
        match self {
            Self::Raw => format::RAW,
            Self::Uml => format::UML,
            Self::Native => format::NATIVE,
            Self::Qcow2 => format::QCOW2,
        }
    }
}

impl std::fmt::Display for BackingFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Uml => "uml",
            Self::Native => "native",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// A reference to a backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    path: Vec<u8>,
    format: BackingFormat,
    identity: BackingIdentity,
    digest: Option<[u8; 32]>,
}

impl Backing {
    /// A reference by `path` (absolute, or relative to the directory of the file that holds it; 1
    /// to [`NATIVE_PATH_MAX`] bytes). A native file is identified as a layer, all others as an
    /// image. `digest`: BLAKE3 of the file's whole content.
    pub fn new(
        path: &[u8],
        format: BackingFormat,
        identity: BackingIdentity,
        digest: Option<[u8; 32]>,
    ) -> Result<Self, HeaderError> {
        if path.is_empty() || path.len() > NATIVE_PATH_MAX || path.contains(&0) {
            let found = format!(
                "{} bytes{}",
                path.len(),
                if path.contains(&0) { " with a NUL" } else { "" }
            );
            return Err(HeaderError::field(
                Field::BackingPath,
                found,
                format!(
                    "1 to {NATIVE_PATH_MAX} bytes without a NUL; a relative path may be shorter"
                ),
            ));
        }
        let fits = match identity {
            BackingIdentity::ImageSeconds { .. } => false,
            BackingIdentity::Image { .. } => format != BackingFormat::Native,
            BackingIdentity::Layer { .. } => format == BackingFormat::Native,
        };
        if !fits {
            return Err(HeaderError::field(
                Field::BackingIdentity,
                format_args!("{identity:?} for format {format}"),
                "UUID and content generation for a native file, size and mtime for any other",
            ));
        }
        Ok(Self { path: path.to_vec(), format, identity, digest })
    }

    /// The same file with another identity.
    pub fn with_identity(&self, identity: BackingIdentity) -> Result<Self, HeaderError> {
        Self::new(&self.path, self.format, identity, self.digest)
    }

    /// The path, as bytes; never empty.
    pub fn path(&self) -> &[u8] {
        &self.path
    }

    /// What the file is.
    pub const fn format(&self) -> BackingFormat {
        self.format
    }

    /// How it is identified.
    pub const fn identity(&self) -> &BackingIdentity {
        &self.identity
    }

    /// BLAKE3 of its whole content, if it was recorded.
    pub const fn digest(&self) -> Option<&[u8; 32]> {
        self.digest.as_ref()
    }

    pub(super) fn check(
        raw: &RawBacking,
        witness: &RawWitness,
        path_field: &[u8],
    ) -> Result<Option<Self>, HeaderError> {
        let path_len = raw.path_len.get();
        if raw.format.get() == format::NONE {
            if path_len != 0 {
                return Err(HeaderError::field(
                    Field::BackingPath,
                    path_len,
                    "length 0 without a backing format",
                ));
            }
            return Ok(None);
        }
        let Some(format) = BackingFormat::from_code(raw.format.get()) else {
            return Err(HeaderError::field(Field::BackingFormat, raw.format.get(), "0 to 4"));
        };
        let Some(path) = usize::try_from(path_len).ok().and_then(|len| path_field.get(..len))
        else {
            let expected = format!("a length of at most {NATIVE_PATH_MAX}");
            return Err(HeaderError::field(Field::BackingPath, path_len, expected));
        };
        let digest = match raw.digest_kind.get() {
            digest::NONE => None,
            digest::BLAKE3 => Some(raw.digest),
            found => {
                return Err(HeaderError::field(
                    Field::BackingDigest,
                    found,
                    "0 (none) or 1 (BLAKE3)",
                ));
            }
        };
        Self::new(path, format, check_identity(raw, witness)?, digest).map(Some)
    }

    pub(super) fn encode(
        &self,
        raw: &mut RawBacking,
        raw_witness: &mut RawWitness,
        path_field: &mut [u8; PATH_LEN],
    ) {
        raw.format = self.format.code().into();
        // `new` has checked the length against the field's.
        raw.path_len = u32::try_from(self.path.len()).unwrap_or(0).into();
        path_field[..self.path.len()].copy_from_slice(&self.path);
        match self.identity {
            // `new` never makes one.
            BackingIdentity::ImageSeconds { .. } => {}
            BackingIdentity::Image { size, mtime, witness } => {
                raw.identity_kind = identity::IMAGE.into();
                raw.size = size.into();
                raw.mtime_secs = mtime.secs().into();
                raw.mtime_nanos = mtime.nanos().into();
                encode_witness(&witness, raw_witness);
            }
            BackingIdentity::Layer { uuid, content_generation } => {
                raw.identity_kind = identity::LAYER.into();
                raw.uuid = uuid.into_bytes();
                raw.content_generation = content_generation.into();
            }
        }
        if let Some(digest) = self.digest {
            raw.digest_kind = digest::BLAKE3.into();
            raw.digest = digest;
        }
    }
}

fn check_identity(raw: &RawBacking, witness: &RawWitness) -> Result<BackingIdentity, HeaderError> {
    match raw.identity_kind.get() {
        identity::IMAGE => {
            let mtime = check_time(raw.mtime_secs.get(), raw.mtime_nanos.get())?;
            let witness = check_witness(witness)?;
            Ok(BackingIdentity::Image { size: raw.size.get(), mtime, witness })
        }
        identity::LAYER => Ok(BackingIdentity::Layer {
            uuid: Uuid::from_bytes(raw.uuid),
            content_generation: raw.content_generation.get(),
        }),
        found => Err(HeaderError::field(Field::BackingIdentity, found, "1 (image) or 2 (layer)")),
    }
}

fn check_time(secs: i64, nanos: u32) -> Result<Timestamp, HeaderError> {
    Timestamp::new(secs, nanos).ok_or_else(|| {
        HeaderError::field(Field::Mtime, format_args!("{nanos} ns"), "below 1000000000 ns")
    })
}

/// An unknown kind comes from a later program and may be ignored, as the whole witness may.
fn check_witness(raw: &RawWitness) -> Result<Witness, HeaderError> {
    let inode = match raw.inode_kind.get() {
        inode::NUMBER_AND_BIRTH => {
            let born = check_time(raw.born_secs.get(), raw.born_nanos.get())?;
            Some(Inode { number: raw.inode.get(), born })
        }
        _ => None,
    };
    let known = raw.sample_kind.get() == sample::BLOCKS;
    Ok(Witness { inode, sample: known.then(|| Sample::from_bytes(raw.sample)) })
}

fn encode_witness(witness: &Witness, raw: &mut RawWitness) {
    if let Some(known) = witness.inode {
        raw.inode_kind = inode::NUMBER_AND_BIRTH.into();
        raw.inode = known.number.into();
        raw.born_secs = known.born.secs().into();
        raw.born_nanos = known.born.nanos().into();
    }
    if let Some(known) = witness.sample {
        raw.sample_kind = sample::BLOCKS.into();
        raw.sample = known.to_bytes();
    }
}
