//! Errors of operations on whole images.

use std::io;
use std::path::{Path, PathBuf};

use crate::image::{DiskError, ImageError};
use crate::shown::Shown;
use crate::storage::{FileKind, LockError};

/// An operation failed. Each message begins with the file; an incomplete output has been removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// An input could not be opened.
    #[error(transparent)]
    Open(#[from] ImageError),
    /// An open disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The system refused an operation.
    #[error("{}: cannot {action}{}: {source}", path.shown(), Place(*at))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The offset in the file, in bytes, if there was one.
        at: Option<u64>,
        /// Why it failed.
        source: io::Error,
    },
    /// The output already exists.
    #[error("{}: already exists", path.shown())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The output's name belongs to something that is not a file.
    #[error("{}: is a {found}; give the name of a file", path.shown())]
    NotAFile {
        /// The output.
        path: PathBuf,
        /// Its type.
        found: FileKind,
    },
    /// The output would replace one of the inputs.
    #[error(
        "{}: is the same file as the input {}; give another name",
        path.shown(), input.shown()
    )]
    SameFile {
        /// The output.
        path: PathBuf,
        /// The name of the input.
        input: PathBuf,
    },
    /// The chain has no such file below.
    #[error(
        "{}: nothing to merge into: {}", path.shown(), match depth {
            1 => "it has no file below it".to_owned(),
            depth => format!("it has fewer than {depth} files below it"),
        }
    )]
    NothingBelow {
        /// The COW file.
        path: PathBuf,
        /// Which file below was requested; 1 is the nearest.
        depth: usize,
    },
    /// The file below cannot be merged into.
    #[error("{}: cannot be merged into: it {why}; merge to a new image instead", path.shown())]
    CannotTake {
        /// The file below.
        path: PathBuf,
        /// The reason why it cannot be written.
        why: &'static str,
    },
    /// The file that would be replaced is open elsewhere.
    #[error("{}: not replaced: {source}", path.shown())]
    InUse {
        /// The output.
        path: PathBuf,
        /// Who holds it, if that is known.
        source: LockError,
    },
}

/// ` at byte N`, or nothing.
struct Place(Option<u64>);

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |at| write!(f, " at byte {at}"))
    }
}

impl OpError {
    /// For `map_err`: `action` on `path` failed.
    pub fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| OpError::Io { path: path.to_owned(), action, at: None, source }
    }

    /// For `map_err`: reading `path` at byte `at` failed.
    pub fn read(path: &Path, at: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| OpError::Io { path: path.to_owned(), action: "read", at: Some(at), source }
    }

    /// For `map_err`: writing `path` at byte `at` failed.
    pub fn write(path: &Path, at: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| OpError::Io { path: path.to_owned(), action: "write", at: Some(at), source }
    }
}
