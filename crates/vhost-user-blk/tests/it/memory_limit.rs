//! What a guest can make the daemon use: memory, and time when it is to stop. The guest offers as
//! much as its rings take, and all of it is as long, or in as many pieces, as requests can be; the
//! disk is fragmented as badly as a guest can make it.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use blk_bench::server::{Server, cpu_between};
use block_io::image::{CreateOptions, create_cow};
use block_io::{CowFormat, Host};
use cow_format::Header;
use testkit::descriptor::Desc;
use testkit::frontend::{
    F_INDIRECT_DESC, F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend, message,
};
use testkit::memory::{GUEST, Memory, memfd};
use testkit::queue::{Buffer, Queue, readable, writable};
use testkit::request::{DISCARD, IN, OUT, WRITE_ZEROES, header, segment};
use testkit::wait::{PATIENCE, wait_until};
use vhost::vhost_user::message::FrontendReq;

use crate::common::{Daemon, upgrade_ok};

/// What the documentation says (operations.md): in KiB, above an idle daemon.
const LIMIT_KIB: u64 = 64 << 10;
const DEPTH: u16 = 1024;
/// As many as are offered on the largest host.
const QUEUES: u32 = 64;
const SIZE: u64 = 4 << 30;
/// What the daemon works before the test ends: all limits are reached at once.
const WORK: Duration = Duration::from_secs(1);
/// Bytes of guest memory that the longest requests name again and again.
const BUFFER_LEN: u32 = 32 << 20;
/// Pieces of memory of the requests with the most of them, 512 bytes each.
const PIECES: usize = 1000;

/// Every other sector is present.
const SECTORS: [u8; 2] = [0b1010_1010; 2];
/// Every other block of 4096 bytes is.
const BLOCKS: [u8; 2] = [0xff, 0];

/// A sparse COW file over a sparse base whose bitmap repeats `pattern`.
fn fragmented(directory: &Path, pattern: [u8; 2]) -> PathBuf {
    let (base, cow) = (directory.join("base"), directory.join("cow"));
    File::create(&base).unwrap().set_len(SIZE).unwrap();
    create_cow(&Host, &cow, &CreateOptions::over(CowFormat::Native, &base)).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&cow).unwrap();
    let mut prefix = vec![0; 4096];
    file.read_exact_at(&mut prefix, 0).unwrap();
    let header = Header::check(&prefix, file.metadata().unwrap().len()).unwrap();
    let geometry = header.geometry();
    let bits = pattern.repeat(usize::try_from(geometry.bitmap_len()).unwrap() / 2);
    file.write_all_at(&bits, geometry.bitmap_offset().get()).unwrap();
    file.set_len(geometry.full_len()).unwrap();
    cow
}

/// In KiB, without guest memory and the page cache of files.
fn anonymous_memory(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A guest whose rings are set up and hold no request.
struct Guest {
    frontend: RawFrontend,
    memory: Memory,
    queues: Vec<Queue>,
    buffer: u64,
}

impl Guest {
    fn new(daemon: &Daemon, queues: u32, inflight: Option<&File>) -> Self {
        let mut frontend = RawFrontend::new(daemon.connect());
        let features = F_VERSION_1 | F_PROTOCOL_FEATURES | F_INDIRECT_DESC;
        frontend.negotiate(features, PROTOCOL_FEATURES);
        let mut memory = Memory::new(16 << 10);
        let queues: Vec<_> = (0..queues).map(|at| Queue::new(&mut memory, at, DEPTH)).collect();
        if let Some(area) = inflight {
            set_area(&mut frontend, area);
        }
        memory.set(&mut frontend);
        queues.iter().for_each(|queue| queue.start(&mut frontend, false));
        let buffer = memory.take(BUFFER_LEN.into());
        Guest { frontend, memory, queues, buffer }
    }

    /// Writes a request into a table: what describes it as a head, and the place of its status.
    fn describe(&mut self, kind: u32, data: &[Buffer]) -> (u64, Vec<Buffer>, u64) {
        let (head, status) = (self.memory.take(16), self.memory.take(1));
        self.memory.write(head, &header(kind, 0));
        self.memory.write(status, &[0xff]);
        let mut all = vec![readable(head, 16)];
        all.extend(data);
        all.push(writable(status, 1));
        (self.memory.take(16 * all.len() as u64), all, status)
    }

    /// The longest read that there is.
    fn long_read(&self) -> Vec<Buffer> {
        vec![writable(self.buffer, BUFFER_LEN); usize::try_from(SIZE / (32 << 20)).unwrap() - 1]
    }

    /// Fills every ring with `requests`, by turns. The places of their status bytes.
    fn fill(&mut self, requests: &[(u32, Vec<Buffer>)]) -> Vec<u64> {
        let all: Vec<_> = requests.iter().map(|(kind, data)| self.describe(*kind, data)).collect();
        for (table, buffers, _) in &all {
            self.queues[0].describe_indirect(&self.memory, 0, *table, buffers);
        }
        let heads: Vec<u16> = (0..DEPTH).collect();
        for queue in &mut self.queues {
            for (head, (table, buffers, _)) in heads.iter().zip(all.iter().cycle()) {
                let request = Desc::indirect(GUEST + table, buffers.len());
                queue.driver.set_desc(&self.memory, *head, request);
            }
            queue.driver.offer(&self.memory, &heads);
        }
        // From here on it has work for every processor.
        self.queues.iter().for_each(Queue::kick);
        all.iter().map(|(_, _, status)| *status).collect()
    }

    fn status(&self, at: u64) -> u8 {
        self.memory.read::<1>(at)[0]
    }
}

/// Header and descriptors of one queue, to the next 64 bytes.
const AREA_LEN: u64 = 16 + 16 * DEPTH as u64 + 48;

/// SET_INFLIGHT_FD, for one queue.
fn set_area(frontend: &mut RawFrontend, area: &File) {
    let mut body = [AREA_LEN, 0].map(u64::to_ne_bytes).concat();
    body.extend([1, DEPTH, 0, 0].map(u16::to_ne_bytes).concat());
    let bytes = message(FrontendReq::SET_INFLIGHT_FD.into(), 1, &body);
    frontend.send_raw(&bytes, &[area.as_raw_fd()]);
}

/// Waits until the daemon has used so much time of processors, and looks meanwhile.
fn works_for(daemon: &Daemon, time: Duration, mut look: impl FnMut()) {
    let process = Server::new(i32::try_from(daemon.pid()).unwrap()).unwrap();
    let before = process.sample();
    // A busy machine has little time for it.
    let deadline = Instant::now() + 5 * PATIENCE;
    while cpu_between(&before, &process.sample()) < time {
        assert!(Instant::now() < deadline, "it does not work");
        look();
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets the daemon work on what a guest has offered, and looks at its memory all the time.
fn stays_below_limit(daemon: &Daemon, idle: u64, what: &str) {
    let mut most = 0;
    works_for(daemon, WORK, || most = most.max(anonymous_memory(daemon)));
    println!("{what}: {idle} KiB idle, {most} KiB at most");
    assert!(most <= idle + LIMIT_KIB, "{what}: {idle} KiB idle, {most} KiB at most");
}

fn serve(cow: &Path, args: &[&str]) -> Daemon {
    let mut all = vec![format!("--num-queues={QUEUES}")];
    all.extend(args.iter().map(|&arg| arg.to_owned()));
    all.push(cow.display().to_string());
    Daemon::start(cow.parent().unwrap(), all)
}

const DIRECT: [&str; 2] = ["--cow-cache=direct", "--base-cache=direct"];

#[test]
fn a_fragmented_disk_and_full_rings() {
    // Not in /tmp, which may be in memory and knows no direct I/O.
    for (pattern, args, queues) in [
        (SECTORS, &DIRECT[..], QUEUES),
        (BLOCKS, &DIRECT[..], 4),
        (SECTORS, &[], QUEUES),
        (BLOCKS, &[], 4),
    ] {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let daemon = serve(&fragmented(directory.path(), pattern), args);
        let idle = anonymous_memory(&daemon);
        let mut guest = Guest::new(&daemon, queues, None);
        let pieces = |buffer: fn(u64, u32) -> Buffer| vec![buffer(guest.buffer, 512); PIECES];
        let requests = [(IN, guest.long_read()), (IN, pieces(writable)), (OUT, pieces(readable))];
        guest.fill(&requests);
        stays_below_limit(&daemon, idle, &format!("{queues} queues, {pattern:x?}, {args:?}"));
        // On a busy machine one of 64 queues may make no progress for 5 s while others are served.
        if queues <= 4 {
            daemon.terminate();
        }
    }
}

/// tmpfs can punch holes and cannot zero ranges, so the daemon writes the zeros.
#[test]
fn zeros_that_are_written() {
    const DISK: u64 = 64 << 20;
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        println!("skipped: no tmpfs in /dev/shm");
        return;
    };
    let (base, cow) = (directory.path().join("base"), directory.path().join("cow"));
    File::create(&base).unwrap().set_len(DISK).unwrap();
    create_cow(&Host, &cow, &CreateOptions::over(CowFormat::Native, &base)).unwrap();
    let daemon = serve(&cow, &[]);
    let idle = anonymous_memory(&daemon);
    let mut guest = Guest::new(&daemon, 4, None);
    let segments: Vec<u8> =
        (0..32).flat_map(|_| segment(0, u32::try_from(DISK / 512).unwrap(), 0)).collect();
    guest.memory.write(guest.buffer, &segments);
    let data = vec![readable(guest.buffer, u32::try_from(segments.len()).unwrap())];
    let status = guest.fill(&[(WRITE_ZEROES, data)]);
    stays_below_limit(&daemon, idle, "zeros");
    // Each of so many would write 2 GiB.
    daemon.terminate();
    assert!([0, 1, 0xff].contains(&guest.status(status[0])));
}

/// ramfs can neither punch holes nor zero ranges: what is discarded stays what it was.
#[test]
fn a_discard_where_nothing_can_be_given_back() {
    const DISK: u64 = 16 << 20;
    let directory = tempfile::tempdir().unwrap();
    let Some(_mount) = RamMount::new(directory.path()) else { return };
    let (base, cow) = (directory.path().join("base"), directory.path().join("cow"));
    std::fs::write(&base, vec![7; usize::try_from(DISK).unwrap()]).unwrap();
    create_cow(&Host, &cow, &CreateOptions::over(CowFormat::Native, &base)).unwrap();
    let daemon = serve(&cow, &[]);
    let mut guest = Guest::new(&daemon, 1, None);
    let segments = [segment(0, 16384, 0), segment(16384, 16384, 0)].concat();
    guest.memory.write(guest.buffer, &segments);
    let list = vec![readable(guest.buffer, u32::try_from(segments.len()).unwrap())];
    let answer = |guest: &mut Guest, head: u16, kind, data: &[Buffer]| {
        let (table, all, status) = guest.describe(kind, data);
        guest.queues[0].describe_indirect(&guest.memory, head, table, &all);
        guest.queues[0].offer(&guest.memory, head);
        guest.queues[0].wait(&guest.memory);
        guest.status(status)
    };
    let read = vec![writable(guest.buffer + 4096, 4096)];
    assert_eq!(answer(&mut guest, 0, DISCARD, &list), 0);
    assert_eq!(answer(&mut guest, 1, IN, &read), 0);
    assert_eq!(guest.memory.read::<4096>(guest.buffer + 4096), [7; 4096]);
    assert_eq!(answer(&mut guest, 2, WRITE_ZEROES, &list), 0);
    assert_eq!(answer(&mut guest, 3, IN, &read), 0);
    assert_eq!(guest.memory.read::<4096>(guest.buffer + 4096), [0; 4096]);
    daemon.terminate();
}

/// A file system in memory; gone when dropped.
struct RamMount<'a>(&'a Path);

impl<'a> RamMount<'a> {
    /// `None`, after printing why, if it cannot be mounted.
    fn new(point: &'a Path) -> Option<Self> {
        match Command::new("mount").args(["-t", "ramfs", "none"]).arg(point).output() {
            Ok(mount) if mount.status.success() => return Some(RamMount(point)),
            Ok(mount) => println!("skipped: {}", String::from_utf8_lossy(&mount.stderr)),
            Err(why) => println!("skipped: cannot run mount: {why}"),
        }
        None
    }
}

impl Drop for RamMount<'_> {
    fn drop(&mut self) {
        // The kernel may keep the files of a ring for a moment longer than its process.
        _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

/// The reads of one ring would take minutes.
#[test]
fn get_vring_base_is_answered_while_endless_reads_are_in_flight() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let daemon = serve(&fragmented(directory.path(), SECTORS), &DIRECT);
    // With an area too: whoever asks may go on elsewhere, without it.
    for area in [None, Some(memfd(AREA_LEN))] {
        let mut guest = Guest::new(&daemon, 1, area.as_ref());
        let status = guest.fill(&[(IN, guest.long_read())]);
        works_for(&daemon, Duration::from_millis(200), || ());
        let base = guest.frontend.get_vring_base(0);
        let queue = &guest.queues[0];
        assert_eq!(base, u32::from(queue.used_idx(&guest.memory)), "taken, not answered");
        assert!(base > 0 && base < DEPTH.into(), "{base}");
        assert_eq!(guest.status(status[0]), 1, "it was not done");
    }
    daemon.terminate();
}

#[test]
fn a_long_read_goes_on_after_an_upgrade_and_a_restart() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let cow = fragmented(directory.path(), SECTORS);
    let control = format!("--control={}", directory.path().join("control").display());
    let args = [DIRECT[0], DIRECT[1], &control];
    let mut daemon = serve(&cow, &args);
    let area = memfd(AREA_LEN);
    let mut guest = Guest::new(&daemon, 1, Some(&area));
    let (table, all, status) = guest.describe(IN, &[writable(guest.buffer, BUFFER_LEN); 4]);
    let queue = &mut guest.queues[0];
    queue.describe_indirect(&guest.memory, 0, table, &all);
    queue.offer(&guest.memory, 0);
    let is_marked = || {
        let mut mark = [0];
        area.read_exact_at(&mut mark, 16).unwrap();
        mark == [1]
    };
    wait_until("a request that is taken", is_marked);
    upgrade_ok(directory.path());
    daemon.wait_line("repeating 1 requests that were in flight");
    assert!(is_marked(), "it was done too soon for this test");
    daemon.terminate();
    assert_eq!(guest.status(status), 0xff);
    // The frontend connects again, with the same memory.
    let mut daemon = serve(&cow, &args);
    let Guest { memory, queues, .. } = guest;
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES | F_INDIRECT_DESC, PROTOCOL_FEATURES);
    set_area(&mut frontend, &area);
    memory.set(&mut frontend);
    queues[0].start(&mut frontend, false);
    daemon.wait_line("repeating 1 requests that were in flight");
    queues[0].wait(&memory);
    assert_eq!(memory.read::<1>(status), [0]);
    daemon.terminate();
}
