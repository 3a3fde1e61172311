//! Changing a COW file as a whole, without the files below it: it is locked, and brought to its
//! durable state.

use std::path::{Path, PathBuf};

use cow_format::header::NativeHeader;
use cow_format::{Bitmap, Header};

use super::bitmap::source::BitmapSource;
use super::chain::Opener;
use super::opened::Opened;
use super::trust::recover;
use super::write::header_io::settle;
use super::{DiskOptions, ImageError};
use crate::shown::Shown;
use crate::storage::{Env, Storage};

/// A change that was not made. Unless the error says otherwise, the file is unchanged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// A file could not be opened, written or made.
    #[error(transparent)]
    Open(#[from] ImageError),
    /// Not a valid disk size.
    #[error("{}: size {size} is not a positive multiple of 512", path.shown())]
    Size {
        /// The file.
        path: PathBuf,
        /// The size in bytes.
        size: u64,
    },
    /// The disk would become smaller, which the caller has not allowed.
    #[error(
        "{}: {size} bytes is less than the disk's {virtual_size}; the data beyond would be lost",
        path.shown()
    )]
    Shrink {
        /// The file.
        path: PathBuf,
        /// The size that was asked for, in bytes.
        size: u64,
        /// The size that the disk has, in bytes.
        virtual_size: u64,
    },
    /// There is no base.
    #[error("{}: has no backing file, so there is no reference to update", .0.shown())]
    NoBase(PathBuf),
    /// The new base cannot have the same content.
    #[error(
        "{}: has {found} bytes, but the base of {} has {expected}; it cannot be the same image",
        base.shown(), cow.shown()
    )]
    OtherSize {
        /// The COW file.
        cow: PathBuf,
        /// The new base.
        base: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The size in the header.
        expected: u64,
    },
    /// The new base is another layer.
    #[error("{}: is not the layer below {}", base.shown(), cow.shown())]
    OtherLayer {
        /// The COW file.
        cow: PathBuf,
        /// The new base.
        base: PathBuf,
    },
    /// There is no proof that the base is unchanged.
    #[error(
        "{}: size, mtime or sample of {} differ from the header's, and there is no digest to \
         prove that the content is the same",
        cow.shown(), base.shown()
    )]
    NoDigest {
        /// The COW file.
        cow: PathBuf,
        /// The new base.
        base: PathBuf,
    },
    /// The base has other content.
    #[error(
        "{}: has other content than the base of {}: the BLAKE3 digests differ",
        base.shown(), cow.shown()
    )]
    OtherContent {
        /// The COW file.
        cow: PathBuf,
        /// The new base.
        base: PathBuf,
    },
    /// The base was written while it was being read.
    #[error("{}: was written while its digest was being computed", base.shown())]
    Moving {
        /// The new base.
        base: PathBuf,
    },
}

/// A COW file under its exclusive lock.
pub(crate) struct Edit<F> {
    pub(crate) cow: Opened<F>,
    pub(crate) header: Header,
    /// Empty if all that counts is durable.
    bitmap: Bitmap,
}

impl<F: Storage> Edit<F> {
    pub(crate) fn open<E: Env<File = F>>(env: &E, path: &Path) -> Result<Self, ImageError> {
        let cow = Opener::new(env, &DiskOptions::default(), path).top()?;
        let mut header = cow.header()?;
        let trust = recover(env, &cow, &mut header)?;
        let bits = BitmapSource::find(env, &cow, &header, trust)?;
        bits.check_data(&cow)?;
        let bitmap = match bits.live_counts() {
            true => bits.load_all(&cow)?,
            false => Bitmap::new(header.geometry().sectors()),
        };
        Ok(Edit { cow, header, bitmap })
    }

    /// Makes bits durable that only the live bitmap has, and marks a native file clean: then the
    /// durable bitmap is complete.
    pub(crate) fn settle(&mut self) -> Result<(), ImageError> {
        settle(&self.cow, &mut self.header, &self.bitmap)
    }
}

/// The native header, for operations that UML's format does not support.
pub(crate) fn native_of<'a>(
    header: &'a mut Header,
    path: &Path,
    what: &'static str,
) -> Result<&'a mut NativeHeader, ImageError> {
    match header {
        Header::Native(native) => Ok(native),
        Header::Uml(_) => Err(ImageError::UmlCannot { path: path.to_owned(), what }),
    }
}
