//! The running daemon when the host fails it: no space, a base cut short. The guest is blk-bench,
//! which knows what each sector must hold.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use system_tests::{
    Backend, CowDisk, Outcome, Process, TestDir, blk_bench, compile_c, cow, patterned, run, run_ok,
    vhost_user_blk,
};

const MIB: usize = 1 << 20;

/// What the daemon logs when a write has found no space.
const FAILED: &str = "No space left on device";

/// Who does the daemon's I/O: io_uring, where it can be had, and threads.
const ENGINES: [&[&str]; 2] = [&[], &["--io-engine=sync"]];

/// For everything that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A mount namespace of its own in which `script` runs; in it a file system can be mounted without
/// root and without being seen by other processes.
fn in_namespace(script: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--user", "--map-root-user", "sh", "-euc", script]);
    command
}

fn load(socket: &Path, more: &[&str]) -> Command {
    let mut command = blk_bench();
    command.arg("run").arg("--socket-path").arg(socket).args(["--verify", "--tolerate-errors"]);
    command.args(more);
    command
}

/// How many requests failed, by blk-bench's own account.
fn failed_requests(json: &str) -> u64 {
    let value: serde_json::Value = serde_json::from_str(json).expect("blk-bench prints JSON");
    value["errors"].as_u64().expect("blk-bench counts errors")
}

#[test]
fn a_full_file_system_fails_writes_and_serves_on_when_space_comes_back() {
    if run(in_namespace("mount -t tmpfs none /mnt")).code != Some(0) {
        println!("skipped: this user may not make a mount namespace");
        return;
    }
    ENGINES.into_iter().for_each(full_file_system);
}

fn full_file_system(engine: &[&str]) {
    let disk = CowDisk::over(&patterned(64 * MIB, 1));
    let (socket, mount) = (disk.dir.path("socket"), disk.dir.path("small"));
    std::fs::create_dir(&mount).expect("a directory");
    let cow_file = mount.join("disk.cow");
    let (grow, end) = (disk.dir.path("grow"), disk.dir.path("end"));
    // Only inside of the namespace can the file system be given more room, and the file be kept.
    let script = format!(
        "mount -t tmpfs -o size=4m none {mount}
         {daemon} {engine} --socket-path={socket} {cow_file},{base} &
         until [ -e {grow} ]; do sleep 0.05; done; mount -o remount,size=256m {mount}
         until [ -e {end} ]; do sleep 0.05; done; kill $!; wait $!
         cp --sparse=always {cow_file} {kept}",
        mount = mount.display(),
        engine = engine.join(" "),
        daemon = Path::new(vhost_user_blk().get_program()).display(),
        socket = socket.display(),
        cow_file = cow_file.display(),
        base = disk.base.display(),
        grow = grow.display(),
        end = end.display(),
        kept = disk.cow.display(),
    );
    let daemon = Process::spawn("daemon in a small file system", in_namespace(&script));
    daemon.wait_for("listening", PATIENCE);
    let options = [
        "--ops=read:1,write:4,discard:1,write-zeroes:1",
        "--block-size=512..64k",
        "--queues=2",
        "--depth=8",
        "--flush-every=16",
        "--count=6000",
        "--read-back",
        "--discard-zeroes",
        "--output=json",
    ];
    let mut command = load(&socket, &options);
    command.arg("--base").arg(&disk.base);
    let bench = Process::spawn("blk-bench", command);
    daemon.wait_for(FAILED, PATIENCE);
    std::fs::write(grow, "").expect("a file");
    let (status, output) = bench.wait(PATIENCE);
    assert!(status.success(), "{output}\n{}", daemon.output());
    assert!(failed_requests(&output) > 0, "{output}");
    std::fs::write(end, "").expect("a file");
    let (status, output) = daemon.wait(PATIENCE);
    assert!(status.success(), "{output}");
    // What a failed write has allocated may be left over.
    let mut check = cow();
    check.arg("check").arg(&disk.cow);
    let outcome = run(check);
    assert!(matches!(outcome.code, Some(0 | 3)), "{}", outcome.output);
}

#[test]
fn a_base_cut_short_fails_reads_and_no_one_dies() {
    let disk = CowDisk::over(&patterned(8 * MIB, 2));
    let daemon = disk.serve(&[]);
    let warm = ["--ops=read", "--once", "--output=json", "--depth=4"];
    let output = run_ok(load(daemon.socket(), &warm));
    assert_eq!(failed_requests(&output), 0, "{output}");
    let file = OpenOptions::new().write(true).open(&disk.base).expect("the base");
    file.set_len(4096).expect("cutting the base short");
    // Where the page cache had been read from a mapping it is gone as well.
    let output = run_ok(load(daemon.socket(), &warm));
    let (failed, all) = (failed_requests(&output), (8 * MIB / 4096) as u64);
    assert!(failed >= all - 1, "{failed} of {all}: {output}");
    // The disk takes writes, and gives them back.
    let writes =
        ["--ops=write", "--once", "--region=1M", "--read-back", "--output=json", "--depth=4"];
    let output = run_ok(load(daemon.socket(), &writes));
    assert_eq!(failed_requests(&output), 0, "{output}");
    daemon.stop();
}

/// Four queues under full load, with a page cache from which most reads are copied, when a file is
/// cut short that all of them are reading.
#[test]
fn a_base_cut_short_under_the_load_of_all_queues_gives_errors_and_no_wrong_data() {
    let caches = ["--base-cache=buffered", "--base-cache=direct"];
    for (engine, cache) in ENGINES.into_iter().flat_map(|engine| caches.map(|c| (engine, c))) {
        let args = &[&["--num-queues=4", cache], engine].concat();
        let disk = CowDisk::over(&patterned(32 * MIB, 6));
        let copy = disk.dir.path("copy");
        std::fs::copy(&disk.base, &copy).expect("a copy of the base");
        let daemon = disk.serve(args);
        let options = [
            "--ops=read:4,write:1,discard:1",
            "--block-size=512..64k",
            "--queues=4",
            "--depth=16",
            "--count=60000",
            "--discard-zeroes",
            "--output=json",
        ];
        let mut command = load(daemon.socket(), &options);
        command.arg("--base").arg(&copy);
        let bench = Process::spawn("blk-bench", command);
        wait_for_writes(&disk.cow, 2 * MIB);
        let file = OpenOptions::new().write(true).open(&disk.base).expect("the base");
        file.set_len(MIB as u64).expect("cutting the base short");
        let (status, output) = bench.wait(PATIENCE);
        assert!(status.success(), "{args:?}: {output}\n{}", daemon.output());
        assert!(failed_requests(&output) > 100, "{args:?}: {output}");
        daemon.stop();
    }
}

/// Waits until a COW file occupies this many bytes: a load is under way.
fn wait_for_writes(cow_file: &Path, bytes: usize) {
    let deadline = Instant::now() + PATIENCE;
    let used = || std::fs::metadata(cow_file).map_or(0, |metadata| metadata.blocks() * 512);
    while used() < bytes as u64 {
        assert!(Instant::now() < deadline, "{}: is not written", cow_file.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The memory file of a running blk-bench.
fn memory_of(bench: &Process) -> File {
    let descriptors = format!("/proc/{}/fd", bench.id());
    let links = std::fs::read_dir(descriptors).expect("its descriptors");
    let is_memory = |path: &PathBuf| {
        std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memfd:blk-bench"))
    };
    let path = links.filter_map(|link| Some(link.ok()?.path())).find(is_memory);
    OpenOptions::new().write(true).open(path.expect("its memory")).expect("its memory")
}

/// The frontend's memory is shortened while four queues have work in it, to copy and for the
/// kernel: most of the last queue's data, two queues with their rings, everything.
#[test]
fn memory_cut_short_under_the_load_of_all_queues_ends_the_session_and_no_more() {
    ENGINES.into_iter().for_each(memory_cut_short);
}

fn memory_cut_short(engine: &[&str]) {
    /// In one of these rounds it does have work there.
    const DATA_CUTS: usize = 6;
    let disk = CowDisk::over(&patterned(32 * MIB, 7));
    let daemon = disk.serve(&[&["--num-queues=4"], engine].concat());
    for number in 0..DATA_CUTS + 2 {
        let options = [
            "--ops=read:2,write:1",
            "--block-size=512..64k",
            "--queues=4",
            "--depth=32",
            "--runtime=60s",
            "--output=json",
        ];
        let bench = Process::spawn("blk-bench", load(daemon.socket(), &options));
        daemon.wait_for_times("write cache on", number + 1);
        // The load begins; then the rings fill up; then the frontend, which would die of it, sees
        // nothing of what happens.
        std::thread::sleep(Duration::from_millis(200));
        daemon.signal(Signal::SIGSTOP);
        std::thread::sleep(Duration::from_millis(50));
        bench.signal(Signal::SIGSTOP);
        let memory = memory_of(&bench);
        let len = memory.metadata().expect("its size").len();
        let left = match number {
            // The queue's data is 32 requests of 64 KiB.
            ..DATA_CUTS => len - 30 * (64 << 10),
            DATA_CUTS => len / 2,
            _ => 0,
        };
        memory.set_len(left).expect("shortening it");
        daemon.signal(Signal::SIGCONT);
        // It notices, unless it happens to have no work in what is lost.
        std::thread::sleep(Duration::from_millis(200));
        drop(bench);
        if number + 1 == DATA_CUTS {
            daemon.wait_for("shortened");
        }
    }
    let sound = [
        "--ops=read:1,write:1",
        "--queues=4",
        "--depth=16",
        "--count=4000",
        "--read-back",
        "--output=json",
    ];
    let output = run_ok(load(daemon.socket(), &sound));
    assert_eq!(failed_requests(&output), 0, "{output}");
    daemon.stop();
}

/// A limit on the length of files: the write that goes over it comes up short, and the rest fails.
#[test]
fn writes_past_the_limit_of_a_file_s_length_fail_and_no_one_dies() {
    let caches = ["--cow-cache=buffered", "--cow-cache=direct"];
    for (engine, cache) in ENGINES.into_iter().flat_map(|engine| caches.map(|c| (engine, c))) {
        let disk = CowDisk::over(&patterned(16 * MIB, 8));
        disk.serve(&[]).stop(); // creates the COW file
        let len = std::fs::metadata(&disk.cow).expect("the COW file").len();
        // In the middle of a page, and of some request.
        let limit = format!("--fsize={}", len - 8 * MIB as u64 + 1536);
        let socket = disk.dir.path("socket");
        let mut command = Command::new("prlimit");
        command.arg(limit).arg(vhost_user_blk().get_program()).arg("--socket-path").arg(&socket);
        command.args(["--num-queues=4", cache]).args(engine).arg(&disk.cow);
        let daemon = Backend::start("daemon with a limit", command, &socket);
        let options = [
            "--ops=read:2,write:4,write-zeroes:1",
            "--block-size=512..64k",
            "--queues=4",
            "--depth=8",
            "--flush-every=50",
            "--count=6000",
            "--read-back",
            "--output=json",
        ];
        let mut command = load(&socket, &options);
        command.arg("--base").arg(&disk.base);
        let output = run_ok(command);
        let failed = failed_requests(&output);
        assert!((1000..5000).contains(&failed), "{engine:?} {cache}: {output}");
        daemon.stop();
    }
}

/// Lets fdatasync, and writes that are durable on their return, fail as long as a file exists.
const FAILING_SYNC: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
static int fails(void) {
    int is_there = access(getenv("SYNC_FAILS"), F_OK) == 0;
    errno = EIO;
    return is_there;
}
int fdatasync(int fd) {
    return fails() ? -1 : syscall(SYS_fdatasync, fd);
}
ssize_t pwritev2(int fd, const struct iovec *buffers, int count, off_t at, int flags) {
    if ((flags & RWF_DSYNC) && fails()) return -1;
    return syscall(SYS_pwritev2, fd, buffers, count, at, 0L, flags);
}
"#;

#[test]
fn after_a_failed_sync_there_are_reads_and_no_writes_until_the_disk_is_opened_again() {
    let disk = CowDisk::over(&patterned(8 * MIB, 5));
    let [library, fails] = ["sync.so", "fails"].map(|name| disk.dir.path(name));
    compile_c(FAILING_SYNC, &["-shared", "-fPIC"], &library);
    let socket = disk.dir.path("socket");
    let mut command = vhost_user_blk();
    command.env("LD_PRELOAD", &library).env("SYNC_FAILS", &fails);
    // The library makes calls that the daemon does not.
    command.arg("--sandbox=off");
    command.arg("--socket-path").arg(&socket).arg(disk.spec());
    let daemon = Backend::start("daemon whose syncs fail", command, &socket);
    let failed = |ops, offset, more: &[&str]| {
        let common = ["--once", "--region=64k", "--depth=4", "--output=json", ops, offset];
        failed_requests(&run_ok(load(&socket, &[&common, more].concat())))
    };
    let flushes = ["--flush-every=4"];
    assert_eq!(failed("--ops=write", "--offset=0", &flushes), 0);
    std::fs::write(&fails, "").expect("a file");
    assert!(failed("--ops=write", "--offset=1M", &flushes) > 0);
    daemon.wait_for("sync failed");
    // It would succeed again, and that would prove nothing.
    std::fs::remove_file(&fails).expect("removing a file");
    assert_eq!(failed("--ops=write", "--offset=2M", &[]), 16);
    assert_eq!(failed("--ops=read", "--offset=4M", &[]), 0);
    daemon.kill();
    let daemon = disk.serve(&[]);
    assert_eq!(failed("--ops=write", "--offset=2M", &flushes), 0);
    daemon.stop();
}

/// Lets writes of the durable bitmap, which begins at byte 8192, fail for lack of space as long as
/// a file exists.
const FULL_BITMAP: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
ssize_t pwrite64(int fd, const void *data, size_t len, off_t at) {
    if (at == 8192 && access(getenv("BITMAP_IS_FULL"), F_OK) == 0) {
        errno = ENOSPC;
        return -1;
    }
    return syscall(SYS_pwrite64, fd, data, len, at);
}
ssize_t pwrite(int fd, const void *data, size_t len, off_t at) {
    return pwrite64(fd, data, len, at);
}
"#;

/// A failed flush is reported to the guest, and in the log with the reason. The next one may
/// succeed.
#[test]
fn a_flush_that_fails_for_lack_of_space_is_logged_with_the_reason() {
    let disk = CowDisk::over(&patterned(8 * MIB, 5));
    let [library, full] = ["bitmap.so", "full"].map(|name| disk.dir.path(name));
    compile_c(FULL_BITMAP, &["-shared", "-fPIC"], &library);
    let socket = disk.dir.path("socket");
    let mut command = vhost_user_blk();
    command.env("LD_PRELOAD", &library).env("BITMAP_IS_FULL", &full);
    // The library makes calls that the daemon does not.
    command.arg("--sandbox=off");
    command.arg("--socket-path").arg(&socket).arg(disk.spec());
    let daemon = Backend::start("daemon without space for its bitmap", command, &socket);
    let failed = || {
        let write = ["--once", "--region=64k", "--ops=write", "--flush-every=4", "--output=json"];
        failed_requests(&run_ok(load(&socket, &write)))
    };
    std::fs::write(&full, "").expect("a file");
    assert!(failed() > 0);
    daemon.wait_for("flush failed: ");
    daemon.wait_for("cannot write the bitmap: No space left on device");
    std::fs::remove_file(&full).expect("removing a file");
    assert_eq!(failed(), 0);
    daemon.stop();
}

/// Has fdatasync hang as long as a file exists, as that of a file system does whose server has
/// gone.
const HANGING_SYNC: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int fdatasync(int fd) {
    while (access(getenv("SYNC_HANGS"), F_OK) == 0) usleep(5000);
    return syscall(SYS_fdatasync, fd);
}
"#;

#[test]
fn a_sync_that_hangs_is_reported_by_the_watchdog_only() {
    let disk = CowDisk::over(&patterned(MIB, 6));
    let [library, hangs, notify] = ["sync.so", "hangs", "notify"].map(|name| disk.dir.path(name));
    compile_c(HANGING_SYNC, &["-shared", "-fPIC"], &library);
    let manager = UnixDatagram::bind(&notify).expect("a socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    let socket = disk.dir.path("socket");
    let mut command = vhost_user_blk();
    command.env("LD_PRELOAD", &library).env("SYNC_HANGS", &hangs);
    // The library makes calls that the daemon does not.
    command.arg("--sandbox=off");
    command.env("NOTIFY_SOCKET", &notify).env("WATCHDOG_USEC", "40000");
    command.arg("--socket-path").arg(&socket).arg(disk.spec());
    let daemon = Backend::start("daemon whose syncs hang", command, &socket);
    // It can be connected to before it has made the COW file, which it syncs.
    daemon.wait_for("listening");
    std::fs::write(&hangs, "").expect("a file");
    // A flush or two: on a busy disk each takes seconds.
    let writes = ["--ops=write", "--once", "--region=16k", "--flush-every=4"];
    let bench = Process::spawn("blk-bench", load(&socket, &writes));
    daemon.wait_for("committer is stuck");
    manager.set_nonblocking(true).expect("a socket");
    while manager.recv(&mut [0; 64]).is_ok() {}
    // Ten signs of life would have been due.
    thread::sleep(Duration::from_millis(200));
    assert!(manager.recv(&mut [0; 64]).is_err(), "a sign of life of a daemon that is stuck");
    manager.set_nonblocking(false).expect("a socket");
    std::fs::remove_file(&hangs).expect("removing a file");
    daemon.wait_for("committer makes progress again");
    let (status, output) = bench.wait(PATIENCE);
    assert!(status.success(), "{output}");
    assert!(manager.recv(&mut [0; 64]).is_ok(), "no sign of life any more");
    daemon.stop();
}

#[test]
fn a_base_that_is_opened_for_writing_is_reported_without_waiting() {
    let disk = CowDisk::over(&patterned(MIB, 3));
    let daemon = disk.serve(&[]);
    daemon.wait_for("listening");
    // Reading it is no change.
    std::fs::read(&disk.base).expect("the base");
    assert!(!daemon.output().contains("open for writing"));
    OpenOptions::new().write(true).open(&disk.base).expect("the base");
    daemon.wait_for("was open for writing in another program");
    daemon.stop();
}

/// The load of one half of the disk, and what the whole disk holds after it.
fn write_half(socket: &Path, base: &Path, offset: &str, more: &[&str], expected: &Path) {
    let mut command = blk_bench();
    command.arg("run").arg("--socket-path").arg(socket).arg("--base").arg(base);
    command.args(["--verify", "--ops=write", "--once", "--region=4M", "--offset"]);
    command.arg(offset).args(more).arg("--write-expected").arg(expected);
    run_ok(command);
}

#[test]
fn a_live_bitmap_of_another_boot_is_void_and_what_was_flushed_is_there() {
    if run(in_namespace("mount -t tmpfs none /mnt")).code != Some(0) {
        println!("skipped: this user may not make a mount namespace");
        return;
    }
    for format in ["--format=native", "--format=uml"] {
        let disk = CowDisk::over(&patterned(8 * MIB, 4));
        let [flushed, all, out] = ["flushed", "all", "out"].map(|name| disk.dir.path(name));
        let daemon = disk.serve(&[format]);
        write_half(daemon.socket(), &disk.base, "0", &["--depth=1", "--flush-every=64"], &flushed);
        write_half(daemon.socket(), &flushed, "4M", &["--depth=8"], &all);
        // Dropped, and so killed: the second half was acknowledged, and never flushed.
        drop(daemon);
        // The host is still the same: everything is there.
        let mut merge = cow();
        merge.arg("merge").args([&disk.cow, &out]);
        run_ok(merge);
        assert!(std::fs::read(&out).unwrap() == std::fs::read(&all).unwrap(), "{format}");
        // Under another boot id only what was flushed is, and nothing in between.
        std::fs::remove_file(&out).expect("removing a file");
        let merge = format!("merge {} {}", disk.cow.display(), out.display());
        let merged = cow_after_boot(&disk.dir, &merge);
        assert_eq!(merged.code, Some(0), "{}", merged.output);
        assert!(std::fs::read(&out).unwrap() == std::fs::read(&flushed).unwrap(), "{format}");
    }
}

/// Containers get boot ids of their own. A process that may look beneath sees that it is still the
/// same host.
#[test]
fn a_boot_id_that_is_mounted_over_the_hosts_is_not_believed() {
    let unshared = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-euc", script]);
        run(command)
    };
    if unshared("mount -t tmpfs none /mnt").code != Some(0) {
        println!("skipped: this user may not make a mount namespace");
        return;
    }
    let disk = CowDisk::over(&patterned(8 * MIB, 4));
    let [all, out] = ["all", "out"].map(|name| disk.dir.path(name));
    let daemon = disk.serve(&[]);
    write_half(daemon.socket(), &disk.base, "0", &["--depth=8"], &all);
    drop(daemon);
    let merge = format!("merge {} {}", disk.cow.display(), out.display());
    let merged = unshared(&under_other_boot_id(&disk.dir, "", &merge));
    assert_eq!(merged.code, Some(0), "{}", merged.output);
    assert!(std::fs::read(&out).unwrap() == std::fs::read(&all).unwrap());
}

/// A script that runs a command of `cow`, by `prefix`, where another boot id is mounted over the
/// host's.
fn under_other_boot_id(directory: &TestDir, prefix: &str, args: &str) -> String {
    let boot = directory.path("boot_id");
    std::fs::write(&boot, "01234567-89ab-cdef-0123-456789abcdef\n").expect("a file");
    format!(
        "mount --bind {} /proc/sys/kernel/random/boot_id; {prefix} {} {args}",
        boot.display(),
        Path::new(cow().get_program()).display(),
    )
}

/// Runs a command of `cow` as on a host that has been booted since: it may not look beneath the
/// other boot id.
fn cow_after_boot(directory: &TestDir, args: &str) -> Outcome {
    run(in_namespace(&under_other_boot_id(directory, "setpriv --bounding-set=-sys_admin", args)))
}

/// Some of the disk is flushed in place, more of it one write at a time, which goes into the
/// journal. Then the daemon is killed and the host goes down: what was not synced in place is lost
/// there, and put in place from the journal.
#[test]
fn what_stands_in_the_journal_outlives_the_page_cache() {
    if run(in_namespace("mount -t tmpfs none /mnt")).code != Some(0) {
        println!("skipped: this user may not make a mount namespace");
        return;
    }
    let disk = CowDisk::over(&patterned(8 * MIB, 4));
    let expected = ["one", "two", "three", "four"].map(|name| disk.dir.path(name));
    let daemon = disk.serve(&["--num-queues=2"]);
    let write = |base: &Path, offset: &str, more: &[&str], expected: &Path| {
        let mut command = blk_bench();
        command.arg("run").arg("--socket-path").arg(daemon.socket()).arg("--base").arg(base);
        command.args(["--verify", "--ops=write", "--once", "--region=256K", "--depth=1"]);
        command.arg("--offset").arg(offset).args(more).arg("--write-expected").arg(expected);
        run_ok(command);
    };
    write(&disk.base, "0", &["--flush-every=64"], &expected[0]);
    write(&expected[0], "1M", &["--flush-every=32"], &expected[1]);
    // The first flush of little is in place as well, and begins the journal.
    write(&expected[1], "1M", &["--count=1", "--flush-every=1"], &expected[2]);
    write(&expected[2], "2M", &["--flush-every=1"], &expected[3]);
    daemon.kill();

    let file = OpenOptions::new().read(true).write(true).open(&disk.cow).expect("the COW file");
    let mut field = [0; 8];
    file.read_exact_at(&mut field, 80).expect("the header");
    let data_offset = u64::from_le_bytes(field);
    let lost = vec![0; 256 << 10];
    file.write_all_at(&lost, data_offset + (2 << 20)).expect("a write");

    let image = disk.dir.path("image");
    let merge = format!("merge {} {}", disk.cow.display(), image.display());
    let refused = cow_after_boot(&disk.dir, &merge);
    assert_eq!(refused.code, Some(1), "{}", refused.output);
    assert!(refused.output.contains("cow check --repair"), "{}", refused.output);
    let repaired = cow_after_boot(&disk.dir, &format!("check --repair {}", disk.cow.display()));
    assert_eq!(repaired.code, Some(0), "{}", repaired.output);
    let merged = cow_after_boot(&disk.dir, &merge);
    assert_eq!(merged.code, Some(0), "{}", merged.output);
    assert!(std::fs::read(&image).unwrap() == std::fs::read(&expected[3]).unwrap());
}
