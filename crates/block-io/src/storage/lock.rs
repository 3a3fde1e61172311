//! Locks on open file descriptions (OFD locks).
//!
//! An OFD lock is released only with the last reference to its description, and a request in flight
//! in an io_uring is such a reference. A successor that gets the lock therefore knows that its
//! predecessor's I/O has ended. This holds for each description that does I/O: the buffered one
//! locks `[0, 2^62)` and the direct one `[2^62, 2^63)`; without a direct one the buffered one locks
//! both. They conflict with the POSIX whole-file lock of UML's ubd driver. A shared lock leaves out
//! the byte by which QEMU says that it writes, so that it never hides QEMU's lock there.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::storage::{LockError, LockKind};

/// Where the range of the direct description begins: far past any data, and half of what `off_t`
/// can express.
const DIRECT_START: i64 = 1 << 62;

/// The part of a file's lock space that one description locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockRange {
    /// `[0, 2^63)`: the only description of this opening.
    Whole,
    /// `[0, 2^62)`: the buffered description beside a direct one.
    Buffered,
    /// `[2^62, 2^63)`: the direct description.
    Direct,
}

impl LockRange {
    /// `l_start` and `l_len`; a length of 0 means to the end of the lock space.
    fn start_len(self) -> (i64, i64) {
        match self {
            LockRange::Whole => (0, 0),
            LockRange::Buffered => (0, DIRECT_START),
            LockRange::Direct => (DIRECT_START, 0),
        }
    }
}

/// Takes the lock or fails at once.
pub(crate) fn try_lock(file: impl AsFd, kind: LockKind, range: LockRange) -> Result<(), LockError> {
    let request = flock(kind, range);
    let taken = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&request)).and_then(|_| match kind {
        LockKind::Shared => unlock_range(&file, QEMU_WRITES, 1),
        LockKind::Exclusive => Ok(()),
    });
    match taken {
        Ok(()) if kind == LockKind::Shared && qemu_writes(&file) && !no_writer(&file) => {
            Err(LockError::Held { pid: None })
        }
        Ok(()) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => {
            Err(LockError::Held { pid: holder(file, kind, range) })
        }
        Err(errno @ (Errno::ENOLCK | Errno::ENOSYS | Errno::EOPNOTSUPP)) => {
            Err(LockError::Unsupported(errno.into()))
        }
        Err(errno) => Err(LockError::Io(errno.into())),
    }
}

/// Releases everything that the description has locked.
pub(crate) fn unlock(file: impl AsFd) -> io::Result<()> {
    Ok(unlock_range(file, 0, 0)?)
}

fn unlock_range(file: impl AsFd, start: i64, len: i64) -> nix::Result<()> {
    let mut request = flock(LockKind::Shared, LockRange::Whole);
    (request.l_start, request.l_len) = (start, len);
    // 2: no truncation.
    #[allow(clippy::cast_possible_truncation)]
    {
        request.l_type = libc::F_UNLCK as i16;
    }
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&request)).map(|_| ())
}

/// The process that holds a conflicting POSIX lock, as UML's driver does. OFD locks belong to no
/// process.
fn holder(file: impl AsFd, kind: LockKind, range: LockRange) -> Option<i32> {
    let mut answer = flock(kind, range);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut answer)).ok()?;
    (i32::from(answer.l_type) != libc::F_UNLCK && answer.l_pid > 0).then_some(answer.l_pid)
}

/// Whether QEMU says that it has the file open for writing.
///
/// All its locks are shared: byte 100 + n is locked by a process that does the n-th of a list of
/// things with the file, of which writing is number 1 (`block/file-posix.c`,
/// `include/block/block-common.h`). Our own shared lock keeps QEMU from writing: it locks byte 201.
/// What begins at byte 0 is the shared lock of an older version of this program.
fn qemu_writes(file: impl AsFd) -> bool {
    let mut answer = flock(LockKind::Exclusive, LockRange::Whole);
    (answer.l_start, answer.l_len) = (QEMU_WRITES, 1);
    let asked = fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut answer));
    asked.is_ok() && i32::from(answer.l_type) != libc::F_UNLCK && answer.l_start != 0
}

/// Whether it is certain that no process has the file open for writing, whatever the locks say:
/// for a shared lock it takes no more than permission to read. A read lease is granted only on a
/// file that nobody has open for writing, and only to the file's owner and with CAP_LEASE.
fn no_writer(file: impl AsFd) -> bool {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: these commands take a number, and the descriptor is open. The first makes the kernel
    // report the end of the lease by a signal that is ignored unless a program handles it; SIGIO,
    // the default, would kill the process. The end of the lease undoes that.
    unsafe {
        libc::fcntl(fd, F_SETSIG, libc::SIGURG) == 0
            && libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) == 0
            && libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) == 0
    }
}

/// linux/fcntl.h; libc does not have it.
const F_SETSIG: libc::c_int = 10;

/// The byte that QEMU locks in a file that it may write to.
const QEMU_WRITES: i64 = 101;

fn flock(kind: LockKind, range: LockRange) -> libc::flock {
    let l_type = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    };
    let (l_start, l_len) = range.start_len();
    // Constants 0..=2 and 0: no truncation.
    #[allow(clippy::cast_possible_truncation)]
    libc::flock { l_type: l_type as i16, l_whence: libc::SEEK_SET as i16, l_start, l_len, l_pid: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::file::{File, Host};
    use crate::storage::{Access, Env, Storage};
    use std::path::Path;

    fn open(path: &Path, direct: bool) -> File {
        let file = Host.open(path, Access::ReadWrite).unwrap();
        if direct { Host.with_direct(file, Access::ReadWrite).unwrap() } else { file }
    }

    fn held(result: Result<(), LockError>) -> bool {
        match result {
            Ok(()) => false,
            Err(LockError::Held { .. }) => true,
            Err(err) => panic!("{err}"),
        }
    }

    #[test]
    fn one_writer_or_many_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0; 4096]).unwrap();
        for (first, second) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a, b) = (open(&path, first), open(&path, second));
            a.try_lock(LockKind::Shared).unwrap();
            b.try_lock(LockKind::Shared).unwrap();
            assert!(held(a.try_lock(LockKind::Exclusive)));
            drop(b);
            a.try_lock(LockKind::Exclusive).unwrap();
            let c = open(&path, second);
            assert!(held(c.try_lock(LockKind::Shared)));
            drop(a);
            c.try_lock(LockKind::Exclusive).unwrap();
        }
    }

    #[test]
    fn a_file_that_qemu_writes_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0; 4096]).unwrap();
        // The second: the kernel merges neighbouring bytes in its answer.
        for (start, len, writes) in
            [(101, 1, true), (100, 4, true), (100, 1, false), (201, 1, false)]
        {
            let qemu = open(&path, false);
            let mut bytes = flock(LockKind::Shared, LockRange::Whole);
            (bytes.l_start, bytes.l_len) = (start, len);
            fcntl(qemu.as_fd(), FcntlArg::F_OFD_SETLK(&bytes)).unwrap();
            let ours = open(&path, false);
            assert_eq!(held(ours.try_lock(LockKind::Shared)), writes, "{start} {len}");
            assert!(held(ours.try_lock(LockKind::Exclusive)));
            // A second reader of ours is not a writer.
            if !writes {
                ours.try_lock(LockKind::Shared).unwrap();
                open(&path, false).try_lock(LockKind::Shared).unwrap();
            }
        }
    }

    /// Takes the lock of a QEMU that writes, on a description of the file with this access.
    fn like_qemu(path: &Path, access: Access) -> File {
        let file = Host.open(path, access).unwrap();
        let mut byte = flock(LockKind::Shared, LockRange::Whole);
        (byte.l_start, byte.l_len) = (QEMU_WRITES, 1);
        fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&byte)).unwrap();
        file
    }

    #[test]
    fn who_only_reads_cannot_pretend_to_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0; 4096]).unwrap();
        let ours = || Host.open(&path, Access::Read).unwrap();
        if !no_writer(ours()) {
            println!("skipped: no lease here");
            return;
        }
        let _reader = like_qemu(&path, Access::Read);
        ours().try_lock(LockKind::Shared).unwrap();
        let _writer = like_qemu(&path, Access::ReadWrite);
        assert!(held(ours().try_lock(LockKind::Shared)));
    }

    #[test]
    fn another_reader_of_ours_does_not_hide_a_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0; 4096]).unwrap();
        let first = open(&path, false);
        // Also one that was exclusive before.
        first.try_lock(LockKind::Exclusive).unwrap();
        first.try_lock(LockKind::Shared).unwrap();
        let _writer = like_qemu(&path, Access::ReadWrite);
        assert!(held(open(&path, false).try_lock(LockKind::Shared)));
    }

    #[test]
    fn a_direct_description_alone_keeps_every_successor_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0; 4096]).unwrap();
        let file = open(&path, true);
        file.try_lock(LockKind::Exclusive).unwrap();
        // The reference that a ring keeps alive after the process has died.
        let in_flight = file.direct().unwrap().0.try_clone_to_owned().unwrap();
        drop(file);
        assert!(held(open(&path, false).try_lock(LockKind::Exclusive)));
        assert!(held(open(&path, true).try_lock(LockKind::Shared)));
        drop(in_flight);
        open(&path, false).try_lock(LockKind::Exclusive).unwrap();
    }
}
