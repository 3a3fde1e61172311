//! Directories, images and digests for tests.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::backend::Backend;
use crate::guest::{Console, Guest};
use crate::programs::{cow, run_ok};

/// A directory that is removed with its test.
pub struct TestDir(TempDir);

impl TestDir {
    /// Makes one.
    pub fn new() -> Self {
        Self(
            tempfile::Builder::new()
                .prefix("guest-test-")
                .tempdir()
                .expect("a temporary directory"),
        )
    }

    /// The path of `name` in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Default for TestDir {
    fn default() -> Self {
        Self::new()
    }
}

/// `len` bytes in which every sector differs from every other, and from those of another `seed`.
pub fn patterned(len: usize, seed: u64) -> Vec<u8> {
    let word = |index: u64| {
        let mixed = index.wrapping_add(seed << 32).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (mixed ^ (mixed >> 29)).to_le_bytes()
    };
    (0..).flat_map(word).take(len).collect()
}

/// Writes `content` to a new file `path`.
pub fn write_image(path: &Path, content: &[u8]) {
    let mut file = File::create_new(path).expect("a new image file");
    file.write_all(content).expect("writing an image file");
}

/// The sha256 of a file's content, in hexadecimal.
pub fn sha256(path: &Path) -> String {
    let mut hasher = Sha256::new();
    let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    io::copy(&mut file, &mut HashWriter(&mut hasher)).expect("reading a file");
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A base image, the place of a COW file over it, and their daemon.
pub struct CowDisk {
    /// Holds everything of the test.
    pub dir: TestDir,
    /// The base image.
    pub base: PathBuf,
    /// The COW file; the daemon creates it.
    pub cow: PathBuf,
}

impl CowDisk {
    /// A base of this content.
    pub fn over(content: &[u8]) -> Self {
        let disk = Self::at(TestDir::new());
        write_image(&disk.base, content);
        disk
    }

    /// A base of `len` bytes with an ext4 file system that holds `files` (name, content).
    pub fn over_ext4(len: u64, files: &[(&str, &str)]) -> Self {
        let disk = Self::at(TestDir::new());
        let tree = disk.dir.path("tree");
        fs::create_dir(&tree).expect("a new directory");
        for (name, content) in files {
            fs::write(tree.join(name), content).expect("writing a file");
        }
        let mut mkfs = Command::new("mkfs.ext4");
        // Debian's path of a user does not hold it.
        mkfs.env("PATH", format!("{}:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default()));
        mkfs.args(["-q", "-F", "-d"]).args([&tree, &disk.base]).arg(format!("{}k", len / 1024));
        run_ok(mkfs);
        disk
    }

    fn at(dir: TestDir) -> Self {
        let (base, cow) = (dir.path("base.img"), dir.path("disk.cow"));
        Self { dir, base, cow }
    }

    /// `COW,BASE`, as the daemon and UML's `ubd0=` take it.
    pub fn spec(&self) -> String {
        format!("{},{}", self.cow.display(), self.base.display())
    }

    /// Starts the daemon on `COW,BASE` with further options. One at a time: the socket is the same.
    pub fn serve(&self, options: &[&str]) -> Backend {
        let mut args = options.to_vec();
        let spec = self.spec();
        args.push(&spec);
        Backend::daemon(&self.dir.path("socket"), &args)
    }

    /// Runs `guest` to its end with this disk at a daemon with further options, which must end
    /// well.
    pub fn run(&self, guest: Guest, options: &[&str]) -> Console {
        let daemon = self.serve(options);
        let console = guest.disk(&daemon).run(&self.dir, "guest");
        daemon.stop();
        console
    }

    /// The disk's content, merged by `cow merge` into a new file.
    pub fn merged(&self) -> PathBuf {
        let out = self.dir.path("merged.img");
        let _ = fs::remove_file(&out);
        let mut merge = cow();
        merge.arg("merge").args([&self.cow, &out]);
        run_ok(merge);
        out
    }
}
