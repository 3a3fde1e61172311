//! A guest is migrated from one QEMU to another, and its disk goes from one daemon to another.
//!
//! A guest under load seldom reads again what the daemon wrote into its memory while it moved, so a
//! daemon that forgot to mark that in the dirty log could pass the first test. The second checks
//! exactly this, and fails with such a daemon, as the third proves. That each kind of write is
//! marked the daemon's own tests prove (`crates/vhost-user-blk/tests/it/dirty_log.rs`).

use std::fs;
use std::process::Command;

use serde_json::json;
use system_tests::{
    Backend, CowDisk, Guest, Kernel, Running, compile_c, cow, patterned, require, run_ok,
    vhost_user_blk,
};

const MIB: usize = 1 << 20;

/// The daemon at the destination.
fn target_daemon(disk: &CowDisk, options: &[&str]) -> Backend {
    let spec = disk.spec();
    let args = [options, &["--incoming", &spec]].concat();
    Backend::daemon(&disk.dir.path("target"), &args)
}

/// Waits until the guest has written one line more that begins with `key`.
fn await_another(guest: &Running, key: &str) {
    let line = format!("@@{key}=");
    let seen = guest.output().matches(&line).count();
    guest.wait_for_times(&line, seen + 1);
}

/// fio writes and verifies, in rounds, in a file system, until it is stopped. One migration is
/// cancelled when the disk has already been released, the next succeeds; at least one whole round
/// comes before, between and after them.
#[test]
fn a_guest_moves_under_load_and_sees_nothing_of_it() {
    require!(Kernel::Qemu.available());
    let script = "
        check mkfs mkfs.ext4 -q -F /dev/vda
        check mount mount -t ext4 /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/kept bs=64k count=32 2>/dev/null
        sha256sum /mnt/kept >/tmp/sum
        (read line </dev/ttyS1; touch /tmp/stop) &
        round=0 failed=0
        while [ ! -e /tmp/stop ]; do
            fio --name=verify --directory=/mnt --size=2M --numjobs=2 --direct=1 --ioengine=libaio \
                --iodepth=16 --rw=randwrite --bsrange=4k-32k --verify=crc32c --verify_fatal=1 \
                --verify_backlog=64 --fsync=32 --group_reporting --minimal >/tmp/fio.log 2>&1 \
                || { failed=1; cat /tmp/fio.log; }
            round=$((round + 1))
            result round $round
        done
        result failed $failed
        check cached sha256sum -cs /tmp/sum
        check umount umount /mnt
        check fsck e2fsck -fn /dev/vda
        check remount mount -t ext4 -o ro /dev/vda /mnt
        check kept sha256sum -cs /tmp/sum
        umount /mnt
        dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|timeout|hung|not a head' || true
        result errors $(dmesg | grep -ciE 'i/o error|ext4-fs (error|warning)|hung|not a head')
    ";
    let disk = CowDisk::over(&patterned(64 * MIB, 7));
    let options = ["--num-queues=2"];
    let daemon = disk.serve(&options);
    let guest =
        || Guest::new(Kernel::Qemu, script).queues(2).with_fio().controlled().reconnecting();
    let source = guest().disk(&daemon).boot(&disk.dir, "source");
    source.wait_for("@@round=1");
    let target_daemon = target_daemon(&disk, &options);
    let target = |name: &str| {
        let target = guest().disk(&target_daemon).incoming(&disk.dir.path(name));
        let target = target.boot(&disk.dir, name);
        // It listens once it answers.
        target.monitor();
        target
    };

    let mut monitor = source.monitor();
    let capability = |on: bool| {
        let each = json!([{ "capability": "pause-before-switchover", "state": on }]);
        json!({ "capabilities": each })
    };
    monitor.run("migrate-set-capabilities", capability(true));
    let in_vain = target("first");
    monitor.migrate(&disk.dir.path("first"));
    monitor.await_status("pre-switchover");
    assert!(daemon.output().contains("disk closed"), "the disk was not let go");
    monitor.run("migrate_cancel", json!({}));
    monitor.await_status("cancelled");
    drop(in_vain);
    await_another(&source, "round");

    monitor.run("migrate-set-capabilities", capability(false));
    let target = target("second");
    monitor.migrate(&disk.dir.path("second"));
    let state = monitor.await_status("completed");
    println!("the guest stood still for {} ms", state["downtime"]);
    await_another(&target, "round");
    let before = source.output();
    drop((monitor, source));
    daemon.stop();
    target.tell("stop");
    let console = target.finish_after(&before);
    target_daemon.stop();
    console.expect("failed", "0");
    let all = ["mkfs", "mount", "cached", "umount", "fsck", "remount", "kept"];
    console.expect_ok(&all);
    console.expect("errors", "0");
    let mut check = cow();
    check.arg("check").arg(&disk.cow);
    run_ok(check);
    let mut info = cow();
    info.arg("info").arg(&disk.cow);
    let info = run_ok(info);
    assert!(info.contains("clean"), "{info}");
}

/// Of the buffer that [`HELD`] keeps, and of each of the two pieces of the disk that it reads.
const HELD_MIB: usize = 16;
const HELD: &str = include_str!("../c/held.c");
const UNLOGGED: &str = include_str!("../c/unlogged.c");

/// Slow enough that each pass over what has changed takes the guest some of its own time.
const SLOW: u64 = 16 << 20;

/// Migrates a guest with a buffer that only the daemon writes, and rewrites after it was sent.
/// Returns the number of its pages that are wrong at the destination.
fn wrong_pages_after_the_move(prepare: impl FnOnce(&CowDisk, &mut Command)) -> usize {
    let script = format!(
        "
        (while :; do dd if=/dev/urandom of=/tmp/noise bs=64k count=128 conv=notrunc 2>/dev/null; done) &
        held /dev/vda {HELD_MIB}
        kill $!
        "
    );
    let disk = CowDisk::over(&patterned(2 * HELD_MIB * MIB, 7));
    let program = disk.dir.path("held");
    compile_c(HELD, &["-static", "-O1"], &program);
    let program = fs::read(program).expect("the program");
    let mut command = vhost_user_blk();
    prepare(&disk, &mut command);
    let socket = disk.dir.path("socket");
    command.arg("--socket-path").arg(&socket).arg(disk.spec());
    let daemon = Backend::start("daemon at the source", command, &socket);
    let guest = || {
        let guest = Guest::new(Kernel::Qemu, &script).with_file("bin/held", program.clone());
        guest.controlled().reconnecting()
    };
    let source = guest().disk(&daemon).boot(&disk.dir, "source");
    source.wait_for("@@held=first");
    let target_daemon = target_daemon(&disk, &[]);
    let waiting = disk.dir.path("waiting");
    let target = guest().disk(&target_daemon).incoming(&waiting).boot(&disk.dir, "target");
    // It listens once it answers.
    target.monitor();
    let mut monitor = source.monitor();
    monitor.migrate_without_end(&waiting, SLOW);
    monitor.await_first_pass();
    source.tell("second");
    source.wait_for("@@held=second");
    monitor.let_migration_end();
    let state = monitor.await_status("completed");
    println!("{} passes", state["ram"]["dirty-sync-count"]);
    target.monitor().await_running();
    target.tell("compare");
    target.wait_for("@@wrong=");
    let all = HELD_MIB * MIB / 4096;
    assert_eq!(target.number("pages"), all);
    target.number("wrong")
}

#[test]
fn what_the_daemon_writes_into_memory_while_it_is_sent_arrives() {
    require!(Kernel::Qemu.available());
    assert_eq!(wrong_pages_after_the_move(|_, _| {}), 0);
}

/// The daemon is the same, with a log of its own that is never read.
#[test]
fn a_guest_sees_that_a_daemon_marks_nothing() {
    require!(Kernel::Qemu.available());
    let wrong = wrong_pages_after_the_move(|disk, command| {
        let library = disk.dir.path("unlogged.so");
        compile_c(UNLOGGED, &["-shared", "-fPIC"], &library);
        command.env("LD_PRELOAD", library);
    });
    println!("{wrong} pages are wrong");
    // The guest's kernel may move a page, and so write it itself.
    assert!(wrong > HELD_MIB * MIB / 4096 / 2, "{wrong} pages are wrong");
}
