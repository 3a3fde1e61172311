//! Which file systems are trusted when they report where a file has holes.

use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, F2FS_SUPER_MAGIC, FsType, TMPFS_MAGIC,
};

/// Trusted are those whose answer includes dirty data in the page cache, and that can be asked at
/// every offset: what they report as a hole reads as zeros. The same answer is relied on
/// permanently, for a base, and for the bits of sectors that a dead daemon acknowledged. So an
/// unknown file system is not asked, and everything counts as data. That is always correct and
/// costs time. In particular:
///
/// - ZFS said of data that was just written that it is a hole (OpenZFS 15526, 6050, 11900). A sync
///   of the file before the
///   question writes ZFS's intent log and leaves the block tree, which is what is asked, as it is.
/// - FUSE hands the question to a program, and NFS and SMB to a server, that may know nothing of
///   what this host has in its
///   page cache, or answer from a file system that is on none of the lists.
/// - overlayfs hands it to a file system that it does not name.
const BELIEVED: [FsType; 5] = [
    // ext2, ext3 and ext4. (ext2 reports everything as data.)
    EXT4_SUPER_MAGIC,
    XFS_MAGIC,
    BTRFS_SUPER_MAGIC,
    F2FS_SUPER_MAGIC,
    // Its page cache is the file.
    TMPFS_MAGIC,
];

/// "XFSB". (In `nix` not for musl.)
const XFS_MAGIC: FsType = FsType(0x5846_5342);

/// Whether a file system of this kind can be asked for the holes of its files.
pub(crate) fn is_believed(kind: FsType) -> bool {
    BELIEVED.contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_lie_is_not_asked() {
        for (magic, expected) in [
            (0xef53, true),
            (0x5846_5342, true),
            (0x9123_683e, true),
            (0xf2f5_2010, true),
            (0x0102_1994, true),
            // ZFS, FUSE, NFS, SMB, overlayfs, 9p, none.
            (0x2fc1_2fc1, false),
            (0x6573_5546, false),
            (0x6969, false),
            (0xff53_4d42, false),
            (0x794c_7630, false),
            (0x0102_1997, false),
            (0, false),
        ] {
            assert_eq!(is_believed(FsType(magic)), expected, "{magic:#x}");
        }
    }
}
