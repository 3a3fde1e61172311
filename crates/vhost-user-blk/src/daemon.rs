//! The daemon's life: socket, disk, one frontend after the other, a clean end.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block_io::{CachePolicy, CowFormat, Disk, DiskError, DiskOptions, OpenError};
use cow_format::{HEADER_PREFIX_LEN, Header, HeaderError};
use nix::poll::PollTimeout;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::cli::{Cache, Format, Image, Options};
use crate::connection::{self, Readable, wait_readable};
use crate::hold::Hold;
use crate::session::Session;
use crate::socket::{Listener, Socket, SocketError};
use crate::vring::RunningRing;
use crate::worker::WorkerHandle;
use crate::{signals, systemd};

/// How long to wait before the next try when a connection could not be accepted, in milliseconds:
/// what is short then (descriptors, memory) is short in the whole system.
const ACCEPT_RETRY_MS: u16 = 1000;

/// How long to wait until the I/O of a daemon that was killed has ended and its locks fall. Usually
/// that is some ten milliseconds; a sync on a busy disk can take more than a second.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(5);

/// Why the daemon ended with a failure.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// No frontend could come.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The disk was not opened.
    #[error(transparent)]
    Open(#[from] OpenError),
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

/// Serves until a signal asks for the end, or, with a connected socket, until the frontend goes.
///
/// # Errors
/// [`DaemonError`]. Whatever it is, the socket file is gone and the disk is as whole as it can be.
pub fn run(options: &Options) -> Result<(), DaemonError> {
    systemd::install();
    signals::install().map_err(|e| DaemonError::system("take over signals")(e.into()))?;
    raise_fd_limit();
    // The socket first: a command line with a bad one must not make a COW file. Frontends that come
    // early wait in its queue.
    let socket = Socket::open(&options.endpoint)?;
    let hold = if options.incoming { Hold::incoming(options) } else { Hold::open(options) };
    let hold = Arc::new(hold?);
    let session = Arc::new(Mutex::new(Session::new(Arc::clone(&hold), &hold.shape())));
    systemd::ready();
    let served = serve(&socket, &session).map_err(DaemonError::system("use the socket"));
    systemd::stopping();
    // The workers have ended with the last connection.
    hold.close()?;
    served
}

/// A frontend can pass many descriptors: three for each queue and one for each memory region.
fn raise_fd_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        log::warn!("cannot raise the limit of open files: {e}");
    }
}

/// Opens what the command line names, and makes a COW file that does not exist.
pub(crate) fn open_disk(options: &Options) -> Result<Disk, DaemonError> {
    let policy = |cache| match cache {
        Cache::Buffered => CachePolicy::Buffered,
        Cache::Direct => CachePolicy::Direct,
    };
    let mut how = DiskOptions {
        read_only: options.read_only,
        base_cache: policy(options.base_cache),
        cow_cache: policy(options.cow_cache),
        lock_wait: PREDECESSOR_WAIT,
        ..DiskOptions::default()
    };
    let disk = match &options.image {
        Image::File { path, format: Some(Format::Raw) } => Disk::open_raw(path, &how)?,
        Image::File { path, format } => {
            check_format(path, *format)?;
            Disk::open_cow(path, None, &how).map_err(|e| unless_raw(path, e))?
        }
        Image::Cow { cow, base, format } => {
            check_format(cow, *format)?;
            if *format == Some(Format::Uml) {
                how.format = CowFormat::Uml;
            }
            Disk::open_cow(cow, base.as_deref(), &how)?
        }
    };
    for (depth, layer) in disk.layers().iter().enumerate() {
        log::info!("{}{}", if depth == 0 { "disk " } else { "  over " }, layer.path().display());
    }
    let access = if disk.read_only() { "read-only" } else { "writable" };
    log::info!("{} sectors of 512 bytes, {access}", disk.capacity().get());
    Ok(disk)
}

/// Refuses a COW file of another format than the one named. A file that does not exist, or whose
/// header is no good, is left to the opening, which says why.
pub(crate) fn check_format(path: &Path, expected: Option<Format>) -> Result<(), DaemonError> {
    let Some(expected) = expected else { return Ok(()) };
    let Ok(header) = read_header(path) else { return Ok(()) };
    let found = match header {
        Header::Uml(_) => Format::Uml,
        _ => Format::Native,
    };
    if found == expected {
        return Ok(());
    }
    Err(DaemonError::Format { path: path.to_owned(), found, expected })
}

fn read_header(path: &Path) -> Result<Header, Box<dyn std::error::Error>> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut prefix = Vec::new();
    file.take(u64::try_from(HEADER_PREFIX_LEN)?).read_to_end(&mut prefix)?;
    Ok(Header::check(&prefix, len)?)
}

/// Says what to do with a file that is no COW file, which may well be a raw image.
fn unless_raw(path: &Path, error: OpenError) -> DaemonError {
    match error {
        OpenError::Header { source: HeaderError::NotCow { .. }, .. } => {
            DaemonError::NotCow { path: path.to_owned() }
        }
        error => error.into(),
    }
}

impl RunningRing for WorkerHandle {
    fn stop(self) -> u16 {
        WorkerHandle::stop(self)
    }
}

fn serve(socket: &Socket, session: &Arc<Mutex<Session<Arc<Hold>>>>) -> io::Result<()> {
    match socket {
        Socket::Connected(stream) => connection::serve(stream.try_clone()?, session),
        Socket::Listening(listener) => {
            log::info!("listening");
            while let Some(stream) = next_frontend(listener)? {
                log::info!("frontend connected");
                connection::serve(stream, session)?;
            }
            Ok(())
        }
    }
}

/// The next connection; `None` when the daemon is to end.
fn next_frontend(listener: &Listener) -> io::Result<Option<UnixStream>> {
    loop {
        if wait_readable(&[listener.as_fd()], PollTimeout::NONE)? == Readable::Stop {
            return Ok(None);
        }
        match listener.accept() {
            Ok(stream) => return Ok(Some(stream)),
            // It has gone already, or another process that shares the socket took it.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::ConnectionAborted
                        | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => {
                log::error!("cannot accept a connection: {e}");
                if wait_readable(&[], ACCEPT_RETRY_MS.into())? == Readable::Stop {
                    return Ok(None);
                }
            }
        }
    }
}
