//! Directories, images and digests for tests.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

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
    let mut file = fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
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
