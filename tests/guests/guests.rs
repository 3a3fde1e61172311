//! Guests at work on disks of the daemon: each test under QEMU and under User Mode Linux.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use system_tests::{CowDisk, Guest, Kernel, patterned, require, sha256};

const MIB: usize = 1 << 20;

/// Stops the daemon and compares the disk, as the guest saw it at last, with the merged image; the
/// base must be as it was.
struct Unchanged {
    sha256: String,
    modified: SystemTime,
}

impl Unchanged {
    fn base_of(disk: &CowDisk) -> Self {
        let modified =
            fs::metadata(&disk.base).and_then(|m| m.modified()).expect("the base's mtime");
        Self { sha256: sha256(&disk.base), modified }
    }

    fn check(&self, disk: &CowDisk) {
        let now = Self::base_of(disk);
        assert_eq!(now.sha256, self.sha256, "the base's content has changed");
        assert_eq!(now.modified, self.modified, "the base's mtime has changed");
    }
}

fn ext4(kernel: Kernel) {
    require!(kernel.available());
    let disk = CowDisk::over(&patterned(64 * MIB, 1));
    let base = Unchanged::base_of(&disk);
    let script = "
        check mkfs mkfs.ext4 -q -F /dev/vda
        check mount mount -t ext4 /dev/vda /mnt
        for i in $(seq 10 39); do
            dd if=/dev/urandom of=/mnt/file$i bs=4k count=$((i * 2)) 2>/dev/null
        done
        check fsync fsync /mnt/file*
        (cd /mnt && sha256sum file*) >/tmp/sums
        rm /mnt/file2?
        check sync sync
        check fstrim fstrim -v /mnt
        check umount umount /mnt
        check fsck e2fsck -fn /dev/vda
        check remount mount -t ext4 -o ro /dev/vda /mnt
        grep -v file2 /tmp/sums >/tmp/left
        check files sh -c 'cd /mnt && sha256sum -c /tmp/left'
        umount /mnt
        result digest $(digest /dev/vda)
    ";
    let console = disk.run(Guest::new(kernel, script), &[]);
    console.expect_ok(&["mkfs", "mount", "fsync", "sync", "fstrim", "umount", "fsck"]);
    console.expect_ok(&["remount", "files"]);
    console.expect("digest", &sha256(&disk.merged()));
    base.check(&disk);
}

#[test]
fn ext4_in_qemu() {
    ext4(Kernel::Qemu);
}

#[test]
fn ext4_in_uml() {
    ext4(Kernel::Uml);
}

/// Random writes of 512 bytes to 64 KiB, each verified by its checksum when all are done.
const FIO: &str = "fio --name=verify --filename=/dev/vda --direct=1 --ioengine=libaio --iodepth=16 \
    --rw=randwrite --bsrange=512-64k --blockalign=512 --verify=crc32c --verify_fatal=1 --group_reporting";

fn fio(guest: Guest, disk: &CowDisk, options: &[&str]) {
    let console = disk.run(guest.with_fio(), options);
    console.expect_ok(&["fio"]);
    console.expect("digest", &sha256(&disk.merged()));
}

#[test]
fn fio_verifies_in_qemu_on_four_queues() {
    require!(Kernel::Qemu.available());
    fio_on_four_queues(&[]);
}

#[test]
fn fio_verifies_in_qemu_on_four_queues_without_io_uring() {
    require!(Kernel::Qemu.available());
    fio_on_four_queues(SYNC);
}

fn fio_on_four_queues(options: &[&str]) {
    let disk = CowDisk::over(&patterned(64 * MIB, 2));
    let script = format!(
        "result queues $(ls /sys/block/vda/mq | wc -l)
         check fio {FIO} --numjobs=4 --offset_increment=16M --size=4M
         result digest $(digest /dev/vda)"
    );
    let guest = Guest::new(Kernel::Qemu, &script).queues(4);
    fio(guest, &disk, &[&["--num-queues=4"], options].concat());
}

/// One queue, with the daemon's ways of waiting and of caching that are not the default.
fn fio_on_one_queue(kernel: Kernel, options: &[&str]) {
    require!(kernel.available());
    let disk = CowDisk::over(&patterned(32 * MIB, 3));
    let script = format!("check fio {FIO} --size=16M; result digest $(digest /dev/vda)");
    fio(Guest::new(kernel, &script), &disk, options);
}

#[test]
fn fio_verifies_in_uml() {
    fio_on_one_queue(Kernel::Uml, &[]);
}

const SYNC: &[&str] = &["--io-engine=sync"];
const NO_POLLING: &[&str] = &["--poll-us=0"];
const DIRECT: &[&str] = &["--base-cache=direct", "--cow-cache=direct"];

/// UML's kicks come through pipes.
#[test]
fn fio_verifies_in_uml_without_io_uring() {
    fio_on_one_queue(Kernel::Uml, &[SYNC, NO_POLLING].concat());
}

#[test]
fn fio_verifies_in_uml_without_polling() {
    fio_on_one_queue(Kernel::Uml, NO_POLLING);
}

#[test]
fn fio_verifies_in_uml_with_direct_caches() {
    fio_on_one_queue(Kernel::Uml, DIRECT);
}

#[test]
fn fio_verifies_in_uml_with_direct_caches_and_no_polling() {
    fio_on_one_queue(Kernel::Uml, &[DIRECT, NO_POLLING].concat());
}

#[test]
fn fio_verifies_in_qemu_without_polling() {
    fio_on_one_queue(Kernel::Qemu, NO_POLLING);
}

#[test]
fn fio_verifies_in_qemu_with_direct_caches() {
    fio_on_one_queue(Kernel::Qemu, DIRECT);
}

#[test]
fn fio_verifies_in_qemu_with_direct_caches_and_no_polling() {
    fio_on_one_queue(Kernel::Qemu, &[DIRECT, NO_POLLING].concat());
}

fn read_only(kernel: Kernel) {
    require!(kernel.available());
    let disk = CowDisk::over_ext4(16 << 20, &[("hello", "from the base")]);
    let base = Unchanged::base_of(&disk);
    disk.serve(&[]).stop(); // creates the COW file
    let cow = sha256(&disk.cow);
    let script = "
        result ro $(cat /sys/block/vda/ro)
        check write dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync
        check mount mount -t ext4 -o ro,noload /dev/vda /mnt
        result hello \"$(cat /mnt/hello)\"
        umount /mnt
    ";
    let console = disk.run(Guest::new(kernel, script), &["--read-only"]);
    console.expect("ro", "1");
    console.expect("write", "failed: 1");
    console.expect_ok(&["mount"]);
    console.expect("hello", "from the base");
    assert_eq!(sha256(&disk.cow), cow, "the COW file has changed");
    base.check(&disk);
}

#[test]
fn read_only_in_qemu() {
    read_only(Kernel::Qemu);
}

#[test]
fn read_only_in_uml() {
    read_only(Kernel::Uml);
}

/// Single sectors round the borders of pages and of the disk, discards and zeroes, against a model.
fn sectors(kernel: Kernel, options: &[&str]) {
    require!(kernel.available());
    const WRITTEN: [usize; 9] = [0, 1, 3, 7, 8, 63, 64, 1001, 8191];
    const DISCARDED: std::ops::Range<usize> = 96..160;
    const ZEROED: std::ops::Range<usize> = 1000..1017;
    let mut model = patterned(4 * MIB, 4);
    let disk = CowDisk::over(&model);
    for range in [DISCARDED, ZEROED] {
        model[range.start * 512..range.end * 512].fill(0);
    }
    for sector in WRITTEN {
        let content = format!("{sector:0512}");
        model[sector * 512..][..512].copy_from_slice(content.as_bytes());
    }
    let script = format!(
        "result size $(cat /sys/block/vda/size)
         check discard blkdiscard -o {} -l {} /dev/vda
         check zero blkdiscard -z -o {} -l {} /dev/vda
         for sector in {}; do
             printf %0512d $sector >/tmp/sector
             dd if=/tmp/sector of=/dev/vda bs=512 seek=$sector oflag=direct 2>/dev/null
         done
         result digest $(digest /dev/vda)
         result by-sector $(digest /dev/vda 512)",
        DISCARDED.start * 512,
        DISCARDED.len() * 512,
        ZEROED.start * 512,
        ZEROED.len() * 512,
        WRITTEN.map(|sector| sector.to_string()).join(" "),
    );
    let console = disk.run(Guest::new(kernel, &script), options);
    console.expect("size", &(model.len() / 512).to_string());
    console.expect_ok(&["discard", "zero"]);
    let merged = disk.merged();
    assert!(fs::read(&merged).expect("the merged image") == model, "the disk is not as expected");
    console.expect("digest", &sha256(&merged));
    console.expect("by-sector", &sha256(&merged));
}

#[test]
fn single_sectors_in_qemu() {
    sectors(Kernel::Qemu, &[]);
}

#[test]
fn single_sectors_with_direct_caches_in_qemu() {
    sectors(Kernel::Qemu, &["--base-cache=direct", "--cow-cache=direct"]);
}

#[test]
fn single_sectors_in_uml() {
    sectors(Kernel::Uml, &[]);
}

#[test]
fn single_sectors_in_a_uml_cow_file() {
    sectors(Kernel::Uml, &["--format=uml"]);
}

/// A base whose size is no multiple of 512: the last sector is filled up with zeros.
fn odd_size(kernel: Kernel) {
    require!(kernel.available());
    const LEN: usize = 1_000_001;
    let mut model = patterned(LEN, 5);
    let disk = CowDisk::over(&model);
    model.resize(LEN.next_multiple_of(512), 0);
    let whole = disk.dir.path("whole.img");
    fs::write(&whole, &model).expect("writing the expected image");
    let script = "
        result size $(cat /sys/block/vda/size)
        result digest $(digest /dev/vda 512)
    ";
    let console = disk.run(Guest::new(kernel, script), &[]);
    console.expect("size", &(model.len() / 512).to_string());
    console.expect("digest", &sha256(&whole));
}

#[test]
fn odd_size_in_qemu() {
    odd_size(Kernel::Qemu);
}

#[test]
fn odd_size_in_uml() {
    odd_size(Kernel::Uml);
}

/// A guest that reboots finds what it wrote: under QEMU the device is reset on the same connection,
/// UML starts again on a new one.
fn reboot(kernel: Kernel) {
    require!(kernel.available());
    let disk = CowDisk::over(&patterned(4 * MIB, 6));
    let script = "
        if [ \"$(head -c 6 /dev/vda)\" = MARKER ]; then
            result booted twice
            result digest $(digest /dev/vda)
        else
            result booted once
            echo MARKER | dd of=/dev/vda conv=fsync 2>/dev/null
            reboot -f
        fi
    ";
    let console = disk.run(Guest::new(kernel, script), &[]);
    console.expect("booted", "twice");
    console.expect("digest", &sha256(&disk.merged()));
}

#[test]
fn reboot_in_qemu() {
    reboot(Kernel::Qemu);
}

#[test]
fn reboot_in_uml() {
    reboot(Kernel::Uml);
}

/// Two guests at the same time on one base, then each again: its own files are there, the other's
/// are not.
fn two_guests(kernel: Kernel) {
    require!(kernel.available());
    let one = CowDisk::over_ext4(32 << 20, &[("common", "of the base")]);
    let base = Unchanged::base_of(&one);
    let mut two = CowDisk::over(&[]);
    two.base.clone_from(&one.base);

    let write = |own: &str| {
        format!(
            "check mount mount -t ext4 /dev/vda /mnt
             echo content of {own} >/mnt/{own}
             dd if=/dev/urandom of=/mnt/big-{own} bs=64k count=32 conv=fsync 2>/dev/null
             result files $(cd /mnt && echo *)
             check umount umount /mnt
             check fsck e2fsck -fn /dev/vda"
        )
    };
    let (daemon_one, daemon_two) = (one.serve(&[]), two.serve(&[]));
    let guest_one = Guest::new(kernel, &write("one")).disk(&daemon_one).boot(&one.dir, "one");
    let guest_two = Guest::new(kernel, &write("two")).disk(&daemon_two).boot(&two.dir, "two");
    for console in [guest_one.finish(), guest_two.finish()] {
        console.expect_ok(&["mount", "umount", "fsck"]);
    }

    let read = "
        check mount mount -t ext4 -o ro /dev/vda /mnt
        result files $(cd /mnt && echo *)
        umount /mnt
    ";
    // The second of them on a restarted daemon.
    daemon_two.stop();
    let daemon_two = two.serve(&[]);
    let again_one = Guest::new(kernel, read).disk(&daemon_one).run(&one.dir, "one-again");
    let again_two = Guest::new(kernel, read).disk(&daemon_two).run(&two.dir, "two-again");
    again_one.expect("files", "big-one common lost+found one");
    again_two.expect("files", "big-two common lost+found two");
    daemon_one.stop();
    daemon_two.stop();
    base.check(&one);
}

#[test]
fn two_guests_on_one_base_in_qemu() {
    two_guests(Kernel::Qemu);
}

#[test]
fn two_guests_on_one_base_in_uml() {
    two_guests(Kernel::Uml);
}

/// What the guest's kernel makes of the features: the serial number, the limits, and a write cache
/// that can be switched off and on.
#[test]
fn features_in_qemu() {
    require!(Kernel::Qemu.available());
    let disk = CowDisk::over(&patterned(4 * MIB, 7));
    let script = "
        cd /sys/block/vda
        result serial \"$(cat serial)\"
        result cache-at-first \"$(cat queue/write_cache)\"
        echo 'write through' >cache_type
        result cache-off \"$(cat queue/write_cache)\"
        check write-through dd if=/dev/urandom of=/dev/vda bs=64k count=8 oflag=direct
        echo 'write back' >cache_type
        result cache-on \"$(cat queue/write_cache)\"
        check write-back dd if=/dev/urandom of=/dev/vda bs=64k count=8 seek=8 oflag=direct conv=fsync
        result blocks \"$(cat queue/logical_block_size) $(cat queue/physical_block_size)\"
        check discards test $(cat queue/discard_max_bytes) -gt 0
        check zeroes test $(cat queue/write_zeroes_max_bytes) -gt 0
        result digest $(digest /dev/vda)
    ";
    let console = disk.run(Guest::new(Kernel::Qemu, script), &["--serial=guest-disk-7"]);
    console.expect("serial", "guest-disk-7");
    console.expect("cache-at-first", "write back");
    console.expect("cache-off", "write through");
    console.expect("cache-on", "write back");
    console.expect("blocks", "512 4096");
    console.expect_ok(&["write-through", "write-back", "discards", "zeroes"]);
    console.expect("digest", &sha256(&disk.merged()));
}

/// A raw image, served as it is and named raw.
#[test]
fn raw_image_in_uml() {
    require!(Kernel::Uml.available());
    let disk = CowDisk::over(&patterned(4 * MIB, 8));
    let length = fs::metadata(&disk.base).expect("the image").size();
    let image = format!("--blk-file={}", disk.base.display());
    let daemon =
        system_tests::Backend::daemon(&disk.dir.path("socket"), &[image.as_str(), "--format=raw"]);
    let script = "
        check write dd if=/dev/urandom of=/dev/vda bs=4k count=100 seek=7 oflag=direct conv=fsync
        check discard blkdiscard -o 65536 -l 65536 /dev/vda
        result digest $(digest /dev/vda)
    ";
    let console = Guest::new(Kernel::Uml, script).disk(&daemon).run(&disk.dir, "guest");
    daemon.stop();
    console.expect_ok(&["write", "discard"]);
    console.expect("digest", &sha256(&disk.base));
    assert_eq!(fs::metadata(&disk.base).expect("the image").size(), length);
}
