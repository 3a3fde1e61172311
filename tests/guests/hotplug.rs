//! Memory and disks that come and go while the guest is at work.

use serde_json::json;
use system_tests::{Belongings, CowDisk, Guest, Kernel, Running, patterned, require};

const MIB: usize = 1 << 20;

/// How often memory comes and goes.
const DIMMS: usize = 10;
/// How often a disk does.
const DISKS: usize = 20;

/// Waits until the guest has begun and ended one round more.
fn await_whole_round(guest: &Running) {
    let seen = guest.output().matches("@@round=").count();
    guest.wait_for_times("@@round=", seen + 2);
}

/// fio writes and verifies in rounds while memory is added, used and taken away. The kernel prefers
/// memory that can be taken away for what programs use, and so for fio's buffers.
#[test]
fn memory_comes_and_goes_under_load() {
    require!(Kernel::Qemu.available());
    let script = "
        (read line </dev/ttyS1; touch /tmp/stop) &
        round=0 failed=0
        while [ ! -e /tmp/stop ]; do
            fio --name=verify --filename=/dev/vda --size=2M --direct=1 --ioengine=libaio \
                --iodepth=16 --rw=randwrite --bsrange=4k-32k --verify=crc32c --verify_fatal=1 \
                --minimal >/tmp/fio.log 2>&1 || { failed=1; cat /tmp/fio.log; }
            round=$((round + 1))
            result round $round
        done
        result failed $failed
        result errors $(dmesg | grep -ciE 'i/o error|hung|not a head')
    ";
    let disk = CowDisk::over(&patterned(8 * MIB, 1));
    let daemon = disk.serve(&["--num-queues=2"]);
    let guest = Guest::new(Kernel::Qemu, script).queues(2).with_fio().controlled();
    let guest = guest.with_memory_slots().disk(&daemon).boot(&disk.dir, "guest");
    guest.wait_for("@@round=1");
    let before = daemon.belongings();
    assert!(before.memory > 0, "{before:?}");
    let mut monitor = guest.monitor();
    for _ in 0..DIMMS {
        let size = 128 * MIB;
        let memory = json!({
            "qom-type": "memory-backend-memfd", "id": "more", "size": size, "share": true,
        });
        monitor.run("object-add", memory);
        let dimm = json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "more" });
        monitor.run("device_add", dimm);
        // The file may stay open beside its mapping.
        let with_dimm = daemon.belongings();
        assert_eq!(with_dimm.memory, before.memory + 1, "the daemon has not got the memory");
        await_whole_round(&guest);
        monitor.unplug("dimm");
        monitor.run_in_the_end("object-del", json!({ "id": "more" }));
        daemon.wait_for_belongings(before);
    }
    guest.tell("stop");
    let console = guest.finish();
    console.expect("failed", "0");
    console.expect("errors", "0");
    let log = daemon.stop();
    assert!(!log.contains("WARN"), "{log}");
}

/// A disk is plugged, written and read, and unplugged during that. The guest's requests fail then,
/// as those to any disk that is gone; the daemon loses track of nothing and serves the next time.
#[test]
fn a_disk_comes_and_goes_under_load() {
    require!(Kernel::Qemu.available());
    let script = format!(
        "
        for round in $(seq {DISKS}); do
            result wants $round
            while [ ! -b /dev/vdb ]; do sleep 0.05; done
            dd if=/dev/urandom of=/tmp/data bs=64k count=8 2>/dev/null
            check write$round dd if=/tmp/data of=/dev/vdb bs=512k iflag=fullblock oflag=direct
            dd if=/dev/vdb of=/tmp/found bs=512k count=1 iflag=direct 2>/dev/null
            check same$round cmp /tmp/data /tmp/found
            at_rest=$(cat /sys/block/vdb/stat)
            # It gets errors in the end.
            fio --name=load --filename=/dev/vdb --allow_file_create=0 --offset=1M --size=4M \
                --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw --bsrange=4k-32k \
                --time_based --runtime=1000 >/dev/null 2>&1 &
            while [ \"$(cat /sys/block/vdb/stat)\" = \"$at_rest\" ]; do sleep 0.05; done
            result load $round
            wait
            while [ -b /dev/vdb ]; do sleep 0.05; done
        done
        "
    );
    let first = CowDisk::over(&patterned(MIB, 2));
    let disk = CowDisk::over(&patterned(8 * MIB, 3));
    let options = ["--num-queues=2"];
    let (first_daemon, daemon) = (first.serve(&options), disk.serve(&options));
    // Its socket is there before its disk is open.
    daemon.wait_for("listening");
    let without_frontend = daemon.belongings();
    // Of its root bus a guest of this machine gives a device back when it is asked.
    let guest = Guest::new(Kernel::Qemu, &script).queues(2).with_fio().controlled().machine("pc");
    let guest = guest.disk(&first_daemon).boot(&first.dir, "guest");
    let mut monitor = guest.monitor();
    let mut connected: Option<Belongings> = None;
    for round in 1..=DISKS {
        guest.wait_for(&format!("@@wants={round}"));
        let path = daemon.socket().to_str().expect("a path of text");
        let address = json!({ "type": "unix", "data": { "path": path } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        monitor.run("chardev-add", json!({ "id": "plug", "backend": backend }));
        // Without MSI-X: with it QEMU 10.0 under TCG failed an assertion of its own (hw/pci/msix.c)
        // in one of some forty times that a device was plugged.
        let device = json!({
            "driver": "vhost-user-blk-pci", "id": "disk", "chardev": "plug", "num-queues": 2,
            "vectors": 0,
        });
        monitor.run("device_add", device);
        guest.wait_for(&format!("@@load={round}"));
        let now = daemon.belongings();
        assert_eq!(*connected.get_or_insert(now), now, "round {round}");
        monitor.unplug("disk");
        monitor.run_in_the_end("chardev-remove", json!({ "id": "plug" }));
        daemon.wait_for_belongings(without_frontend);
    }
    let console = guest.finish();
    for round in 1..=DISKS {
        console.expect_ok(&[&format!("write{round}"), &format!("same{round}")]);
    }
    first_daemon.stop();
    let log = daemon.stop();
    assert!(!log.contains("WARN"), "{log}");
}
