//! What a format needs of the place where it is stored, and of the names around it.
//!
//! [`Storage`] is one file, [`Env`] the directory tree, the clock of boots and the locks. Both
//! exist for the real system ([`crate::storage::file`]) and for the simulated disk
//! (`crate::testing::sim`), so that exactly the same code runs on both.

pub mod file;
pub(crate) mod filesystem;
pub(crate) mod lock;
pub(crate) mod proc_fs;
pub(crate) mod witness;

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use cow_format::ByteOffset;
use cow_format::SECTOR_SIZE;
use cow_format::header::CacheWitness;
use cow_format::identity::{ActualIdentity, Inode, Timestamp};
use uuid::Uuid;

/// What a file is.
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

/// Which file it is and what can be known of it without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Device and inode number: two descriptions of one file agree in both.
    pub id: FileId,
    /// What the file is.
    pub kind: FileKind,
    /// Length in bytes; of a block device, its size.
    pub size: u64,
    /// When the content last changed.
    pub mtime: Timestamp,
    /// When the inode was created, where the file system knows it: tells apart two files that had
    /// the same number.
    pub born: Option<Timestamp>,
    /// Bytes that are really allocated (`st_blocks` · 512, as `ls -s` counts them).
    pub allocated: u64,
    /// Of a block device, its logical block in bytes: what does not begin and end at a multiple of
    /// it is read, changed and written by the page cache, and can be neither discarded nor zeroed.
    /// 512 for any other file.
    pub logical_block: u32,
}

impl FileStat {
    /// How the file is known as a backing file; `layer` is what its native header says, if it has
    /// one.
    pub fn identity(&self, layer: Option<(Uuid, u64)>) -> ActualIdentity {
        let device = self.kind == FileKind::BlockDevice;
        // The node's inode says nothing of the device, and is made anew with each boot.
        let born = self.born.filter(|_| !device);
        let inode = born.map(|born| Inode { number: self.id.ino, born });
        ActualIdentity { size: self.size, mtime: self.mtime, device, inode, layer }
    }
}

/// The logical block of a file that is no block device, in bytes.
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

/// What a lock allows others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Others may hold shared locks.
    Shared,
    /// Nobody else may hold any lock.
    Exclusive,
}

/// The boot id of the host, the 16 bytes of its UUID: what is in the page cache lives no longer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl fmt::Debug for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Zeros to write, or to compare with.
pub(crate) static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// One open file.
///
/// A write that returned is in the page cache (it outlives the process); only [`Storage::sync`]
/// makes it outlive a power cut. No method moves a shared file position that another depends on.
pub trait Storage: Send + Sync {
    /// Reads into `buf` from `at`; fewer bytes than asked for only at the end of the file.
    fn read_at(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<usize>;

    /// Writes all of `buf` at `at`, lengthening the file if it must.
    fn write_all_at(&self, buf: &[u8], at: ByteOffset) -> io::Result<()>;

    /// As [`Storage::read_exact_at`]; what is long enough and not in the page cache bypasses that,
    /// if the file system can and address and offset have the same place in a page of 4 KiB.
    fn read_large_at(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<()> {
        self.read_exact_at(buf, at)
    }

    /// As [`Storage::write_all_at`]; what is long enough bypasses the page cache, under the same
    /// conditions.
    fn write_large_at(&self, buf: &[u8], at: ByteOffset) -> io::Result<()> {
        self.write_all_at(buf, at)
    }

    /// Whether large writes bypass the page cache. Then several threads can write at the same time;
    /// through the page cache they take turns.
    fn bypasses_cache(&self) -> bool {
        false
    }

    /// Writes `len` bytes of zeros at `at`, which then have their blocks as any other data has.
    fn write_zeros(&self, at: ByteOffset, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let n = usize::try_from(len - done).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.write_all_at(&ZEROS[..n], ByteOffset::new(at.get() + done))?;
            done += n as u64;
        }
        Ok(())
    }

    /// Makes `len` bytes at `at` read as zeros and frees their space where it can; the length
    /// stays.
    fn punch(&self, at: ByteOffset, len: u64) -> io::Result<()>;

    /// Makes `len` bytes at `at` read as zeros and keeps (or takes) their space; the length stays.
    fn zero_keep_allocated(&self, at: ByteOffset, len: u64) -> io::Result<()>;

    /// Makes every completed write and the file's length outlive a power cut (fdatasync). After an
    /// error nothing is known of the writes since the last success, and calling again does not
    /// repair that.
    fn sync(&self) -> io::Result<()>;

    /// Writes all of `buf` at `at` and makes that outlive a power cut; it says nothing of other
    /// writes. After an error nothing is known of this one, and repeating it does not repair that.
    fn write_durably(&self, buf: &[u8], at: ByteOffset) -> io::Result<()>;

    /// An error if the kernel could not write something of this file to the disk, at any time since
    /// somebody last was told so: then what the page cache shows may be nowhere else. Each opening
    /// is told once, so ask before the first sync. Writes nothing.
    fn check_writeback(&self) -> io::Result<()>;

    /// Forgets what the page cache has of this file and is not waiting to be written: from then on
    /// reads show what is on the disk. After a failed write to the disk the two can differ.
    fn drop_cache(&self) -> io::Result<()>;

    /// Sets the time of the last change, and makes it outlive a power cut, with all that
    /// [`Storage::sync`] does.
    fn stamp(&self, mtime: Timestamp) -> io::Result<()>;

    /// Sets the file's length in bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// The next range of bytes at or after `from` that may be other than zeros; `None` when only a
    /// hole follows. Where the holes are not known all is data up to the end.
    fn next_data(&self, from: ByteOffset) -> io::Result<Option<Range<u64>>> {
        if self.knows_holes() {
            return self.seek_data(from);
        }
        let (from, end) = (from.get(), self.len()?);
        Ok((from < end).then_some(from..end))
    }

    /// Whether the file system can be believed when it says where the holes are.
    fn knows_holes(&self) -> bool;

    /// What the file system says of [`Storage::next_data`]; only that asks it.
    fn seek_data(&self, from: ByteOffset) -> io::Result<Option<Range<u64>>>;

    /// Lets `len` bytes at `to` share the space of those at `at` in `from`, which costs no copy and
    /// no space; false if the file system cannot do that for these two (another file system,
    /// another alignment).
    fn share_from(&self, from: &Self, at: ByteOffset, len: u64, to: ByteOffset) -> io::Result<bool>
    where
        Self: Sized,
    {
        _ = (from, at, len, to);
        Ok(false)
    }

    /// Which file this is; asks the system anew each time.
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

    /// Fills `buf` from `at`; the end of the file before that is `UnexpectedEof`.
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

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// Another opening of the file holds a lock that conflicts.
    #[error("{}", held_by(.pid))]
    Held {
        /// The process, where the system knows one (it does not for an OFD lock, which belongs to
        /// no process).
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

/// Names, boots and the opening of files: everything outside the files themselves.
pub trait Env: Clone + Send + Sync + 'static {
    /// An open file.
    type File: Storage;

    /// Opens an existing file. A directory or other odd thing may open too: the caller looks at
    /// [`Storage::stat`].
    fn open(&self, path: &Path, access: Access) -> io::Result<Self::File>;

    /// Adds a second description that bypasses the page cache for data, with the lock that belongs
    /// to it (a range of its own: call it before [`Storage::try_lock`]).
    fn with_direct(&self, file: Self::File, access: Access) -> io::Result<Self::File>;

    /// Creates a file, open for reading and writing, in the directory of `near`, that nobody finds
    /// until it is published: without a name where the file system can, else with the temporary
    /// name that is returned.
    fn create_unpublished(&self, near: &Path) -> io::Result<(Self::File, Option<PathBuf>)>;

    /// Gives an unpublished file the name `to`, which must not exist (`AlreadyExists` otherwise).
    fn publish(&self, file: &Self::File, temporary: Option<&Path>, to: &Path) -> io::Result<()>;

    /// Gives an unpublished file the name `to`, in one step in place of a file that has it.
    fn publish_over(
        &self,
        file: &Self::File,
        temporary: Option<&Path>,
        to: &Path,
    ) -> io::Result<()>;

    /// Creates a file at once under its name, which must not exist.
    fn create_new(&self, path: &Path) -> io::Result<Self::File>;

    /// Removes a name.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes changes of names in the directory that holds `path` outlive a power cut.
    fn sync_parent(&self, path: &Path) -> io::Result<()>;

    /// The absolute path of an existing file, with every symbolic link resolved.
    fn canonical(&self, path: &Path) -> io::Result<PathBuf>;

    /// `path` from the root on, symbolic links as they are.
    fn absolute(&self, path: &Path) -> io::Result<PathBuf>;

    /// Whether something has this name (a dangling symbolic link has).
    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// The boot id of the running system.
    fn boot_id(&self) -> io::Result<BootId>;

    /// Which life of the page cache holds `file`, within the boot; `None` where nobody can tell.
    fn cache_witness(&self, file: &Self::File) -> Option<CacheWitness>;
}
