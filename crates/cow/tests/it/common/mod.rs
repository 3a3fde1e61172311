//! What the tests of the tool share: a directory of their own, `cow` and other programs run in it,
//! the UML vectors.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

/// The mtime that the UML vectors expect of their bases.
pub const VECTOR_MTIME: u64 = 1_700_000_000;

/// A directory that is gone afterwards.
pub struct Scratch(tempfile::TempDir);

/// What a program left.
pub struct Run {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Scratch {
    pub fn new() -> Self {
        Scratch(tempfile::tempdir().unwrap())
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and gives it the vectors' mtime.
    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        set_mtime(&path, VECTOR_MTIME);
        path
    }

    pub fn read(&self, name: impl AsRef<Path>) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// The names in the directory, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs `cow` with the words of `args`, in the directory.
    pub fn cow(&self, args: &str) -> Run {
        self.cow_args(args.split_whitespace())
    }

    pub fn cow_args(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Run {
        self.run(Command::new(env!("CARGO_BIN_EXE_cow")).args(args))
    }

    /// Runs `cow` and expects that it succeeds; gives its standard output.
    pub fn cow_ok(&self, args: &str) -> String {
        let run = self.cow(args);
        assert_eq!(run.status, 0, "cow {args}: {}{}", run.stdout, run.stderr);
        run.stdout
    }

    /// Runs `cow`, expects `status`, and that its message has every one of `words`.
    pub fn cow_fails(&self, args: &str, status: i32, words: &[&str]) {
        let run = self.cow(args);
        assert_eq!(run.status, status, "cow {args}: {}{}", run.stdout, run.stderr);
        for word in words {
            assert!(run.stderr.contains(word), "cow {args}: no {word:?} in {}", run.stderr);
        }
        let messages = run.stderr.lines().filter(|line| !line.starts_with("cow: warning: "));
        assert_eq!(messages.count(), 1, "cow {args}: one message: {}", run.stderr);
    }

    /// What `cow ARGS --output=json` says.
    pub fn json(&self, args: &str) -> serde_json::Value {
        serde_json::from_str(&self.cow_ok(&format!("{args} --output=json"))).unwrap()
    }

    /// Runs another program in the directory.
    pub fn run(&self, command: &mut Command) -> Run {
        let output = command.current_dir(self.dir()).stdin(Stdio::null()).output().unwrap();
        Run::from(output)
    }

    /// Writes the three bases of the vectors.
    pub fn bases(&self) {
        self.write("base-1m.img", &base_image('B', 2048));
        self.write("base-odd.img", &base_image('B', 1954)[..1_000_001]);
        self.write("base-512.img", &base_image('B', 1));
    }

    /// Unpacks a vector, `uml-1m` say, to NAME.cow.
    pub fn vector(&self, name: &str) -> PathBuf {
        let packed = fs::File::open(vectors().join(format!("{name}.cow.zst"))).unwrap();
        let path = self.path(format!("{name}.cow"));
        let mut bytes = Vec::new();
        ruzstd::decoding::StreamingDecoder::new(packed).unwrap().read_to_end(&mut bytes).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        // 128 and more: ended by a signal, as a shell says it.
        let signal = std::os::unix::process::ExitStatusExt::signal(&output.status).unwrap_or(0);
        let status = output.status.code().unwrap_or(128 + signal);
        Run { status, stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

/// The UML vectors in this repository.
pub fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../cow-format/tests/vectors")
}

/// `count` sectors, each 32 times the tag and the sector's number (as the vectors' gen-base.sh
/// makes them).
pub fn base_image(tag: char, count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for sector in 0..count {
        for _ in 0..32 {
            writeln!(bytes, "{tag}{sector:014}").unwrap();
        }
    }
    bytes
}

pub fn set_mtime(path: &Path, secs: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
    fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

pub fn mtime_secs(path: &Path) -> u64 {
    fs::metadata(path).unwrap().modified().unwrap().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Bytes that the file really takes.
pub fn allocated(path: &Path) -> u64 {
    // While the kernel writes it back the count of its blocks can be anything.
    fs::File::open(path).unwrap().sync_all().unwrap();
    fs::metadata(path).unwrap().blocks() * 512
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes into the middle of a file and keeps its mtime out of it.
pub fn patch(path: &Path, at: u64, bytes: &[u8]) {
    fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// Says that a test is skipped if `program` is not there; CI installs all of them.
pub fn missing(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()));
    if !found {
        println!("skipped: {program} is not installed");
    }
    !found
}
