//! Load with verification, without a guest: `blk-bench` writes through several queues and knows
//! what every sector must hold. Its driver shares nothing with the daemon but the vhost-user
//! messages.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use blk_bench::driver::device::{Device, Options};
use blk_bench::driver::queue::{SECTOR_SIZE, Wait};
use blk_bench::load::job::{Job, Mix};
use blk_bench::load::model::{Base, Content, Expectation, Expected};
use blk_bench::load::region::Region;
use blk_bench::load::{self, RunError};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use system_tests::{Backend, TestDir, cow, patterned, run_ok, sha256, vhost_user_blk, write_image};

/// A multiple of a sector, but neither of a page nor of the longest request.
const SECTORS: u64 = (12 << 11) + 3;
/// Every failure prints it.
const SEED: u64 = 20_261_122;
const QUEUES: u16 = 4;
/// Longest request in sectors.
const GRANULE: u32 = 64;

/// A base image and a COW file that does not exist yet.
struct Disk {
    dir: TestDir,
    base: PathBuf,
    cow: PathBuf,
}

impl Disk {
    fn new() -> Self {
        let dir = TestDir::new();
        let (base, cow) = (dir.path("base"), dir.path("cow"));
        let len = usize::try_from(SECTORS).unwrap() * SECTOR_SIZE;
        write_image(&base, &patterned(len, 1));
        Self { dir, base, cow }
    }

    fn serve(&self, args: &[&str]) -> Backend {
        let image = if self.cow.exists() {
            self.cow.display().to_string()
        } else {
            format!("{},{}", self.cow.display(), self.base.display())
        };
        let queues = format!("--num-queues={QUEUES}");
        Backend::daemon(&self.dir.path("socket"), &[args, &[&queues, &image]].concat())
    }

    fn expectation(&self) -> Expectation {
        Expectation { base: Some(Base::open(&self.base).unwrap()), seed: SEED }
    }

    fn merge(&self) -> PathBuf {
        let merged = self.dir.path("merged");
        let mut command = cow();
        command.args(["merge", "--quiet", "--force"]).arg(&self.cow).arg(&merged);
        run_ok(command);
        merged
    }
}

const DEPTH: u16 = 16;

fn connect(backend: &Backend, depth: u16) -> Device {
    connect_with(backend, depth, None)
}

/// Data in pieces of `segment` bytes.
fn connect_with(backend: &Backend, depth: u16, segment: Option<usize>) -> Device {
    let options = Options {
        queues: QUEUES,
        depth,
        segment,
        stall_after: Duration::from_secs(120),
        ..Options::new(backend.socket())
    };
    Device::connect(&options).unwrap()
}

/// Everything that changes a disk, in requests of 1 to 64 sectors, with neighbours in different
/// queues.
fn job() -> Job {
    let region = Region {
        start: 0,
        granule: GRANULE,
        granules: SECTORS / u64::from(GRANULE),
        queues: QUEUES,
    };
    Job {
        mix: Mix { read: 40, write: 45, discard: 5, write_zeroes: 5, unmap_zeroes: 5 },
        min_sectors: 1,
        partitioned: true,
        flush_every: Some(200),
        count: Some(12_000),
        seed: SEED,
        verify: true,
        discard_zeroes: true,
        check_used_len: true,
        ..Job::new(region)
    }
}

fn run(backend: &Backend, job: &Job, expectation: Expectation) -> Expected {
    run_at(DEPTH, backend, job, expectation)
}

/// As [`run`], with `depth` requests in flight in each queue.
fn run_at(depth: u16, backend: &Backend, job: &Job, expectation: Expectation) -> Expected {
    let mut device = connect(backend, depth);
    let outcome = load::run(device.take_queues(), job, &expectation, None)
        .unwrap_or_else(|error| panic!("{error} (seed {SEED})"));
    Expected { region: job.region, models: outcome.models, expectation }
}

/// Reads every sector; gives how many were of known content.
fn read_back(backend: &Backend, expected: &Expected) -> Result<u64, RunError> {
    let mut device = connect(backend, DEPTH);
    load::read_back(&mut device.take_queues(), expected, 0..SECTORS, Wait::Eventfd)
}

fn assert_same(left: &Path, right: &Path) {
    assert_eq!(
        sha256(left),
        sha256(right),
        "{} and {} differ (seed {SEED})",
        left.display(),
        right.display()
    );
}

/// Every sector holds what it must, at the daemon, which is ended, and in the merged image.
fn check_to_the_end(disk: &Disk, backend: Backend, expected: &Expected) {
    assert_eq!(read_back(&backend, expected).unwrap(), SECTORS);
    backend.stop();
    let image = disk.dir.path("expected");
    expected.write_image(&image, SECTORS).unwrap();
    assert_same(&disk.merge(), &image);
}

/// Load, read-back, end; again from the file; and the merged image against the expected one.
fn holds_what_was_written(args: &[&str], wait: Wait) {
    let disk = Disk::new();
    let base_before = sha256(&disk.base);
    let backend = disk.serve(args);
    let expected = run(&backend, &Job { wait, ..job() }, disk.expectation());
    assert_eq!(read_back(&backend, &expected).unwrap(), SECTORS);
    backend.stop();
    let backend = disk.serve(&[]);
    check_to_the_end(&disk, backend, &expected);
    assert_eq!(sha256(&disk.base), base_before, "the base has changed");
}

#[test]
fn native_buffered() {
    holds_what_was_written(&["--format=native"], Wait::Eventfd);
}

#[test]
fn native_direct() {
    holds_what_was_written(
        &["--format=native", "--cow-cache=direct", "--base-cache=direct"],
        Wait::Eventfd,
    );
}

#[test]
fn uml_buffered() {
    holds_what_was_written(&["--format=uml"], Wait::Eventfd);
}

#[test]
fn uml_direct() {
    holds_what_was_written(&["--format=uml", "--cow-cache=direct"], Wait::Eventfd);
}

/// With threads that make system calls in place of io_uring.
#[test]
fn sync_engine() {
    for format in ["--format=native", "--format=uml"] {
        holds_what_was_written(&["--io-engine=sync", format], Wait::Eventfd);
    }
}

#[test]
fn sync_engine_direct() {
    holds_what_was_written(
        &["--io-engine=sync", "--cow-cache=direct", "--base-cache=direct", "--poll-us=0"],
        Wait::Eventfd,
    );
}

#[test]
fn without_polling() {
    holds_what_was_written(&["--poll-us=0"], Wait::Eventfd);
}

#[test]
fn with_a_client_that_polls() {
    holds_what_was_written(&["--poll-us=1000"], Wait::Poll);
}

#[test]
fn one_request_at_a_time() {
    for args in [["--format=native", "--poll-us=0"], ["--format=uml", "--poll-us=100"]] {
        let disk = Disk::new();
        let backend = disk.serve(&args);
        let expected = run_at(1, &backend, &job(), disk.expectation());
        check_to_the_end(&disk, backend, &expected);
    }
}

/// Reports the end, also when a test fails.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Pages leave the cache all the time, as when memory is short: between the question whether they
/// are there and the copy, too.
#[test]
fn pages_are_evicted_under_the_load() {
    let disk = Disk::new();
    let backend = disk.serve(&[]);
    let done = AtomicBool::new(false);
    let (expected, evictions) = std::thread::scope(|scope| {
        let evicting = scope.spawn(|| {
            let mut evictions = 0;
            while !done.load(Ordering::Acquire) {
                // The daemon may be about to make the COW file.
                for file in [&disk.base, &disk.cow].into_iter().flat_map(File::open) {
                    let all = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
                    posix_fadvise(&file, 0, 0, all).unwrap();
                }
                evictions += 1;
            }
            evictions
        });
        let at_end = AtEnd(&done);
        let expected = run(&backend, &job(), disk.expectation());
        assert_eq!(read_back(&backend, &expected).unwrap(), SECTORS);
        drop(at_end);
        (expected, evicting.join().unwrap())
    });
    println!("evicted {evictions} times");
    check_to_the_end(&disk, backend, &expected);
}

#[test]
fn writes_of_one_sector_side_by_side_from_all_queues() {
    let disk = Disk::new();
    let backend = disk.serve(&[]);
    // Four queues share every byte of the bitmap.
    let region = Region { start: 0, granule: 1, granules: SECTORS, queues: QUEUES };
    let mix = Mix { read: 20, write: 80, ..Mix::default() };
    let expected = run(&backend, &Job { region, mix, ..job() }, disk.expectation());
    check_to_the_end(&disk, backend, &expected);
}

/// A memory cgroup of this test, in either version of the hierarchy. It goes when it is dropped,
/// after its processes.
struct SmallMemory(PathBuf);

impl SmallMemory {
    /// `None` where this user may not make one.
    fn new(limit: u64) -> Option<Self> {
        let name = format!("vhost-user-blk-test-{}", std::process::id());
        let hierarchies =
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        hierarchies.into_iter().find_map(|(root, file)| {
            let group = Self(Path::new(root).join(&name));
            // In a directory of another kind, that is no file that can be written.
            fs::create_dir(&group.0).ok()?;
            fs::write(group.0.join(file), limit.to_string()).ok()?;
            Some(group)
        })
    }
}

impl Drop for SmallMemory {
    fn drop(&mut self) {
        _ = fs::remove_dir(&self.0);
    }
}

/// The kernel takes pages away, mapped ones too, and writers wait for writeback, as when the host's
/// memory is short.
#[test]
fn memory_is_short_under_the_load() {
    let disk = Disk::new();
    let Some(group) = SmallMemory::new(10 << 20) else {
        println!("skipped: this user may not make a memory cgroup");
        return;
    };
    // What is in the cache already counts elsewhere.
    let base = File::open(&disk.base).unwrap();
    base.sync_all().unwrap();
    posix_fadvise(&base, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    let socket = disk.dir.path("socket");
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ >$0/cgroup.procs; exec \"$@\""]).arg(&group.0);
    command.arg(vhost_user_blk().get_program()).arg("--socket-path").arg(&socket);
    command.arg(format!("--num-queues={QUEUES}"));
    command.arg(format!("{},{}", disk.cow.display(), disk.base.display()));
    let backend = Backend::start("daemon in a small memory", command, &socket);
    let expected = run(&backend, &job(), disk.expectation());
    assert_eq!(read_back(&backend, &expected).unwrap(), SECTORS);
    let refused =
        ["memory.failcnt", "memory.events"].map(|file| fs::read_to_string(group.0.join(file)));
    let refused = refused.into_iter().flatten().collect::<String>();
    println!("the limit was met: {refused}");
    assert!(
        refused.contains(|digit: char| ('1'..='9').contains(&digit)),
        "memory was not short: {refused}"
    );
    check_to_the_end(&disk, backend, &expected);
}

/// What direct I/O cannot take goes through the page cache, and the rest goes past it, in the same
/// and in neighbouring pages at the same time: neither may lose what the other has written, and no
/// sync may fail.
#[test]
fn direct_and_buffered_writes_side_by_side() {
    // Sectors of the longest request, and bytes of the longest piece of memory: a sector alone in
    // aligned memory beside longer requests in memory that is not; parts of pages; parts of pages
    // beside whole ones.
    for (granule, segment) in [(3, Some(1000)), (8, None), (12, None)] {
        let disk = Disk::new();
        let backend = disk.serve(&["--cow-cache=direct"]);
        let region = Region { start: 0, granule, granules: 700, queues: QUEUES };
        let mix = Mix { read: 30, write: 60, discard: 10, ..Mix::default() };
        let job = Job { region, mix, flush_every: None, count: Some(12_000), ..job() };
        let mut device = connect_with(&backend, DEPTH, segment);
        let expectation = disk.expectation();
        let outcome = load::run(device.take_queues(), &job, &expectation, None)
            .unwrap_or_else(|error| panic!("{error} (seed {SEED})"));
        let expected = Expected { region, models: outcome.models, expectation };
        drop((outcome.queues, device));
        check_to_the_end(&disk, backend, &expected);
    }
}

/// No flush at all: what was acknowledged is there when the daemon was killed, for the host runs
/// on.
#[test]
fn acknowledged_writes_outlive_the_daemon() {
    for format in ["--format=native", "--format=uml"] {
        let disk = Disk::new();
        let backend = disk.serve(&[format]);
        let mut device = connect(&backend, DEPTH);
        let pid = Pid::from_raw(device.pid());
        let job =
            Job { flush_every: None, count: Some(1_000_000), survive_disconnect: true, ..job() };
        let expectation = disk.expectation();
        let queues = device.take_queues();
        let outcome = std::thread::scope(|scope| {
            let load = scope.spawn(|| load::run(queues, &job, &expectation, None));
            // Long enough for a few thousand writes; how many it were is asserted below.
            while fs::metadata(&disk.cow).unwrap().blocks_on_disk() < 4 << 20 {
                std::thread::sleep(Duration::from_millis(5));
            }
            kill(pid, Signal::SIGKILL).unwrap();
            load.join().unwrap()
        });
        let outcome = outcome.unwrap_or_else(|error| panic!("{error} (seed {SEED})"));
        let expected = Expected { region: job.region, models: outcome.models, expectation };
        drop((outcome.queues, device, backend));

        let backend = disk.serve(&[]);
        let known =
            read_back(&backend, &expected).unwrap_or_else(|error| panic!("{format}: {error}"));
        backend.stop();
        let lookup = |sector| expected.lookup(sector).1;
        let written =
            (0..SECTORS).filter(|&sector| matches!(lookup(sector), Content::Write(_))).count();
        assert!(written > 1000, "only {written} sectors were acknowledged");
        let in_flight_max = u64::from(QUEUES) * 16 * u64::from(GRANULE);
        assert!(known >= SECTORS - in_flight_max, "only {known} sectors are known");
    }
}

trait OnDisk {
    fn blocks_on_disk(&self) -> u64;
}

impl OnDisk for fs::Metadata {
    fn blocks_on_disk(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.blocks() * 512
    }
}

/// The test can fail: one byte of the COW file, changed behind the daemon's back, is found.
#[test]
fn a_byte_changed_behind_the_daemons_back_is_found() {
    let disk = Disk::new();
    let backend = disk.serve(&[]);
    let job = Job { mix: Mix::WRITE, min_sectors: GRANULE, once: true, count: None, ..job() };
    let expected = run(&backend, &job, disk.expectation());
    assert_eq!(read_back(&backend, &expected).unwrap(), SECTORS);

    let changed: u64 = 4321;
    let stamp = [b"BLKBENCH".as_slice(), &changed.to_le_bytes()].concat();
    let content = fs::read(&disk.cow).unwrap();
    let at =
        content.chunks_exact(SECTOR_SIZE).position(|sector| sector.starts_with(&stamp)).unwrap();
    let file = File::options().write(true).open(&disk.cow).unwrap();
    file.write_all_at(b"?", (at * SECTOR_SIZE + 300) as u64).unwrap();
    match read_back(&backend, &expected) {
        Err(RunError::Mismatch { mismatch, .. }) => {
            assert_eq!(mismatch.sector, changed);
            assert!(mismatch.found.contains("torn or damaged"), "{mismatch}");
        }
        other => panic!("{other:?}"),
    }
    backend.stop();
    let image = disk.dir.path("expected");
    expected.write_image(&image, SECTORS).unwrap();
    assert_ne!(sha256(&disk.merge()), sha256(&image));
}

/// Nor does a disk pass that has gone back in time, to a state that was once right.
#[test]
fn an_older_copy_of_the_cow_file_is_found() {
    let disk = Disk::new();
    let backend = disk.serve(&[]);
    let first = Job { count: Some(2000), ..job() };
    run(&backend, &first, disk.expectation());
    backend.stop();
    let old = disk.dir.path("old");
    run_ok(copy(&disk.cow, &old));

    let backend = disk.serve(&[]);
    let writes = Job { count: None, mix: Mix::WRITE, min_sectors: GRANULE, once: true, ..job() };
    let expected = run(&backend, &writes, disk.expectation());
    backend.stop();
    run_ok(copy(&old, &disk.cow));
    let backend = disk.serve(&[]);
    assert!(matches!(read_back(&backend, &expected), Err(RunError::Mismatch { .. })));
    backend.stop();
}

fn copy(from: &Path, to: &Path) -> Command {
    let mut command = Command::new("cp");
    command.arg("--sparse=always").arg(from).arg(to);
    command
}
