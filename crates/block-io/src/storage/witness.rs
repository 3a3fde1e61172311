//! Identifies the page cache that holds a file: the boot of the host, and the instance of the file
//! system's page cache within that boot (`docs/spec/format-native.md` section 6).
//!
//! A page cache can be lost without a reboot: a file system shuts itself down, a thin device runs
//! full, a device disappears; then it is unmounted and mounted again. The visible trace of a
//! superblock is its directory in sysfs. kernfs numbers inodes upwards for as long as the host
//! runs, so a directory that was removed and created again has another number, and the number is
//! the same in all mount namespaces. A block device's diskseq would add nothing: a device that
//! comes back needs a new superblock.

use std::ffi::{CStr, OsStr};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;

use cow_format::header::CacheWitness;
use nix::errno::Errno;
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, PROC_SUPER_MAGIC, SYSFS_MAGIC,
    TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
};
use uuid::Uuid;

use crate::storage::BootId;
use crate::storage::file::statx;
use crate::storage::proc_fs::explain_boot_id;

/// ramfs (linux/magic.h).
const RAMFS_MAGIC: i64 = 0x8584_58f6;
/// `_IOR(0x15, 1, struct fs_sysfs_path)`, Linux 6.9: a length of one byte and a name of up to 128.
const FS_IOC_GETFSSYSFSPATH: libc::c_ulong = 0x8081_1501;
const SYSFS_NAME_MAX: usize = 128;
/// `_IOR(0x94, 31, struct btrfs_ioctl_fs_info_args)`.
const BTRFS_IOC_FS_INFO: libc::c_ulong = 0x8400_941f;
const BTRFS_FS_INFO_LEN: usize = 1024;
/// The offset of the file system's UUID in that structure.
const BTRFS_FS_INFO_FSID: std::ops::Range<usize> = 16..32;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The witness of the page cache that holds `file`; `None` if it cannot be determined.
pub(crate) fn of(file: &File) -> Option<CacheWitness> {
    let kind = fstatfs(file).ok()?.filesystem_type();
    if [TMPFS_MAGIC, FsType(RAMFS_MAGIC as _)].contains(&kind) {
        return Some(CacheWitness::Memory);
    }
    match superblock_dir(file, kind).and_then(|dir| sysfs_inode(&dir)) {
        Some(inode) => Some(CacheWitness::Superblock(inode)),
        None => unique_mount_id(file).map(CacheWitness::Mount),
    }
}

/// The directory in sysfs of the superblock that holds `file`.
fn superblock_dir(file: &File, kind: FsType) -> Option<PathBuf> {
    let root = Path::new("/sys/fs");
    if let Some(name) = sysfs_name(file) {
        return Some(root.join(name));
    }
    if kind == BTRFS_SUPER_MAGIC {
        return Some(root.join("btrfs").join(btrfs_uuid(file)?.to_string()));
    }
    let names = [(EXT4_SUPER_MAGIC, "ext4"), (XFS_SUPER_MAGIC, "xfs"), (F2FS_SUPER_MAGIC, "f2fs")];
    let (_, name) = names.into_iter().find(|(magic, _)| *magic == kind)?;
    Some(root.join(name).join(device_name(file)?))
}

/// The name below /sys/fs that the kernel reports, from Linux 6.9 on: `ext4/sda1`.
fn sysfs_name(file: &File) -> Option<PathBuf> {
    let mut answer = [0u8; 1 + SYSFS_NAME_MAX];
    ioctl(file, FS_IOC_GETFSSYSFSPATH, &mut answer)?;
    let name = answer.get(1..1 + usize::from(answer[0]))?;
    let name = PathBuf::from(OsStr::from_bytes(name));
    let plain = |component| matches!(component, Component::Normal(_));
    (!name.as_os_str().is_empty() && name.components().all(plain)).then_some(name)
}

fn btrfs_uuid(file: &File) -> Option<Uuid> {
    let mut answer = [0u8; BTRFS_FS_INFO_LEN];
    ioctl(file, BTRFS_IOC_FS_INFO, &mut answer)?;
    Uuid::from_slice(&answer[BTRFS_FS_INFO_FSID]).ok()
}

/// An ioctl that writes `answer`, whose length must be the one encoded in its number.
fn ioctl<const LEN: usize>(
    file: &File,
    request: libc::c_ulong,
    answer: &mut [u8; LEN],
) -> Option<()> {
    debug_assert_eq!((request >> 16) as usize & 0x3fff, LEN);
    // SAFETY: bits 16 to 29 of the number are the length of what the kernel writes, which is that
    // of `answer`; the descriptor is open.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, answer.as_mut_ptr()) };
    (result == 0).then_some(())
}

/// The kernel's name of the block device that the file system is on: `sda1`, `dm-0`.
fn device_name(file: &File) -> Option<std::ffi::OsString> {
    let device = file.metadata().ok()?.dev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    link.file_name().map(OsStr::to_owned)
}

/// The inode number of a directory that is really in sysfs, and not in something mounted there.
fn sysfs_inode(dir: &Path) -> Option<u64> {
    let dir = File::open(dir).ok()?;
    let real = fstatfs(&dir).ok()?.filesystem_type() == SYSFS_MAGIC;
    real.then_some(())?;
    Some(dir.metadata().ok()?.ino())
}

/// The id of the mount by which `file` was opened; it is never reused within this boot (Linux 6.8).
fn unique_mount_id(file: &File) -> Option<u64> {
    Some(statx(file, libc::STATX_MNT_ID_UNIQUE)?.stx_mnt_id)
}

/// The boot id of the host, read once: it does not change while the kernel runs.
static BOOT: OnceLock<BootId> = OnceLock::new();

pub(crate) fn boot_id() -> io::Result<BootId> {
    if let Some(boot) = BOOT.get() {
        return Ok(*boot);
    }
    let boot = read_boot_id()?;
    Ok(*BOOT.get_or_init(|| boot))
}

/// The boot id of the host, if a disk has been opened and a process that has given up its
/// privileges reads another one (that of a container) or none.
#[must_use]
pub fn hidden_boot_id() -> Option<BootId> {
    let seen = File::open(BOOT_ID).ok().filter(is_in_proc);
    BOOT.get().copied().filter(|_| seen.is_none())
}

/// Adopts the [`hidden_boot_id`] of a predecessor, before a disk is opened.
pub fn adopt_boot_id(boot: BootId) {
    BOOT.get_or_init(|| boot);
}

/// Containers (LXC, Incus, systemd-nspawn) get a boot id of their own, mounted over the host's. In
/// that case the host's is looked for beneath the mount, so that daemons inside and outside of
/// containers agree.
fn read_boot_id() -> io::Result<BootId> {
    let file = File::open(BOOT_ID).map_err(explain_boot_id)?;
    if is_in_proc(&file) {
        return parse(file);
    }
    match host_boot_id() {
        Ok(boot) => Ok(boot),
        Err(err) => {
            log::warn!(
                "{BOOT_ID}: is the container's and not the host's, which cannot be read ({err}): after a \
                 restart of the container a disk that was not closed has all flushed data, but may \
                 lack later writes; stop the daemon before the container, or give it CAP_SYS_ADMIN"
            );
            parse(file)
        }
    }
}

fn is_in_proc(file: &File) -> bool {
    fstatfs(file).is_ok_and(|stat| stat.filesystem_type() == PROC_SUPER_MAGIC)
}

/// From a copy of the mount of /proc without the mounts on top of it, which requires privilege.
fn host_boot_id() -> io::Result<BootId> {
    let proc = open_tree(c"/proc")?;
    let path = c"sys/kernel/random/boot_id";
    // SAFETY: `proc` is open, and `path` ends with its NUL.
    let fd =
        unsafe { libc::openat(proc.as_raw_fd(), path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    let file = owned(fd.into())?;
    if !is_in_proc(&file) {
        return Err(io::Error::other("what is mounted at /proc is no proc file system"));
    }
    parse(file)
}

fn open_tree(path: &CStr) -> io::Result<File> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: open_tree(2) reads the path, which ends with its NUL.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    owned(fd)
}

/// A descriptor that a system call has just returned.
fn owned(fd: libc::c_long) -> io::Result<File> {
    match i32::try_from(fd) {
        // SAFETY: it is new and has no other owner.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(Errno::last().into()),
    }
}

fn parse(mut file: impl Read + AsFd) -> io::Result<BootId> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    parse_boot_id(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{BOOT_ID}: {text:?} is no UUID"))
    })
}

fn parse_boot_id(text: &str) -> Option<BootId> {
    Uuid::try_parse(text.trim_end()).ok().map(|uuid| BootId(uuid.into_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_id_is_a_uuid() {
        let BootId(id) = parse_boot_id("53b98363-bcfd-4521-9d8f-9419f9880b9a\n").unwrap();
        assert_eq!((id[0], id[15]), (0x53, 0x9a));
        assert_eq!(parse_boot_id("53b98363"), None);
        assert_eq!(parse_boot_id("53b98363-bcfd-4521-9d8f-9419f9880b9ag"), None);
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
    }

    /// Two openings have the same witness, another file system has a different one.
    #[test]
    fn a_page_cache_has_one_witness() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "x").unwrap();
        let witness = of(&File::open(&path).unwrap());
        assert_eq!(of(&File::open(&path).unwrap()), witness);
        if let Ok(memory) = tempfile::tempfile_in("/dev/shm") {
            assert_eq!(of(&memory), Some(CacheWitness::Memory));
        }
    }

    /// Both ways to the directory in sysfs lead to the same place, if both exist.
    #[test]
    fn the_kernel_names_the_directory_that_the_device_names() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let kind = fstatfs(&file).unwrap().filesystem_type();
        let (Some(name), true) = (sysfs_name(&file), kind == EXT4_SUPER_MAGIC) else {
            println!("skipped: not on ext4, or a kernel before 6.9");
            return;
        };
        assert_eq!(name, Path::new("ext4").join(device_name(&file).unwrap()));
        let Some(CacheWitness::Superblock(inode)) = of(&file) else { panic!("{:?}", of(&file)) };
        assert_eq!(sysfs_inode(&Path::new("/sys/fs").join(name)), Some(inode));
    }
}
