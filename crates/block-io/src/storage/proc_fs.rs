//! Access to /proc, of which a process may see little or nothing: systemd's `ProcSubset=pid` hides
//! /proc/sys, and in a chroot there may be no /proc at all.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

const DESCRIPTORS: &str = "/proc/self/fd";

/// Opening this path opens the same inode again, whatever its name is by now.
#[must_use]
pub fn descriptor_path(file: impl AsFd) -> PathBuf {
    Path::new(DESCRIPTORS).join(file.as_fd().as_raw_fd().to_string())
}

/// Whether the paths of [`descriptor_path`] work.
#[must_use]
pub fn shows_descriptors() -> bool {
    Path::new(DESCRIPTORS).exists()
}

/// Explains an error that came from using a [`descriptor_path`].
pub(crate) fn explain(err: io::Error) -> io::Error {
    if err.kind() != io::ErrorKind::NotFound || shows_descriptors() {
        return err;
    }
    let said = "no /proc here, through which an open file is opened again; mount one (in a chroot: \
                mount -t proc proc ROOT/proc)";
    io::Error::new(io::ErrorKind::NotFound, said)
}

/// Explains why the boot id cannot be read.
pub(crate) fn explain_boot_id(err: io::Error) -> io::Error {
    if err.kind() != io::ErrorKind::NotFound {
        return err;
    }
    let said = "this process does not see /proc/sys, which has the host's boot id; without it there is no \
                telling whether the last daemon's writes are still in the page cache. Make it visible (in \
                a systemd unit: ProcSubset=all, the default; in a chroot: mount -t proc proc ROOT/proc)";
    io::Error::new(io::ErrorKind::NotFound, said)
}
