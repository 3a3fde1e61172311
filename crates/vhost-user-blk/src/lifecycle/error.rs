//! Why the daemon ends with a failure.

use std::io;
use std::path::PathBuf;

use block_io::{DiskError, ImageError};
use cow_format::identity::IdentityError;

use crate::cli::Format;
use crate::lifecycle::handover::HandoverError;
use crate::process::requirements::RequirementError;
use crate::process::socket::SocketError;
use crate::session::connection::ResumeError;

/// Why the daemon ended with a failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// No frontend could come.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The disk was not opened.
    #[error("{0}{hint}", hint = hint(.0))]
    Open(#[from] ImageError),
    /// The file has another format than the command line says.
    #[error(
        "{}: --format: the file is {found:?}, expected {expected:?}; leave --format out for a COW \
         file that exists",
        path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: Format,
        /// What it should be.
        expected: Format,
    },
    /// A file without a COW header, and nobody said that it is raw.
    #[error(
        "--blk-file: {}: not a COW file; if it is a raw image, say so with --format=raw",
        path.display()
    )]
    NotCow {
        /// The file.
        path: PathBuf,
    },
    /// A base for a new COW file that may not be a raw image.
    #[error(
        "{}: begins like {found}, and a new COW file stands over a raw image: make it with `cow create -b BASE -F FORMAT`, \
         which can say what the base is, or make a raw image of the base with `cow convert`",
        path.display()
    )]
    Base {
        /// The file.
        path: PathBuf,
        /// What it may be.
        found: &'static str,
    },
    /// A file that was there when it was looked at.
    #[error("{}: is not there any more: {source}", path.display())]
    Gone {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The disk has another size than the frontend was told.
    #[error(
        "{}: has {found} sectors; the frontend was told {expected}: start this daemon anew",
        path.display()
    )]
    Capacity {
        /// The file.
        path: PathBuf,
        /// Its 512-byte sectors now.
        found: u64,
        /// Its 512-byte sectors when it was looked at.
        expected: u64,
    },
    /// The disk did not end cleanly.
    #[error("the disk could not be closed: {0}; what was flushed before is safe")]
    Close(#[from] DiskError),
    /// What the predecessor left cannot be read.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// What a predecessor's frontend said is refused.
    #[error("cannot go on with the frontend: {0}")]
    Session(#[from] ResumeError),
    /// The host lacks something that the daemon needs.
    #[error(transparent)]
    Requirement(#[from] RequirementError),
    /// The system refused something that always works.
    #[error("cannot {what}: {source}")]
    System {
        /// The operation.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl DaemonError {
    /// Whether the command line is wrong in itself, whatever the state of the system.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, DaemonError::Socket(e) if e.is_usage())
    }

    pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| DaemonError::System { what, source }
    }
}

/// What the daemon's user can do.
fn hint(error: &ImageError) -> &'static str {
    match error {
        ImageError::NoLocks { .. } => {
            "; if you are certain that no second daemon or tool will, start it with --allow-unlocked"
        }
        ImageError::Backing { .. } => " (COW,BASE)",
        ImageError::SideFile { .. } => " (cow convert -O native)",
        ImageError::Journal { .. } => {
            ": start the daemon without --read-only, or run cow check --repair"
        }
        ImageError::NotFrozen { .. } => " (cow snapshot)",
        ImageError::Identity { source: IdentityError::Mtime { .. }, .. } => {
            "; if its content is unchanged, run `cow rebind`; otherwise restore it"
        }
        ImageError::Identity { source: IdentityError::Replaced { .. }, .. } => {
            "; put the right one back, or run `cow rebind` if this one is meant"
        }
        _ => "",
    }
}
