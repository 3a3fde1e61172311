//! A guest under load whose daemon is killed again and again: it sees a pause, and nothing else.
//!
//! `GUEST_KILLS` is the number of times (5 if it is not set).

use std::env;
use std::thread;
use std::time::{Duration, Instant};

use system_tests::{CowDisk, Guest, Kernel, patterned, require};

const MIB: usize = 1 << 20;

/// A daemon lives so long, and up to twice that: TCG guests are slow, and each life should see some
/// thousand requests.
const LIFE: Duration = Duration::from_millis(700);

/// Longer than fio lays out its files, and reads them again at the end.
const SLACK: Duration = Duration::from_secs(5);

#[test]
fn a_guest_outlives_its_daemons() {
    require!(Kernel::Qemu.available());
    let kills: u32 = env::var("GUEST_KILLS").map_or(5, |text| text.parse().expect("GUEST_KILLS"));
    let load = 2 * LIFE * kills + SLACK;
    // fio in the file system and, beside it, files that are not synced before the end.
    let script = format!(
        "check mkfs mkfs.ext4 -q -F /dev/vda
         check mount mount -t ext4 /dev/vda /mnt
         (for i in $(seq 1 {files}); do
             dd if=/dev/urandom of=/mnt/file$i bs=64k count=4 2>/dev/null
             sleep 1
         done; cd /mnt && sha256sum file* >/tmp/sums) &
         check fio fio --name=verify --directory=/mnt --size=12M --numjobs=2 --direct=1 \
             --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-32k --verify=crc32c \
             --verify_fatal=1 --verify_backlog=256 --fsync=16 --time_based --runtime={seconds} --group_reporting
         result load ended
         wait
         check umount umount /mnt
         check fsck e2fsck -fn /dev/vda
         check remount mount -t ext4 -o ro /dev/vda /mnt
         check files sh -c 'cd /mnt && sha256sum -cs /tmp/sums'
         umount /mnt
         dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|timeout|hung|not a head' || true
         result errors $(dmesg | grep -ciE 'i/o error|ext4-fs (error|warning)|hung|not a head')
        ",
        files = load.as_secs() / 2,
        seconds = load.as_secs(),
    );
    let disk = CowDisk::over(&patterned(96 * MIB, 7));
    // Direct writes take longer, so that more of them are in flight.
    let options = ["--num-queues=2", "--cow-cache=direct"];
    let mut daemon = disk.serve(&options);
    let guest = Guest::new(Kernel::Qemu, &script).queues(2).with_fio().reconnecting();
    let guest = guest.with_time(2 * load).disk(&daemon).boot(&disk.dir, "guest");
    guest.wait_for("Starting 2 processes");
    let (mut killed, mut again) = (0, 0);
    let begun = Instant::now();
    while killed < kills && !guest.shows("@@load=ended") {
        // The times are no synchronisation: any moment will do.
        let jitter = begun.elapsed().subsec_nanos() % 1000;
        thread::sleep(LIFE + LIFE * jitter / 1000);
        again += u32::from(daemon.output().contains("requests that were in flight"));
        daemon.kill();
        daemon = disk.serve(&options);
        killed += 1;
    }
    let console = guest.finish();
    again += u32::from(daemon.output().contains("requests that were in flight"));
    daemon.stop();
    console.expect_ok(&["mkfs", "mount", "fio", "umount", "fsck", "remount", "files"]);
    console.expect("errors", "0");
    // On a very slow host the load can end before the last ones.
    assert!(killed >= kills.min(2), "killed {killed} times of {kills}");
    println!("killed {killed} times; {again} daemons found requests in flight");
    assert!(again > 0, "no daemon was killed at work");
}
