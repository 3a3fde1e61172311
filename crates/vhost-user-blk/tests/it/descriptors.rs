//! A disk that the daemon gets as open descriptors: it opens no path, from its start to its end.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use block_io::image::{CreateOptions, create_cow, snapshot};
use block_io::{CowFormat, Host};
use testkit::wait::wait_until;

use crate::common::{Daemon, PROGRAM, SECTORS, upgrade_ok};
use crate::migration::Guest;

/// The descriptors' numbers in the daemon.
const COW: RawFd = 110;
const DIRECT: RawFd = 111;
const LAYER: RawFd = 112;
const BASE: RawFd = 113;

/// A directory with the chain `cow`, `layer`, `base`, whose files get other names when they have
/// been opened.
struct Chain(tempfile::TempDir);

impl Chain {
    fn new() -> Self {
        let chain = Chain(tempfile::tempdir().unwrap());
        let base = chain.path("base");
        fs::write(&base, vec![0; usize::try_from(SECTORS).unwrap() * 512]).unwrap();
        let over = CreateOptions::over(CowFormat::Native, &base);
        create_cow(&Host, &chain.path("layer"), &over).unwrap();
        snapshot(&Host, &chain.path("layer"), &chain.path("cow")).unwrap();
        chain
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn open(&self, name: &str, options: &mut OpenOptions) -> OwnedFd {
        options.open(self.path(name)).unwrap().into()
    }

    /// Every file of the disk, by its number.
    fn open_all(&self) -> Vec<(RawFd, OwnedFd)> {
        let write = || File::options().read(true).write(true).to_owned();
        let read = || File::options().read(true).to_owned();
        vec![
            (COW, self.open("cow", &mut write())),
            (DIRECT, self.open("cow", write().custom_flags(libc::O_DIRECT))),
            (LAYER, self.open("layer", &mut read())),
            (BASE, self.open("base", &mut read())),
        ]
    }

    /// Moves every file away, or back.
    fn rename(&self, away: bool) {
        for name in ["cow", "layer", "base"] {
            let (here, there) = (self.path(name), self.path(&format!("{name}-away")));
            let (from, to) = if away { (here, there) } else { (there, here) };
            fs::rename(from, to).unwrap();
        }
    }
}

/// `command`, which gets these descriptors under these numbers.
fn passing(mut command: Command, fds: Vec<(RawFd, OwnedFd)>) -> Command {
    // SAFETY: dup2 is async-signal-safe, and what it makes is inherited.
    unsafe {
        command.pre_exec(move || {
            for (number, fd) in &fds {
                if libc::dup2(fd.as_raw_fd(), *number) != *number {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command
}

fn daemon(directory: &Path, name: &str, fds: Vec<(RawFd, OwnedFd)>, args: &[&str]) -> Daemon {
    let own = directory.join(name);
    fs::create_dir_all(&own).unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("--socket-path").arg(own.join("socket"));
    command.arg("--control").arg(own.join("control")).args(args);
    let mut daemon = Daemon::spawn(passing(command, fds), own.join("socket"));
    daemon.wait_line("listening");
    daemon
}

const BUFFERED: [&str; 2] = ["--cow-fd=110", "--base-fd=112,113"];

#[test]
fn a_disk_of_descriptors_is_served_upgraded_and_closed() {
    let direct = [&BUFFERED[..], &["--cow-direct-fd=111", "--cow-cache=direct"]].concat();
    for args in [&BUFFERED[..], &direct] {
        let chain = Chain::new();
        let fds = chain.open_all();
        chain.rename(true);
        let mut daemon = daemon(chain.0.path(), "one", fds, args);
        let mut guest = Guest::waiting(&daemon);
        guest.start();
        guest.write(1, 0x11);
        for round in 2..5 {
            let said = upgrade_ok(&chain.path("one"));
            assert!(said.contains("upgraded"), "{said}");
            assert_eq!(guest.read(round - 1), 0x11 * u8::try_from(round - 1).unwrap());
            guest.write(round, 0x11 * u8::try_from(round).unwrap());
        }
        assert!(daemon.wait_line("disk ").contains("cow"));
        drop(guest);
        let log = daemon.terminate();
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
        chain.rename(false);
        let disk = block_io::Disk::open_cow(&chain.path("cow"), None, &Default::default()).unwrap();
        assert!(!disk.is_leaky());
        drop(disk);
    }
}

#[test]
fn it_is_let_go_and_taken_again_without_being_opened() {
    let chain = Chain::new();
    let (here, there) = (chain.open_all(), chain.open_all());
    chain.rename(true);
    let mut source = daemon(chain.0.path(), "source", here, &BUFFERED);
    let incoming = [&BUFFERED[..], &["--incoming"]].concat();
    let target = daemon(chain.0.path(), "target", there, &incoming);
    let (mut guest, mut arriving) = (Guest::waiting(&source), Guest::waiting(&target));
    guest.start();
    // It stays at first.
    for round in 1..3 {
        guest.log(true);
        guest.write(round, 0x55);
        guest.stop();
        source.wait_line("disk closed");
        guest.start();
        assert_eq!(guest.read(round), 0x55);
        guest.log(false);
    }
    guest.log(true);
    guest.write(3, 0x33);
    guest.stop();
    source.wait_line("disk closed");
    arriving.start();
    assert_eq!([1, 2, 3, 4].map(|sector| arriving.read(sector)), [0x55, 0x55, 0x33, 0]);
    // The lock is on the description.
    let why = guest.start_in_vain(&mut source);
    assert!(why.contains("in use"), "{why}");
    source.terminate();
    drop(arriving);
    target.terminate();
}

#[test]
fn systemd_passes_the_disk_beside_the_socket() {
    let chain = Chain::new();
    let socket = chain.path("socket");
    let listener = OwnedFd::from(UnixListener::bind(&socket).unwrap());
    let fds = chain.open_all();
    chain.rename(true);
    let first = [listener].into_iter().chain(fds.into_iter().map(|(_, fd)| fd));
    // Numbers from 3 on are the shell's to give: here they can be in use.
    let passed: Vec<_> = (200..).zip(first).collect();
    let mut command = Command::new("bash");
    command.args([
        "-c",
        "exec 3<&200 4<&201 5<&202 6<&203 7<&204; export LISTEN_PID=$$; exec \"$@\"",
        "bash",
        PROGRAM,
    ]);
    command.env("LISTEN_FDS", "5").env("LISTEN_FDNAMES", "vm.socket:cow:cow-direct:base:base");
    command.arg("--cow-cache=direct").arg("--control").arg(chain.path("control"));
    let mut daemon = Daemon::spawn(passing(command, passed), socket.clone());
    daemon.wait_line("listening");
    let mut guest = Guest::waiting(&daemon);
    guest.start();
    guest.write(7, 0x77);
    upgrade_ok(chain.0.path());
    assert_eq!(guest.read(7), 0x77);
    drop(guest);
    daemon.end();
}

#[test]
fn a_descriptor_that_does_not_do_is_refused_by_its_option() {
    let chain = Chain::new();
    let refused = |fds, args: &[&str], expected: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.arg("--socket-path").arg(chain.path("socket")).args(args);
        let (status, said) = Daemon::spawn(passing(command, fds), chain.path("socket")).wait();
        assert_eq!(status, Some(if expected[0].starts_with("--") { 2 } else { 1 }), "{said}");
        for text in expected {
            assert!(said.contains(text), "no {text:?} in {said}");
        }
        assert!(!chain.path("socket").exists());
    };
    refused(Vec::new(), &BUFFERED, &["--cow-fd=110", "Bad file descriptor"]);
    let swapped: Vec<_> = chain.open_all().into_iter().map(|(fd, file)| (223 - fd, file)).collect();
    refused(swapped, &BUFFERED, &["--cow-fd=110", "reading only"]);
    refused(chain.open_all(), &["--cow-fd=110", "--base-fd=112"], &["not one of those", "base"]);
    let writable = ["--cow-fd=110", "--base-fd=111,113"];
    refused(chain.open_all(), &writable, &["--base-fd=111", "writing too"]);
    let mixed = ["--cow-fd=110", "--base-fd=113,112"];
    refused(chain.open_all(), &mixed, &["base", "not a COW file"]);
    let pipe = |number| (number, OwnedFd::from(std::io::pipe().unwrap().0));
    refused(vec![pipe(COW)], &["--cow-fd=110", "--read-only"], &["special file"]);
    // Nothing was written.
    let held = chain.open_all();
    wait_until("the locks", || {
        block_io::Disk::open_cow(&chain.path("cow"), None, &Default::default()).is_ok()
    });
    drop(held);
}
