//! What happens to a disk in the life of its guest: the driver is rebound, the machine is reset
//! during I/O, one kernel starts another. (A guest that reboots: `guests.rs`.)

use std::fs;

use serde_json::json;
use system_tests::{CowDisk, Guest, Kernel, compile_c, patterned, require, sha256};

const MIB: usize = 1 << 20;

/// Where the kernel or the file system complains, and whether they have.
const COMPLAINTS: &str = "
    dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|hung|not a head' || true
    result errors $(dmesg | grep -ciE 'i/o error|ext4-fs (error|warning)|hung|not a head')
";

/// The driver is taken off while the device is being read, and put on again.
fn rebind(kernel: Kernel) {
    require!(kernel.available());
    let disk = CowDisk::over(&patterned(8 * MIB, 1));
    let script = "
        driver=/sys/bus/virtio/drivers/virtio_blk
        device=$(basename $(ls -d $driver/virtio*))
        for round in 1 2 3 4; do
            dd if=/dev/urandom of=/tmp/data bs=64k count=8 2>/dev/null
            check write$round dd if=/tmp/data of=/dev/vda seek=$round bs=512k iflag=fullblock \
                oflag=direct conv=notrunc
            (while dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done) &
            sleep 0.3
            echo $device >$driver/unbind
            # It gets errors then, and ends.
            wait
            result gone$round $(test -e /sys/block/vda && echo no || echo yes)
            echo $device >$driver/bind
            while [ ! -b /dev/vda ]; do sleep 0.1; done
            dd if=/dev/vda of=/tmp/found skip=$round bs=512k count=1 iflag=direct 2>/dev/null
            check same$round cmp /tmp/data /tmp/found
        done
        result digest $(digest /dev/vda)
    ";
    let console = disk.run(Guest::new(kernel, script), &[]);
    for round in 1..=4 {
        console.expect(&format!("gone{round}"), "yes");
        console.expect_ok(&[&format!("write{round}"), &format!("same{round}")]);
    }
    console.expect("digest", &sha256(&disk.merged()));
}

#[test]
fn a_driver_is_bound_anew_in_qemu() {
    rebind(Kernel::Qemu);
}

#[test]
fn a_driver_is_bound_anew_in_uml() {
    rebind(Kernel::Uml);
}

/// The machine is reset while it reads, writes and syncs; what was synced before is there each
/// time.
#[test]
fn a_machine_is_reset_in_the_midst_of_io() {
    require!(Kernel::Qemu.available());
    const RESETS: usize = 3;
    let disk = CowDisk::over(&patterned(64 * MIB, 2));
    let script = format!(
        "
        boot=1
        if mount -t ext4 /dev/vda /mnt 2>/dev/null; then
            boot=$(($(cat /mnt/boot) + 1))
            check kept sh -c 'cd /mnt && sha256sum -cs sums'
        else
            check mkfs mkfs.ext4 -q -F /dev/vda
            check mount mount -t ext4 /dev/vda /mnt
        fi
        dd if=/dev/urandom of=/mnt/kept$boot bs=64k count=8 2>/dev/null
        (cd /mnt && sha256sum kept* >sums)
        echo $boot >/mnt/boot
        check sync sync
        result boot $boot
        if [ $boot -le {RESETS} ]; then
            (while dd if=/dev/urandom of=/mnt/load bs=16k count=32 conv=notrunc,fsync; do :; done) \
                2>/dev/null &
            (while dd if=/dev/vda of=/dev/null bs=64k iflag=direct; do :; done) 2>/dev/null &
            result load $boot
            (while dd if=/dev/urandom of=/mnt/direct bs=64k count=16 oflag=direct; do :; done) 2>/dev/null
        fi
        check umount umount /mnt
        check fsck e2fsck -fn /dev/vda
        {COMPLAINTS}
        result digest $(digest /dev/vda)
        "
    );
    let options = ["--num-queues=2"];
    let daemon = disk.serve(&options);
    let guest = Guest::new(Kernel::Qemu, &script).queues(2).controlled();
    let guest = guest.disk(&daemon).boot(&disk.dir, "guest");
    let mut monitor = guest.monitor();
    for boot in 1..=RESETS {
        guest.wait_for(&format!("@@load={boot}"));
        // No synchronisation: any moment will do.
        std::thread::sleep(std::time::Duration::from_millis(500));
        monitor.run("system_reset", json!({}));
    }
    drop(monitor);
    let console = guest.finish();
    daemon.stop();
    console.expect("boot", &(RESETS + 1).to_string());
    console.expect_ok(&["mkfs", "mount", "kept", "sync", "umount", "fsck"]);
    console.expect("errors", "0");
    console.expect("digest", &sha256(&disk.merged()));
}

/// A kernel starts another while it reads and writes. The first does not shut the device down; the
/// second resets it.
#[test]
fn a_kernel_goes_over_to_another_in_the_midst_of_io() {
    require!(Kernel::Qemu.available());
    require!(Kernel::Qemu.can_kexec());
    let disk = CowDisk::over(&patterned(64 * MIB, 3));
    let program = disk.dir.path("kexec");
    compile_c(include_str!("../c/kexec.c"), &["-static", "-O1"], &program);
    let script = format!(
        "
        if [ -n \"${{second-}}\" ]; then
            result booted second
            check remount mount -t ext4 /dev/vda /mnt
            check kept sh -c 'cd /mnt && sha256sum -cs sums'
            dd if=/dev/urandom of=/mnt/more bs=64k count=8 2>/dev/null
            check umount umount /mnt
            check fsck e2fsck -fn /dev/vda
            {COMPLAINTS}
            result digest $(digest /dev/vda)
        else
            check mkfs mkfs.ext4 -q -F /dev/vda
            check mount mount -t ext4 /dev/vda /mnt
            dd if=/dev/urandom of=/mnt/kept bs=64k count=32 2>/dev/null
            (cd /mnt && sha256sum kept >sums)
            check sync sync
            (while :; do dd if=/dev/urandom of=/mnt/load bs=64k count=32 oflag=direct conv=notrunc; done) \
                2>/dev/null &
            (while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct; done) 2>/dev/null &
            sleep 1
            kexec /kernel /second 'console=ttyS0 quiet panic=-1 second=1'
        fi
        "
    );
    let daemon = disk.serve(&[]);
    let program = fs::read(program).expect("the program");
    let guest = Guest::new(Kernel::Qemu, &script).with_file("bin/kexec", program).with_kernel();
    let console = guest.disk(&daemon).run(&disk.dir, "guest");
    daemon.stop();
    console.expect("booted", "second");
    console.expect_ok(&["mkfs", "mount", "sync", "remount", "kept", "umount", "fsck"]);
    console.expect("errors", "0");
    console.expect("digest", &sha256(&disk.merged()));
}
