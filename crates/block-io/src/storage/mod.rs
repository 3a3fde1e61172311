//! What the formats need from the underlying storage, and from the file names around it.
//!
//! [`Storage`] is one file; [`Env`] is the directory tree, the boot id and the page cache's
//! witness. Both are implemented for the real system ([`crate::storage::file`]) and for the
//! simulated disk (`crate::testing::sim`), so that exactly the same code runs on both.

pub mod file;
pub(crate) mod filesystem;
pub(crate) mod lock;
pub(crate) mod proc_fs;
pub(crate) mod witness;

pub use witness::{adopt_boot_id, hidden_boot_id};

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use cow_format::ByteOffset;
use cow_format::SECTOR_SIZE;
use cow_format::header::CacheWitness;
use cow_format::identity::{ActualIdentity, Inode, Timestamp};
use uuid::Uuid;

/// The type of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A pipe, a socket, a character device.
    Other,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileKind::Regular => "regular file",
            FileKind::BlockDevice => "block device",
            FileKind::Directory => "directory",
            FileKind::Other => "special file",
        })
    }
}

/// A file's identity and everything known about it without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Device and inode number: equal for two descriptions of one file.
    pub id: FileId,
    /// What the file is.
    pub kind: FileKind,
    /// Length in bytes; of a block device, its size.
    pub size: u64,
    /// When the content last changed.
    pub mtime: Timestamp,
    /// When the inode was created, if the file system records it: distinguishes two files that had
    /// the same number.
    pub born: Option<Timestamp>,
    /// Bytes that are actually allocated (`st_blocks` · 512, as `ls -s` counts them).
    pub allocated: u64,
    /// The logical block size of a block device in bytes: transfers that do not begin and end at a
    /// multiple of it are read, modified and written by the page cache, and such ranges can be
    /// neither discarded nor zeroed. 512 for any other file.
    pub logical_block: u32,
    /// The user id of its owner.
    pub owner: u32,
    /// How many names it has.
    pub links: u64,
    /// Who may do what: the lower twelve bits of `st_mode`.
    pub mode: u32,
}

impl FileStat {
    /// The file's identity as a backing file; `layer` is from its native header, if it has one.
    pub fn identity(&self, layer: Option<(Uuid, u64)>) -> ActualIdentity {
        let device = self.kind == FileKind::BlockDevice;
        // The node's inode says nothing about the device, and is created again at each boot.
        let born = self.born.filter(|_| !device);
        let inode = born.map(|born| Inode { number: self.id.ino, born });
        ActualIdentity { size: self.size, mtime: self.mtime, device, inode, layer }
    }
}

/// The logical block size of a file that is not a block device, in bytes.
pub const FILE_BLOCK: u32 = 512;
const _: () = assert!(FILE_BLOCK as u64 == SECTOR_SIZE);

/// What file systems allocate, share and punch out at a time, in bytes.
pub(crate) const FS_BLOCK: u64 = 4096;

/// A page of memory, in bytes: the alignment at which direct I/O and the page cache need no copy.
pub(crate) const PAGE: usize = 4096;

/// A sector, as the length of something in memory.
pub(crate) const SECTOR: usize = 512;
const _: () = assert!(SECTOR as u64 == SECTOR_SIZE);

/// Device and inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// What a lock allows other openings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Others may hold shared locks.
    Shared,
    /// No other lock may be held.
    Exclusive,
}

/// The boot id of the host, the 16 bytes of its UUID: the content of the page cache does not
/// outlive it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl fmt::Debug for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Zeros to write, or to compare with. In .bss: they cost no memory until they are used.
pub static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// One open file.
///
/// A write that returned is in the page cache (it outlives the process); only [`Storage::sync`]
/// makes it outlive a power cut. No method moves a shared file position.
pub trait Storage: Send + Sync {
    /// Reads into `buf` from `at`; returns fewer bytes than requested only at the end of the file.
    fn read_at(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<usize>;

    /// Writes all of `buf` at `at`, extending the file if necessary.
    fn write_all_at(&self, buf: &[u8], at: ByteOffset) -> io::Result<()>;

    /// As [`Storage::read_exact_at`]; a transfer that is long enough and not in the page cache
    /// bypasses it, if the file system supports that, and address and offset have the same position
    /// within a page of 4 KiB.
    fn read_large_at(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<()> {
        self.read_exact_at(buf, at)
    }

    /// As [`Storage::write_all_at`]; a transfer that is long enough bypasses the page cache, under
    /// the same conditions.
    fn write_large_at(&self, buf: &[u8], at: ByteOffset) -> io::Result<()> {
        self.write_all_at(buf, at)
    }

    /// Whether large writes bypass the page cache. Then several threads can write at the same time;
    /// through the page cache they are serialised.
    fn bypasses_cache(&self) -> bool {
        false
    }

    /// Writes `len` bytes of zeros at `at`, which allocates blocks like any other data.
    fn write_zeros(&self, at: ByteOffset, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let n = usize::try_from(len - done).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.write_all_at(&ZEROS[..n], ByteOffset::new(at.get() + done))?;
            done += n as u64;
        }
        Ok(())
    }

    /// Makes `len` bytes at `at` read as zeros and frees their space where possible; the length
    /// stays.
    fn punch(&self, at: ByteOffset, len: u64) -> io::Result<()>;

    /// Makes `len` bytes at `at` read as zeros and keeps (or allocates) their space; the length
    /// stays.
    fn zero_keep_allocated(&self, at: ByteOffset, len: u64) -> io::Result<()>;

    /// Makes every completed write and the file's length outlive a power cut (fdatasync). After an
    /// error the state of all writes since the last success is unknown, and calling it again does
    /// not repair that.
    fn sync(&self) -> io::Result<()>;

    /// Writes all of `buf` at `at` and makes that outlive a power cut; this says nothing about
    /// other writes. After an error the state of this one is unknown, and repeating it does not
    /// repair that.
    fn write_durably(&self, buf: &[u8], at: ByteOffset) -> io::Result<()>;

    /// Returns an error if the kernel failed to write some of this file to the disk at any time
    /// since the last report: then the page cache may be the only copy. Each opening gets the
    /// report once, so call this before the first sync. Writes nothing.
    fn check_writeback(&self) -> io::Result<()>;

    /// Drops the clean pages of this file from the page cache: from then on reads return what is on
    /// the disk. After a failed write to the disk the two can differ.
    fn drop_cache(&self) -> io::Result<()>;

    /// Sets the modification time, and makes it outlive a power cut, with everything that
    /// [`Storage::sync`] covers.
    fn stamp(&self, mtime: Timestamp) -> io::Result<()>;

    /// Sets the file's length in bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Sets who may do what, as [`FileStat::mode`] reports it.
    fn set_mode(&self, mode: u32) -> io::Result<()>;

    /// The next range of bytes at or after `from` that may not be zeros; `None` if only a hole
    /// follows. If holes are unknown, everything up to the end is data.
    fn next_data(&self, from: ByteOffset) -> io::Result<Option<Range<u64>>> {
        if self.knows_holes() {
            return self.seek_data(from);
        }
        let (from, end) = (from.get(), self.len()?);
        Ok((from < end).then_some(from..end))
    }

    /// Whether the file system is trusted when it reports holes.
    fn knows_holes(&self) -> bool;

    /// The file system's answer for [`Storage::next_data`]; only that calls it.
    fn seek_data(&self, from: ByteOffset) -> io::Result<Option<Range<u64>>>;

    /// Makes `len` bytes at `to` share the space of those at `at` in `from`, without a copy;
    /// returns false if the file system does not support that for these two (another file system,
    /// another alignment).
    fn share_from(&self, from: &Self, at: ByteOffset, len: u64, to: ByteOffset) -> io::Result<bool>
    where
        Self: Sized,
    {
        _ = (from, at, len, to);
        Ok(false)
    }

    /// The file's metadata, queried at each call.
    fn stat(&self) -> io::Result<FileStat>;

    /// Takes a lock on the whole file that conflicts with every other opening of it, or fails at
    /// once.
    fn try_lock(&self, kind: LockKind) -> Result<(), LockError>;

    /// Length in bytes.
    fn len(&self) -> io::Result<u64> {
        Ok(self.stat()?.size)
    }

    /// Whether the length is 0.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf` from `at`; if the file ends before that, the error is `UnexpectedEof`.
    fn read_exact_at(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<()> {
        match self.read_at(buf, at)? {
            n if n == buf.len() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Fills `buf` from `at`, with zeros past the end of the file.
    fn read_zero_filled(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<()> {
        let n = self.read_at(buf, at)?;
        buf[n..].fill(0);
        Ok(())
    }
}

/// Why a lock could not be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another opening of the file holds a lock that conflicts.
    #[error("{}", held_by(.pid))]
    Held {
        /// The process, if the system knows one (it does not for an OFD lock, which belongs to no
        /// process).
        pid: Option<i32>,
    },
    /// The file system has no locks (NFS without a lock manager, Lustre without `flock`, some of
    /// FUSE).
    #[error("the file system has no locks ({0})")]
    Unsupported(io::Error),
    /// The system could not lock.
    #[error("cannot lock: {0}")]
    Io(#[from] io::Error),
}

fn held_by(pid: &Option<i32>) -> String {
    match pid {
        Some(pid) => format!("in use by process {pid}"),
        None => "in use by another program".to_owned(),
    }
}

/// Names, boots and opening files: everything outside the files themselves.
pub trait Env: Clone + Send + Sync + 'static {
    /// An open file.
    type File: Storage;

    /// Opens an existing file. What is neither a regular file nor a block device is never opened
    /// for real, because opening a device can do harm: it can only be asked for [`Storage::stat`],
    /// and everything else fails. The caller checks the kind.
    fn open(&self, path: &Path, access: Access) -> io::Result<Self::File>;

    /// The same for the file at `path` in `dir`, which no `..`, symbolic link or magic link of
    /// /proc on the way may leave (`CrossesDevices` otherwise).
    fn open_beneath(&self, dir: &Path, path: &Path, access: Access) -> io::Result<Self::File>;

    /// Where the symbolic link at `path` in `dir` leads. The way to it may not leave `dir` either.
    fn link_beneath(&self, dir: &Path, path: &Path) -> io::Result<PathBuf>;

    /// [`Env::open`] for a file that a program has created beside another: `path` itself is no symbolic
    /// link (ELOOP otherwise).
    fn open_itself(&self, path: &Path, access: Access) -> io::Result<Self::File>;

    /// Which file has this name. Opens nothing.
    fn id(&self, path: &Path) -> io::Result<FileId>;

    /// The directories in which a header may name a file, besides that of its own file. Absolute.
    fn backing_dirs(&self) -> Vec<PathBuf>;

    /// Whether this process accesses or makes files as this user.
    fn is_user(&self, uid: u32) -> bool;

    /// Adds a second description that bypasses the page cache for data, with a lock range of its
    /// own: call it before [`Storage::try_lock`].
    fn with_direct(&self, file: Self::File, access: Access) -> io::Result<Self::File>;

    /// Creates a file in the directory of `near`, open for reading and writing and for this user
    /// only (mode 0600), that is invisible until it is published: without a name if the file system
    /// supports that, otherwise with the temporary name that is returned.
    fn create_unpublished(&self, near: &Path) -> io::Result<(Self::File, Option<PathBuf>)>;

    /// Gives an unpublished file the name `to`, which must not exist (`AlreadyExists` otherwise).
    fn publish(&self, file: &Self::File, temporary: Option<&Path>, to: &Path) -> io::Result<()>;

    /// Gives an unpublished file the name `to`, replacing an existing file in one step.
    fn publish_over(
        &self,
        file: &Self::File,
        temporary: Option<&Path>,
        to: &Path,
    ) -> io::Result<()>;

    /// Creates a file of mode 0600 directly under its name, which must not exist.
    fn create_new(&self, path: &Path) -> io::Result<Self::File>;

    /// Removes a name.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes changes of names in the directory of `path` outlive a power cut.
    fn sync_parent(&self, path: &Path) -> io::Result<()>;

    /// The absolute path of an existing file, with every symbolic link resolved.
    fn canonical(&self, path: &Path) -> io::Result<PathBuf>;

    /// `path` made absolute, with symbolic links left as they are.
    fn absolute(&self, path: &Path) -> io::Result<PathBuf>;

    /// Whether something has this name (a dangling symbolic link has).
    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// The boot id of the running system.
    fn boot_id(&self) -> io::Result<BootId>;

    /// The witness of the page cache instance that holds `file`, within the boot; `None` if it
    /// cannot be determined.
    fn cache_witness(&self, file: &Self::File) -> Option<CacheWitness>;
}
