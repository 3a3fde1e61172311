//! The socket for frontends: a socket file that the daemon creates, or an inherited descriptor.

use std::ffi::{CString, OsStr};
use std::fs::{self, File, Metadata};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::kill;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, bind, connect, getpeername, getsockopt, socket,
    sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;

/// Longest path of a socket in bytes: `sun_path` has 108, the last for the NUL (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// How long to wait until a killed predecessor is completely gone, with its sockets and, once its
/// I/O has ended, its locks. Usually that takes some ten milliseconds; a sync on a busy disk can
/// take more than a second.
pub const PREDECESSOR_WAIT: Duration = Duration::from_secs(5);
/// How long to wait for the lock of a socket's directory. Daemons hold it for some microseconds.
const DIRECTORY_WAIT: Duration = Duration::from_secs(1);
/// Interval between two checks of a predecessor's socket.
const RETRY: Duration = Duration::from_millis(5);
/// Owner and group may connect, others may not. To admit a frontend of another user, run the daemon
/// with that user's group.
const SOCKET_MODE_MASK: Mode = Mode::from_bits_truncate(0o117);
/// Only the owner may connect.
const CONTROL_MODE_MASK: Mode = Mode::from_bits_truncate(0o177);
/// How far the listening socket's number is above the lowest free one, at least. This is more than
/// the number of descriptors that are opened before a connection is accepted: four for each of the
/// 65 files that a disk can have, and some.
const ROOM_BELOW_LISTENER: RawFd = 512;

/// The socket that the command line names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `--socket-path`: create a socket file and listen.
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
    /// The path is not a socket. Such a file is never removed.
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
        /// What the path is.
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
    /// Whoever has the other end of a pair need not be who made it.
    #[error(
        "--fd={fd}: a connected socket cannot be combined with --allow-uid and --allow-gid: its other \
         end is in the hands of whoever got it from the process that made it; leave them out, or pass \
         a listening socket"
    )]
    ConnectedPeer {
        /// As given.
        fd: RawFd,
    },
    /// `--fd` names no usable socket.
    #[error(
        "--fd={fd}: {found}; expected a listening or connected unix stream socket that the parent \
         process left open"
    )]
    BadFd {
        /// As given.
        fd: RawFd,
        /// What is wrong with it.
        found: String,
    },
}

impl SocketError {
    /// Whether the command line itself is wrong, independent of the state of the system.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        use SocketError::{BadFd, ConnectedPeer, PathTooLong};
        matches!(self, PathTooLong { .. } | BadFd { .. } | ConnectedPeer { .. })
    }
}

/// An open socket.
#[derive(Debug)]
pub enum Socket {
    /// Accepts one frontend after the other.
    Listening(Listener),
    /// One frontend only.
    Connected(UnixStream),
}

impl Endpoint {
    /// Checks that the socket can be opened; a `selective` one must tell who connects. No frontend
    /// can connect yet, and no file is left.
    pub fn check(&self, selective: bool) -> Result<(), SocketError> {
        match *self {
            Endpoint::Path(ref path) => Place::of_frontends(path).make(bind_and_remove),
            Endpoint::Fd(fd) => match check_fd(fd)? {
                false if selective => Err(SocketError::ConnectedPeer { fd }),
                _ => Ok(()),
            },
        }
    }
}

impl Socket {
    /// Creates or takes the socket. From now on a frontend can connect; it waits until it is
    /// accepted. To be called only when everything else is ready. If the daemon ends after a
    /// frontend has connected, some frontends give up the disk, while all of them retry if they
    /// cannot connect.
    pub fn open(endpoint: &Endpoint) -> Result<Self, SocketError> {
        let socket = match endpoint {
            Endpoint::Path(path) => Socket::Listening(Listener::bind(Place::of_frontends(path))?),
            Endpoint::Fd(fd) => from_fd(*fd)?,
        };
        Ok(match socket {
            Socket::Listening(listener) => Socket::Listening(listener.placed_high()),
            connected @ Socket::Connected(_) => connected,
        })
    }
}

/// A listening socket, and its file, which is removed with it.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    file: Option<SocketFile>,
}

impl Listener {
    /// Creates the control socket. Only the daemon's user may connect.
    pub fn control(path: &Path) -> Result<Self, SocketError> {
        Self::bind(Place { option: "--control", path, mask: CONTROL_MODE_MASK })
    }

    fn bind(place: Place<'_>) -> Result<Self, SocketError> {
        let (inner, file) = place.make(|path| {
            let inner = UnixListener::bind(path)?;
            Ok((inner, SocketFile::new(path, file_id(&fs::symlink_metadata(path)?))?))
        })?;
        Ok(Listener { inner, file: Some(file) })
    }

    /// The same socket, with a number above those of all connections that it will accept.
    ///
    /// When a process dies, the kernel closes its descriptors from the highest number down.
    /// (close_files() goes up and puts each on a list of work, whose last entry is done first.) So
    /// a frontend that sees the end of its connection and connects again at once is refused. In the
    /// other order it would get into the queue of a process that is ending, and some frontends then
    /// give up the disk.
    #[must_use]
    pub fn placed_high(mut self) -> Self {
        match duplicate_high(self.inner.as_fd()) {
            Ok(high) => self.inner = UnixListener::from(high),
            Err(e) => log::warn!(
                "cannot give the listening socket a high number: {e}; if this process is killed, a \
                 frontend that reconnects at once may lose its disk"
            ),
        }
        self
    }

    /// Removes the file, then closes the socket. (While the socket is open, no other file can get
    /// the inode.) If another process has the socket open as well, it goes on there.
    /// Async-signal-safe.
    ///
    /// `placeholder` is an open descriptor. A duplicate of it takes the socket's number, which this
    /// listener still owns.
    pub(crate) fn close_in_handler(&self, placeholder: RawFd) {
        if let Some(file) = &self.file {
            file.remove();
        }
        // SAFETY: both numbers are open; the second is owned by `inner`, which from here on owns a
        // duplicate of `placeholder`.
        unsafe { libc::dup3(placeholder, self.inner.as_raw_fd(), libc::O_CLOEXEC) };
    }

    /// Takes over a socket that another program has opened, and its file, named by device and
    /// inode.
    pub fn inherit(fd: OwnedFd, file: Option<((u64, u64), PathBuf)>) -> io::Result<Self> {
        let file = file.map(|(id, path)| SocketFile::new(&path, id)).transpose()?;
        Ok(Listener { inner: UnixListener::from(fd), file })
    }

    /// Its file, by device and inode, unless it has been removed.
    pub fn file_id(&self) -> Option<(u64, u64)> {
        self.file.as_ref().filter(|file| !file.is_removed()).map(|file| file.id)
    }

    /// Accepts the next connection. Does not wait if the socket is non-blocking.
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
            file.log_failure();
        }
    }
}

/// A socket's file, which is removed only once: later another file may have its name, and even its
/// inode number.
#[derive(Debug)]
struct SocketFile {
    path: CString,
    id: (u64, u64),
    removed: AtomicBool,
    /// Why it could not be removed; 0 if it was.
    errno: AtomicI32,
}

impl SocketFile {
    fn new(path: &Path, id: (u64, u64)) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        Ok(SocketFile { path, id, removed: AtomicBool::new(false), errno: AtomicI32::new(0) })
    }

    fn is_removed(&self) -> bool {
        self.removed.load(Ordering::SeqCst)
    }

    /// Removes the file, unless another file has its name now. Async-signal-safe, but may change
    /// errno.
    fn remove(&self) {
        if self.removed.swap(true, Ordering::SeqCst) {
            return;
        }
        let mut found = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the path ends with NUL, and `found` is a whole `stat`.
        if unsafe { libc::lstat(self.path.as_ptr(), found.as_mut_ptr()) } != 0 {
            return;
        }
        // SAFETY: lstat has filled it.
        let found = unsafe { found.assume_init() };
        if (found.st_dev, found.st_ino) != self.id {
            return;
        }
        // SAFETY: the path ends with NUL.
        if unsafe { libc::unlink(self.path.as_ptr()) } != 0 {
            self.errno.store(Errno::last_raw(), Ordering::SeqCst);
        }
    }

    /// Logs the reason if the file could not be removed.
    fn log_failure(&self) {
        let errno = self.errno.load(Ordering::SeqCst);
        if errno != 0 {
            let path = Path::new(OsStr::from_bytes(self.path.as_bytes()));
            let e = io::Error::from_raw_os_error(errno);
            log::warn!("{}: cannot remove the socket: {e}", path.display());
        }
    }
}

fn file_id(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// A socket file to create.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// The option that names it.
    option: &'static str,
    path: &'a Path,
    /// Permissions that it must not have.
    mask: Mode,
}

impl<'a> Place<'a> {
    fn of_frontends(path: &'a Path) -> Self {
        Place { option: "--socket-path", path, mask: SOCKET_MODE_MASK }
    }

    /// Creates the socket file with `make`. A stale one is replaced.
    fn make<T>(self, make: impl Fn(&Path) -> io::Result<T>) -> Result<T, SocketError> {
        let Place { option, path, mask } = self;
        let len = path.as_os_str().as_bytes().len();
        if len > SOCKET_PATH_MAX {
            return Err(SocketError::PathTooLong { option, path: path.to_owned(), len });
        }
        let make = || {
            // The mode comes from the umask, so that the socket never exists with a wider one. No
            // other thread of this process makes files.
            let before = umask(mask);
            let result = make(path);
            umask(before);
            result
        };
        // Between bind(2) and listen(2) the socket looks stale, hence the lock.
        let lock = lock_directory(self);
        match make() {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
                make_room(self, &lock?)?;
                make().map_err(|e| match e.kind() {
                    io::ErrorKind::AddrInUse => {
                        SocketError::Alive { option, path: path.to_owned() }
                    }
                    _ => error(self, "make the socket", e),
                })
            }
            other => other.map_err(|e| error(self, "make the socket", e)),
        }
    }
}

/// Creates a socket file without listening on it, and removes it.
fn bind_and_remove(path: &Path) -> io::Result<()> {
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    fs::remove_file(path)
}

/// A duplicate with a number above those of the connections to come.
fn duplicate_high(fd: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let duplicate = |min: RawFd| {
        let number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(min))?;
        // SAFETY: the kernel has just made it.
        Ok::<_, Errno>(unsafe { OwnedFd::from_raw_fd(number) })
    };
    // The lowest free number. It is above all open ones unless the parent has left gaps.
    let lowest = duplicate(0)?;
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let highest = RawFd::try_from(limit).unwrap_or(RawFd::MAX) - 1;
    duplicate(lowest.as_raw_fd().saturating_add(ROOM_BELOW_LISTENER).min(highest))
}

/// The directory in which a file of this name is.
pub(crate) fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Locks the directory of a socket, so that only one daemon at a time creates a socket there. A
/// lock on the directory leaves no lock file behind. Daemons hold it for a moment; but whoever may
/// read the directory can lock it, so the wait has an end.
fn lock_directory(place: Place<'_>) -> Result<Flock<File>, SocketError> {
    let mut directory =
        File::open(directory_of(place.path)).map_err(|e| error(place, "open its directory", e))?;
    let deadline = Instant::now() + DIRECTORY_WAIT;
    loop {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < deadline => {
                directory = file;
            }
            Err((_, e)) => return Err(error(place, "lock its directory", e.into())),
        }
        std::thread::sleep(RETRY);
    }
}

/// Removes a socket file whose process is gone. Without the lock another daemon could replace the
/// file between the check and the removal, and would lose its new socket.
fn make_room(place: Place<'_>, _lock: &Flock<File>) -> Result<(), SocketError> {
    let path = place.path;
    match fs::symlink_metadata(path) {
        Ok(metadata) => check_stale(place, &metadata)?,
        // Its owner has just removed it.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(error(place, "read its metadata", e)),
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(error(place, "remove the stale socket", e))
        }
        _ => {
            log::info!("{}: replaced a stale socket", path.display());
            Ok(())
        }
    }
}

/// Checks that no process listens on the socket.
fn check_stale(place: Place<'_>, metadata: &Metadata) -> Result<(), SocketError> {
    let Place { option, path, .. } = place;
    let kind = metadata.file_type();
    if !kind.is_socket() {
        let found = if kind.is_dir() {
            "a directory"
        } else if kind.is_symlink() {
            "a symbolic link"
        } else if kind.is_file() {
            "a regular file"
        } else {
            "a special file"
        };
        return Err(SocketError::NotASocketFile { option, path: path.to_owned(), found });
    }
    let deadline = Instant::now() + PREDECESSOR_WAIT;
    loop {
        return match try_connect(path) {
            Err(Errno::ECONNREFUSED) => Ok(()),
            // The listening process is gone. A child that it was starting has the socket open a
            // moment longer.
            Ok(Some(pid)) if is_gone(pid) && Instant::now() < deadline => {
                std::thread::sleep(RETRY);
                continue;
            }
            // EAGAIN: it is alive, and its queue is full.
            Ok(_) | Err(Errno::EAGAIN) => Err(SocketError::Alive { option, path: path.to_owned() }),
            Err(e) => Err(error(place, "find out whether a process listens on it", e.into())),
        };
    }
}

/// Connects and disconnects, without waiting for room in the queue. Returns the process that called
/// listen(2), if it is visible from here.
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

/// Checks that a descriptor is a usable socket. Returns whether it listens.
fn check_fd(number: RawFd) -> Result<bool, SocketError> {
    let bad = |found: &str| SocketError::BadFd { fd: number, found: found.to_owned() };
    if number < 0 {
        return Err(bad("a descriptor number is not negative"));
    }
    // SAFETY: borrowed only to ask the kernel, which answers EBADF for a number that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|_| bad("the descriptor is not open"))?;
    let kind = getsockopt(&borrowed, sockopt::SockType).map_err(|e| match e {
        Errno::ENOTSOCK => bad("the descriptor is not a socket"),
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
    Ok(listening)
}

fn from_fd(number: RawFd) -> Result<Socket, SocketError> {
    let listening = check_fd(number)?;
    // SAFETY: the number is open, as was just checked, and is ours: the parent passed it for this
    // option, which is used once.
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
