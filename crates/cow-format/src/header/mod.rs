//! The headers of COW files, checked.

mod backing;
pub(crate) mod error;
mod native;
mod native_check;
mod native_raw;
mod native_state;
mod page_cache;
mod uml;
mod uml_raw;

pub use backing::{Backing, BackingFormat, NATIVE_PATH_MAX};
pub use error::{Field, HeaderError, Part};
pub use native::{HeaderWrite, NativeHeader};
pub use native_state::NativeState;
pub use page_cache::{BootId, CacheWitness, PageCache};
pub use uml::{UmlHeader, UmlVersion};

use crate::geometry::Geometry;
use crate::units::VIRTUAL_SIZE_MAX;

/// Bytes at the start of a file that hold any header; pass these, or the whole of a shorter file,
/// to [`Header::check`].
pub const HEADER_PREFIX_LEN: usize = 8192;

/// A checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Header {
    /// This project's own.
    Native(Box<NativeHeader>),
    /// User Mode Linux's.
    Uml(UmlHeader),
}

impl Header {
    /// Checks the header of a file of `file_len` bytes that begins with `prefix` (the first
    /// [`HEADER_PREFIX_LEN`] bytes, or all of a shorter file). The magic alone decides the format.
    pub fn check(prefix: &[u8], file_len: u64) -> Result<Self, HeaderError> {
        if prefix.len() < 8 {
            return Err(HeaderError::Truncated {
                part: Part::Header,
                found: prefix.len() as u64,
                expected: 8,
            });
        }
        if uml::has_magic(prefix) {
            return UmlHeader::check(prefix, file_len).map(Self::Uml);
        }
        if native_raw::has_magic(prefix) || native_raw::has_second_magic(prefix) {
            return NativeHeader::check(prefix, file_len)
                .map(|header| Self::Native(Box::new(header)));
        }
        Err(HeaderError::NotCow { found: prefix[..8].to_vec() })
    }

    /// Where bitmap and data are.
    pub fn geometry(&self) -> &Geometry {
        match self {
            Self::Native(header) => header.geometry(),
            Self::Uml(header) => header.geometry(),
        }
    }
}

/// Refuses a disk of no bytes and one above [`VIRTUAL_SIZE_MAX`].
fn check_size(field: Field, size: u64) -> Result<(), HeaderError> {
    if (1..=VIRTUAL_SIZE_MAX).contains(&size) {
        return Ok(());
    }
    let expected = format!("1 to {VIRTUAL_SIZE_MAX} bytes (256 TiB)");
    Err(HeaderError::field(field, size, expected))
}
