//! What a descriptor is that came in a message.
//!
//! This is found out without a system call that can sleep. A file can be on a file system that is a
//! program of the frontend's (FUSE), which fstat(2), fstatfs(2), a page fault and even close(2) ask
//! and wait for. So a descriptor is looked at before anything is done with it, and what is not
//! admitted is closed by a thread that may sleep ([`Foreign`]).

use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, fcntl, readlink};
use nix::sys::socket::{UnixAddr, getsockname};

use crate::process::sandbox::{self, Thread};
use crate::process::signals;

/// Where the kernel shows its devices.
const SYSFS: &str = "/sys";

/// The stack of the thread that closes descriptors, in bytes.
const STACK_BYTES: usize = 64 << 10;

/// What a descriptor is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Eventfd,
    Pipe,
    /// A socket of the unix domain.
    Socket,
    /// A memfd, or a file of tmpfs or hugetlbfs.
    SharedMemory,
    /// A DAX character device.
    Dax,
    /// A file of a file system on a block device, as ext4 and XFS are.
    DiskFile,
    /// A file of another file system: FUSE, a network, btrfs, overlayfs, ...
    OtherFile,
    /// What its link in /proc says.
    Unknown(PathBuf),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eventfd => "an eventfd",
            Self::Pipe => "a pipe",
            Self::Socket => "a unix socket",
            Self::SharedMemory => "shared memory",
            Self::Dax => "a DAX device",
            Self::DiskFile => "a file",
            Self::OtherFile => "a file of a file system that may not answer",
            Self::Unknown(link) => return write!(f, "{:?}", link.as_os_str()),
        })
    }
}

impl Kind {
    /// What `fd` is.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> Self {
        // The kernel has seals for tmpfs, of which memfds are, and hugetlbfs only.
        if fcntl(fd, FcntlArg::F_GET_SEALS).is_ok() {
            return Self::SharedMemory;
        }
        let link = readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()).as_str());
        let link = link.unwrap_or_default();
        // A file's begins with "/", whatever its name is.
        match link.as_bytes() {
            b"anon_inode:[eventfd]" => Self::Eventfd,
            name if name.starts_with(b"pipe:") => Self::Pipe,
            name if name.starts_with(b"socket:") && is_unix(fd) => Self::Socket,
            _ => Self::of_file(fd).unwrap_or(Self::Unknown(link.into())),
        }
    }

    fn of_file(fd: BorrowedFd<'_>) -> Option<Self> {
        let found = stat_without_asking(fd)?;
        match u32::from(found.stx_mode) & libc::S_IFMT {
            // File systems without a block device share the major number 0.
            libc::S_IFREG if found.stx_dev_major == 0 => Some(Self::OtherFile),
            libc::S_IFREG => Some(Self::DiskFile),
            libc::S_IFCHR => {
                let device = Dax::new(Path::new(SYSFS), found.stx_rdev_major, found.stx_rdev_minor);
                device.exists().then_some(Self::Dax)
            }
            _ => None,
        }
    }
}

fn is_unix(fd: BorrowedFd<'_>) -> bool {
    getsockname::<UnixAddr>(fd.as_raw_fd()).is_ok()
}

/// What is known of a file without asking the file system's program or server.
fn stat_without_asking(fd: BorrowedFd<'_>) -> Option<libc::statx> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is a string, and `found` has room for the answer.
    let result = unsafe {
        libc::statx(fd.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, found.as_mut_ptr())
    };
    // SAFETY: all-zero bytes are a valid statx, and so is what the kernel made of them.
    (result == 0).then(|| unsafe { found.assume_init() })
}

/// A DAX character device, in sysfs.
pub(crate) struct Dax(PathBuf);

impl Dax {
    fn new(sysfs: &Path, major: u32, minor: u32) -> Self {
        Dax(sysfs.join(format!("dev/char/{major}:{minor}")))
    }

    /// The device behind `fd`, whether or not it is one.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> Option<Self> {
        let found = stat_without_asking(fd)?;
        Some(Self::new(Path::new(SYSFS), found.stx_rdev_major, found.stx_rdev_minor))
    }

    /// Whether it is a DAX device.
    fn exists(&self) -> bool {
        let subsystem = self.0.join("subsystem").read_link();
        subsystem.is_ok_and(|path| path.file_name().is_some_and(|name| name == "dax"))
    }

    /// The size of its pages in bytes. Mappings cannot be split at less.
    pub(crate) fn page_size(&self) -> Option<u64> {
        let align = std::fs::read_to_string(self.0.join("align")).ok()?;
        align.trim().parse().ok().filter(|size: &u64| size.is_power_of_two())
    }
}

/// Descriptors that were not looked at. They are closed by a thread of their own, which may sleep.
#[derive(Debug, Default)]
pub(crate) struct Foreign(Vec<OwnedFd>);

static CLOSING: Mutex<Closing> = Mutex::new(Closing { waiting: Vec::new(), running: false });

struct Closing {
    waiting: Vec<OwnedFd>,
    /// A thread closes them.
    running: bool,
}

impl Foreign {
    /// Adds descriptors.
    pub(crate) fn extend(&mut self, fds: impl IntoIterator<Item = OwnedFd>) {
        self.0.extend(fds);
    }

    /// What they are.
    pub(crate) fn kinds(&self) -> impl Iterator<Item = Kind> + '_ {
        self.0.iter().map(|fd| Kind::of(fd.as_fd()))
    }

    /// The descriptors, none of which sleeps when it is closed.
    pub(crate) fn admitted(mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.0)
    }

    /// Whether descriptors could not be closed yet. To start a program would then wait for them too.
    pub(crate) fn any_unclosed() -> bool {
        let closing = lock_closing();
        closing.running || !closing.waiting.is_empty()
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        if self.0.is_empty() {
            return;
        }
        let mut closing = lock_closing();
        closing.waiting.append(&mut self.0);
        if !closing.running {
            let thread = std::thread::Builder::new().name("closer".to_owned());
            let start = || thread.stack_size(STACK_BYTES).spawn(close_all);
            // Without it they wait for the next time.
            closing.running = signals::starting_threads(start).is_ok();
        }
    }
}

fn lock_closing() -> MutexGuard<'static, Closing> {
    CLOSING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Closes what waits, then ends.
fn close_all() {
    sandbox::narrow(Thread::Closer);
    loop {
        let mut closing = lock_closing();
        let Some(fd) = closing.waiting.pop() else {
            closing.running = false;
            return;
        };
        drop(closing);
        drop(fd);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::UdpSocket;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixStream;

    use nix::sys::eventfd::EventFd;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::stat::Mode;

    use super::*;

    fn kind(fd: impl AsFd) -> Kind {
        Kind::of(fd.as_fd())
    }

    #[test]
    fn kinds_are_told_apart() {
        assert_eq!(kind(EventFd::new().unwrap()), Kind::Eventfd);
        let (reader, writer) = std::io::pipe().unwrap();
        assert_eq!((kind(reader), kind(writer)), (Kind::Pipe, Kind::Pipe));
        assert_eq!(kind(UnixStream::pair().unwrap().0), Kind::Socket);
        let memfd = memfd_create(c"pipe:", MFdFlags::MFD_CLOEXEC).unwrap();
        assert_eq!(kind(memfd), Kind::SharedMemory);
        for path in ["/", "/dev/null", "/dev/zero"] {
            assert_eq!(kind(File::open(path).unwrap()), Kind::Unknown(path.into()));
        }
        // What only looks like one of them.
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(matches!(kind(udp), Kind::Unknown(_)));
        let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty());
        assert_eq!(kind(epoll.unwrap().0), Kind::Unknown("anon_inode:[eventpoll]".into()));
        assert_eq!(kind(File::open("/proc/self/status").unwrap()), Kind::OtherFile);
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("pipe:[1]");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let fifo = File::options().read(true).write(true).open(fifo).unwrap();
        assert!(matches!(kind(fifo), Kind::Unknown(_)));
    }

    #[test]
    fn what_was_not_admitted_is_closed_all_the_same() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut foreign = Foreign::default();
        foreign.extend([writer.into()]);
        drop(foreign);
        // Its end is seen.
        assert_eq!(std::io::Read::read(&mut reader, &mut [0; 1]).unwrap(), 0);
        testkit::wait::wait_until("the thread's end", || !Foreign::any_unclosed());
    }

    #[test]
    fn a_dax_device_says_how_large_its_pages_are() {
        let sysfs = tempfile::tempdir().unwrap();
        let device = sysfs.path().join("dev/char/252:7");
        std::fs::create_dir_all(&device).unwrap();
        let dax = Dax::new(sysfs.path(), 252, 7);
        assert!(!dax.exists());
        symlink("../../../../bus/mem", device.join("subsystem")).unwrap();
        assert!(!dax.exists(), "/dev/zero and the like");
        std::fs::remove_file(device.join("subsystem")).unwrap();
        symlink("../../../../bus/dax", device.join("subsystem")).unwrap();
        assert!(dax.exists());
        assert_eq!(dax.page_size(), None);
        for (align, size) in [("2097152\n", Some(2 << 20)), ("12\n", None), ("\n", None)] {
            std::fs::write(device.join("align"), align).unwrap();
            assert_eq!(dax.page_size(), size);
        }
    }
}
