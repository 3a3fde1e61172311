//! Why an image is not opened, made or changed.

use std::io;
use std::path::{Path, PathBuf};

use cow_format::header::BackingFormat;
use cow_format::identity::IdentityError;
use cow_format::{DataTruncated, HeaderError};

use super::CHAIN_DEPTH_MAX;
use super::bitmap::side_file;
use crate::storage::{FileKind, LockError};

/// An image that was not opened, made or changed. Each names its file first.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The system refused an operation.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The file is open elsewhere.
    #[error("{}: {source}; a COW file has one user at a time, and the files below it are only read", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
        /// Who holds it, if that is known.
        source: LockError,
    },
    /// The file cannot be locked, and is to be written.
    #[error(
        "{}: its file system has no locks ({source}), so that nothing keeps a second program from writing to it, which \
         would destroy it",
        path.display()
    )]
    NoLocks {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There can be no side file beside a UML COW file.
    #[error(
        "{}: cannot be made: {source}; a UML COW file has this file beside it while it is written, without which writes that \
         were acknowledged and not flushed would be lost with the program that serves them. Let its user write to \
         the directory, make a native COW file of it (cow convert -O native), or open it read-only",
        path.display()
    )]
    SideFile {
        /// The side file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not the one that a predecessor handed on, or not in use by it.
    #[error("{}: is not the file that the predecessor has open", path.display())]
    NotHeld {
        /// The file.
        path: PathBuf,
    },
    /// The file is no image.
    #[error("{}: is a {found}, expected {expected}", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: FileKind,
        /// What it may be.
        expected: &'static str,
    },
    /// The header was refused.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The field, what was found and expected.
        source: HeaderError,
    },
    /// The bitmap speaks of data that the file does not have.
    #[error("{}: {source}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// The sector and the lengths.
        source: DataTruncated,
    },
    /// The backing file that a header names cannot be opened.
    #[error(
        "{}: cannot open the backing file of {}: {source}; if it is elsewhere, name it (daemon: COW,BASE; cow: -b BASE)",
        path.display(), cow.display()
    )]
    Backing {
        /// The COW file.
        cow: PathBuf,
        /// The backing file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The backing file is not the one that the header means.
    #[error("{} is not the backing file of {}: {source}", path.display(), cow.display())]
    Identity {
        /// The COW file.
        cow: PathBuf,
        /// The backing file that was looked at.
        path: PathBuf,
        /// Which property differs, and both values.
        source: IdentityError,
    },
    /// A file was named as its own backing file, or comes twice in a chain.
    #[error("{}: comes twice in the chain of {} (also as {}); a file cannot back itself", path.display(), top.display(), again.display())]
    Repeated {
        /// The top of the chain.
        top: PathBuf,
        /// The file.
        path: PathBuf,
        /// Its other name.
        again: PathBuf,
    },
    /// Too many layers.
    #[error("{}: the chain has more than {CHAIN_DEPTH_MAX} files; merge some of them", top.display())]
    TooDeep {
        /// The top of the chain.
        top: PathBuf,
    },
    /// A frozen layer is never written again.
    #[error("{}: is frozen, since other files build on it; open it read-only, or put a COW file over it", path.display())]
    Frozen {
        /// The file.
        path: PathBuf,
    },
    /// After a power cut, what stands in the journal is to be put in place by whoever may write.
    #[error(
        "{}: was not closed before the host went down, and flushed sectors stand in its journal only; open it for \
         writing once: cow check --repair, or start its daemon",
        path.display()
    )]
    Journal {
        /// The file.
        path: PathBuf,
    },
    /// A file below the top is still being written, or can be.
    #[error(
        "{}: backs {} but is not frozen; if it has been opened for writing since, that disk's content is gone; else \
         freeze it: cow snapshot",
        path.display(), cow.display()
    )]
    NotFrozen {
        /// The COW file.
        cow: PathBuf,
        /// Its backing file.
        path: PathBuf,
    },
    /// The backing file is of another format than the reference says.
    #[error("{}: backs {} as {expected}, but is {found}", path.display(), cow.display())]
    Format {
        /// The COW file.
        cow: PathBuf,
        /// Its backing file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What the reference says.
        expected: BackingFormat,
    },
    /// A backing file was named for a COW file that has none.
    #[error("{}: has no backing file, so {} cannot be it", path.display(), base.display())]
    NoBacking {
        /// The COW file.
        path: PathBuf,
        /// What was named.
        base: PathBuf,
    },
    /// UML's format cannot express what was asked for.
    #[error("{}: a UML COW file cannot {what}; a native one can", path.display())]
    UmlCannot {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        what: &'static str,
    },
    /// A new file without a backing file needs a size.
    #[error("{}: without a backing file the disk needs a size", path.display())]
    NoSize {
        /// The file.
        path: PathBuf,
    },
    /// A raw image cannot be written because of its length.
    #[error(
        "{}: {}", path.display(), match len {
            0 => "is empty, expected an image of at least one byte".to_owned(),
            len => format!(
                "length {len} is no multiple of 512; open it read-only, or lengthen it: truncate -s %512 FILE"
            ),
        }
    )]
    RawLength {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
}

impl ImageError {
    /// For `map_err`: `action` on `path` failed.
    pub(crate) fn io(
        path: impl Into<PathBuf>,
        action: &'static str,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| ImageError::Io { path, action, source }
    }

    /// For `map_err`: the live bitmap beside the UML COW file `cow` was not made.
    pub(crate) fn side_file(cow: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                ImageError::SideFile { path: side_file::path_for(cow), source }
            }
            _ => ImageError::io(cow, "make the live bitmap")(source),
        }
    }

    /// For `map_err`: the header of `path` was refused.
    pub(crate) fn header(path: impl Into<PathBuf>) -> impl FnOnce(HeaderError) -> Self {
        let path = path.into();
        move |source| ImageError::Header { path, source }
    }
}

/// A disk's operation that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The system refused an operation. The disk works on.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A sync failed, now or earlier: nobody knows what is on the disk, and no later success would prove anything.
    #[error("{}: a sync has failed; the disk takes no writes until it is opened again", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
    },
    /// The disk was opened read-only, or has been closed.
    #[error("{}: not open for writing", path.display())]
    ReadOnly {
        /// The file.
        path: PathBuf,
    },
}
