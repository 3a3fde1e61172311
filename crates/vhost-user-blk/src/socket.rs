//! Where frontends come from: a socket file that the daemon makes, or a descriptor it was given.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use nix::sys::signal::kill;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getpeername, getsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;

/// Longest path of a socket in bytes: `sun_path` has 108, the last for the NUL (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// How long to wait until a predecessor that was killed is gone altogether, with its sockets and, as
/// soon as its I/O has ended, its locks. Usually that is some ten milliseconds; a sync on a busy disk
/// can take more than a second.
pub const PREDECESSOR_WAIT: Duration = Duration::from_secs(5);
/// Between two looks at a predecessor's socket.
const RETRY: Duration = Duration::from_millis(5);
/// Owner and group may connect, others not. A frontend of another user is let in by running the
/// daemon with that user's group.
const SOCKET_MODE_MASK: Mode = Mode::from_bits_truncate(0o117);
/// Nobody else may connect.
const CONTROL_MODE_MASK: Mode = Mode::from_bits_truncate(0o177);

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `--socket-path`: make a socket file and listen.
    Path(PathBuf),
    /// `--fd`: an open descriptor, listening or connected.
    Fd(RawFd),
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The kernel has no room for the path.
    #[error(
        "{option}: {}: the path has {len} bytes, a socket's path can have {SOCKET_PATH_MAX}; \
         choose a shorter one, or start the daemon in that directory and give a relative path",
        path.display()
    )]
    PathTooLong {
        /// `--socket-path` or `--control`.
        option: &'static str,
        /// As given.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Another process listens there.
    #[error(
        "{option}: {}: another process is listening on this socket; stop it or choose another \
         path",
        path.display()
    )]
    Alive {
        /// `--socket-path` or `--control`.
        option: &'static str,
        /// As given.
        path: PathBuf,
    },
    /// A file that is no socket is never removed.
    #[error(
        "{option}: {}: the path exists and is {found}, not a socket; remove it or choose \
         another path",
        path.display()
    )]
    NotASocketFile {
        /// `--socket-path` or `--control`.
        option: &'static str,
        /// As given.
        path: PathBuf,
        /// What stands there.
        found: &'static str,
    },
    /// The system refused.
    #[error("{option}: {}: cannot {what}: {source}", path.display())]
    Path {
        /// `--socket-path` or `--control`.
        option: &'static str,
        /// As given.
        path: PathBuf,
        /// The operation.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// `--fd` names nothing that can be used.
    #[error(
        "--fd={fd}: {found}; expected a listening or connected unix stream socket that the parent \
         process left open"
    )]
    BadFd {
        /// As given.
        fd: RawFd,
        /// What it is.
        found: String,
    },
}

impl SocketError {
    /// Whether the command line is wrong in itself, whatever the state of the system.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, SocketError::PathTooLong { .. } | SocketError::BadFd { .. })
    }
}

/// An open socket.
#[derive(Debug)]
pub enum Socket {
    /// Accepts one frontend after the other.
    Listening(Listener),
    /// One frontend, and when it goes, none.
    Connected(UnixStream),
}

impl Socket {
    /// Makes or takes the socket. From here on a frontend can connect; it waits until it is accepted.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn open(endpoint: &Endpoint) -> Result<Self, SocketError> {
        match endpoint {
            Endpoint::Path(path) => {
                let option = "--socket-path";
                Listener::bind(Place { option, path, mask: SOCKET_MODE_MASK })
                    .map(Socket::Listening)
            }
            Endpoint::Fd(fd) => from_fd(*fd),
        }
    }
}

/// A listening socket, and the file it made, which goes when it goes.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    file: Option<SocketFile>,
}

impl Listener {
    /// Makes the control socket, for the daemon's user alone: who may connect to it may have the
    /// daemon run any program.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn control(path: &Path) -> Result<Self, SocketError> {
        Self::bind(Place { option: "--control", path, mask: CONTROL_MODE_MASK })
    }

    fn bind(place: Place<'_>) -> Result<Self, SocketError> {
        let Place { option, path, .. } = place;
        let len = path.as_os_str().as_bytes().len();
        if len > SOCKET_PATH_MAX {
            return Err(SocketError::PathTooLong { option, path: path.to_owned(), len });
        }
        let inner = {
            // Between bind(2) and listen(2) the socket looks like one that nobody listens on.
            let lock = lock_directory(place);
            match bind(place) {
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => take_over(place, &lock?)?,
                other => other.map_err(|e| error(place, "make the socket", e))?,
            }
        };
        let metadata =
            fs::symlink_metadata(path).map_err(|e| error(place, "read its metadata", e))?;
        let file = SocketFile { path: path.to_owned(), id: file_id(&metadata) };
        Ok(Listener { inner, file: Some(file) })
    }

    /// Goes on with a socket that another program has opened, and the file that it made, named by
    /// device and inode.
    pub fn inherit(fd: OwnedFd, file: Option<((u64, u64), PathBuf)>) -> Self {
        let file = file.map(|(id, path)| SocketFile { path, id });
        Listener { inner: UnixListener::from(fd), file }
    }

    /// The file that it made, by device and inode.
    pub fn file_id(&self) -> Option<(u64, u64)> {
        self.file.as_ref().map(|file| file.id)
    }

    /// Takes the next frontend; waits for none if the socket is non-blocking.
    ///
    /// # Errors
    /// What accept(2) says.
    pub fn accept(&self) -> io::Result<UnixStream> {
        self.inner.accept().map(|(stream, _)| stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            file.remove();
        }
    }
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl SocketFile {
    /// Removes the file, unless another one has taken its name since.
    fn remove(self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|m| file_id(&m) == self.id);
        if ours && let Err(e) = fs::remove_file(&self.path) {
            log::warn!("{}: cannot remove the socket: {e}", self.path.display());
        }
    }
}

fn file_id(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// A socket file that is to be made.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// Who named it.
    option: &'static str,
    path: &'a Path,
    /// Permissions that it does not have.
    mask: Mode,
}

fn bind(place: Place<'_>) -> io::Result<UnixListener> {
    // The mode comes from the umask, so that the socket never exists with a wider one. The process
    // has one thread now.
    let before = umask(place.mask);
    let result = UnixListener::bind(place.path);
    umask(before);
    result
}

/// Locks the directory of a socket, which leaves no file behind: of several daemons one at a time
/// makes a socket there.
fn lock_directory(place: Place<'_>) -> Result<Flock<File>, SocketError> {
    let parent = match place.path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(parent).map_err(|e| error(place, "open its directory", e))?;
    Flock::lock(directory, FlockArg::LockExclusive)
        .map_err(|(_, e)| error(place, "lock its directory", e.into()))
}

/// Takes over a socket file whose process is gone. Between the look and the removal another daemon
/// might take it over as well, and lose its new socket to us: hence the lock.
fn take_over(place: Place<'_>, _lock: &Flock<File>) -> Result<UnixListener, SocketError> {
    let Place { option, path, .. } = place;
    match fs::symlink_metadata(path) {
        Ok(metadata) => check_stale(place, &metadata)?,
        // Its owner has removed it meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(error(place, "read its metadata", e)),
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(error(place, "remove the stale socket", e));
        }
        _ => log::info!("{}: took over a socket that nobody listened on", path.display()),
    }
    bind(place).map_err(|e| match e.kind() {
        io::ErrorKind::AddrInUse => SocketError::Alive { option, path: path.to_owned() },
        _ => error(place, "make the socket", e),
    })
}

/// Whether nobody listens on the socket at `path`.
fn check_stale(place: Place<'_>, metadata: &Metadata) -> Result<(), SocketError> {
    let Place { option, path, .. } = place;
    let kind = metadata.file_type();
    if !kind.is_socket() {
        let found = match () {
            () if kind.is_dir() => "a directory",
            () if kind.is_symlink() => "a symbolic link",
            () if kind.is_file() => "a regular file",
            () => "a special file",
        };
        return Err(SocketError::NotASocketFile { option, path: path.to_owned(), found });
    }
    let deadline = Instant::now() + PREDECESSOR_WAIT;
    loop {
        return match try_connect(path) {
            Err(Errno::ECONNREFUSED) => Ok(()),
            // Whoever listened is gone; a child that it was about to start has the socket for a
            // moment longer.
            Ok(Some(pid)) if is_gone(pid) && Instant::now() < deadline => {
                std::thread::sleep(RETRY);
                continue;
            }
            // EAGAIN: so alive that its queue is full.
            Ok(_) | Err(Errno::EAGAIN) => Err(SocketError::Alive { option, path: path.to_owned() }),
            Err(e) => Err(error(place, "find out whether a process listens on it", e.into())),
        };
    }
}

/// Connects and disconnects, without waiting for room in the other's queue; says which process
/// began to listen, if it can be seen from here.
fn try_connect(path: &Path) -> nix::Result<Option<Pid>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    let pid = getsockopt(&socket, sockopt::PeerCredentials)?.pid();
    Ok((pid > 0).then(|| Pid::from_raw(pid)))
}

fn is_gone(pid: Pid) -> bool {
    kill(pid, None) == Err(Errno::ESRCH)
}

fn error(place: Place<'_>, what: &'static str, source: io::Error) -> SocketError {
    SocketError::Path { option: place.option, path: place.path.to_owned(), what, source }
}

fn from_fd(number: RawFd) -> Result<Socket, SocketError> {
    let bad = |found: &str| SocketError::BadFd { fd: number, found: found.to_owned() };
    if number < 0 {
        return Err(bad("a descriptor number is not negative"));
    }
    // SAFETY: borrowed only to ask the kernel, which answers EBADF for a number that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|_| bad("the descriptor is not open"))?;
    let kind = getsockopt(&borrowed, sockopt::SockType).map_err(|e| match e {
        Errno::ENOTSOCK => bad("the descriptor is no socket"),
        e => bad(e.desc()),
    })?;
    if socket_domain(borrowed) != Some(libc::AF_UNIX) {
        return Err(bad("the socket is not a unix socket"));
    }
    if kind != SockType::Stream {
        return Err(bad("the socket is not a stream socket"));
    }
    let listening = getsockopt(&borrowed, sockopt::AcceptConn).map_err(|e| bad(e.desc()))?;
    if !listening && getpeername::<UnixAddr>(number).is_err() {
        return Err(bad("the socket neither listens nor is connected"));
    }

    // SAFETY: the number is open, as was just seen, and is ours: the parent passed it to be used by
    // this option, which is looked at once.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    Ok(if listening {
        Socket::Listening(Listener { inner: UnixListener::from(owned), file: None })
    } else {
        Socket::Connected(UnixStream::from(owned))
    })
}

/// `SO_DOMAIN`, which nix does not know.
fn socket_domain(fd: BorrowedFd<'_>) -> Option<libc::c_int> {
    let mut domain: libc::c_int = 0;
    let mut len = libc::socklen_t::try_from(size_of_val(&domain)).ok()?;
    // SAFETY: `domain` and `len` are valid for writes, and `len` is the size of `domain`.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DOMAIN,
            (&raw mut domain).cast(),
            &raw mut len,
        )
    };
    (result == 0).then_some(domain)
}
