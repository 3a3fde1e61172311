//! Where frontends come from: a socket file that the daemon makes, or a descriptor it was given.

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
/// The listening socket's number is at least so far above the lowest free one: more than what is
/// opened between that and the accept of a connection, which is four descriptors for each of the 65
/// files that a disk can have, and some.
const ROOM_BELOW_LISTENER: RawFd = 512;

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

impl Endpoint {
    /// Whether there could be such a socket. Nobody can connect yet, and no file is left.
    pub fn check(&self) -> Result<(), SocketError> {
        match self {
            Endpoint::Path(path) => Place::of_frontends(path).make(bind_and_remove),
            Endpoint::Fd(fd) => check_fd(*fd).map(|_| ()),
        }
    }
}

impl Socket {
    /// Makes or takes the socket. From here on a frontend can connect; it waits until it is
    /// accepted. To be called when nothing stands in the way of serving it: some frontends give a
    /// disk up whose daemon ends after they have connected, while all try again where they cannot
    /// connect.
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

/// A listening socket, and the file it made, which goes when it goes.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    file: Option<SocketFile>,
}

impl Listener {
    /// Makes the control socket, for the daemon's user alone: who may connect to it may have the
    /// daemon run any program.
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

    /// The same socket with a number above that of every connection that it will give.
    ///
    /// When a process dies the kernel closes its descriptors from the highest number down.
    /// (close_files() goes up and puts each on a list of work, whose last entry is done first.) So
    /// a frontend that sees the end of its connection and connects again at once finds nobody; the
    /// other way round it would be taken into the queue of a process that is ending, which some
    /// take for the end of the disk.
    #[must_use]
    pub fn placed_high(mut self) -> Self {
        match duplicate_high(self.inner.as_fd()) {
            Ok(high) => self.inner = UnixListener::from(high),
            Err(e) => log::warn!(
                "cannot give the listening socket a high number: {e}; if this process is killed, a frontend that \
                 connects again at once may lose its disk"
            ),
        }
        self
    }

    /// Ends it for frontends, its file first, of which the open socket keeps the inode. A socket
    /// that another process has open as well goes on there. Async-signal-safe.
    ///
    /// `stand_in` is an open descriptor that takes the number, which stays this listener's.
    pub(crate) fn close_in_handler(&self, stand_in: RawFd) {
        if let Some(file) = &self.file {
            file.remove();
        }
        // SAFETY: both numbers are open; the second is owned by `inner`, which from here on owns a
        // duplicate of `stand_in`.
        unsafe { libc::dup3(stand_in, self.inner.as_raw_fd(), libc::O_CLOEXEC) };
    }

    /// Goes on with a socket that another program has opened, and the file that it made, named by
    /// device and inode.
    pub fn inherit(fd: OwnedFd, file: Option<((u64, u64), PathBuf)>) -> io::Result<Self> {
        let file = file.map(|(id, path)| SocketFile::new(&path, id)).transpose()?;
        Ok(Listener { inner: UnixListener::from(fd), file })
    }

    /// The file that it made, by device and inode, as long as it has it.
    pub fn file_id(&self) -> Option<(u64, u64)> {
        self.file.as_ref().filter(|file| !file.is_removed()).map(|file| file.id)
    }

    /// Takes the next frontend; waits for none if the socket is non-blocking.
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
            file.complain();
        }
    }
}

/// A socket's file, which is removed once. Later another may have its name, and even its inode
/// number.
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

    /// Removes the file, unless another one has taken its name since. Async-signal-safe; errno may
    /// be another afterwards.
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

    /// Says why it is still there, if it is.
    fn complain(&self) {
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

/// A socket file that is to be made.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// Who named it.
    option: &'static str,
    path: &'a Path,
    /// Permissions that it does not have.
    mask: Mode,
}

impl<'a> Place<'a> {
    fn of_frontends(path: &'a Path) -> Self {
        Place { option: "--socket-path", path, mask: SOCKET_MODE_MASK }
    }

    /// Makes a socket file there, by `make`, in place of one that nobody listens on.
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
        // Between bind(2) and listen(2) the socket looks like one that nobody listens on.
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

/// Makes a socket file to which nobody can connect, and removes it.
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
    // The lowest free number, which is above all that are open unless the parent has left gaps.
    let lowest = duplicate(0)?;
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let highest = RawFd::try_from(limit).unwrap_or(RawFd::MAX) - 1;
    duplicate(lowest.as_raw_fd().saturating_add(ROOM_BELOW_LISTENER).min(highest))
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

/// Removes a socket file whose process is gone. Between the look and the removal another daemon
/// might take it over as well, and lose its new socket to us: hence the lock.
fn make_room(place: Place<'_>, _lock: &Flock<File>) -> Result<(), SocketError> {
    let path = place.path;
    match fs::symlink_metadata(path) {
        Ok(metadata) => check_stale(place, &metadata)?,
        // Its owner has removed it meanwhile.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(error(place, "read its metadata", e)),
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(error(place, "remove the stale socket", e))
        }
        _ => {
            log::info!("{}: took over a socket that nobody listened on", path.display());
            Ok(())
        }
    }
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

/// Whether a descriptor is a socket that can be used, and whether it listens.
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
    Ok(listening)
}

fn from_fd(number: RawFd) -> Result<Socket, SocketError> {
    let listening = check_fd(number)?;
    // SAFETY: the number is open, as was just seen, and is ours: the parent passed it to be used by
    // this option, which is taken once.
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
