//! The page cache goes, or has lost something, while the host runs on: its boot id stays. What a
//! guest has flushed must be there all the same (docs/architecture.md, "When the power goes").
//!
//! The first half mounts file systems here and needs root. The second runs in a QEMU guest, where a
//! device can fail.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use system_tests::flushed::program::write_base;
use system_tests::flushed::{ClientLog, Model, Program, read_dump};
use system_tests::powercut::{FileSystem, Host, Variant, dump_path, wait_until};
use system_tests::{
    Backend, Kernel, LoopMount, Process, Running, SmallTmpfs, TestDir, available, cow,
    drop_page_cache, require, run_ok, vhost_user_blk,
};

const CLIENT: &str = env!("CARGO_BIN_EXE_flush-client");
/// For everything that is waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// Under TCG, on a busy machine.
const GUEST_PATIENCE: Duration = Duration::from_secs(300);
/// The flushes of the load during which a fault occurs.
const FLUSHES_BEFORE: usize = 40;
/// A program after the fault, to its end.
const AFTERWARDS: &str = "count=120";

/// How the daemon ends, and how it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// Killed under load, before the fault.
    Killed,
    /// It lives through the fault, until the guest has heard of it; then SIGTERM.
    Ended,
    /// The same with kill -9, and a service manager that restarts it at once, before the file
    /// system is mounted again.
    Restarted,
}

/// A disk on a file system that is mounted here, and the answers that its guest got.
struct Disk {
    // In this order: the daemon, the mount, what it is made of.
    backend: Option<Backend>,
    mount: LoopMount,
    thin: Option<SmallTmpfs>,
    dir: TestDir,
    seed: u64,
}

impl Disk {
    /// A COW file over a base in a new file system; on a thin device, if `thin` gives its size.
    fn new(file_system: FileSystem, thin: Option<u64>, seed: u64) -> Result<Self, String> {
        available(&[&format!("mkfs.{}", file_system.name())])?;
        let dir = TestDir::new();
        let (files, at) = (dir.path("files"), dir.path("mount"));
        fs::create_dir(&files).expect("a directory");
        write_base(&files.join("base0"), 0).expect("writing a base");
        let thin = thin.map(|len| SmallTmpfs::new(&dir, len)).transpose()?;
        let image = thin.as_ref().map_or_else(|| dir.path("image"), |thin| thin.path("image"));
        let mount = LoopMount::new(file_system, &image, &files, &at)?;
        let mut create = cow();
        create.args(["create", "--quiet", "-b"]).args([at.join("base0"), at.join("0.cow")]);
        run_ok(create);
        Ok(Self { backend: None, mount, thin, dir, seed })
    }

    fn cow_file(&self) -> PathBuf {
        self.mount.at.join("0.cow")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path("socket")
    }

    fn serve(&mut self) {
        let args = [Path::new("--num-queues=2").to_owned(), self.cow_file()];
        self.backend = Some(Backend::daemon(&self.socket(), &args));
    }

    fn client(&self, args: &[&str]) -> Command {
        let mut client = Command::new(CLIENT);
        client.env("TOLD", self.dir.path("told")).arg(args[0]).arg(self.socket()).args(&args[1..]);
        client
    }

    fn client_log(&self) -> ClientLog {
        ClientLog::read(&self.dir.path("told"))
    }

    /// Begins program `number` and waits until some of it is flushed.
    fn load(&self, number: u64) -> Process {
        let (seed, number) = (self.seed.to_string(), number.to_string());
        let load = Process::spawn("load", self.client(&["run", &seed, &number, "tolerant"]));
        let enough = || {
            self.client_log().lines.iter().filter(|line| line.starts_with("flushed ")).count()
                >= FLUSHES_BEFORE
        };
        assert!(wait_until(PATIENCE, enough), "no flushes: {}", load.output());
        load
    }

    /// Whether the guest has heard of a failed flush: then its client has ended.
    fn guest_has_heard(&self) -> bool {
        self.client_log().has("ended")
    }

    fn signal(&mut self, signal: Signal) {
        let backend = self.backend.take().expect("a daemon");
        if signal == Signal::SIGKILL { backend.kill() } else { backend.end() }
    }

    /// Reads the disk, plays one more program, ends the daemon, and reads the disk again.
    fn look(&mut self) {
        self.dump(0);
        let seed = self.seed.to_string();
        run_ok(self.client(&["run", &seed, "1000", AFTERWARDS]));
        self.backend.take().expect("a daemon").stop();
        self.serve();
        self.dump(1);
        self.backend.take().expect("a daemon").stop();
    }

    fn dump(&self, slot: u64) {
        let file = self.dir.path("dump").display().to_string();
        run_ok(self.client(&["dump", &file, &slot.to_string()]));
    }

    /// Panics unless each flushed sector was read as it must be.
    fn judge(&self, what: &str) {
        judge(&self.client_log(), &self.dir.path("dump"), self.seed, what);
    }
}

fn judge(client_log: &ClientLog, dump: &Path, seed: u64, what: &str) {
    let mut slot = 0;
    let verdict = Model::new(seed).follow(client_log, |sectors| {
        slot += 1;
        read_dump(dump, slot - 1, sectors)
    });
    let violations = verdict.violations.join("\n  ");
    assert!(verdict.dumps == 2 && verdict.flushes > 0, "{what} (seed {seed}): {verdict:?}");
    assert!(
        violations.is_empty(),
        "{what} (seed {seed}): flushed sectors are gone:\n  {violations}"
    );
}

/// Programs that flush little, which a journal takes, and any others.
fn programs(seed: u64) -> [u64; 2] {
    let small = Program::of_small_flushes(seed);
    [small, small + 1]
}

/// The daemon as a service that is started again at once, whatever it ended with.
struct Service {
    /// Of the loop; the group is killed with it.
    _process: Process,
    pid: PathBuf,
}

impl Service {
    fn start(disk: &Disk) -> Self {
        let pid = disk.dir.path("pid");
        let script = "while :; do \"$@\" & echo $! >\"$PID\"; wait $! || sleep 0.02; done";
        let mut command = Command::new("sh");
        command.env("PID", &pid).args(["-c", script, "sh"]).arg(vhost_user_blk().get_program());
        command.arg("--socket-path").arg(disk.socket()).arg("--num-queues=2").arg(disk.cow_file());
        Self { _process: Process::spawn("service", command), pid }
    }

    /// Kills the daemon of the moment; the next one comes at once.
    fn kill(&self) {
        let pid = fs::read_to_string(&self.pid).ok().and_then(|pid| pid.trim().parse().ok());
        if let Some(pid) = pid {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// The file system is shut down under load, unmounted and mounted again.
fn shut_down(file_system: FileSystem, life: Life, seed: u64) {
    for number in programs(seed) {
        let mut disk = match Disk::new(file_system, None, seed) {
            Ok(disk) => disk,
            Err(why) => return println!("skipped: {why}"),
        };
        let shut_down = |disk: &Disk| disk.mount.shut_down();
        let service = (life == Life::Restarted).then(|| Service::start(&disk));
        if service.is_none() {
            disk.serve();
        }
        let load = disk.load(number);
        if life == Life::Killed {
            disk.signal(Signal::SIGKILL);
        }
        if let Err(why) = shut_down(&disk) {
            return println!("skipped: {} cannot be shut down here: {why}", file_system.name());
        }
        if life != Life::Killed {
            assert!(wait_until(PATIENCE, || disk.guest_has_heard()), "{}", load.output());
        }
        drop(load);
        if life == Life::Ended {
            disk.signal(Signal::SIGTERM);
        }
        let kill = || {
            if let Some(service) = &service {
                service.kill();
            }
        };
        disk.mount.unmount(kill);
        disk.mount.mount();
        // By hand from here on: which of its daemons reads is not in a test's hands otherwise.
        if let Some(service) = service {
            disk.dump(0);
            service.kill();
            drop(service);
            disk.mount.unmount(|| {});
            disk.mount.mount();
            disk.serve();
            disk.dump(1);
            disk.signal(Signal::SIGTERM);
        } else {
            disk.serve();
            disk.look();
        }
        disk.judge(&format!("{} shut down, program {number}, {life:?}", file_system.name()));
    }
}

#[test]
fn ext4_that_is_shut_down_after_the_daemon_s_death_keeps_what_was_flushed() {
    shut_down(FileSystem::Ext4, Life::Killed, 11);
}

#[test]
fn ext4_that_is_shut_down_under_the_daemon_keeps_what_was_flushed() {
    shut_down(FileSystem::Ext4, Life::Ended, 12);
}

#[test]
fn ext4_that_is_shut_down_under_a_service_keeps_what_was_flushed() {
    shut_down(FileSystem::Ext4, Life::Restarted, 13);
}

#[test]
fn xfs_that_is_shut_down_after_the_daemon_s_death_keeps_what_was_flushed() {
    shut_down(FileSystem::Xfs, Life::Killed, 14);
}

#[test]
fn xfs_that_is_shut_down_under_the_daemon_keeps_what_was_flushed() {
    shut_down(FileSystem::Xfs, Life::Ended, 15);
}

#[test]
fn xfs_that_is_shut_down_under_a_service_keeps_what_was_flushed() {
    shut_down(FileSystem::Xfs, Life::Restarted, 16);
}

#[test]
fn btrfs_that_is_shut_down_under_the_daemon_keeps_what_was_flushed() {
    shut_down(FileSystem::Btrfs, Life::Ended, 17);
}

/// A thin device runs full, the file system stops, and space comes back.
fn runs_full(file_system: FileSystem, signal: Signal, seed: u64) {
    /// Room for what the file system has written when it is new, and some of the load.
    const THIN_LEN: u64 = 140 << 20;
    for number in programs(seed) {
        let mut disk = match Disk::new(file_system, Some(THIN_LEN), seed) {
            Ok(disk) => disk,
            Err(why) => return println!("skipped: {why}"),
        };
        disk.serve();
        let load = disk.load(number);
        disk.thin.as_ref().expect("a thin device").fill();
        // The load continues until the guest gets the error: overwritten sectors have their place
        // already.
        assert!(wait_until(PATIENCE, || disk.guest_has_heard()), "{}", load.output());
        drop(load);
        disk.signal(signal);
        disk.thin.as_ref().expect("a thin device").make_room();
        drop_page_cache();
        disk.mount.unmount(|| {});
        disk.mount.mount();
        disk.serve();
        disk.look();
        disk.judge(&format!("{} ran full, program {number}, {signal}", file_system.name()));
    }
}

#[test]
fn a_thin_device_that_runs_full_keeps_what_was_flushed_when_the_daemon_is_killed() {
    runs_full(FileSystem::Ext4, Signal::SIGKILL, 21);
}

#[test]
fn a_thin_device_that_runs_full_keeps_what_was_flushed_when_the_daemon_ends() {
    runs_full(FileSystem::Ext4, Signal::SIGTERM, 22);
}

/// What befalls the device of a guest that is the daemon's host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// It is gone for a while: every request fails.
    Gone,
    /// Its writes fail for a while.
    WritesFail,
}

/// Functions for the plan; the device is the mapper's `disk`, over the whole of `/dev/vda`.
const MAPPED: &str = r#"
load_modules dm-flakey
sectors=$(cat /sys/block/vda/size)
dmsetup create disk --noudevsync --table "0 $sectors linear /dev/vda 0"
dmsetup mknodes
# table LINE: the device is this from now on; nothing that waits is written before.
table() {
    dmsetup suspend --noflush --nolockfs --noudevsync disk
    dmsetup load disk --table "0 $sectors $1"
    dmsetup resume --noudevsync disk
}
await_word() { read -r _ </dev/ttyS1; }
"#;

/// Waits for a line of the host's report.
fn await_line(
    guest: &mut Running,
    client_log: &dyn Fn() -> ClientLog,
    what: &str,
    reached: &dyn Fn(&ClientLog) -> bool,
) {
    wait_until(GUEST_PATIENCE, || {
        reached(&client_log()) || guest.has_ended() || !client_log().failures.is_empty()
    });
    let client_log = client_log();
    assert!(reached(&client_log), "no {what}: {:?}\n{}", client_log.failures, guest.output());
}

/// The device of the host fails under load, and works again; the daemon's successor must show what
/// was flushed, without or after a new mount.
fn device_fails(file_system: FileSystem, fault: Fault, life: Life, remount: bool, seed: u64) {
    require!(Kernel::Qemu.available());
    require!(available(&["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"]));
    let number = Program::of_small_flushes(seed);
    let name = file_system.name();
    let dir = TestDir::new();
    let image = dir.path("disk");
    let variant = Variant { file_system, uml: false, direct: false };
    let host = Host::new(&dir, &image, variant, None, Path::new(CLIENT)).controlled();
    if !remount {
        // Without a journal ext4 continues after an error of its device.
        let mut tune = Command::new("tune2fs");
        tune.env("PATH", format!("{}:/usr/sbin:/sbin", env::var("PATH").unwrap_or_default()));
        tune.args(["-O", "^has_journal"]).arg(&image);
        run_ok(tune);
    }
    let table = match fault {
        Fault::Gone => "error",
        Fault::WritesFail => "flakey /dev/vda 0 0 3600 1 error_writes",
    };
    let end = if life == Life::Ended { "kill -TERM $daemon" } else { "kill -KILL $daemon" };
    let options = if remount { "" } else { "errors=continue" };
    let mut plan = MAPPED.to_owned();
    plan += &format!("mount_disk {name} /dev/mapper/disk '{options}'\nserve\n");
    plan += &format!("flush-client run $socket {seed} {number} tolerant & load=$!\n");
    plan += &format!(
        "await_word\n{}table '{table}'\n",
        if life == Life::Killed { "kill_daemon\n" } else { "" }
    );
    // As the kernel's flusher would after some seconds: what it cannot write it takes for clean
    // from then on.
    plan += "wait $load || true\nsync || true\n";
    if life != Life::Killed {
        plan += &format!("{end}\nwait $daemon || true\n");
    }
    if remount {
        plan += "unmount_disk\n";
        plan += &format!(
            "table 'linear /dev/vda 0'\nmount -t {name} /dev/mapper/disk /mnt || fail mount\n"
        );
    } else {
        plan += "table 'linear /dev/vda 0'\n";
    }
    plan += "serve\ndump\n";
    plan += &format!(
        "play {seed} 1000 {AFTERWARDS}\nclose_disk\nserve\ndump\nclose_disk\nunmount_disk\n"
    );
    let drive = format!("format=raw,cache=unsafe,file={}", image.display());
    let mut guest = host.boot(&dir, "host", &drive, &plan);
    let client_log = || ClientLog::read(&dir.path("host.told"));
    let has_flushed = |client_log: &ClientLog| {
        client_log.lines.iter().filter(|line| line.starts_with("flushed ")).count()
            >= FLUSHES_BEFORE
    };
    await_line(&mut guest, &client_log, "flushes", &has_flushed);
    guest.tell("go");
    await_line(&mut guest, &client_log, "end", &|client_log| client_log.has("over"));
    let client_log = client_log();
    let what = format!("{name}, {fault:?}, {life:?}, remount {remount}, program {number}");
    if life != Life::Killed {
        assert!(client_log.has("ended"), "{what}: the guest got no answer: {:?}", client_log.lines);
    }
    judge(&client_log, &dump_path(&dir), seed, &what);
}

#[test]
fn what_was_flushed_outlives_a_device_that_is_gone_for_a_while_under_ext4() {
    device_fails(FileSystem::Ext4, Fault::Gone, Life::Killed, true, 31);
}

#[test]
fn what_was_flushed_outlives_a_device_that_is_gone_for_a_while_under_xfs() {
    device_fails(FileSystem::Xfs, Fault::Gone, Life::Ended, true, 32);
}

#[test]
fn what_was_flushed_outlives_a_device_that_is_gone_for_a_while_under_btrfs() {
    device_fails(FileSystem::Btrfs, Fault::Gone, Life::Ended, true, 33);
}

#[test]
fn what_was_flushed_outlives_failing_writes_and_a_new_mount_of_ext4() {
    device_fails(FileSystem::Ext4, Fault::WritesFail, Life::Ended, true, 34);
}

#[test]
fn what_was_flushed_outlives_failing_writes_and_a_new_mount_of_btrfs() {
    device_fails(FileSystem::Btrfs, Fault::WritesFail, Life::Restarted, true, 35);
}

#[test]
fn what_was_flushed_outlives_failing_writes_of_a_file_system_that_goes_on() {
    device_fails(FileSystem::Ext4, Fault::WritesFail, Life::Ended, false, 36);
}

#[test]
fn what_was_flushed_outlives_failing_writes_and_a_daemon_that_is_killed_after_them() {
    device_fails(FileSystem::Ext4, Fault::WritesFail, Life::Restarted, false, 37);
}
