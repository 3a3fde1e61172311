//! `cow export-delta` and `cow apply-delta`: there and back, and what is refused.

use std::fs;
use std::process::{Command, Stdio};

use crate::common::{Scratch, VECTOR_MTIME, base_image, set_mtime};
use block_io::{Disk, DiskOptions};
use cow_format::{Sector, SectorCount, SectorRange};

/// Changes the disk in a COW file.
fn change(scratch: &Scratch, name: &str, changes: &[(u64, u64, u8)]) {
    let disk = Disk::open_cow(&scratch.path(name), None, &DiskOptions::default()).unwrap();
    for (start, count, byte) in changes {
        let range = SectorRange::new(Sector::new(*start), SectorCount::new(*count)).unwrap();
        match byte {
            0 => disk.discard(range).unwrap(),
            byte => disk.write(range, &vec![*byte; usize::try_from(count * 512).unwrap()]).unwrap(),
        }
    }
    disk.close().unwrap();
}

#[test]
fn a_delta_makes_the_same_cow_file_elsewhere() {
    let scratch = Scratch::new();
    let base = base_image('B', 1000).repeat(10);
    for (format, size) in
        [("native", base.len()), ("uml", base.len()), ("native", 1_000_001), ("uml", 1_000_001)]
    {
        scratch.write("base.img", &base[..size]);
        scratch.cow_ok(&format!("create --force --format {format} -b base.img a.cow"));
        let last = size as u64 / 512 - 1;
        change(&scratch, "a.cow", &[(3, 2, 7), (100, 50, 0), (300, 1500, 9), (last, 1, 8)]);
        scratch.cow_ok("export-delta --force a.cow a.delta");
        assert!(fs::metadata(scratch.path("a.delta")).unwrap().len() < 2000, "it is compressed");
        fs::copy(scratch.path("base.img"), scratch.path("copy.img")).unwrap();
        set_mtime(&scratch.path("copy.img"), VECTOR_MTIME);
        scratch.cow_ok("apply-delta --force -b copy.img a.delta b.cow");
        scratch.cow_ok("compare a.cow b.cow");
        scratch.cow_ok("check b.cow");
        let present = |name: &str| scratch.json(&format!("info {name}"))["present-sectors"].clone();
        assert_eq!(present("a.cow"), present("b.cow"), "{format} {size}");
        scratch.cow_ok("merge --force a.cow a.img");
        scratch.cow_ok("merge --force b.cow b.img");
        assert_eq!(scratch.read("a.img"), scratch.read("b.img"), "{format} {size}");
    }
    // The last partial sector, as UML's kernel writes it.
    scratch.bases();
    scratch.vector("uml-odd");
    scratch.cow_ok("merge -b base-odd.img --in-place --yes uml-odd.cow");
    change(&scratch, "uml-odd.cow", &[(1953, 1, 5)]);
    scratch.cow_ok("export-delta --force uml-odd.cow a.delta");
    scratch.cow_ok("apply-delta --force -b base-odd.img a.delta b.cow");
    scratch.cow_ok("compare --strict uml-odd.cow b.cow");
}

#[test]
fn a_delta_since_a_file_of_the_chain_holds_all_that_came_after() {
    let scratch = Scratch::new();
    let base = base_image('B', 2000);
    scratch.write("base.img", &base);
    scratch.cow_ok("create -b base.img l0.cow");
    change(&scratch, "l0.cow", &[(0, 10, 1)]);
    scratch.cow_ok("snapshot l0.cow l1.cow");
    change(&scratch, "l1.cow", &[(5, 10, 2), (50, 5, 0)]);
    // Smaller and larger again: what was cut off must not come back.
    scratch.cow_ok("resize --shrink l1.cow 512000");
    scratch.cow_ok("snapshot l1.cow top.cow");
    scratch.cow_ok("resize top.cow 1024000");
    change(&scratch, "top.cow", &[(8, 3, 3)]);
    for (since, base_args) in
        [("base.img", "base.img"), ("l0.cow", "l0.cow -F native"), ("l1.cow", "l1.cow -F native")]
    {
        scratch.cow_ok(&format!("export-delta --force --since {since} top.cow d"));
        scratch.cow_ok(&format!("apply-delta --force -b {base_args} d new.cow"));
        scratch.cow_ok("compare --strict top.cow new.cow");
        scratch.cow_ok("check new.cow");
    }
    scratch.cow_fails("export-delta --since top.cow top.cow e", 1, &["top.cow", "not one of"]);
    scratch.cow_fails("export-delta --since nope top.cow e", 1, &["nope", "not one of"]);
    scratch.cow_fails("export-delta top.cow d", 1, &["d", "exists"]);
    scratch.cow_fails("export-delta --force top.cow base.img", 1, &["base.img", "same file"]);
    // Another layer than the one that it is over.
    scratch.cow_ok("create --size 1024000 x.cow");
    scratch.cow_ok("snapshot x.cow y.cow");
    scratch.cow_fails("apply-delta -b x.cow -F native d new2.cow", 1, &["x.cow", "UUID"]);
    assert!(!scratch.path("new2.cow").exists());
}

#[test]
fn it_goes_through_a_pipe() {
    let scratch = Scratch::new();
    scratch.cow_ok("create --size 3M a.cow");
    change(&scratch, "a.cow", &[(0, 4096, 4), (5000, 1000, 5)]);
    let cow = env!("CARGO_BIN_EXE_cow");
    let mut export = Command::new(cow);
    export.args(["export-delta", "a.cow", "-"]).current_dir(scratch.dir());
    let mut export = export.stdout(Stdio::piped()).spawn().unwrap();
    let mut apply = Command::new(cow);
    apply.args(["apply-delta", "-", "b.cow"]).current_dir(scratch.dir());
    let applied = apply.stdin(export.stdout.take().unwrap()).output().unwrap();
    assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    assert!(export.wait().unwrap().success());
    scratch.cow_ok("compare --strict a.cow b.cow");
    // A pipe with a name.
    let script = "mkfifo pipe && { \"$0\" export-delta a.cow - >pipe & exec \"$0\" apply-delta pipe c.cow; }";
    let run = scratch.run(Command::new("sh").args(["-c", script, cow]));
    assert_eq!(run.status, 0, "{}", run.stderr);
    scratch.cow_ok("compare --strict a.cow c.cow");
}

#[test]
fn a_wrong_base_and_a_broken_stream_leave_nothing() {
    let scratch = Scratch::new();
    let base = scratch.write("base.img", &base_image('B', 1000));
    scratch.cow_ok("create --digest -b base.img a.cow");
    change(&scratch, "a.cow", &[(3, 2, 7)]);
    scratch.cow_ok("export-delta a.cow with.delta");
    scratch.cow_ok("create --force -b base.img a.cow");
    change(&scratch, "a.cow", &[(3, 2, 7)]);
    scratch.cow_ok("export-delta a.cow without.delta");

    set_mtime(&base, VECTOR_MTIME + 1);
    scratch.cow_ok("apply-delta -b base.img with.delta b.cow");
    scratch.cow_fails("apply-delta -b base.img without.delta c.cow", 1, &["base.img", "--trust"]);
    let run = scratch.cow("apply-delta --trust -b base.img without.delta c.cow");
    assert_eq!((run.status, run.stderr.contains("warning")), (0, true), "{}", run.stderr);
    scratch.cow_ok("compare b.cow c.cow");

    scratch.write("other.img", &base_image('C', 1000));
    set_mtime(&scratch.path("other.img"), VECTOR_MTIME + 2);
    scratch.cow_fails("apply-delta -b other.img with.delta d.cow", 1, &["other.img", "digest"]);
    scratch.write("other.img", &base_image('B', 999));
    scratch.cow_fails("apply-delta -b other.img with.delta d.cow", 1, &["other.img", "size"]);
    scratch.cow_fails("apply-delta with.delta d.cow", 2, &["with.delta", "--base"]);
    scratch.cow_fails("apply-delta -b base.img base.img d.cow", 1, &["base.img", "not a delta"]);
    scratch.cow_fails("apply-delta -b base.img nope d.cow", 1, &["nope", "No such file"]);
    // A device is not even opened: some do harm then.
    scratch.cow_fails("apply-delta -b base.img /dev/null d.cow", 1, &["/dev/null", "special file"]);
    scratch.cow_fails("apply-delta -b base.img . d.cow", 1, &["directory"]);
    let whole = scratch.read("with.delta");
    for len in [100, 112, 120, whole.len() - 1] {
        scratch.write("cut.delta", &whole[..len]);
        scratch.cow_fails("apply-delta -b base.img cut.delta d.cow", 1, &["cut.delta"]);
    }
    let mut flipped = whole;
    flipped[40] ^= 1;
    scratch.write("cut.delta", &flipped);
    scratch.cow_fails("apply-delta -b base.img cut.delta d.cow", 1, &["cut.delta", "checksum"]);
    assert!(!scratch.path("d.cow").exists());
}
