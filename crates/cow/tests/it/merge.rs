//! `cow create` and `cow merge` to a new file: names, space, locks, a full disk.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use crate::common::{Scratch, allocated, base_image, patch, set_mtime};
use block_io::Host;
use block_io::storage::{Access, Env, LockKind, Storage};

/// A base with zeros in it and a COW file over it that has zeros of its own.
fn with_zeros(scratch: &Scratch) {
    let mut base = base_image('B', 4096);
    base[1 << 20..].fill(0);
    scratch.write("base.img", &base);
    scratch.cow_ok("create --format uml -b base.img a.cow");
}

#[test]
fn the_output_is_never_an_input() {
    let scratch = Scratch::new();
    with_zeros(&scratch);
    fs::hard_link(scratch.path("base.img"), scratch.path("hard.img")).unwrap();
    symlink("base.img", scratch.path("soft.img")).unwrap();
    symlink("a.cow", scratch.path("soft.cow")).unwrap();
    let before = (scratch.read("base.img"), scratch.read("a.cow"));
    for out in ["base.img", "a.cow", "hard.img", "soft.img", "soft.cow", "./base.img"] {
        for force in ["", "--force "] {
            scratch.cow_fails(&format!("merge {force}a.cow {out}"), 1, &[out, "same file"]);
        }
    }
    scratch.cow_fails(
        "create --force --format uml -b base.img hard.img",
        1,
        &["hard.img", "same file"],
    );
    assert_eq!((scratch.read("base.img"), scratch.read("a.cow")), before);
    scratch.cow_ok("merge a.cow out.img");
    assert_eq!(scratch.read("out.img"), scratch.read("base.img"));
}

#[test]
fn an_output_that_exists_needs_force() {
    let scratch = Scratch::new();
    with_zeros(&scratch);
    fs::write(scratch.path("out.img"), "precious").unwrap();
    scratch.cow_fails("merge a.cow out.img", 1, &["out.img", "exists", "--force"]);
    scratch.cow_fails(
        "create --format uml -b base.img out.img",
        1,
        &["out.img", "exists", "--force"],
    );
    scratch.cow_fails(
        "create --format raw --size 1M out.img",
        1,
        &["out.img", "exists", "--force"],
    );
    assert_eq!(scratch.read("out.img"), b"precious");

    symlink("out.img", scratch.path("link.img")).unwrap();
    scratch.cow_ok("merge --force a.cow link.img");
    assert_eq!(scratch.read("out.img"), scratch.read("base.img"));
    assert!(fs::symlink_metadata(scratch.path("link.img")).unwrap().is_symlink());

    symlink("nowhere", scratch.path("dangling")).unwrap();
    scratch.cow_fails("merge --force a.cow dangling", 1, &["dangling", "exists"]);
    fs::create_dir(scratch.path("dir")).unwrap();
    scratch.cow_fails("merge --force a.cow dir", 1, &["dir", "directory"]);
    scratch.cow_fails("merge --force a.cow ..", 1, &["..", "directory"]);
    scratch.cow_fails("merge --force a.cow /dev/null", 1, &["/dev/null", "special file"]);
    scratch.cow_fails("merge a.cow no/such/out.img", 1, &["no/such/out.img", "No such file"]);
    assert_eq!(scratch.names(), ["a.cow", "base.img", "dangling", "dir", "link.img", "out.img"]);
}

#[test]
fn zeros_take_no_space() {
    let scratch = Scratch::new();
    with_zeros(&scratch);
    // Sectors of the COW file that are present and zero: over data of the base, and over zeros.
    let data = 12288;
    patch(&scratch.path("a.cow"), data, &[0; 65536]);
    patch(&scratch.path("a.cow"), data + 65536, b"new");
    patch(&scratch.path("a.cow"), 8192, &[0xff; 17]);
    scratch.cow_ok("merge a.cow out.img");
    let mut expected = scratch.read("base.img");
    expected[..65536].fill(0);
    expected[65536..65536 + 4096].fill(0);
    expected[65536..65539].copy_from_slice(b"new");
    assert_eq!(scratch.read("out.img"), expected);
    // A file system may need a block or two to keep its books.
    assert!(allocated(&scratch.path("out.img")) < 1 << 20);
    assert!(allocated(&scratch.path("base.img")) >= 2 << 20);
}

#[test]
fn raw_images_are_holes_of_the_size_asked_for() {
    let scratch = Scratch::new();
    scratch.cow_ok("create --format raw --size 1.5G disk.img");
    assert_eq!(fs::metadata(scratch.path("disk.img")).unwrap().len(), 3 << 29);
    assert_eq!(allocated(&scratch.path("disk.img")), 0);
    scratch.cow_ok("--quiet create --force --format raw --size 512 disk.img");
    assert_eq!(fs::metadata(scratch.path("disk.img")).unwrap().len(), 512);
}

#[test]
fn wrong_command_lines_end_with_2() {
    let scratch = Scratch::new();
    for (args, word) in [
        ("", "Usage"),
        ("frobnicate", "frobnicate"),
        ("create x", "SIZE"),
        ("create --format uml x", "SIZE"),
        ("create -F native --size 1M x", "--base"),
        ("create --format raw -b base.img x", "raw"),
        ("create --format raw x", "SIZE"),
        ("create --format raw --size 1Q x", "1Q"),
        ("create --format raw --size -5 x", "-5"),
        ("create --format raw --size 9E x", "8 EiB"),
        ("info --output=xml x", "xml"),
        ("merge a.cow", "OUT"),
        ("merge --no-such-option a.cow out", "--no-such-option"),
    ] {
        let run = scratch.cow(args);
        assert_eq!(run.status, 2, "cow {args}: {}", run.stderr);
        assert!(run.stderr.contains(word), "cow {args}: {}", run.stderr);
    }
    assert_eq!(scratch.names(), [""; 0]);
}

#[test]
fn a_file_in_use_is_refused() {
    let scratch = Scratch::new();
    with_zeros(&scratch);
    scratch.cow_ok("create --format uml -b base.img out.cow");
    let hold = |name: &str, access, kind| {
        let file = Host.open(&scratch.path(name), access).unwrap();
        // Between fork and exec the child of another test has the last lock's description for a
        // moment.
        let mut tries = 0..1_000_000;
        while let Err(err) = file.try_lock(kind) {
            assert!(tries.next().is_some(), "{name}: {err}");
            std::thread::yield_now();
        }
        file
    };
    let daemon = hold("a.cow", Access::ReadWrite, LockKind::Exclusive);
    scratch.cow_fails("merge a.cow out.img", 1, &["a.cow", "in use"]);
    scratch.cow_fails("merge --force out.cow a.cow", 1, &["a.cow", "in use"]);
    drop(daemon);
    let reader = hold("base.img", Access::Read, LockKind::Shared);
    scratch.cow_ok("merge a.cow out.img");
    scratch.cow_fails("create --force --format raw --size 1M base.img", 1, &["base.img", "in use"]);
    drop(reader);
    let writer = hold("base.img", Access::ReadWrite, LockKind::Exclusive);
    scratch.cow_fails("merge a.cow other.img", 1, &["base.img", "in use"]);
    drop(writer);
}

/// Where a file system can, the merged image shares the space of what it was made of.
#[test]
fn what_can_share_space_does() {
    for (mkfs, options) in [("mkfs.xfs", &["-q", "-m", "reflink=1"][..]), ("mkfs.btrfs", &["-q"])] {
        if crate::common::missing(mkfs) {
            continue;
        }
        let scratch = Scratch::new();
        scratch.run(Command::new("truncate").args(["-s", "512M", "fs"]));
        let made = scratch.run(Command::new(mkfs).args(options).arg("fs"));
        assert_eq!(made.status, 0, "{}", made.stderr);
        fs::create_dir(scratch.path("m")).unwrap();
        let mounted = scratch.run(Command::new("mount").args(["-o", "loop", "fs", "m"]));
        if mounted.status != 0 {
            println!("skipped: cannot mount what {mkfs} made: {}", mounted.stderr);
            continue;
        }
        let base = base_image('B', 1000).repeat(64);
        scratch.write("m/base.img", &base);
        scratch.cow_ok("create -b m/base.img m/a.cow");
        let data = fs::metadata(scratch.path("m/a.cow")).unwrap().len() - base.len() as u64;
        // 1 MiB of its own, 512 bytes of its own, and a piece that begins within a block.
        patch(&scratch.path("m/a.cow"), data + (4 << 20), &vec![7; 1 << 20]);
        patch(&scratch.path("m/a.cow"), data + 512, &[8; 512]);
        patch(&scratch.path("m/a.cow"), 8192, &[0b10]);
        patch(&scratch.path("m/a.cow"), 8192 + 1024, &[0xff; 256]);
        scratch.run(Command::new("sync").args(["-f", "m"]));
        let used = |scratch: &Scratch| {
            let run = scratch.run(Command::new("df").args(["--output=used", "-B1", "m"]));
            run.stdout.lines().nth(1).unwrap().trim().parse::<u64>().unwrap()
        };
        let before = used(&scratch);
        let merged = scratch.cow("merge m/a.cow m/out.img");
        let (out, grown) =
            (fs::read(scratch.path("m/out.img")), used(&scratch).saturating_sub(before));
        let unmounted = scratch.run(Command::new("umount").arg("m"));
        assert_eq!(unmounted.status, 0, "{}", unmounted.stderr);
        assert_eq!(merged.status, 0, "{mkfs}: {}", merged.stderr);
        let mut expected = base.clone();
        expected[512..1024].fill(8);
        expected[4 << 20..5 << 20].fill(7);
        assert_eq!(out.unwrap(), expected, "{mkfs}");
        assert!(grown < 8 << 20, "{mkfs}: {grown} of {} bytes were allocated again", base.len());
    }
}

#[test]
fn a_full_disk_leaves_nothing() {
    let scratch = Scratch::new();
    let base = scratch.write("base.img", &base_image('B', 4096));
    scratch.cow_ok("create --format uml -b base.img a.cow");
    let small = scratch.path("small");
    fs::create_dir(&small).unwrap();
    let mounted =
        scratch.run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none", "small"]));
    if mounted.status != 0 {
        println!("skipped: cannot mount a tmpfs: {}", mounted.stderr);
        return;
    }
    let run = scratch.cow("merge a.cow small/out.img");
    let left = fs::read_dir(&small).unwrap().count();
    let unmounted = scratch.run(Command::new("umount").arg("small"));
    assert_eq!((run.status, left), (1, 0), "{}", run.stderr);
    assert!(
        run.stderr.contains("small/out.img") && run.stderr.contains("No space left"),
        "{}",
        run.stderr
    );
    assert_eq!(unmounted.status, 0, "{}", unmounted.stderr);
    set_mtime(&base, crate::common::VECTOR_MTIME);
    scratch.cow_ok("merge a.cow out.img");
}
