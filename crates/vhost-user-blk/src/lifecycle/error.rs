//! Why the daemon ends with a failure.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use block_io::Shown;
use block_io::image::Outside;
use block_io::shown::argument;
use block_io::{DiskError, ImageError};
use cow_format::identity::IdentityError;

use crate::cli::Format;
use crate::lifecycle::handover::HandoverError;
use crate::process::requirements::RequirementError;
use crate::process::sandbox::{self, SandboxError};
use crate::process::socket::SocketError;
use crate::process::users::UserError;
use crate::session::connection::ResumeError;

/// Why the daemon ended with a failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// There is no socket for frontends.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The disk cannot be opened.
    #[error("{0}{hint}", hint = hint(.0))]
    Open(#[from] ImageError),
    /// The disk cannot be opened again, and the sandbox may be the reason.
    #[error(
        "{0}; if another file has its name since the daemon started: --sandbox allows only the \
         files that the disk had then; restart the daemon"
    )]
    Confined(Box<DaemonError>),
    /// The file's format is not the one on the command line.
    #[error(
        "{}: --format: the file is {found:?}, expected {expected:?}; leave --format out for an \
         existing COW file",
        path.shown()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: Format,
        /// The format on the command line.
        expected: Format,
    },
    /// A file without a COW header and without `--format=raw`.
    #[error(
        "--blk-file: {}: not a COW file; for a raw image add --format=raw",
        path.shown()
    )]
    NotCow {
        /// The file.
        path: PathBuf,
    },
    /// The base for a new COW file, which may not be a raw image.
    #[error(
        "{}: looks like {found}, but the base of a new COW file must be a raw image; create the COW \
         file with `cow create -b BASE -F FORMAT`, which takes other bases, or convert the base to \
         raw with `cow convert`",
        path.shown()
    )]
    Base {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        found: &'static str,
    },
    /// A descriptor of the disk cannot be used.
    #[error("{option}={fd}: {source}")]
    Descriptor {
        /// The option that names it.
        option: &'static str,
        /// Its number.
        fd: RawFd,
        /// What is wrong with it.
        source: io::Error,
    },
    /// `--backing-dir`.
    #[error("--backing-dir: {}: {source}", path.shown())]
    BackingDir {
        /// The directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file that existed when the daemon started.
    #[error("{}: does not exist any more: {source}", path.shown())]
    Gone {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The disk's size is not the one that was reported to the frontend.
    #[error(
        "{}: capacity changed from {expected} to {found} sectors since start; restart the daemon",
        path.shown()
    )]
    Capacity {
        /// The file.
        path: PathBuf,
        /// Its 512-byte sectors now.
        found: u64,
        /// Its 512-byte sectors when the daemon started.
        expected: u64,
    },
    /// The disk was not closed cleanly.
    #[error("cannot close the disk: {0}; everything that was flushed before is safe")]
    Close(#[from] DiskError),
    /// A queue's thread could not be stopped.
    #[error(
        "ended as if killed, because a queue did not stop; the disk was flushed first, and the \
         guest's requests in flight are done again by the next daemon if its frontend keeps an \
         in-flight area"
    )]
    RingRuns,
    /// The predecessor's handover cannot be used.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The session of the predecessor's frontend cannot be restored.
    #[error("cannot continue the frontend's session: {0}")]
    Session(#[from] ResumeError),
    /// The host lacks something that the daemon needs.
    #[error(transparent)]
    Requirement(#[from] RequirementError),
    /// A user or group on the command line.
    #[error(transparent)]
    User(#[from] UserError),
    /// The user cannot open a file that has to be opened later.
    #[error(
        "--user={user}: {}: this user cannot open it: {source}; give the file to the user",
        path.display()
    )]
    NotForUser {
        /// As given.
        user: String,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The sandbox cannot be entered.
    #[error("--sandbox: {0}; --sandbox=off does without it")]
    Sandbox(#[from] SandboxError),
    /// The system refused an operation that normally works.
    #[error("cannot {what}: {source}")]
    System {
        /// The operation.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

impl DaemonError {
    /// Whether the command line itself is wrong, independent of the state of the system.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        match self {
            DaemonError::Socket(e) => e.is_usage(),
            DaemonError::Descriptor { .. } | DaemonError::BackingDir { .. } => true,
            _ => false,
        }
    }

    /// Explains a permission that is missing in the sandbox.
    pub(crate) fn confined(self) -> Self {
        let denied = |source: &io::Error| source.kind() == io::ErrorKind::PermissionDenied;
        match &self {
            DaemonError::Open(ImageError::Io { source, .. })
                if denied(source) && sandbox::is_entered() =>
            {
                DaemonError::Confined(Box::new(self))
            }
            _ => self,
        }
    }

    /// An error of an operation of the system.
    pub fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| DaemonError::System { what, source }
    }
}

/// Names the daemon's option that helps.
fn hint(error: &ImageError) -> String {
    let text = match error {
        ImageError::NotAllowed { why: Outside::LeadsOut, .. } => {
            "; if that is right, give the files below by their real paths: COW,BASE"
        }
        ImageError::NotAllowed { path, why: Outside::NotNamed, .. } => {
            return format!(
                "; if that is right, add it: COW,...,{} (with --cow-fd: its descriptor)",
                argument(path)
            );
        }
        ImageError::NotAllowed { path, .. } => {
            let dir = argument(path.parent().unwrap_or(path));
            return format!(
                "; if that is right, pass --backing-dir={dir}, or give the files below: COW,{}",
                argument(path)
            );
        }
        ImageError::NoLocks { .. } => {
            "; if no other daemon or tool can write to it, pass --allow-unlocked"
        }
        ImageError::Backing { .. } => "; if it is elsewhere, give its path as COW,BASE",
        ImageError::SideFile { .. } => "; to convert it: cow convert -O native",
        ImageError::Journal { .. } => {
            "; start the daemon without --read-only, or run cow check --repair"
        }
        ImageError::NotFrozen { .. } => "; to freeze it: cow snapshot",
        ImageError::Identity { source: IdentityError::Mtime { .. }, .. } => {
            "; if its content is unchanged, run `cow rebind`; otherwise restore it"
        }
        ImageError::Identity { source: IdentityError::Replaced { .. }, .. } => {
            "; put the right one back, or run `cow rebind` if this one is meant"
        }
        _ => "",
    };
    text.to_owned()
}
