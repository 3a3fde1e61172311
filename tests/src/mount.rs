//! File systems that are mounted here, by root, and what can befall them.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::files::TestDir;
use crate::powercut::{FileSystem, wait_until};
use crate::programs::{run, run_ok};

/// What a dead daemon had in its rings keeps its file system busy for a moment.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(60);

/// A file system in a file, mounted through a loop device. It is unmounted when it is dropped, and
/// its device let go.
pub struct LoopMount {
    file_system: FileSystem,
    image: PathBuf,
    /// Where it is mounted.
    pub at: PathBuf,
    mounted: bool,
}

impl LoopMount {
    /// Makes one at `image` that holds the files of `files`, and mounts it at `at`; returns the
    /// reason if that cannot be done here.
    ///
    /// # Errors
    /// The reason, if this user may not mount, or this kernel does not know the file system.
    pub fn new(
        file_system: FileSystem,
        image: &Path,
        files: &Path,
        at: &Path,
    ) -> Result<Self, String> {
        file_system.make(image, files);
        fs::create_dir_all(at).expect("a directory");
        let mut mount =
            Self { file_system, image: image.to_owned(), at: at.to_owned(), mounted: false };
        mount.try_mount()?;
        Ok(mount)
    }

    fn try_mount(&mut self) -> Result<(), String> {
        let mut command = Command::new("mount");
        command.args(["-t", self.file_system.name(), "-o", "loop"]).arg(&self.image).arg(&self.at);
        let outcome = run(command);
        self.mounted = outcome.code == Some(0);
        if self.mounted {
            Ok(())
        } else {
            Err(format!(
                "{} cannot be mounted here: {}",
                self.file_system.name(),
                outcome.output.trim()
            ))
        }
    }

    /// Mounts it again.
    ///
    /// # Panics
    /// If that fails.
    pub fn mount(&mut self) {
        if let Err(why) = self.try_mount() {
            panic!("{why}");
        }
    }

    /// Tries to unmount it; false if it is in use.
    pub fn try_unmount(&mut self) -> bool {
        let mut command = Command::new("umount");
        command.arg(&self.at);
        self.mounted = run(command).code != Some(0);
        !self.mounted
    }

    /// Unmounts it as soon as it is no longer in use; `meanwhile` is called before each try.
    ///
    /// # Panics
    /// If it stays in use.
    pub fn unmount(&mut self, mut meanwhile: impl FnMut()) {
        let unmounted = wait_until(UNMOUNT_TIMEOUT, || {
            meanwhile();
            self.try_unmount()
        });
        assert!(unmounted, "{} stays in use", self.at.display());
    }

    /// Shuts it down as it does itself after an error, without writing what is in its log:
    /// XFS_IOC_GOINGDOWN, which ext4 has as well.
    ///
    /// # Errors
    /// The file system has no such thing.
    pub fn shut_down(&self) -> std::io::Result<()> {
        /// _IOR('X', 125, __u32)
        const GOING_DOWN: libc::Ioctl = 0x8004_587D_u32 as libc::Ioctl;
        // XFS_FSOP_GOING_FLAGS_NOLOGFLUSH
        let no_log_flush: u32 = 2;
        let root = File::open(&self.at)?;
        // SAFETY: the descriptor is open, and the kernel reads one u32 at the address.
        let result = unsafe { libc::ioctl(root.as_raw_fd(), GOING_DOWN, &raw const no_log_flush) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        if self.mounted {
            let mut command = Command::new("umount");
            // Also from a daemon that is only about to be killed.
            command.arg("--lazy").arg(&self.at);
            let _ = run(command);
        }
    }
}

/// A small tmpfs, for an image that finds no more space: a thin device that is full.
pub struct SmallTmpfs {
    at: PathBuf,
}

impl SmallTmpfs {
    /// Mounts one of `len` bytes in `dir`.
    ///
    /// # Errors
    /// The reason, if this user may not mount.
    pub fn new(dir: &TestDir, len: u64) -> Result<Self, String> {
        let at = dir.path("thin");
        fs::create_dir(&at).expect("a directory");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={len}"), "none"]).arg(&at);
        let outcome = run(command);
        if outcome.code == Some(0) { Ok(Self { at }) } else { Err(outcome.output) }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    /// Takes all the space that is left.
    ///
    /// # Panics
    /// If something else than the lack of space ends that.
    pub fn fill(&self) {
        let filler = self.path("filler");
        let mut file = OpenOptions::new().append(true).create(true).open(filler).expect("a file");
        for len in [1 << 20, 4096] {
            let block = vec![b'f'; len];
            let error = loop {
                if let Err(error) = file.write_all(&block) {
                    break error;
                }
            };
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull, "filling a tmpfs: {error}");
        }
    }

    /// Gives that space back.
    ///
    /// # Panics
    /// If it cannot.
    pub fn make_room(&self) {
        fs::remove_file(self.path("filler")).expect("removing a file");
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let mut command = Command::new("umount");
        command.arg("--lazy").arg(&self.at);
        let _ = run(command);
    }
}

/// Has the kernel forget the content of files that it believes to be on their disks.
///
/// # Panics
/// If this user may not.
pub fn drop_page_cache() {
    let mut command = Command::new("sh");
    command.args(["-c", "echo 1 >/proc/sys/vm/drop_caches"]);
    run_ok(command);
}
