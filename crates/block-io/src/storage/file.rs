//! Real files: [`File`] and the real system, [`Host`].

use std::fs::{self, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::UNIX_EPOCH;

use cow_format::ByteOffset;
use cow_format::header::CacheWitness;
use cow_format::identity::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{
    AT_FDCWD, AtFlags, FallocateFlags, FcntlArg, OFlag, OpenHow, PosixFadviseAdvice, RenameFlags,
    ResolveFlag, fallocate, fcntl, openat2, posix_fadvise, readlinkat, renameat2,
};
use nix::sys::stat::futimens;
use nix::sys::statfs::fstatfs;
use nix::sys::time::TimeSpec;
use nix::unistd::{Uid, Whence, fdatasync, geteuid, linkat, lseek64, setfsuid};

use crate::storage::filesystem::is_believed;
use crate::storage::lock::{LockRange, try_lock, unlock};
use crate::storage::proc_fs::{descriptor_path, explain, shows_descriptors};
use crate::storage::witness;
use crate::storage::{
    Access, BootId, Env, FILE_BLOCK, FileId, FileKind, FileStat, LockError, LockKind, PAGE, Storage,
};
use crate::sync::lock;

/// The alignment for direct I/O if the kernel does not report it (statx has since Linux 6.1): no
/// disk needs more.
const DIRECT_ALIGN_DEFAULT: u32 = 4096;

/// Fewer bytes go through the page cache, where the kernel combines them into larger transfers.
const LARGE_MIN: usize = 128 << 10;
/// Permissions of a new file: it has, or will have, a guest's data, which is nobody else's
/// business, and who can read a file can also lock it.
const NEW_MODE: u32 = 0o600;
/// The bits of `st_mode` that are permissions.
const MODE_BITS: u32 = 0o7777;
/// The number of cachestat(2), Linux 6.5, on all architectures except Alpha.
const SYS_CACHESTAT: libc::c_long = 451;

/// A real file: a description that goes through the page cache, and perhaps a second one that
/// bypasses it.
///
/// Every method here uses the buffered one; the direct one is for the worker's data, see
/// [`File::direct`].
#[derive(Debug)]
pub struct File {
    buffered: fs::File,
    direct: Option<Direct>,
    kind: FileKind,
    /// See [`FileStat::logical_block`].
    logical_block: u32,
    /// Whether the file system can be asked for holes; determined on first use.
    knows_holes: OnceLock<bool>,
    /// See [`Env::cache_witness`]; determined on first use. It does not change while the file is
    /// open.
    witness: OnceLock<Option<CacheWitness>>,
    /// For large transfers that bypass the page cache: opened on first use; `None` if the file
    /// system does not support it. It has no lock, since no I/O on it outlasts the call.
    large: OnceLock<Option<fs::File>>,
}

/// The second description.
#[derive(Debug)]
struct Direct {
    file: fs::File,
    align: DirectAlign,
}

/// What a direct transfer must be aligned to, in bytes; both are powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlign {
    /// The memory address of each piece.
    pub memory: u32,
    /// The offset in the file and the length of each piece.
    pub offset: u32,
}

impl File {
    fn new(buffered: fs::File) -> io::Result<Self> {
        let kind = kind_of(&buffered.metadata()?);
        let logical_block = match kind {
            FileKind::BlockDevice => logical_block(&buffered)?,
            _ => FILE_BLOCK,
        };
        let (knows_holes, witness, large) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Ok(File { buffered, direct: None, kind, logical_block, knows_holes, witness, large })
    }

    /// The description for large transfers.
    fn large(&self) -> Option<&fs::File> {
        let open = || {
            let flags = fcntl(&self.buffered, FcntlArg::F_GETFL).ok()?;
            let access = match flags & libc::O_ACCMODE {
                libc::O_RDONLY => Access::Read,
                _ => Access::ReadWrite,
            };
            // By descriptor, since it may have no name.
            let path = descriptor_path(&self.buffered);
            open_options(access).custom_flags(libc::O_DIRECT).open(path).ok()
        };
        self.large.get_or_init(open).as_ref()
    }

    /// Whether most of `len` bytes from `at` are in the page cache; also true if the kernel cannot
    /// tell.
    fn is_cached(&self, at: u64, len: u64) -> bool {
        #[repr(C)]
        struct Range {
            at: u64,
            len: u64,
        }
        /// Pages: cached, dirty, in writeback, evicted, recently evicted.
        type Counts = [u64; 5];
        let (range, mut counts) = (Range { at, len }, Counts::default());
        // SAFETY: cachestat(2) reads one `cachestat_range` and writes one `cachestat`, which these
        // are; the descriptor is open.
        let result = unsafe {
            let fd = libc::c_long::from(self.buffered.as_raw_fd());
            libc::syscall(SYS_CACHESTAT, fd, &raw const range, &raw mut counts, 0)
        };
        result != 0 || counts[0] * PAGE as u64 >= len / 2
    }

    /// A file from descriptions that another process has opened and locked; `direct` bypasses the
    /// page cache.
    ///
    /// # Errors
    /// Errors of fstat(2).
    pub fn inherit(buffered: OwnedFd, direct: Option<OwnedFd>) -> io::Result<Self> {
        let mut file = Self::new(buffered.into())?;
        let direct = direct.map(fs::File::from);
        let align = |direct: &fs::File| direct_align(direct, file.logical_block);
        file.direct = direct.map(|direct| Direct { align: align(&direct), file: direct });
        Ok(file)
    }

    /// The top of a disk, opened by whoever started this program: as [`File::inherit`], but the
    /// descriptions are checked. They must be open for `access` at least.
    ///
    /// # Errors
    /// `InvalidInput` with what is wrong with a description; errors of fstat(2) and fcntl(2).
    pub fn given(buffered: OwnedFd, direct: Option<OwnedFd>, access: Access) -> io::Result<Self> {
        let flags = check_given(&buffered, access)?;
        if flags.contains(OFlag::O_DIRECT) {
            return Err(wrong("bypasses the page cache (O_DIRECT); one that does not is needed"));
        }
        if let Some(direct) = &direct {
            // So the two are different descriptions, too.
            if !check_given(direct, access)?.contains(OFlag::O_DIRECT) {
                return Err(wrong("the direct one does not bypass the page cache (O_DIRECT)"));
            }
            if fstat_id(&buffered)? != fstat_id(direct)? {
                return Err(wrong("the direct one is of another file"));
            }
        }
        let file = Self::inherit(buffered, direct)?;
        // Now: when the same file is used again, nothing may be opened any more.
        Host.cache_witness(&file);
        Ok(file)
    }

    /// The same for a file below the top, which must be open for reading only.
    pub fn given_base(fd: OwnedFd) -> io::Result<Self> {
        if check_given(&fd, Access::Read)?.contains(OFlag::O_RDWR) {
            return Err(wrong("is open for writing too; a file below the top is only read"));
        }
        Self::given(fd, None, Access::Read)
    }

    /// The same descriptions once more, and what has been found out about them.
    pub fn again(&self) -> io::Result<Self> {
        let direct = self.direct.as_ref().map(|direct| {
            Ok::<_, io::Error>(Direct { file: direct.file.try_clone()?, align: direct.align })
        });
        Ok(File {
            buffered: self.buffered.try_clone()?,
            direct: direct.transpose()?,
            kind: self.kind,
            logical_block: self.logical_block,
            knows_holes: self.knows_holes.clone(),
            witness: self.witness.clone(),
            large: OnceLock::new(),
        })
    }

    /// The description that goes through the page cache. It carries the lock: register it in every
    /// ring.
    pub fn buffered(&self) -> BorrowedFd<'_> {
        self.buffered.as_fd()
    }

    /// The description that bypasses the page cache (`O_DIRECT`), and its alignment requirements.
    /// It carries a lock of its own: register it in every ring that uses it. Pieces that do not fit
    /// its alignment go through [`File::buffered`]. The kernel keeps the two coherent for reads,
    /// but for writes only if they are to different pages: if some writes to parts of a page are
    /// buffered, all of them must be.
    pub fn direct(&self) -> Option<(BorrowedFd<'_>, DirectAlign)> {
        self.direct.as_ref().map(|direct| (direct.file.as_fd(), direct.align))
    }

    /// Releases the lock. Otherwise it is released with the last reference to the descriptions, and
    /// the kernel takes its time to tear down the rings in which they were registered. No I/O may
    /// be in progress.
    pub fn unlock(&self) -> io::Result<()> {
        unlock(&self.buffered)?;
        self.direct.as_ref().map_or(Ok(()), |direct| unlock(&direct.file))
    }

    /// Zeros are written on a file system without holes, and for parts of a device that are not
    /// whole blocks.
    fn fallocate_or_zeros(&self, mode: FallocateFlags, at: ByteOffset, len: u64) -> io::Result<()> {
        let blocks = whole_blocks(at, len, self.logical_block);
        let (end, blocks_end) = (at.get() + len, blocks.end);
        self.write_zeros(at, blocks.start - at.get())?;
        self.fallocate_blocks(mode, blocks.start, blocks_end - blocks.start)?;
        self.write_zeros(ByteOffset::new(blocks_end), end - blocks_end)
    }

    fn fallocate_blocks(&self, mode: FallocateFlags, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let at = ByteOffset::new(at);
        let (start, length) = (off_t(at.get())?, off_t(len)?);
        loop {
            return match fallocate(&self.buffered, mode, start, length) {
                Ok(()) => Ok(()),
                Err(Errno::EINTR) => continue,
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => self.write_zeros(at, len),
                Err(errno) => Err(errno.into()),
            };
        }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.buffered()
    }
}

impl Storage for File {
    fn read_at(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.buffered.read_at(&mut buf[done..], at.get() + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        Ok(done)
    }

    fn write_all_at(&self, buf: &[u8], at: ByteOffset) -> io::Result<()> {
        self.buffered.write_all_at(buf, at.get())
    }

    fn read_large_at(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<()> {
        let place = |index: usize| at.get() + index as u64;
        let middle = direct_part(buf, at)
            .filter(|middle| !self.is_cached(place(middle.start), middle.len() as u64));
        let Some((large, middle)) = self.large().zip(middle) else {
            return self.read_exact_at(buf, at);
        };
        match large.read_exact_at(&mut buf[middle.clone()], place(middle.start)) {
            // Another alignment is required, or the file ends before a whole page.
            Err(err)
                if err.raw_os_error() == Some(libc::EINVAL)
                    || err.kind() == io::ErrorKind::UnexpectedEof =>
            {
                return self.read_exact_at(buf, at);
            }
            done => done?,
        }
        self.buffered.read_exact_at(&mut buf[..middle.start], at.get())?;
        self.buffered.read_exact_at(&mut buf[middle.end..], place(middle.end))
    }

    fn write_large_at(&self, buf: &[u8], at: ByteOffset) -> io::Result<()> {
        let Some((middle, large)) = direct_part(buf, at).zip(self.large()) else {
            return self.write_all_at(buf, at);
        };
        let place = |index: usize| at.get() + index as u64;
        match large.write_all_at(&buf[middle.clone()], place(middle.start)) {
            // Another alignment is required, or a short write has left a partial page.
            Err(err) if err.raw_os_error() == Some(libc::EINVAL) => {
                return self.write_all_at(buf, at);
            }
            done => done?,
        }
        self.buffered.write_all_at(&buf[..middle.start], at.get())?;
        self.buffered.write_all_at(&buf[middle.end..], place(middle.end))
    }

    fn bypasses_cache(&self) -> bool {
        self.large().is_some()
    }

    fn punch(&self, at: ByteOffset, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate_or_zeros(mode, at, len)
    }

    fn zero_keep_allocated(&self, at: ByteOffset, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.fallocate_or_zeros(mode, at, len)
    }

    fn sync(&self) -> io::Result<()> {
        fdatasync(&self.buffered).map_err(Into::into)
    }

    fn write_durably(&self, buf: &[u8], at: ByteOffset) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let rest = &buf[done..];
            let part =
                libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
            let (fd, place) = (self.buffered.as_raw_fd(), off_t(at.get() + done as u64)?);
            // SAFETY: `part` is `rest`, which lives, and is only read; the descriptor is open.
            let n = unsafe { libc::pwritev2(fd, &raw const part, 1, place, libc::RWF_DSYNC) };
            match (usize::try_from(n), Errno::last()) {
                (Ok(0), _) => return Err(io::ErrorKind::WriteZero.into()),
                (Ok(n), _) => done += n,
                (Err(_), Errno::EINTR) => {}
                (Err(_), Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                    self.write_all_at(rest, ByteOffset::new(at.get() + done as u64))?;
                    return self.sync();
                }
                (Err(_), errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn check_writeback(&self) -> io::Result<()> {
        let fd = self.buffered.as_raw_fd();
        // It waits for the first page only; the error state that it then checks is that of the
        // whole file.
        // SAFETY: no memory is involved, and the descriptor is open.
        let result = unsafe { libc::sync_file_range(fd, 0, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE) };
        match (result, Errno::last()) {
            (0, _) => Ok(()),
            // A file system or a sandbox without support reports nothing.
            (_, Errno::EINVAL | Errno::ESPIPE | Errno::ENOSYS | Errno::EPERM) => Ok(()),
            (_, errno) => Err(errno.into()),
        }
    }

    fn drop_cache(&self) -> io::Result<()> {
        posix_fadvise(&self.buffered, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        Ok(())
    }

    fn stamp(&self, mtime: Timestamp) -> io::Result<()> {
        let leave = TimeSpec::new(0, libc::UTIME_OMIT);
        futimens(&self.buffered, &leave, &TimeSpec::new(mtime.secs(), mtime.nanos().into()))?;
        // fdatasync does not sync timestamps.
        self.buffered.sync_all()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.buffered.set_len(len)
    }

    fn set_mode(&self, mode: u32) -> io::Result<()> {
        self.buffered.set_permissions(fs::Permissions::from_mode(mode))
    }

    fn knows_holes(&self) -> bool {
        *self.knows_holes.get_or_init(|| match self.kind {
            FileKind::Regular => {
                fstatfs(&self.buffered).is_ok_and(|fs| is_believed(fs.filesystem_type()))
            }
            // The node's file system says nothing about the device.
            _ => false,
        })
    }

    fn seek_data(&self, from: ByteOffset) -> io::Result<Option<Range<u64>>> {
        let from = off_t(from.get())?;
        let start = match lseek64(&self.buffered, from, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => return Ok(None),
            // No holes here (a block device, an old file system): everything is data.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => {
                let end = self.len()?;
                let from = from.unsigned_abs();
                return Ok((from < end).then_some(from..end));
            }
            Err(errno) => return Err(errno.into()),
        };
        let end = lseek64(&self.buffered, start, Whence::SeekHole)?;
        Ok(Some(start.unsigned_abs()..end.unsigned_abs()))
    }

    fn share_from(
        &self,
        from: &Self,
        at: ByteOffset,
        len: u64,
        to: ByteOffset,
    ) -> io::Result<bool> {
        let range = libc::file_clone_range {
            src_fd: from.buffered.as_raw_fd().into(),
            src_offset: at.get(),
            src_length: len,
            dest_offset: to.get(),
        };
        // SAFETY: the request reads one `file_clone_range`, which `range` is, and both descriptors
        // are open.
        match unsafe {
            libc::ioctl(self.buffered.as_raw_fd(), libc::FICLONERANGE, &raw const range)
        } {
            0 => Ok(true),
            _ => match Errno::last() {
                Errno::EOPNOTSUPP | Errno::EXDEV | Errno::EINVAL | Errno::ENOTTY => Ok(false),
                errno => Err(errno.into()),
            },
        }
    }

    fn stat(&self) -> io::Result<FileStat> {
        let meta = self.buffered.metadata()?;
        let size = match self.kind {
            FileKind::BlockDevice => lseek64(&self.buffered, 0, Whence::SeekEnd)?.unsigned_abs(),
            _ => meta.size(),
        };
        let nanos = u32::try_from(meta.mtime_nsec()).ok();
        let mtime = nanos.and_then(|nanos| Timestamp::new(meta.mtime(), nanos));
        let born = meta.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Ok(FileStat {
            id: id_of(&meta),
            kind: self.kind,
            size,
            mtime: mtime
                .ok_or_else(|| io::Error::other("mtime with a second or more of nanoseconds"))?,
            born: born.and_then(|d| Timestamp::new(d.as_secs().cast_signed(), d.subsec_nanos())),
            allocated: meta.blocks() * 512,
            logical_block: self.logical_block,
            owner: meta.uid(),
            links: meta.nlink(),
            mode: meta.mode() & MODE_BITS,
        })
    }

    fn try_lock(&self, kind: LockKind) -> Result<(), LockError> {
        let Some(direct) = &self.direct else {
            return try_lock(&self.buffered, kind, LockRange::Whole);
        };
        try_lock(&self.buffered, kind, LockRange::Buffered)?;
        try_lock(&direct.file, kind, LockRange::Direct)
    }
}

/// The real system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

/// The directories of [`Host::allow_backing_dir`].
static BACKING_DIRS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn backing_dirs() -> MutexGuard<'static, Vec<PathBuf>> {
    lock(&BACKING_DIRS)
}

impl Host {
    /// From now on, and in this whole process, a header may name files in `dir`. It always may name
    /// those in the directory of a file that the user has named, unless the whole chain is named.
    ///
    /// # Errors
    /// If it is no directory, or cannot be found.
    pub fn allow_backing_dir(dir: &Path) -> io::Result<()> {
        if !fs::metadata(dir)?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        // A header can name it in either way.
        let both = [std::path::absolute(dir)?, fs::canonicalize(dir)?];
        let mut dirs = backing_dirs();
        for dir in both {
            if !dirs.contains(&dir) {
                dirs.push(dir);
            }
        }
        Ok(())
    }
}

impl Env for Host {
    type File = File;

    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        open_if_harmless(access, |flags| open_options(access).custom_flags(flags).open(path))
    }

    fn open_beneath(&self, dir: &Path, path: &Path, access: Access) -> io::Result<File> {
        let write = if access == Access::ReadWrite { OFlag::O_RDWR } else { OFlag::O_RDONLY };
        open_if_harmless(access, |flags| {
            let flags = OFlag::from_bits_retain(flags);
            // Unlike open(2), openat2(2) refuses flags that O_PATH would ignore.
            let write = if flags.contains(OFlag::O_PATH) { OFlag::empty() } else { write };
            beneath(dir, path, flags | write)
        })
    }

    fn link_beneath(&self, dir: &Path, path: &Path) -> io::Result<PathBuf> {
        let link = beneath(dir, path, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
        Ok(readlinkat(&link, c"")?.into())
    }

    fn open_itself(&self, path: &Path, access: Access) -> io::Result<File> {
        open_if_harmless(access, |flags| {
            let flags = flags | libc::O_NOFOLLOW;
            let file = open_options(access).custom_flags(flags).open(path)?;
            // With O_PATH, O_NOFOLLOW opens the link.
            match file.metadata()?.is_symlink() {
                true => Err(io::Error::from_raw_os_error(libc::ELOOP)),
                false => Ok(file),
            }
        })
    }

    fn id(&self, path: &Path) -> io::Result<FileId> {
        fs::metadata(path).map(|meta| id_of(&meta))
    }

    fn backing_dirs(&self) -> Vec<PathBuf> {
        backing_dirs().clone()
    }

    fn is_user(&self, uid: u32) -> bool {
        // No user has the highest number, so the call only says who makes files.
        [geteuid, || setfsuid(Uid::from_raw(u32::MAX))].iter().any(|who| who().as_raw() == uid)
    }

    fn with_direct(&self, mut file: File, access: Access) -> io::Result<File> {
        // By descriptor, not by name: exactly the same inode.
        let direct = open_options(access)
            .custom_flags(libc::O_DIRECT)
            .open(descriptor_path(&file.buffered))
            .map_err(explain)?;
        let align = direct_align(&direct, file.logical_block);
        file.direct = Some(Direct { file: direct, align });
        Ok(file)
    }

    fn create_new(&self, path: &Path) -> io::Result<File> {
        let mut options = open_options(Access::ReadWrite);
        File::new(options.create_new(true).mode(NEW_MODE).open(path)?)
    }

    fn create_unpublished(&self, near: &Path) -> io::Result<(File, Option<PathBuf>)> {
        let named = || {
            let name = temporary_name(near);
            Ok((self.create_new(&name)?, Some(name)))
        };
        if !shows_descriptors() {
            // Without /proc a nameless file could not be linked to a name later.
            return named();
        }
        let mut options = open_options(Access::ReadWrite);
        match options.custom_flags(libc::O_TMPFILE).mode(NEW_MODE).open(parent(near)) {
            Ok(file) => Ok((File::new(file)?, None)),
            Err(err)
                if matches!(
                    err.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)
                ) =>
            {
                named()
            }
            Err(err) => Err(err),
        }
    }

    fn publish(&self, file: &File, temporary: Option<&Path>, to: &Path) -> io::Result<()> {
        let Some(from) = temporary else {
            let source = descriptor_path(&file.buffered);
            return linkat(AT_FDCWD, source.as_path(), AT_FDCWD, to, AtFlags::AT_SYMLINK_FOLLOW)
                .map_err(Into::into);
        };
        match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => Ok(()),
            // A file system without RENAME_NOREPLACE (NFS): a hard link refuses an existing name as
            // well.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                fs::hard_link(from, to)?;
                fs::remove_file(from)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn publish_over(&self, file: &File, temporary: Option<&Path>, to: &Path) -> io::Result<()> {
        if let Some(from) = temporary {
            return fs::rename(from, to);
        }
        // A link cannot replace a name, a rename can.
        let name = temporary_name(to);
        self.publish(file, None, &name)?;
        fs::rename(&name, to).inspect_err(|_| _ = fs::remove_file(&name))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_parent(&self, path: &Path) -> io::Result<()> {
        fs::File::open(parent(path))?.sync_all()
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        fs::canonicalize(path)
    }

    fn absolute(&self, path: &Path) -> io::Result<PathBuf> {
        std::path::absolute(path)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        match fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(err) => Err(err),
        }
    }

    fn boot_id(&self) -> io::Result<BootId> {
        witness::boot_id()
    }

    fn cache_witness(&self, file: &File) -> Option<CacheWitness> {
        *file.witness.get_or_init(|| witness::of(&file.buffered))
    }
}

/// The directory that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// A name beside `path` that no other process uses.
fn temporary_name(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.new", std::process::id()));
    path.with_file_name(name)
}

fn id_of(meta: &fs::Metadata) -> FileId {
    FileId { dev: meta.dev(), ino: meta.ino() }
}

fn fstat_id(fd: &OwnedFd) -> io::Result<FileId> {
    let found = nix::sys::stat::fstat(fd)?;
    Ok(FileId { dev: found.st_dev, ino: found.st_ino })
}

fn wrong(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// Refuses a description that does not do for `access`; returns its flags.
fn check_given(fd: &OwnedFd, access: Access) -> io::Result<OFlag> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_PATH) {
        return Err(wrong("stands for a place and is not open (O_PATH)"));
    }
    match (access, flags & OFlag::O_ACCMODE) {
        (_, OFlag::O_WRONLY) => return Err(wrong("is open for writing only")),
        (Access::ReadWrite, OFlag::O_RDONLY) => {
            return Err(wrong("is open for reading only, but the disk is to be written"));
        }
        _ => {}
    }
    if flags.contains(OFlag::O_APPEND) {
        return Err(wrong("appends whatever is written (O_APPEND)"));
    }
    // As in `open_if_harmless`; and nobody waits for signals of it.
    let unwanted = OFlag::O_NONBLOCK | OFlag::O_ASYNC;
    if flags.intersects(unwanted) {
        fcntl(fd, FcntlArg::F_SETFL(flags - unwanted))?;
    }
    Ok(flags)
}

/// Opens `path` in `dir`, which nothing on the way may leave.
fn beneath(dir: &Path, path: &Path, flags: OFlag) -> io::Result<fs::File> {
    let place = libc::O_PATH | libc::O_DIRECTORY;
    let dir = open_options(Access::Read).custom_flags(place).open(dir)?;
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
    Ok(openat2(&dir, path, how)?.into())
}

/// Opens a file with `open`, which is given flags of open(2), but only if it is a regular file or a
/// block device. To open others can do harm: a watchdog starts, a tape is rewound, a program at the
/// other end of a pipe goes on. So the kind is known first, by a descriptor that only stands for
/// the place (`O_PATH`), and that is what is returned for all others.
fn open_if_harmless(
    access: Access,
    open: impl Fn(i32) -> io::Result<fs::File>,
) -> io::Result<File> {
    let place = open(libc::O_PATH)?;
    let meta = place.metadata()?;
    if !matches!(kind_of(&meta), FileKind::Regular | FileKind::BlockDevice) {
        return File::new(place);
    }
    // O_NONBLOCK: not to wait for the holder of a lease.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = match shows_descriptors() {
        true => open_options(access).custom_flags(flags).open(descriptor_path(&place))?,
        false => open(flags)?,
    };
    if id_of(&file.metadata()?) != id_of(&meta) {
        return Err(io::Error::other("was replaced while it was being opened"));
    }
    // It has no effect on files and disks, but io_uring on some kernels would not wait for them.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
    File::new(file)
}

fn open_options(access: Access) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(access == Access::ReadWrite);
    options
}

fn kind_of(meta: &fs::Metadata) -> FileKind {
    let kind = meta.file_type();
    match () {
        () if kind.is_file() => FileKind::Regular,
        () if kind.is_block_device() => FileKind::BlockDevice,
        () if kind.is_dir() => FileKind::Directory,
        () => FileKind::Other,
    }
}

/// The part of `len` bytes at `at` that consists of whole blocks of `block` bytes, a power of two:
/// a block device can discard and zero only those. If there is none, the range is empty and at the
/// end.
#[must_use]
pub fn whole_blocks(at: ByteOffset, len: u64, block: u32) -> Range<u64> {
    let (block, end) = (u64::from(block), at.get() + len);
    let (first, last) = (at.get().next_multiple_of(block), end / block * block);
    if first < last { first..last } else { end..end }
}

/// The logical block of a block device, in bytes.
fn logical_block(device: &fs::File) -> io::Result<u32> {
    let mut len: libc::c_int = 0;
    // SAFETY: the request writes one int, which `len` is; the descriptor is open.
    Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), libc::BLKSSZGET, &raw mut len) })?;
    match u32::try_from(len) {
        Ok(len) if len.is_power_of_two() => Ok(len.max(FILE_BLOCK)),
        _ => Err(io::Error::other(format!(
            "a logical block of {len} bytes, expected a power of two"
        ))),
    }
}

fn off_t(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// What statx(2) reports of `file`; `None` if the kernel does not report `field`.
pub(crate) fn statx(file: &fs::File, field: libc::c_uint) -> Option<libc::statx> {
    let mut answer = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor, which `file` keeps open;
    // `answer` is a whole statx that the kernel writes to.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, field, answer.as_mut_ptr())
    };
    // SAFETY: all-zero bytes are a valid statx, and so is what the kernel made of them.
    let answer = unsafe { answer.assume_init() };
    (result == 0 && answer.stx_mask & field != 0).then_some(answer)
}

/// The kernel's alignment requirements for direct I/O on this file, or the safe default if it does
/// not report them.
fn direct_align(file: &fs::File, logical_block: u32) -> DirectAlign {
    let default = DIRECT_ALIGN_DEFAULT.max(logical_block);
    let unknown = DirectAlign { memory: default, offset: default };
    let Some(answer) = statx(file, libc::STATX_DIOALIGN) else { return unknown };
    let (memory, offset) = (answer.stx_dio_mem_align, answer.stx_dio_offset_align);
    if memory.is_power_of_two() && offset.is_power_of_two() {
        DirectAlign { memory, offset }
    } else {
        unknown
    }
}

/// The whole pages of `buf` that are whole pages of the file as well; `None` if address and offset
/// differ in their position within a page, or if there is too little.
fn direct_part(buf: &[u8], at: ByteOffset) -> Option<Range<usize>> {
    let into = usize::try_from(at.get() % PAGE as u64).ok()?;
    let start = into.next_multiple_of(PAGE) - into;
    let end = (into + buf.len()) / PAGE * PAGE;
    let middle = start..end.checked_sub(into)?;
    let fits = buf.as_ptr().addr() % PAGE == into;
    (fits && middle.len() >= LARGE_MIN).then_some(middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_lengths_and_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = Host.create_new(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        let at = |at| ByteOffset::new(at);
        assert_eq!(file.next_data(at(0)).unwrap(), None);
        file.write_all_at(&[1; 8192], at(1 << 20)).unwrap();
        file.sync().unwrap();
        let data = file.next_data(at(0)).unwrap().unwrap();
        assert!(data.contains(&(1 << 20)) && data.end < 2 << 20);
        assert!(file.stat().unwrap().allocated < 1 << 20);
        file.punch(at(1 << 20), 4096).unwrap();
        file.zero_keep_allocated(at((1 << 20) + 4096), 100).unwrap();
        let mut buf = [9; 8192];
        file.read_exact_at(&mut buf, at(1 << 20)).unwrap();
        assert!(buf[..4196].iter().all(|b| *b == 0) && buf[4196..].iter().all(|b| *b == 1));
        assert_eq!(file.len().unwrap(), 1 << 30);
        assert_eq!(file.read_at(&mut buf, at((1 << 30) - 10)).unwrap(), 10);
        let err = file.read_exact_at(&mut buf, at((1 << 30) - 10)).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
        file.punch(at(0), 0).unwrap();
    }

    #[test]
    fn an_unpublished_file_has_no_name_until_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let (file, temporary) = Host.create_unpublished(&path).unwrap();
        assert!(!path.exists());
        file.write_all_at(b"x", ByteOffset::new(0)).unwrap();
        Host.publish(&file, temporary.as_deref(), &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"x");
        let (file, temporary) = Host.create_unpublished(&path).unwrap();
        let err = Host.publish(&file, temporary.as_deref(), &path).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::AlreadyExists);
        let name = temporary_name(&path);
        let file = Host.create_new(&name).unwrap();
        let err = Host.publish(&file, Some(&name), &path).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::AlreadyExists);
        Host.publish_over(&file, Some(&name), &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        let (file, temporary) = Host.create_unpublished(&path).unwrap();
        file.write_all_at(b"y", ByteOffset::new(0)).unwrap();
        Host.publish_over(&file, temporary.as_deref(), &path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"y");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn direct_descriptions_say_their_alignment() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, [0; 8192]).unwrap();
        let file = Host.with_direct(Host.open(&path, Access::Read).unwrap(), Access::Read).unwrap();
        let (_, align) = file.direct().unwrap();
        assert!(
            align.offset.is_power_of_two() && align.offset >= 512 && align.memory.is_power_of_two()
        );
    }

    #[test]
    fn large_transfers_leave_what_others_leave() {
        let dir = tempfile::tempdir().unwrap();
        let memory: Vec<u8> = (0..251).cycle().take(4 * LARGE_MIN + 3 * PAGE).collect();
        let aligned = memory.as_ptr().align_offset(PAGE);
        let len = 3 * LARGE_MIN + 700;
        let mut direct = 0;
        for (from, at, len) in [
            (0, 0, len),
            (0, 8192, LARGE_MIN),
            (0, 8192, LARGE_MIN - 1),
            // At the same position within a page in memory and in the file, and not.
            (512, 4096 + 512, len),
            (4095, 4095, len),
            (512, 0, len),
            (0, 512, len),
        ] {
            let path = dir.path().join("f");
            let file = Host.create_new(&path).unwrap();
            let bytes = &memory[aligned + from..][..len];
            direct += usize::from(direct_part(bytes, ByteOffset::new(at)).is_some());
            // Over pages that are in the cache.
            file.write_all_at(&vec![1; 8192 + 2 * len], ByteOffset::new(0)).unwrap();
            file.write_large_at(bytes, ByteOffset::new(at)).unwrap();
            let mut back = memory.clone();
            for _ in ["cached", "not cached"] {
                let back = &mut back[from..][..len];
                back.fill(0);
                file.read_large_at(back, ByteOffset::new(at)).unwrap();
                assert!(back == bytes, "{from} {at} {len}");
                file.sync().unwrap();
                let all = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                posix_fadvise(&file.buffered, 0, 0, all).unwrap();
            }
            let mut expected = vec![1; 8192 + 2 * len];
            let at = usize::try_from(at).unwrap();
            expected[at..at + len].copy_from_slice(bytes);
            assert!(fs::read(&path).unwrap() == expected, "{from} {at} {len}");
            fs::remove_file(&path).unwrap();
        }
        assert_eq!(direct, 4);
        // Past the end.
        let path = dir.path().join("short");
        let file = Host.create_new(&path).unwrap();
        file.set_len(2 * LARGE_MIN as u64 + 100).unwrap();
        let mut back = vec![1; aligned + len];
        let err = file.read_large_at(&mut back[aligned..], ByteOffset::new(0)).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
    }
}
