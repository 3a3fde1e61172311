//! A disk goes from one daemon to another when its guest is migrated, and stays if the guest stays.

use std::path::Path;

use crate::common::{Daemon, PROGRAM, SECTORS, has_landlock};
use block_io::Host;
use block_io::ops::inspect::{Content, inspect};
use testkit::dirty_log::Log;
use testkit::frontend::{
    F_FLUSH, F_LOG_ALL, F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend,
};
use testkit::memory::Memory;
use testkit::queue::{Buffer, Queue, readable, writable};
use testkit::request::{IN, OUT, header};
use vhost::vhost_user::message::FrontendReq;

const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH;

/// A frontend with one queue, whose guest can come and go.
pub(crate) struct Guest {
    frontend: RawFrontend,
    memory: Memory,
    queue: Queue,
    head: u64,
    status: u64,
    data: u64,
    log: Option<Log>,
}

impl Guest {
    /// Connected, as QEMU is when it waits for its guest.
    pub(crate) fn waiting(daemon: &Daemon) -> Self {
        let mut frontend = RawFrontend::new(daemon.connect());
        frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
        let config = frontend.get_config(0, 60).unwrap();
        assert_eq!(config[..8], SECTORS.to_le_bytes());
        let mut memory = Memory::new(64);
        let queue = Queue::new(&mut memory, 0, 16);
        let (head, status, data) = (memory.take(16), memory.take(1), memory.take(512));
        memory.set(&mut frontend);
        Guest { frontend, memory, queue, head, status, data, log: None }
    }

    pub(crate) fn start(&mut self) {
        self.queue.start(&mut self.frontend, self.log.is_some());
    }

    /// Tries to start, which must end the connection.
    pub(crate) fn start_in_vain(mut self, daemon: &mut Daemon) -> String {
        self.frontend.need_reply = false;
        self.start();
        let line = daemon.wait_line("connection closed: SET_VRING_");
        self.frontend.wait_closed();
        line
    }

    pub(crate) fn log(&mut self, on: bool) {
        let log = if on { F_LOG_ALL } else { 0 };
        if on {
            let log = self.memory.log();
            log.set(&mut self.frontend);
            self.log = Some(log);
        }
        self.frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES | log);
    }

    pub(crate) fn stop(&mut self) {
        self.frontend.get_vring_base(0);
    }

    /// What the sector holds; every byte of a sector is the same.
    pub(crate) fn read(&mut self, sector: u64) -> u8 {
        self.memory.write(self.data, &[0xee; 512]);
        self.request(IN, sector, &[writable(self.data, 512)]);
        let bytes: [u8; 512] = self.memory.read(self.data);
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        bytes[0]
    }

    pub(crate) fn write(&mut self, sector: u64, value: u8) {
        self.memory.write(self.data, &[value; 512]);
        self.request(OUT, sector, &[readable(self.data, 512)]);
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) {
        self.memory.write(self.head, &header(kind, sector));
        let chain = [&[readable(self.head, 16)], data, &[writable(self.status, 1)]].concat();
        self.queue.describe(&self.memory, 0, &chain);
        self.queue.offer(&self.memory, 0);
        self.queue.wait(&self.memory);
        assert_eq!(self.memory.read(self.status), [0]);
    }
}

/// Makes the base, and starts a daemon named `name` on the COW file.
fn daemon(directory: &Path, name: &str, args: &[&str]) -> Daemon {
    let (cow, base) = (directory.join("cow"), directory.join("base"));
    if !base.exists() {
        std::fs::write(&base, vec![0; usize::try_from(SECTORS).unwrap() * 512]).unwrap();
    }
    let own = directory.join(name);
    std::fs::create_dir_all(&own).unwrap();
    let image = format!("{},{}", cow.display(), base.display());
    Daemon::start(&own, [args, &[&image]].concat())
}

fn is_clean(directory: &Path) -> bool {
    let found = inspect(&Host, &directory.join("cow"), None).unwrap();
    assert!(found.problem.is_none(), "{:?}", found.problem);
    let Content::Cow(cow) = &found.files[0].content else { panic!("no COW file") };
    let side_file = directory.join("cow.live");
    !cow.live && !found.files[0].in_use && !side_file.exists()
}

fn migrates(args: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut source = daemon(directory, "source", args);
    let mut guest = Guest::waiting(&source);
    guest.start();
    guest.write(1, 0x11);
    let mut target = daemon(directory, "target", &["--incoming"]);
    let mut arriving = Guest::waiting(&target);
    guest.log(true);
    guest.write(2, 0x22);
    guest.stop();
    source.wait_line("disk closed");
    arriving.start();
    assert_eq!([1, 2, 3].map(|sector| arriving.read(sector)), [0x11, 0x22, 0]);
    arriving.write(3, 0x33);

    // The source has nothing to do with it any more.
    let why = guest.start_in_vain(&mut source);
    assert!(why.contains("in use"), "{why}");
    source.terminate();
    arriving.write(4, 0x44);
    drop(arriving);
    target.wait_line("connection ended");
    target.terminate();
    assert!(is_clean(directory));

    let last = daemon(directory, "last", &[]);
    let mut guest = Guest::waiting(&last);
    guest.start();
    assert_eq!([1, 2, 3, 4].map(|sector| guest.read(sector)), [0x11, 0x22, 0x33, 0x44]);
}

#[test]
fn a_guest_finds_its_disk_at_the_other_daemon() {
    migrates(&["--format=native"]);
    migrates(&["--format=uml", "--cow-cache=direct"]);
}

#[test]
fn a_guest_that_stays_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut source = daemon(directory.path(), "source", &[]);
    let target = daemon(directory.path(), "target", &["--incoming"]);
    let arriving = Guest::waiting(&target);
    let mut guest = Guest::waiting(&source);
    guest.start();
    for round in 1..=5 {
        guest.log(true);
        guest.write(round, 0x55);
        guest.stop();
        source.wait_line("disk closed");
        assert!(is_clean(directory.path()));
        // The frontend may switch the log off before or after it starts the ring again.
        if round % 2 == 0 {
            guest.log(false);
        }
        guest.start();
        assert_eq!(guest.read(round), 0x55);
        guest.log(false);
        guest.write(round, 0x66);
    }
    // Not let go without a log.
    guest.stop();
    assert!(!is_clean(directory.path()));
    guest.start();
    assert_eq!(guest.read(5), 0x66);
    drop((guest, arriving));
    target.terminate();
    let log = source.terminate();
    assert!(!log.contains("ERROR"), "{log}");
    assert!(is_clean(directory.path()));
}

#[test]
fn a_disk_that_is_not_let_go_is_waited_for_and_then_refused() {
    let directory = tempfile::tempdir().unwrap();
    let source = daemon(directory.path(), "source", &[]);
    let mut guest = Guest::waiting(&source);
    guest.start();
    let mut target = daemon(directory.path(), "target", &["--incoming"]);
    let why = Guest::waiting(&target).start_in_vain(&mut target);
    assert!(why.contains("queue 0: cannot serve it") && why.contains("in use"), "{why}");
    guest.write(1, 0x11);
    // It tries again with the next frontend.
    let mut arriving = Guest::waiting(&target);
    drop(guest);
    source.terminate();
    arriving.start();
    assert_eq!(arriving.read(1), 0x11);
    // From now on it is as any other.
    arriving.stop();
    assert!(!is_clean(directory.path()));
    target.terminate();
    assert!(is_clean(directory.path()));
}

#[test]
fn a_disk_that_has_changed_is_refused() {
    changed("--sandbox=off", "has no backing file");
    if has_landlock() {
        changed("--sandbox=on", "--sandbox allows only the files that the disk had");
    }
}

fn changed(sandbox: &str, replaced: &str) {
    let directory = tempfile::tempdir().unwrap();
    let cow = directory.path().join("cow");
    daemon(directory.path(), "first", &[]).terminate();
    let mut target = daemon(directory.path(), "target", &["--incoming", sandbox]);
    let arriving = Guest::waiting(&target);
    std::fs::rename(&cow, directory.path().join("elsewhere")).unwrap();
    let why = arriving.start_in_vain(&mut target);
    assert!(why.contains("does not exist any more"), "{why}");
    assert!(!cow.exists(), "it was made anew");

    let arriving = Guest::waiting(&target);
    let options = block_io::image::CreateOptions {
        format: block_io::CowFormat::Native,
        base: None,
        size: Some(2 * SECTORS * 512),
        replace: false,
        journal_len: None,
        mode: None,
    };
    block_io::image::create_cow(&Host, &cow, &options).unwrap();
    let why = arriving.start_in_vain(&mut target);
    assert!(why.contains(replaced), "{why}");
    target.terminate();

    let args = ["--incoming", "--blk-file", cow.to_str().unwrap()];
    let mut target = Daemon::start(directory.path(), args);
    let mut frontend = RawFrontend::new(target.connect());
    frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
    let mut memory = Memory::new(16);
    let queue = Queue::new(&mut memory, 0, 16);
    memory.set(&mut frontend);
    block_io::image::resize(&Host, &cow, 4 * SECTORS * 512, false).unwrap();
    frontend.need_reply = false;
    queue.start(&mut frontend, false);
    let why = target.wait_line("connection closed");
    let expected = format!("changed from {} to {} sectors", 2 * SECTORS, 4 * SECTORS);
    assert!(why.contains(&expected), "{why}");
    target.terminate();
}

#[test]
fn what_is_missing_is_said_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let raw = directory.path().join("raw");
    std::fs::write(&raw, [0; 4096]).unwrap();
    let missing = directory.path().join("missing");
    let over_raw = format!("{},{}", missing.display(), raw.display());
    for (image, expected) in [
        (vec!["--blk-file", missing.to_str().unwrap()], "cannot open"),
        (vec![over_raw.as_str()], "cannot open"),
        (vec!["--blk-file", raw.to_str().unwrap()], "not a COW file"),
    ] {
        let mut command = std::process::Command::new(PROGRAM);
        command.arg("--incoming").arg("--socket-path").arg(&socket).args(&image);
        let (status, log) = Daemon::spawn(command, socket.clone()).wait();
        assert_eq!(status, Some(1), "{log}");
        assert!(log.contains(expected), "{log}");
        assert!(!missing.exists());
    }
}
