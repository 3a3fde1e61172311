//! The daemon on a bad day: its I/O is begun and completed in any order, comes up short and fails
//! (`block_io::fault_injection`), under a load from several queues that knows what each sector must
//! hold. After that it is killed, and another one, on a good day, has to find all that was
//! acknowledged.
//!
//! What happens is random; `TEST_SEED` gives the load and each queue the same random numbers again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::soak::from_env;
use crate::common::{Daemon, PROGRAM};
use blk_bench::driver::device::{Device, Options};
use blk_bench::driver::queue::Wait;
use blk_bench::load;
use blk_bench::load::job::{Job, Mix};
use blk_bench::load::model::{Base, Expectation, Expected};
use blk_bench::load::region::Region;
use nix::sys::signal::Signal;
use rand::RngCore;

/// A multiple of a sector, but neither of a page nor of the longest request.
const SECTORS: u64 = (12 << 11) + 3;
const QUEUES: u16 = 4;
/// Longest request in sectors: some are too long for the queue's own thread.
const GRANULE: u32 = 96;
const REQUESTS: u64 = 6000;

/// A base in which every other 64 KiB are a hole.
fn base(directory: &Path) -> PathBuf {
    let path = directory.join("base");
    let file = File::create_new(&path).unwrap();
    file.set_len(SECTORS * 512).unwrap();
    for start in (0..SECTORS - 128).step_by(256) {
        let sectors: Vec<u8> = (start..start + 128).flat_map(crate::common::sector).collect();
        file.write_all_at(&sectors, start * 512).unwrap();
    }
    path
}

fn serve(directory: &Path, args: &[&str], fault_injection: Option<u64>) -> Daemon {
    let socket = directory.join("socket");
    let mut command = Command::new(PROGRAM);
    command.arg("--socket-path").arg(&socket).arg(format!("--num-queues={QUEUES}")).args(args);
    command.arg(format!("{0}/cow,{0}/base", directory.display()));
    if let Some(seed) = fault_injection {
        command.env("BLOCK_IO_FAULTS", seed.to_string());
    }
    let mut daemon = Daemon::spawn(command, socket);
    daemon.wait_line("listening");
    daemon
}

fn connect(daemon: &Daemon, segment: Option<usize>) -> Device {
    let stall_after = Duration::from_secs(60);
    let options =
        Options { queues: QUEUES, depth: 16, segment, stall_after, ..Options::new(&daemon.socket) };
    Device::connect(&options).unwrap()
}

/// `segment`: the data is in pieces of so many bytes, which direct I/O cannot take.
fn survives(args: &[&str], wait: Wait, segment: Option<usize>) {
    let seed = from_env("TEST_SEED").unwrap_or_else(|| rand::rng().next_u64());
    println!("TEST_SEED={seed}");
    // On a disk: a temporary file system may have no direct I/O.
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = base(directory.path());
    let granules = SECTORS / u64::from(GRANULE);
    let job = Job {
        mix: Mix { read: 40, write: 40, discard: 5, write_zeroes: 5, unmap_zeroes: 5 },
        min_sectors: 1,
        partitioned: true,
        flush_every: Some(200),
        count: Some(REQUESTS),
        wait,
        seed,
        verify: true,
        // One that the file system is said to refuse changes nothing, or a part.
        discard_zeroes: false,
        check_used_len: true,
        tolerate_errors: true,
        ..Job::new(Region { start: 0, granule: GRANULE, granules, queues: QUEUES })
    };
    let expectation = Expectation { base: Some(Base::open(&base).unwrap()), seed };
    let mut daemon = serve(directory.path(), args, Some(seed));
    let mut device = connect(&daemon, segment);
    let outcome = load::run(device.take_queues(), &job, &expectation, None).unwrap();
    let failed = outcome.errors();
    println!("{failed} of {REQUESTS} requests failed");
    assert!((REQUESTS / 50..REQUESTS / 2).contains(&failed), "{failed} requests failed");
    daemon.signal(Signal::SIGKILL);
    daemon.reap();

    let expected = Expected { region: job.region, models: outcome.models, expectation };
    let daemon = serve(directory.path(), args, None);
    let mut device = connect(&daemon, None);
    let mut queues = device.take_queues();
    let known = load::read_back(&mut queues, &expected, 0..SECTORS, Wait::Eventfd).unwrap();
    assert!(known > SECTORS / 2, "{known} of {SECTORS} sectors are known");
    drop((queues, device));
    daemon.terminate();
}

#[test]
fn buffered() {
    survives(&[], Wait::Eventfd, None);
}

#[test]
fn without_polling_over_a_direct_base() {
    survives(&["--base-cache=direct", "--poll-us=0"], Wait::Eventfd, Some(1000));
}

#[test]
fn direct_with_a_client_that_polls() {
    let direct = ["--cow-cache=direct", "--base-cache=direct", "--poll-us=200"];
    survives(&direct, Wait::Poll, None);
}

#[test]
fn uml_direct() {
    survives(&["--format=uml", "--cow-cache=direct"], Wait::Eventfd, Some(1000));
}

#[test]
fn with_threads_for_io_uring() {
    survives(&["--io-engine=sync"], Wait::Eventfd, None);
}

#[test]
fn direct_with_threads_for_io_uring() {
    let direct = ["--io-engine=sync", "--cow-cache=direct", "--base-cache=direct"];
    survives(&direct, Wait::Eventfd, Some(1000));
}
