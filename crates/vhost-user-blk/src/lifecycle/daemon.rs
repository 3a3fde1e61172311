//! The daemon's life: socket, disk, one frontend after the other, a clean end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use block_io::CachePolicy;
use block_io::CowFormat;
use block_io::Disk;
use block_io::DiskError;
use block_io::DiskOptions;
use block_io::Host;
use block_io::ImageError;
use block_io::ops::signature::{Signature, signature_of};
use block_io::ring::NoUring;
use cow_format::identity::IdentityError;
use cow_format::{HeaderError, Sector, SectorCount, SectorRange};
use log::Level;
use nix::poll::PollTimeout;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::cli::{Cache, Format, Image, Options};
use crate::datapath::route::PAGE;
use crate::datapath::worker::WorkerHandle;
use crate::lifecycle::disk_slot::DiskSlot;
use crate::lifecycle::handover::HandoverError;
use crate::lifecycle::takeover;
use crate::lifecycle::upgrade::{Handoff, UpgradeError, running_program};
use crate::process::control::{self, Request};
use crate::process::log_limit::{self, CONNECTIONS, CONTROL};
use crate::process::socket::{Listener, PREDECESSOR_WAIT, Socket, SocketError};
use crate::process::{requirements, signals, systemd};
use crate::session::Session;
use crate::session::connection::{Commands, Connection, Readable, ResumeError, wait_readable};
use crate::session::vring::RunningRing;

/// How long to wait before the next try when a connection could not be accepted, in milliseconds:
/// what is short then (descriptors, memory) is short in the whole system.
const ACCEPT_RETRY_MS: u16 = 1000;

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
    /// What was written for pages of one size would be wrong with others.
    #[error(
        "the system's pages have {found} bytes, expected {PAGE}: this program is made and tested for x86-64 only"
    )]
    PageSize {
        /// Bytes; 0 if the system does not say.
        found: u64,
    },
    /// The I/O engine that was asked for.
    #[error(
        "--io-engine=io_uring: {source} ({hint}); use --io-engine=sync, or leave the option out"
    )]
    Engine {
        /// What usually is the reason.
        hint: &'static str,
        /// What was refused.
        source: NoUring,
    },
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

/// Serves until a signal asks for the end, or, with a connected socket, until the frontend goes.
///
/// # Errors
/// [`DaemonError`]. Whatever it is, the socket file is gone and the disk is as whole as it can be.
pub fn run(options: &Options) -> Result<(), DaemonError> {
    requirements::check_page_size()?;
    if let Some(handover) = options.takeover {
        return takeover::run(options, handover);
    }
    systemd::install();
    signals::install(None).map_err(DaemonError::system("take over signals"))?;
    // First of all: a command line with a bad socket must not make a COW file.
    options.endpoint.check()?;
    let control = options.control.as_deref().map(Listener::control).transpose()?;
    raise_fd_limit();
    let slot =
        if options.incoming { DiskSlot::incoming(options) } else { DiskSlot::open(options) }?;
    let socket = match Socket::open(&options.endpoint) {
        Ok(socket) => socket,
        Err(e) => {
            slot.close()?;
            return Err(e.into());
        }
    };
    live(Daemon::new(socket, control, slot), None)
}

/// A frontend that is connected to the disk.
pub(crate) type Guest = Connection<Arc<DiskSlot>>;

/// All that a daemon consists of.
pub struct Daemon {
    socket: Socket,
    control: Option<Listener>,
    slot: Arc<DiskSlot>,
    session: Arc<Mutex<Session<Arc<DiskSlot>>>>,
    /// The file that this program was started from.
    program: PathBuf,
}

impl Daemon {
    /// A daemon to which no frontend has said anything yet.
    pub(crate) fn new(socket: Socket, control: Option<Listener>, slot: DiskSlot) -> Self {
        let slot = Arc::new(slot);
        let session = Arc::new(Mutex::new(Session::new(Arc::clone(&slot), &slot.shape())));
        Daemon { socket, control, slot, session, program: running_program() }
    }

    pub(crate) fn session(&self) -> &Arc<Mutex<Session<Arc<DiskSlot>>>> {
        &self.session
    }
}

impl Commands for (&Daemon, &Listener) {
    fn fd(&self) -> BorrowedFd<'_> {
        self.1.as_fd()
    }

    fn handle(&self, frontend: Option<BorrowedFd<'_>>) {
        let &(daemon, control) = self;
        let Ok(client) = control.accept() else { return };
        let Request::Upgrade(request) = match Request::receive(&client) {
            Ok(request) => request,
            Err(e) => return CONTROL.say(Level::Warn, format_args!("control socket: {e}")),
        };
        let why = match daemon.slot.disk() {
            Some(disk) => {
                let listener = match &daemon.socket {
                    Socket::Listening(listener) => Some(listener),
                    Socket::Connected(_) => None,
                };
                let handoff = Handoff { disk: &disk, listener, control, program: &daemon.program };
                handoff.hand_over(&request, &daemon.session, frontend, client.as_fd())
            }
            None => UpgradeError::DiskElsewhere,
        };
        CONTROL.say(Level::Warn, format_args!("no upgrade: {why}"));
        control::answer(&client, &Err(format!("{why}; the daemon serves on as it was")));
    }
}

/// Serves until the end, first the frontend that is connected.
pub(crate) fn live(daemon: Daemon, connected: Option<Guest>) -> Result<(), DaemonError> {
    let entrance = match &daemon.socket {
        Socket::Listening(listener) => Some(signals::Entrance::new(listener)),
        Socket::Connected(_) => None,
    };
    systemd::ready();
    let served = serve(&daemon, connected).map_err(DaemonError::system("use the socket"));
    systemd::stopping();
    drop(entrance);
    log_limit::say_what_was_left_out();
    // The workers have ended with the last connection.
    daemon.slot.close()?;
    served
}

/// A frontend can pass many descriptors: three for each queue and one for each memory region.
pub(crate) fn raise_fd_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        log::warn!("cannot raise the limit of open files: {e}");
    }
}

/// Opens what the command line names, and makes a COW file that does not exist; or takes it from a
/// predecessor, by the descriptions of its top file.
pub(crate) fn open_disk(
    options: &Options,
    inherited: Option<block_io::storage::file::File>,
) -> Result<Disk, DaemonError> {
    let policy = |cache| match cache {
        Cache::Buffered => CachePolicy::Buffered,
        Cache::Direct => CachePolicy::Direct,
    };
    let mut disk_options = DiskOptions {
        read_only: options.read_only,
        base_cache: policy(options.base_cache),
        cow_cache: policy(options.cow_cache),
        lock_wait: PREDECESSOR_WAIT,
        unlocked: options.allow_unlocked,
        ..DiskOptions::default()
    };
    let disk = match (&options.image, inherited) {
        (Image::File { path, format: Some(Format::Raw) }, None) => {
            Disk::open_raw(path, &disk_options)?
        }
        (Image::File { path, format: Some(Format::Raw) }, Some(top)) => {
            Disk::inherit_raw(path, top, &disk_options)?
        }
        (Image::File { path, .. } | Image::Cow { cow: path, .. }, Some(top)) => {
            Disk::inherit_cow(path, top, &disk_options)?
        }
        (Image::File { path, format }, None) => {
            check_format(path, *format)?;
            Disk::open_cow(path, None, &disk_options).map_err(|e| unless_raw(path, e))?
        }
        (Image::Cow { cow, base, format }, None) => {
            check_format(cow, *format)?;
            if *format == Some(Format::Uml) {
                disk_options.format = CowFormat::Uml;
            }
            if let Some(base) = base
                && !cow.exists()
            {
                check_base(base)?;
            }
            Disk::open_cow(cow, base.as_deref(), &disk_options)?
        }
    };
    Ok(disk)
}

/// Logs what was opened.
pub(crate) fn describe(disk: &Disk) {
    for (depth, layer) in disk.layers().iter().enumerate() {
        log::info!("{}{}", if depth == 0 { "disk " } else { "  over " }, layer.path().display());
    }
    if let (Some(top), Some(start)) =
        (disk.layers().first(), SectorRange::new(Sector::new(0), SectorCount::new(0)))
        && top.file().direct().is_some()
        && !disk.write_at(start).get().is_multiple_of(PAGE)
    {
        log::warn!(
            "{}: --cow-cache=direct: the data does not begin at a multiple of {PAGE} bytes, as in old files of UML; \
             writes go through the page cache",
            top.path().display()
        );
    }
    let access = if disk.read_only() { "read-only" } else { "writable" };
    log::info!("{} sectors of 512 bytes, {access}", disk.capacity().get());
}

/// Refuses a COW file of another format than the one named. A file that does not exist, or whose
/// header is no good, is left to the opening, which says why.
pub(crate) fn check_format(path: &Path, expected: Option<Format>) -> Result<(), DaemonError> {
    let Some(expected) = expected else { return Ok(()) };
    let found = match signature_of(&Host, path) {
        Some(Signature::Uml) => Format::Uml,
        Some(Signature::Native) => Format::Native,
        _ => return Ok(()),
    };
    if found == expected {
        return Ok(());
    }
    Err(DaemonError::Format { path: path.to_owned(), found, expected })
}

/// Refuses to make a COW file over a base that begins like another format: it would be taken for the
/// bytes of a disk. (Where it is one, for a guest can have written anything there, `cow create -F raw`
/// makes the COW file.)
fn check_base(base: &Path) -> Result<(), DaemonError> {
    let found = match signature_of(&Host, base) {
        Some(Signature::Qcow2) => "a qcow2 image",
        Some(Signature::Uml | Signature::Native | Signature::BrokenCow) => "a COW file",
        None => return Ok(()),
    };
    Err(DaemonError::Base { path: base.to_owned(), found })
}

/// Says what to do with a file that is no COW file, which may well be a raw image.
fn unless_raw(path: &Path, error: ImageError) -> DaemonError {
    match error {
        ImageError::Header { source: HeaderError::NotCow { .. }, .. } => {
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

fn serve(daemon: &Daemon, connected: Option<Guest>) -> io::Result<()> {
    let commands = daemon.control.as_ref().map(|control| (daemon, control));
    let commands = commands.as_ref().map(|commands| commands as &dyn Commands);
    let was_connected = connected.is_some();
    if let Some(connection) = connected {
        connection.serve(commands)?;
    }
    match &daemon.socket {
        Socket::Connected(_) if was_connected => Ok(()),
        Socket::Connected(stream) => {
            Connection::new(stream.try_clone()?, &daemon.session)?.serve(commands)
        }
        Socket::Listening(listener) => {
            log::info!("listening");
            while let Some(stream) = next_frontend(listener, commands)? {
                CONNECTIONS.say(Level::Info, format_args!("frontend connected"));
                Connection::new(stream, &daemon.session)?.serve(commands)?;
            }
            Ok(())
        }
    }
}

/// The next connection; `None` when the daemon is to end.
fn next_frontend(
    listener: &Listener,
    commands: Option<&dyn Commands>,
) -> io::Result<Option<UnixStream>> {
    let fds: Vec<_> = [listener.as_fd()].into_iter().chain(commands.map(Commands::fd)).collect();
    loop {
        match wait_readable(&fds, PollTimeout::NONE)? {
            Readable::Stop => return Ok(None),
            Readable::Fd(1) => {
                commands.inspect(|commands| commands.handle(None));
                continue;
            }
            _ => {}
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
                CONNECTIONS.say(Level::Error, format_args!("cannot accept a connection: {e}"));
                if wait_readable(&[], ACCEPT_RETRY_MS.into())? == Readable::Stop {
                    return Ok(None);
                }
            }
        }
    }
}
