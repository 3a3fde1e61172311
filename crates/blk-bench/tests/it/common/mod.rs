//! Backends for the tests to drive.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use blk_bench::driver::device::{Device, Options};
use blk_bench::load::job::{Job, Mix};
use blk_bench::load::model::{Base, Expectation, Expected};
use blk_bench::load::region::Region;
use blk_bench::load::{self, RunError};
use blk_bench::null::{self, Fault};

/// Size of the RAM disks.
pub const SECTORS: u64 = 16 << 10;
/// Any number; failures print it.
pub const SEED: u64 = 20261122;

/// A RAM disk in this process that serves one connection.
pub struct RamDisk {
    _dir: tempfile::TempDir,
    pub socket: PathBuf,
    _thread: JoinHandle<()>,
}

impl RamDisk {
    pub fn new(fault: Option<Fault>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("ram.sock");
        let listener = null::listen(&socket).unwrap();
        let poll_time = Duration::from_micros(20);
        let options = null::Options { sectors: SECTORS, queues: 4, ram: true, poll_time, fault };
        let content = null::Content::new(&options).unwrap();
        let _thread =
            std::thread::spawn(move || null::serve_one(&listener, &options, &content).unwrap());
        Self { _dir: dir, socket, _thread }
    }
}

/// A child process that is killed at the end of the test, however it ends.
pub struct Process(pub Child);

impl Process {
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().unwrap())
    }

    /// SIGTERM, then waits for its end.
    pub fn terminate(mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = self.0.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Several queues, everything that changes a disk, lengths from one sector to 32 KiB.
pub fn mixed_job(capacity: u64) -> Job {
    let region = Region { start: 0, granule: 64, granules: capacity / 64, queues: 3 };
    Job {
        mix: Mix { read: 40, write: 50, discard: 0, write_zeroes: 5, unmap_zeroes: 5 },
        min_sectors: 1,
        partitioned: true,
        flush_every: Some(500),
        count: Some(20_000),
        seed: SEED,
        verify: true,
        check_used_len: true,
        ..Job::new(region)
    }
}

pub fn options(socket: &Path) -> Options {
    Options {
        connect_for: Duration::from_secs(20),
        queues: 3,
        depth: 16,
        stall_after: Duration::from_secs(60),
        ..Options::new(socket)
    }
}

/// Runs a job on a fresh connection, reads everything back, and gives what the disk must hold.
pub fn run_and_read_back(options: &Options, job: &Job, base: &Path) -> Result<Expected, RunError> {
    let mut device = Device::connect(options)?;
    let expectation = Expectation { base: Some(Base::open(base)?), seed: job.seed };
    let mut outcome = load::run(device.take_queues(), job, &expectation, None)?;
    let expected =
        Expected { region: job.region, models: std::mem::take(&mut outcome.models), expectation };
    let checked =
        load::read_back(&mut outcome.queues, &expected, 0..device.config().capacity, job.wait)?;
    assert_eq!(checked, device.config().capacity, "all sectors are known");
    device.stop()?;
    Ok(expected)
}
