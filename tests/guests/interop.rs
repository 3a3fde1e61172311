//! One file, several programs: this project's daemon and tool, UML's own ubd driver, `uml_moo` and
//! `uml_mkcow` take each other's COW files and see the same disk.
//!
//! The UML kernel's known faults are kept out of the comparison: its disk is read in single pages
//! past the page cache, and the bases are larger than 64 sectors.

use std::fs;
use std::path::Path;
use std::process::Command;

use system_tests::{
    Backend, Console, CowDisk, Guest, Kernel, available, cow, patterned, require, run, run_ok,
    sha256,
};

const MIB: usize = 1 << 20;

/// Writes through `$disk` that leave every mixture of COW and base sectors, a discard, and the
/// digest of the disk as read in single pages.
const WORK: &str = "
    for sector in 0 1 9 15 16 77 2049 4095; do
        dd if=/dev/urandom of=$disk bs=512 count=1 seek=$sector oflag=direct 2>/dev/null
    done
    check pages dd if=/dev/urandom of=$disk bs=4k count=300 seek=400 oflag=direct
    check discard blkdiscard -o 65536 -l 65536 $disk
    check sync sync
    result digest $(digest $disk 4k)
";

fn uml_programs() -> Result<(), String> {
    Kernel::Uml.available().and_then(|()| available(&["uml_moo", "uml_mkcow"]))
}

/// Boots a guest with the disk at the daemon.
fn under_daemon(kernel: Kernel, disk: &CowDisk, script: &str) -> Console {
    disk.run(Guest::new(kernel, &format!("disk=/dev/vda\n{script}")), &[])
}

/// Boots a guest with the disk at UML's own driver.
fn under_ubd(disk: &CowDisk, spec: &str, script: &str) -> Console {
    let script = format!("disk=/dev/ubda\n{script}");
    Guest::new(Kernel::Uml, &script).ubd(spec).run(&disk.dir, "ubd-guest")
}

fn create_uml_cow(disk: &CowDisk) {
    let mut create = cow();
    create.args(["create", "--format", "uml", "-b"]).args([&disk.base, &disk.cow]);
    run_ok(create);
}

fn uml_moo(disk: &CowDisk) -> String {
    let out = disk.dir.path("moo.img");
    let _ = fs::remove_file(&out);
    let mut moo = Command::new("uml_moo");
    moo.args([&disk.cow, &out]);
    run_ok(moo);
    sha256(&out)
}

/// The disk as every program but the guest sees it.
fn expect_digest(disk: &CowDisk, digest: &str) {
    assert_eq!(sha256(&disk.merged()), digest, "cow merge");
    assert_eq!(uml_moo(disk), digest, "uml_moo");
}

#[test]
fn a_cow_file_goes_round_daemon_and_ubd_driver() {
    require!(uml_programs());
    require!(Kernel::Qemu.available());
    let disk = CowDisk::over(&patterned(4 * MIB, 11));
    let base = sha256(&disk.base);
    create_uml_cow(&disk);

    let daemon_wrote = under_daemon(Kernel::Qemu, &disk, WORK);
    daemon_wrote.expect_ok(&["pages", "discard", "sync"]);
    expect_digest(&disk, daemon_wrote.get("digest"));

    let script = format!("result before $(digest $disk 4k)\n{WORK}");
    let ubd_wrote = under_ubd(&disk, &disk.spec(), &script);
    ubd_wrote.expect("before", daemon_wrote.get("digest"));
    ubd_wrote.expect_ok(&["pages", "discard", "sync"]);
    assert_ne!(ubd_wrote.get("digest"), daemon_wrote.get("digest"));
    expect_digest(&disk, ubd_wrote.get("digest"));

    let again = under_daemon(Kernel::Uml, &disk, &script);
    again.expect("before", ubd_wrote.get("digest"));
    expect_digest(&disk, again.get("digest"));
    // The COW file alone names its base.
    let alone =
        under_ubd(&disk, &disk.cow.display().to_string(), "result digest $(digest $disk 4k)");
    alone.expect("digest", again.get("digest"));
    assert_eq!(sha256(&disk.base), base, "the base has changed");
}

#[test]
fn the_daemon_opens_what_the_ubd_driver_created() {
    require!(uml_programs());
    let disk = CowDisk::over(&patterned(4 * MIB, 12));
    let ubd_wrote = under_ubd(&disk, &disk.spec(), WORK);
    ubd_wrote.expect_ok(&["pages", "discard", "sync"]);
    expect_digest(&disk, ubd_wrote.get("digest"));
    let daemon_read = under_daemon(Kernel::Uml, &disk, "result digest $(digest $disk)");
    daemon_read.expect("digest", ubd_wrote.get("digest"));
}

#[test]
fn files_of_uml_mkcow_are_opened() {
    require!(uml_programs());
    let disk = CowDisk::over(&patterned(4 * MIB, 13));
    let mut mkcow = Command::new("uml_mkcow");
    mkcow.args([&disk.cow, &disk.base]);
    run_ok(mkcow);
    let console =
        under_daemon(Kernel::Uml, &disk, &format!("result before $(digest $disk)\n{WORK}"));
    console.expect("before", &sha256(&disk.base));
    expect_digest(&disk, console.get("digest"));
}

#[test]
fn files_of_cow_create_are_those_of_uml_mkcow() {
    require!(uml_programs());
    for len in [1_000_001, 4 * MIB, 65 * 512] {
        let disk = CowDisk::over(&patterned(len, 14));
        create_uml_cow(&disk);
        let made = disk.dir.path("mkcow.cow");
        let mut mkcow = Command::new("uml_mkcow");
        mkcow.args([&made, &disk.base]);
        run_ok(mkcow);
        assert_eq!(sha256(&disk.cow), sha256(&made), "a base of {len} bytes");
    }
}

/// Merging in place, by one program and by the other.
#[test]
fn merging_in_place_gives_the_same_base() {
    require!(uml_programs());
    let disk = CowDisk::over(&patterned(4 * MIB, 15));
    create_uml_cow(&disk);
    let digest = under_daemon(Kernel::Uml, &disk, WORK).get("digest").to_owned();

    let modified = fs::metadata(&disk.base).and_then(|m| m.modified()).expect("the base's mtime");
    let content = fs::read(&disk.base).expect("the base");
    let copy = disk.dir.path("copy.cow");
    fs::copy(&disk.cow, &copy).expect("copying the COW file");
    let mut merge = cow();
    merge.args(["merge", "--in-place", "--yes"]).arg(&disk.cow);
    run_ok(merge);
    assert_eq!(sha256(&disk.base), digest, "cow merge --in-place");

    let restored = fs::File::create(&disk.base).expect("the base");
    std::io::Write::write_all(&mut &restored, &content).expect("restoring the base");
    restored.set_modified(modified).expect("restoring the base's mtime");
    let mut moo = Command::new("uml_moo");
    moo.arg("-d").arg(&copy);
    run_ok(moo);
    assert_eq!(sha256(&disk.base), digest, "uml_moo -d");
}

/// Who has the COW file open keeps the other out, either way round.
#[test]
fn daemon_and_ubd_driver_exclude_each_other() {
    require!(uml_programs());
    let disk = CowDisk::over(&patterned(4 * MIB, 16));
    create_uml_cow(&disk);
    let try_write = "
        if dd if=/dev/zero of=$disk bs=4k count=1 conv=fsync; then
            result write done
        else
            result write refused
        fi
    ";

    let daemon = disk.serve(&[]);
    under_ubd(&disk, &disk.spec(), try_write).expect("write", "refused");
    daemon.stop();
    assert_eq!(sha256(&disk.merged()), sha256(&disk.base), "the refused driver has written");

    let script = "exec 3<>/dev/ubda; result holds yes; sleep 1000";
    let holder = Guest::new(Kernel::Uml, script).ubd(&disk.spec()).boot(&disk.dir, "holder");
    holder.wait_for("@@holds=yes");
    let mut second = system_tests::vhost_user_blk();
    let socket = disk.dir.path("second-socket");
    second.arg("--socket-path").arg(&socket).arg(disk.spec());
    let refused = run(second);
    assert!(matches!(refused.code, Some(1 | 2)), "the daemon beside the driver: {refused:?}");
    assert!(names(&refused.output, &disk.cow), "the message names no file: {refused:?}");
    assert!(!socket.exists(), "the refused daemon has left its socket");

    drop(holder);
    Backend::daemon(&socket, &[disk.spec()]).stop();
    under_ubd(&disk, &disk.spec(), try_write).expect("write", "done");
}

fn names(message: &str, path: &Path) -> bool {
    message.contains(&path.display().to_string())
}
