//! Errors of the tool itself, and what its user can do about errors of images, which block-io
//! describes.

use std::io;
use std::path::PathBuf;

use block_io::image::{ChangeError, Outside};
use block_io::ops::OpError;
use block_io::shown::argument;
use block_io::{DiskError, ImageError, Shown};
use cow_format::identity::{Doubt, IdentityError};

use crate::delta::DeltaError;
use crate::dependents::Dependents;
use crate::size::Human;
use crate::source::format::FileFormat;
use crate::source::qcow2_header::Qcow2HeaderError;

/// A failure of a command: one message.
#[derive(Debug, thiserror::Error)]
pub enum CowError {
    /// An operation on images failed.
    #[error("{0}{hint}", hint = operation_hint(.0))]
    Op(#[from] OpError),
    /// An image was not changed.
    #[error("{0}{hint}", hint = change_hint(.0))]
    Change(#[from] ChangeError),
    /// A file without a COW header, and no option that says it is a raw image.
    #[error("{}: not a COW file; pass --format raw if it is a raw image", .0.shown())]
    NotCow(PathBuf),
    /// A COW file of another format than --format names.
    #[error("{}: is a {} COW file, not what --format says", path.shown(), format!("{is:?}").to_lowercase())]
    OtherFormat {
        /// The file.
        path: PathBuf,
        /// What it is.
        is: FileFormat,
    },
    /// A delta could not be read to its end.
    #[error("{}: {source}", path.shown())]
    Delta {
        /// The stream.
        path: PathBuf,
        /// What is wrong with it.
        source: DeltaError,
    },
    /// A delta is over another base.
    #[error("{}: is not the base of {}: {why}", base.shown(), delta.shown())]
    OtherBase {
        /// The base that was named.
        base: PathBuf,
        /// The stream.
        delta: PathBuf,
        /// What differs.
        why: String,
    },
    /// A qcow2 image whose clusters are encrypted.
    #[error(
        "{}: is encrypted, which is not supported; decrypt it first: qemu-img convert with --object secret",
        .0.shown()
    )]
    Encrypted(PathBuf),
    /// The header of a qcow2 image is broken.
    #[error("{}: {source}", path.shown())]
    Qcow2Header {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        source: Qcow2HeaderError,
    },
    /// A qcow2 image names a file that is not opened.
    #[error("{}: names {} as its {what}, {why}", image.shown(), name.shown())]
    NotAllowed {
        /// The image.
        image: PathBuf,
        /// What the file is to the image.
        what: &'static str,
        /// As it is in the header.
        name: PathBuf,
        /// Why it is not opened.
        why: String,
    },
    /// A qcow2 image whose clusters are in a file that it does not name.
    #[error(
        "{}: its data is in another file, which it does not name; set that first: qemu-img amend -o data_file=FILE",
        .0.shown()
    )]
    NoDataFile(PathBuf),
    /// A disk that is larger than what the user wants.
    #[error(
        "{}: is a disk of {size} bytes ({}), more than the {max} of --max-size",
        path.shown(), Human(*size)
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The size of the disk in bytes.
        size: u64,
        /// The largest that is taken.
        max: u64,
    },
    /// Neither way to read a qcow2 image worked.
    #[error("{}: cannot be read as qcow2: {imago}; and by qemu-img: {qemu_img}", path.shown())]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// What the library said.
        imago: String,
        /// What qemu-img said.
        qemu_img: String,
    },
    /// Options that do not go together.
    #[error("{0}")]
    Usage(String),
    /// A change that affects other files was not confirmed.
    #[error(
        "{}: would be overwritten with the merged disk, and every other COW file over it would become invalid ({others}); \
         pass --yes to confirm",
        target.shown()
    )]
    NotConfirmed {
        /// The file that would be written.
        target: PathBuf,
        /// The COW files over it that were found.
        others: Dependents,
    },
    /// The file is no part of the chain.
    #[error("{}: is not one of the files below {}", file.shown(), cow.shown())]
    NotBelow {
        /// As named.
        file: PathBuf,
        /// The COW file.
        cow: PathBuf,
    },
    /// Standard output could not be written.
    #[error("cannot write to standard output: {0}")]
    Output(io::Error),
}

/// What the tool's user can do about an error of block-io, which knows no commands and options.
fn image_hint(error: &ImageError) -> String {
    let text = match error {
        ImageError::Backing { .. } => "; if it is elsewhere, give its path with -b BASE",
        ImageError::NotAllowed { why: Outside::LeadsOut, .. } => {
            "; if that is right, record its real path: cow rebind COW BASE"
        }
        ImageError::NotAllowed { path, .. } => {
            let dir = argument(path.parent().unwrap_or(path));
            return format!("; if that is right, pass --backing-dir={dir}");
        }
        ImageError::SideFile { .. } => "; to convert it: cow convert -O native",
        ImageError::Journal { .. } => "; run cow check --repair, or start its daemon",
        ImageError::NotFrozen { .. } => "; to freeze it: cow snapshot",
        ImageError::Identity { source, .. } => return identity_hint(source),
        _ => "",
    };
    text.to_owned()
}

fn identity_hint(error: &IdentityError) -> String {
    match error {
        IdentityError::Mtime { stored, .. } => format!(
            "; if its content is unchanged, run `cow rebind` (or set its time back: touch -d @{}.{:09}); otherwise \
             restore it",
            stored.secs(),
            stored.nanos()
        ),
        IdentityError::Replaced { .. } => {
            "; put the right one back; if this one is meant, run `cow rebind`, which compares the digest of its whole \
             content (or takes it unseen with --trust, if the header has no digest)"
                .to_owned()
        }
        _ => String::new(),
    }
}

fn operation_hint(error: &OpError) -> String {
    match error {
        OpError::Open(error) => image_hint(error),
        OpError::Exists { .. } => "; give another name, or --force to replace it".to_owned(),
        _ => String::new(),
    }
}

fn change_hint(error: &ChangeError) -> String {
    match error {
        ChangeError::Open(error) => image_hint(error),
        ChangeError::Shrink { .. } => "; pass --shrink if that is intended".to_owned(),
        ChangeError::NoDigest { .. } => "; if you know that it is, pass --trust".to_owned(),
        _ => String::new(),
    }
}

impl From<ImageError> for CowError {
    fn from(err: ImageError) -> Self {
        CowError::Op(err.into())
    }
}

impl From<DiskError> for CowError {
    fn from(err: DiskError) -> Self {
        CowError::Op(err.into())
    }
}

/// The error, followed by what the user can do about it.
pub fn advised(error: &ImageError) -> String {
    format!("{error}{}", image_hint(error))
}

/// Why a base that matches may still be another one, and the command that makes the match certain.
pub fn advised_doubt(doubt: &Doubt) -> String {
    match doubt {
        Doubt::WholeSeconds { .. } => format!("{doubt}; `cow rebind` records its time"),
        Doubt::Mtime { sampled: true, .. } => {
            format!("{doubt}; `cow create --digest` records a digest of its whole content")
        }
        doubt => doubt.to_string(),
    }
}
