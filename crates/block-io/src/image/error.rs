//! Errors of opening, creating or changing an image.

use std::io;
use std::path::{Path, PathBuf};

use cow_format::header::BackingFormat;
use cow_format::identity::IdentityError;
use cow_format::{DataTruncated, HeaderError};

use super::CHAIN_DEPTH_MAX;
use super::bitmap::side_file;
use crate::shown::Shown;
use crate::storage::{FileKind, LockError};

/// An image could not be opened, created or changed. Each message begins with the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The system refused an operation.
    #[error("{}: cannot {action}: {source}", path.shown())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The file is open elsewhere.
    #[error(
        "{}: {source}; a COW file has one user at a time, and the files below it are only read",
        path.shown()
    )]
    Locked {
        /// The file.
        path: PathBuf,
        /// Who holds it, if that is known.
        source: LockError,
    },
    /// The file cannot be locked, but would be written.
    #[error(
        "{}: its file system has no locks ({source}), so nothing prevents a second program from \
         writing to it, which would destroy it",
        path.shown()
    )]
    NoLocks {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The side file of a UML COW file cannot be created.
    #[error(
        "{}: cannot be created: {source}; a UML COW file needs this file beside it while it is open for \
         writing, otherwise acknowledged writes that are not flushed would be lost if the program \
         dies. Make the directory writable for it, convert the disk to a native COW file, or open it \
         read-only",
        path.shown()
    )]
    SideFile {
        /// The side file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The side file of a UML COW file may not be the work of a daemon.
    #[error(
        "{}: {why}, so it is not used: it is where a daemon keeps the last writes to the COW file; if no \
         daemon has made it, remove it",
        path.shown()
    )]
    ForeignSideFile {
        /// The side file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The file is not the one that the predecessor passed on, or the predecessor was not using it.
    #[error("{}: is not the file that the predecessor has open", path.shown())]
    NotHeld {
        /// The file.
        path: PathBuf,
    },
    /// The file has the wrong type.
    #[error("{}: is a {found}, expected {expected}", path.shown())]
    Kind {
        /// The file.
        path: PathBuf,
        /// Its type.
        found: FileKind,
        /// The permitted types.
        expected: &'static str,
    },
    /// The header was refused.
    #[error("{}: {source}", path.shown())]
    Header {
        /// The file.
        path: PathBuf,
        /// The field, what was found and expected.
        source: HeaderError,
    },
    /// The bitmap marks data as present that the file does not have.
    #[error("{}: {source}", path.shown())]
    Data {
        /// The file.
        path: PathBuf,
        /// The sector and the lengths.
        source: DataTruncated,
    },
    /// The backing file that a header names cannot be opened.
    #[error(
        "{}: cannot open the backing file of {}: {source}",
        path.shown(), cow.shown()
    )]
    Backing {
        /// The COW file.
        cow: PathBuf,
        /// The backing file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A header names a file that it may not name. Nothing of the file was opened.
    #[error(
        "{}: its header names {} as the file below, which {}",
        cow.shown(), path.shown(), outside(*why, dirs)
    )]
    NotAllowed {
        /// The COW file.
        cow: PathBuf,
        /// The file below.
        path: PathBuf,
        /// What is against it.
        why: Outside,
        /// The directories in which a header may name a file.
        dirs: Vec<PathBuf>,
    },
    /// The backing file does not match the header.
    #[error("{} is not the backing file of {}: {source}", path.shown(), cow.shown())]
    Identity {
        /// The COW file.
        cow: PathBuf,
        /// The backing file that was checked.
        path: PathBuf,
        /// Which property differs, and both values.
        source: IdentityError,
    },
    /// A file is its own backing file, or occurs twice in a chain.
    #[error(
        "{}: occurs twice in the chain of {} (also as {}); a file cannot back itself",
        path.shown(), top.shown(), again.shown()
    )]
    Repeated {
        /// The top of the chain.
        top: PathBuf,
        /// The file.
        path: PathBuf,
        /// Its other name.
        again: PathBuf,
    },
    /// Too many layers.
    #[error(
        "{}: the chain has more than {CHAIN_DEPTH_MAX} files; merge some of them",
        top.shown()
    )]
    TooDeep {
        /// The top of the chain.
        top: PathBuf,
    },
    /// A frozen layer is never written again.
    #[error(
        "{}: is frozen, since other files build on it; open it read-only, or put a COW file over it",
        path.shown()
    )]
    Frozen {
        /// The file.
        path: PathBuf,
    },
    /// After a power cut, the journal must be replayed by the next opener that may write.
    #[error(
        "{}: was not closed before the host went down, and flushed sectors are only in its journal; \
         open it for writing once",
        path.shown()
    )]
    Journal {
        /// The file.
        path: PathBuf,
    },
    /// A file below the top is still being written, or could be.
    #[error(
        "{}: backs {} but is not frozen; if it has been opened for writing since, that disk's content \
         is lost; otherwise it must be frozen",
        path.shown(), cow.shown()
    )]
    NotFrozen {
        /// The COW file.
        cow: PathBuf,
        /// Its backing file.
        path: PathBuf,
    },
    /// The backing file's format differs from the one in the reference.
    #[error("{}: backs {} as {expected}, but is {found}", path.shown(), cow.shown())]
    Format {
        /// The COW file.
        cow: PathBuf,
        /// Its backing file.
        path: PathBuf,
        /// Its format.
        found: &'static str,
        /// The format in the reference.
        expected: BackingFormat,
    },
    /// A backing file was given for a COW file that has none.
    #[error("{}: has no backing file, but {} was given as one", path.shown(), base.shown())]
    NoBacking {
        /// The COW file.
        path: PathBuf,
        /// The file that was given.
        base: PathBuf,
    },
    /// UML's format does not support the operation.
    #[error("{}: a UML COW file cannot {what}; a native one can", path.shown())]
    UmlCannot {
        /// The file.
        path: PathBuf,
        /// The operation.
        what: &'static str,
    },
    /// A new file without a backing file needs a size.
    #[error("{}: a disk without a backing file needs a size", path.shown())]
    NoSize {
        /// The file.
        path: PathBuf,
    },
    /// A raw image cannot be written because of its length.
    #[error(
        "{}: {}", path.shown(), match len {
            0 => "is empty, expected an image of at least one byte".to_owned(),
            len => format!(
                "length {len} is not a multiple of 512; open it read-only, or extend it: \
                 truncate -s %512 FILE"
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

/// Why a file that a header names is not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outside {
    /// The user has named the files of the chain, but not this one.
    NotNamed,
    /// It is not in one of the directories.
    Elsewhere,
    /// A symbolic link leads out of the directory.
    LeadsOut,
}

fn outside(why: Outside, dirs: &[PathBuf]) -> String {
    let dirs: Vec<_> = dirs.iter().map(|dir| dir.shown().to_string()).collect();
    let dirs = dirs.join(" and ");
    match why {
        Outside::NotNamed => "is not one of those that were given for it".to_owned(),
        Outside::Elsewhere => format!("is outside of {dirs}"),
        Outside::LeadsOut => format!("leads out of {dirs} through a symbolic link"),
    }
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

    /// For `map_err`: the live bitmap beside the UML COW file `cow` could not be created.
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

/// An operation on an open disk failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The system refused an operation. The disk stays usable.
    #[error("{}: cannot {action}: {source}", path.shown())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A sync failed, now or earlier: the state on the disk is unknown, and a later success would
    /// prove nothing.
    #[error(
        "{}: a sync has failed; the disk takes no writes until it is opened again",
        path.shown()
    )]
    Failed {
        /// The file.
        path: PathBuf,
    },
    /// The disk was opened read-only, or has been closed.
    #[error("{}: not open for writing", path.shown())]
    ReadOnly {
        /// The file.
        path: PathBuf,
    },
}
