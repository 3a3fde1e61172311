//! A guest under load whose daemon is upgraded again and again, without a new connection: QEMU has
//! no option to make one.
//!
//! `GUEST_UPGRADES` is the number of times (6 if it is not set).

use std::env;
use std::thread;
use std::time::Duration;

use system_tests::{CowDisk, Guest, Kernel, patterned, require, run_ok, vhost_user_blk};

const MIB: usize = 1 << 20;

/// Between two upgrades, so that each program sees some hundred requests.
const LIFE: Duration = Duration::from_millis(400);

fn upgraded_under_load(kernel: Kernel, queues: u16) {
    require!(kernel.available());
    let upgrades: u32 =
        env::var("GUEST_UPGRADES").map_or(6, |text| text.parse().expect("GUEST_UPGRADES"));
    let seconds = (2 * LIFE * upgrades).as_secs() + 2;
    let script = format!(
        "check mkfs mkfs.ext4 -q -F /dev/vda
         check mount mount -t ext4 /dev/vda /mnt
         check fio fio --name=verify --directory=/mnt --size=8M --numjobs=2 --direct=1 \
             --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-32k --verify=crc32c \
             --verify_fatal=1 --verify_backlog=256 --fsync=16 --time_based --runtime={seconds} --group_reporting
         check umount umount /mnt
         check fsck e2fsck -fn /dev/vda
         dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|hung|not a head' || true
         result errors $(dmesg | grep -ciE 'i/o error|ext4-fs (error|warning)|hung|not a head')
        "
    );
    let disk = CowDisk::over(&patterned(64 * MIB, 5));
    let control = disk.dir.path("control");
    let option = format!("--control={}", control.display());
    let daemon = disk.serve(&[&format!("--num-queues={queues}"), &option]);
    let mut guest = Guest::new(kernel, &script).with_fio().with_time(4 * LIFE * upgrades);
    if queues > 1 {
        guest = guest.queues(queues);
    }
    let guest = guest.disk(&daemon).boot(&disk.dir, "guest");
    guest.wait_for("Starting 2 processes");
    for _ in 0..upgrades {
        thread::sleep(LIFE);
        let mut upgrade = vhost_user_blk();
        upgrade.arg("upgrade").arg("--control").arg(&control);
        println!("{}", run_ok(upgrade).trim_end());
    }
    let console = guest.finish();
    console.expect_ok(&["mkfs", "mount", "fio", "umount", "fsck"]);
    console.expect("errors", "0");
    let log = daemon.stop();
    assert_eq!(log.matches("frontend connected").count(), 1, "{log}");
    let upgraded = log.matches("upgraded from").count();
    assert_eq!(upgraded, usize::try_from(upgrades).unwrap(), "{log}");
}

#[test]
fn a_qemu_guest_outlives_upgrades_on_one_connection() {
    upgraded_under_load(Kernel::Qemu, 2);
}

/// Its call descriptors are pipes, and it takes interrupts from the channel for requests.
#[test]
fn a_uml_guest_outlives_upgrades_on_one_connection() {
    upgraded_under_load(Kernel::Uml, 1);
}
