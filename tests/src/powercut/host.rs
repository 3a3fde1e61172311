//! The host whose power is cut: its file system, and the script that it runs.

use std::env;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::files::TestDir;
use crate::flushed::DUMP_SLOT;
use crate::flushed::program::write_base;
use crate::guest::{Guest, Kernel, Running};
use crate::programs::{compile_c, cow, run_ok, vhost_user_blk};

/// Length of the host's disk: XFS takes no less than 300 MiB.
const DISK_LEN: u64 = 384 << 20;
/// Dumps of one boot that there is room for.
const DUMPS: u64 = 3;

/// File systems of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4
    Ext4,
    /// XFS
    Xfs,
    /// btrfs
    Btrfs,
}

impl FileSystem {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    /// As `mount -t` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// Mount options under which durability must be the same.
    pub(super) fn mount_options(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &["", "", "nodelalloc", "data=writeback"],
            Self::Xfs => &[""],
            Self::Btrfs => &["", "", "flushoncommit"],
        }
    }

    /// Makes one in a new file `image`, which holds the files of `dir`, that has no directories.
    pub fn make(self, image: &Path, dir: &Path) {
        let file = File::create_new(image).expect("a new disk image");
        file.set_len(DISK_LEN).expect("a length");
        let mut mkfs = Command::new(format!("mkfs.{}", self.name()));
        // Debian's path of a user does not hold it.
        mkfs.env("PATH", format!("{}:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default()));
        match self {
            Self::Ext4 => {
                mkfs.args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"]).arg(dir);
            }
            Self::Xfs => {
                let list = image.with_extension("files");
                fs::write(&list, xfs_prototype(dir)).expect("a list of files");
                mkfs.args(["-q", "-p"]).arg(list);
            }
            Self::Btrfs => {
                mkfs.args(["-q", "--rootdir"]).arg(dir);
            }
        }
        mkfs.arg(image);
        run_ok(mkfs);
    }
}

/// What mkfs.xfs takes as a description of files (mkfs.xfs(8), "-p protofile").
fn xfs_prototype(dir: &Path) -> String {
    let mut text = "unused\n0 0\nd--755 0 0\n".to_owned();
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        let (name, path) = (entry.file_name(), entry.path());
        text += &format!("{} ---644 0 0 {}\n", name.to_string_lossy(), path.display());
    }
    text + "$\n"
}

/// What the daemon is run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// The file system that the disk's files are on.
    pub file_system: FileSystem,
    /// UML's format, else the native one.
    pub uml: bool,
    /// Past the page cache.
    pub direct: bool,
}

impl Variant {
    /// All of them, so ordered that neighbours differ in all.
    pub fn all() -> Vec<Self> {
        let variant = |number: usize| Self {
            file_system: FileSystem::ALL[number % 3],
            uml: number % 2 == 1,
            direct: number / 2 % 2 == 1,
        };
        // 3, 2 and 2 values: twelve numbers meet each combination once.
        (0..12).map(variant).collect()
    }

    /// Its format, as `--format` takes it.
    pub fn format(self) -> &'static str {
        if self.uml { "uml" } else { "native" }
    }

    /// Its cache, as `--cow-cache` takes it.
    pub fn cache(self) -> &'static str {
        if self.direct { "direct" } else { "buffered" }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.file_system.name(), self.format(), self.cache())
    }
}

/// What is wrong on purpose, and must be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// The disk takes its last flushes back.
    FlushesTakenBack,
    /// The client reports flushes that it has not sent.
    FlushesNotSent,
    /// The daemon's syncs do nothing.
    NoSync,
    /// Its durable writes are ordinary ones.
    NoDurableWrite,
    /// Every other fdatasync is left out.
    HalfOfSyncs,
}

impl Lie {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::FlushesTakenBack,
        Self::FlushesNotSent,
        Self::NoSync,
        Self::NoDurableWrite,
        Self::HalfOfSyncs,
    ];

    /// As `tests/c/wrong.c` takes it, if it is one of the host.
    pub(super) fn of_the_host(self) -> Option<&'static str> {
        match self {
            Self::FlushesTakenBack | Self::FlushesNotSent => None,
            Self::NoSync => Some("nosync"),
            Self::NoDurableWrite => Some("nodsync"),
            Self::HalfOfSyncs => Some("half"),
        }
    }
}

/// A guest that is the host of a daemon: what each of its boots needs.
pub struct Host {
    variant: Variant,
    lie: Option<Lie>,
    template: Guest,
}

impl Host {
    /// Prepares the disk `image` and the boots of its host. `client` is the program of
    /// `flush-client`.
    pub fn new(
        dir: &TestDir,
        image: &Path,
        variant: Variant,
        lie: Option<Lie>,
        client: &Path,
    ) -> Self {
        let files = dir.path("files");
        fs::create_dir(&files).expect("a directory");
        for number in 0..2 {
            write_base(&files.join(format!("base{number}")), number).expect("writing a base");
        }
        variant.file_system.make(image, &files);
        let dump = File::create_new(dump_path(dir)).expect("a new file");
        dump.set_len(DUMPS * DUMP_SLOT).expect("a length");
        let mut template = Guest::new(Kernel::Qemu, "")
            .as_host()
            .queues(2)
            .with_program(client)
            .with_program(Path::new(cow().get_program()))
            .with_program(Path::new(vhost_user_blk().get_program()));
        if lie.and_then(Lie::of_the_host).is_some() {
            let library = dir.path("wrong.so");
            compile_c(include_str!("../../c/wrong.c"), &["-O1", "-shared", "-fPIC"], &library);
            let content = fs::read(library).expect("reading a library");
            template = template.with_file("lib/wrong.so", content);
        }
        Self { variant, lie, template }
    }

    /// Gives it a serial port for lines from the test, and one CPU only.
    pub fn controlled(mut self) -> Self {
        self.template = self.template.controlled().queues(1);
        self
    }

    /// Boots it with a script that ends with `plan`, from a disk that `drive` describes to QEMU.
    /// Its report is in the file `name`.told, and its console is shown by the running guest.
    pub fn boot(&self, dir: &TestDir, name: &str, drive: &str, plan: &str) -> Running {
        let script = format!(
            "{}\ncache={}\nformat={}\nwrong={}\n{plan}\ntell over\n",
            include_str!("host.sh"),
            self.variant.cache(),
            self.variant.format(),
            self.lie.and_then(Lie::of_the_host).unwrap_or_default(),
        );
        let dump = format!("format=raw,cache=unsafe,file={}", dump_path(dir).display());
        self.template
            .clone()
            .with_script(&script)
            .drive(drive)
            .drive(&dump)
            .debug_port(&dir.path(&format!("{name}.told")))
            .boot(dir, name)
    }
}

/// Where a host writes what it reads from the disk.
pub fn dump_path(dir: &TestDir) -> PathBuf {
    dir.path("dump")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_combination_is_a_variant_once() {
        let all: std::collections::BTreeSet<_> =
            Variant::all().iter().map(Variant::to_string).collect();
        assert_eq!(all.len(), 12);
    }
}
