//! The fence (docs/architecture.md): the lock of a dead daemon falls only when its I/O has ended.
//!
//! The daemon is killed with direct reads of the base in flight, whose pages go on arriving in
//! guest memory after the process is gone. The lock is on the COW file, which those reads do not
//! touch; it holds because the file is registered in the ring that they are in; or, with threads
//! that make system calls, because the process's descriptors are given up with the last thread
//! (block-io, ring/threads.rs).

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::{Daemon, PROGRAM};
use blk_bench::driver::device::{Device, Options};
use blk_bench::driver::queue::{Op, Request};
use block_io::ring::IoEngine;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;

const DEPTH: u16 = 96;
const READ_LEN: usize = 1 << 20;
const KILLS: usize = 3;
/// In which a page that came late would be seen.
const WATCH: Duration = Duration::from_millis(300);
/// After this the lock is never going to fall.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn nothing_arrives_after_the_lock_has_fallen() {
    if let Err(why) = IoEngine::IoUring.probe() {
        println!("skipped: no io_uring here: {why}");
        return;
    }
    killed_again_and_again("io_uring");
}

#[test]
fn nor_after_that_of_a_daemon_with_threads() {
    killed_again_and_again("sync");
}

fn killed_again_and_again(engine: &str) {
    // On a disk: a temporary file system may have no direct I/O.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = directory.path().join("base");
    let mut file = File::create_new(&base).unwrap();
    for _ in 0..DEPTH {
        file.write_all(&vec![0x5a; READ_LEN]).unwrap();
    }
    file.sync_all().unwrap();
    for _ in 0..KILLS {
        kill_with_reads_in_flight(engine, directory.path());
    }
}

fn kill_with_reads_in_flight(engine: &str, directory: &Path) {
    let cow = directory.join("cow");
    let socket = directory.join("socket");
    let mut command = Command::new(PROGRAM);
    command.arg("--socket-path").arg(&socket).arg("--base-cache=direct");
    command.arg(format!("--io-engine={engine}"));
    command.arg(format!("{},{}", cow.display(), directory.join("base").display()));
    let mut daemon = Daemon::spawn(command, socket);
    daemon.wait_line("listening");
    let mut options = Options::new(&daemon.socket);
    (options.depth, options.max_data) = (DEPTH, READ_LEN);
    let mut device = Device::connect(&options).unwrap();
    let mut queue = device.take_queues().remove(0);
    let sectors = u32::try_from(READ_LEN / 512).unwrap();
    for number in 0..u64::from(DEPTH) {
        let slot = queue.take_slot().unwrap();
        let sector = number * u64::from(sectors);
        queue.submit(slot, Request { op: Op::Read, sector, sectors });
    }
    queue.kick().unwrap();
    // The first page is there: the kernel has the reads.
    while arrived(&device) == 0 {
        std::hint::spin_loop();
    }
    daemon.signal(Signal::SIGKILL);
    let at_death = arrived(&device);

    let successor = File::options().read(true).write(true).open(&cow).unwrap();
    let died = Instant::now();
    while !try_lock(&successor) {
        assert!(died.elapsed() < PATIENCE, "the lock does not fall");
        std::thread::yield_now();
    }
    let waited = died.elapsed();
    let at_lock = arrived(&device);
    daemon.reap();
    std::thread::sleep(WATCH);
    assert_eq!(arrived(&device), at_lock, "pages came after the lock had fallen");
    println!(
        "{} pages arrived between the death and the lock, {waited:?} later",
        at_lock - at_death
    );
}

/// Pages of guest memory that hold data of the base.
fn arrived(device: &Device) -> usize {
    let memory = device.memory();
    (0..memory.len() / 4096).filter(|page| memory.byte(page * 4096 + 4095) == 0x5a).count()
}

fn try_lock(file: &File) -> bool {
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => true,
        Err(Errno::EAGAIN | Errno::EACCES) => false,
        Err(e) => panic!("{e}"),
    }
}
