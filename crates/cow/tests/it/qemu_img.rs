//! Commands that qemu-img has as well, beside it on the same content: the same disks, facts and
//! exit statuses.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use crate::common::{Scratch, allocated, base_image, missing};
use serde_json::Value;

fn qemu_img_status(scratch: &Scratch, args: &str) -> (i32, String) {
    let run = scratch.run(Command::new("qemu-img").args(args.split_whitespace()));
    (run.status, run.stdout)
}

fn qemu_img(scratch: &Scratch, args: &str) -> String {
    let run = scratch.run(Command::new("qemu-img").args(args.split_whitespace()));
    assert_eq!(run.status, 0, "qemu-img {args}: {}", run.stderr);
    run.stdout
}

fn qemu_io(scratch: &Scratch, file: &str, command: &str) {
    let run = scratch.run(
        Command::new("qemu-io")
            .args(["-f", file.rsplit('.').next().unwrap(), "-c"])
            .arg(command)
            .arg(file),
    );
    assert_eq!(run.status, 0, "qemu-io {command}: {}{}", run.stdout, run.stderr);
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// A raw image with data, a hole in the middle and at the end, and stored zeros.
fn holey(scratch: &Scratch, name: &str) -> Vec<u8> {
    let mut bytes = base_image('B', 1000).repeat(20);
    bytes.truncate(8 << 20);
    bytes[1 << 20..3 << 20].fill(0);
    bytes[7 << 20..].fill(0);
    scratch.write("solid", &bytes);
    qemu_img(scratch, &format!("convert -f raw -O raw -S 4k solid {name}"));
    std::fs::remove_file(scratch.path("solid")).unwrap();
    bytes
}

#[test]
fn info_measure_and_map_say_the_same() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    holey(&scratch, "a.raw");
    let theirs = json(&qemu_img(&scratch, "info -f raw --output=json a.raw"));
    let ours = scratch.json("info a.raw");
    for key in ["filename", "format", "virtual-size", "actual-size"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    let theirs = json(&qemu_img(&scratch, "measure -f raw -O raw --output=json a.raw"));
    let ours = scratch.json("measure -f raw a.raw");
    // To qemu-img a raw image has no holes.
    assert_eq!(ours["fully-allocated"], theirs["fully-allocated"]);
    // A disk that stands alone has the same parts as the raw image that it came from.
    scratch.cow_ok("convert -f raw a.raw a.cow");
    let parts = |text: &str| -> Vec<(u64, u64, bool)> {
        let parts = json(text);
        let number = |part: &Value, key: &str| part[key].as_u64().unwrap();
        parts
            .as_array()
            .unwrap()
            .iter()
            .map(|part| (number(part, "start"), number(part, "length"), part["data"] == true))
            .collect()
    };
    let theirs = parts(&qemu_img(&scratch, "map -f raw --output=json a.raw"));
    assert_eq!(theirs.len(), 4, "{theirs:?}");
    assert_eq!(parts(&scratch.cow_ok("map --output=json a.cow")), theirs);
    // So has what it is in qcow2, whatever wrote that.
    for maker in ["qemu-img", "cow"] {
        match maker {
            "cow" => _ = scratch.cow_ok("convert -f raw -O qcow2 a.raw a.qcow2"),
            _ => _ = qemu_img(&scratch, "convert -f raw -O qcow2 a.raw a.qcow2"),
        }
        assert_eq!(parts(&qemu_img(&scratch, "map -f qcow2 --output=json a.qcow2")), theirs);
        let ours = scratch.json("measure -f qcow2 a.qcow2");
        assert_eq!(
            ours["required"],
            theirs.iter().filter(|part| part.2).map(|part| part.1).sum::<u64>()
        );
        std::fs::remove_file(scratch.path("a.qcow2")).unwrap();
    }
}

#[test]
fn create_takes_the_same_command_line() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("base.raw", &base_image('B', 2048));
    for size in ["1000000000", "1.5G", "0.5K", "2T"] {
        qemu_img(&scratch, &format!("create -q -f qcow2 a.qcow2 {size}"));
        scratch.cow_ok(&format!("create --force a.cow {size}"));
        let theirs = json(&qemu_img(&scratch, "info --output=json a.qcow2"));
        assert_eq!(scratch.json("info a.cow")["virtual-size"], theirs["virtual-size"], "{size}");
    }
    qemu_img(&scratch, "create -q -f qcow2 -b base.raw -F raw o.qcow2 3M");
    scratch.cow_ok("create -b base.raw -F raw o.cow 3M");
    scratch.cow_ok("compare --backing-dir=. --strict -F qcow2 o.cow o.qcow2");
    for size in ["", "x", "1Q", "-5", "1.5", "0x", "9E", "1e3", "K"] {
        let theirs =
            scratch.run(Command::new("qemu-img").args(["create", "-f", "raw", "bad", size]));
        let ours = scratch.cow_args(["create", "-f", "raw", "bad", size]);
        assert_ne!(theirs.status, 0, "{size}");
        assert_eq!(ours.status, 2, "{size}: {}", ours.stderr);
        assert!(!scratch.path("bad").exists(), "{size}");
    }
    // A qcow2 image is no base, and hardly meant to be one byte by byte.
    scratch.cow_fails("create -b a.qcow2 b.cow", 2, &["a.qcow2", "qcow2", "convert", "-F raw"]);
    scratch.cow_ok("create -F raw -b a.qcow2 b.cow");
    assert_eq!(scratch.json("info a.qcow2")["looks-like"], "qcow2");
    assert_eq!(scratch.json("info base.raw")["looks-like"], Value::Null);
}

#[test]
fn compare_and_check_end_the_same() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let mut bytes = holey(&scratch, "a.raw");
    let statuses = |args: &str| {
        let run = scratch.cow(&format!("compare {args}"));
        (run.status, qemu_img_status(&scratch, &format!("compare {args}")).0)
    };
    for (change, size, args) in [
        (None, 8 << 20, "-f raw -F raw a.raw b.raw"),
        (None, 9 << 20, "-f raw -F raw a.raw b.raw"),
        (None, 9 << 20, "-s -f raw -F raw a.raw b.raw"),
        (Some(8_388_607), 8 << 20, "-f raw -F raw a.raw b.raw"),
        (Some(8_388_609), 9 << 20, "-f raw -F raw a.raw b.raw"),
        (Some(0), 8 << 20, "-q -f raw -F raw a.raw b.raw"),
        (None, 8 << 20, "-f raw -F raw a.raw nope.raw"),
    ] {
        bytes.resize(size, 0);
        let mut other = bytes.clone();
        if let Some(at) = change {
            other[at] ^= 1;
        }
        scratch.write("b.raw", &other);
        let (ours, theirs) = statuses(args);
        assert_eq!(ours, theirs, "{change:?} {size} {args}");
    }
    bytes[0] ^= 1;
    bytes.truncate(8 << 20);
    scratch.write("b.raw", &bytes);
    assert_eq!(scratch.cow("compare -q -f raw -F raw a.raw b.raw").stdout, "");
    let run = scratch.cow("compare --output=json -f raw -F raw a.raw b.raw");
    assert_eq!(json(&run.stdout), serde_json::json!({"difference": "content", "offset": 0}));
    let run = scratch.cow("compare --output=json -f raw -F raw a.raw a.raw");
    assert_eq!(json(&run.stdout), serde_json::json!({"difference": "none"}));

    // Sound, leaking, corrupt: a cluster that nothing uses, a block without a bit; a reference to
    // nowhere.
    scratch.cow_ok("create a.cow 8M");
    qemu_img(&scratch, "create -q -f qcow2 a.qcow2 8M");
    let check = |scratch: &Scratch| {
        let theirs = qemu_img_status(scratch, "check -f qcow2 a.qcow2").0;
        (scratch.cow("check a.cow").status, theirs)
    };
    assert_eq!(check(&scratch), (0, 0));
    let data = std::fs::metadata(scratch.path("a.cow")).unwrap().len() - (8 << 20);
    crate::common::patch(&scratch.path("a.cow"), data, &[7; 4096]);
    // The refcount block of a new image is its third cluster: number 4 is a new one that nothing
    // uses.
    crate::common::patch(&scratch.path("a.qcow2"), 4 << 16, &[7; 65536]);
    crate::common::patch(&scratch.path("a.qcow2"), (2 << 16) + 8, &[0, 1]);
    assert_eq!(check(&scratch), (3, 3));
    crate::common::patch(&scratch.path("a.cow"), 100, b"rot");
    // The first entry of the L1 table: a cluster past the end.
    crate::common::patch(&scratch.path("a.qcow2"), 3 << 16, &[0x80, 0, 0, 0, 0x7f, 0, 0, 0]);
    assert_eq!(check(&scratch), (2, 2));
    assert_eq!(scratch.cow("check nope.cow").status, 1);
    assert_eq!(qemu_img_status(&scratch, "check -f qcow2 nope.qcow2").0, 1);
}

#[test]
fn resize_rebase_and_commit_leave_the_same_disk() {
    if missing("qemu-img") || missing("qemu-io") {
        return;
    }
    let scratch = Scratch::new();
    let base = holey(&scratch, "base.raw");
    let mut other = base.clone();
    other[512..70_000].fill(9);
    other[(7 << 20) + 100..(7 << 20) + 5000].fill(8);
    other[5 << 20..6 << 20].fill(0);
    scratch.write("other.raw", &other);
    scratch.cow_ok("create -b base.raw a.cow");
    qemu_img(&scratch, "create -q -f qcow2 -b base.raw -F raw a.qcow2");
    qemu_io(&scratch, "a.qcow2", "write -P 5 4096 8192");
    qemu_io(&scratch, "a.qcow2", "write -z 65536 65536");
    let mut changed = base.clone();
    changed[4096..12288].fill(5);
    changed[65536..131_072].fill(0);
    scratch.write("changed.raw", &changed);
    scratch.cow_ok("convert --force -f raw -b base.raw changed.raw a.cow");
    let same = |what: &str| {
        let run = scratch.cow("compare --backing-dir=. --strict -F qcow2 a.cow a.qcow2");
        assert_eq!(run.status, 0, "{what}: {}{}", run.stdout, run.stderr);
        scratch.cow_ok("check a.cow");
    };
    same("as made");
    let both = |ours: &str, theirs: &str| {
        scratch.cow_ok(ours);
        qemu_img(&scratch, theirs);
    };
    both("resize a.cow +1M", "resize -q -f qcow2 a.qcow2 +1M");
    same("grown");
    both("resize --shrink a.cow 7M", "resize -q -f qcow2 --shrink a.qcow2 7M");
    same("shrunk");
    for args in ["resize a.cow 6M", "resize --shrink a.cow -9M"] {
        assert_ne!(scratch.cow(args).status, 0);
        assert_ne!(qemu_img_status(&scratch, &args.replace("cow", "qcow2")).0, 0, "{args}");
    }
    both("resize a.cow 8M", "resize -q -f qcow2 a.qcow2 8M");
    same("grown again");
    both("rebase -F raw -b other.raw a.cow", "rebase -q -f qcow2 -F raw -b other.raw a.qcow2");
    same("safely rebased");
    both("rebase -u -F raw -b base.raw a.cow", "rebase -u -q -f qcow2 -F raw -b base.raw a.qcow2");
    // What is the same in both bases was not copied, and now reads as that: but zeros over a hole
    // are.
    same("its reference changed");
    std::fs::copy(scratch.path("base.raw"), scratch.path("theirs.raw")).unwrap();
    qemu_img(&scratch, "rebase -u -q -f qcow2 -F raw -b theirs.raw a.qcow2");
    both("commit --in-place --yes a.cow", "commit -q -f qcow2 a.qcow2");
    same("committed");
    assert_eq!(scratch.read("base.raw"), scratch.read("theirs.raw"));
    scratch.cow_ok("rebase --base= a.cow");
    let alone = ["rebase", "-q", "-f", "qcow2", "-b", "", "a.qcow2"];
    assert_eq!(scratch.run(Command::new("qemu-img").args(alone)).status, 0);
    same("alone");
}

#[test]
fn zeros_are_found_or_kept_as_asked() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let mut bytes = base_image('B', 1000).repeat(20);
    bytes.truncate(8 << 20);
    bytes[1 << 20..5 << 20].fill(0);
    scratch.write("a.raw", &bytes);
    scratch.write("base.raw", &base_image('C', 1000).repeat(20)[..8 << 20]);
    scratch.cow_ok("convert --detect-zeroes=off -f raw -b base.raw a.raw a.cow");
    for (ours, theirs, holes) in [("on", "4k", true), ("off", "0", false)] {
        qemu_img(&scratch, &format!("convert -f raw -O raw -S {theirs} a.raw theirs.raw"));
        for args in [
            "convert -f raw -O raw a.raw out",
            "convert -f raw a.raw out",
            "convert -f raw -b base.raw a.raw out",
            "merge a.cow out",
        ] {
            let (command, rest) = args.split_once(' ').unwrap();
            scratch.cow_ok(&format!("{command} --force --detect-zeroes={ours} {rest}"));
            let found = allocated(&scratch.path("out")) < 5 << 20;
            assert_eq!(found, holes, "{ours} {args}");
        }
        assert_eq!(allocated(&scratch.path("theirs.raw")) < 5 << 20, holes);
        assert_eq!(scratch.read("out"), bytes);
    }
    scratch.cow_ok("merge --detect-zeroes=off --in-place --yes a.cow");
    assert!(allocated(&scratch.path("base.raw")) >= 8 << 20);
    assert_eq!(scratch.read("base.raw"), bytes);
}

#[test]
fn what_a_qcow2_image_can_have_is_read_or_refused() {
    if missing("qemu-img") || missing("qemu-io") {
        return;
    }
    let scratch = Scratch::new();
    let bytes = holey(&scratch, "a.raw");
    for options in [
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=4k,refcount_bits=1",
        "extended_l2=on",
        "compression_type=zstd",
        "data_file=a.data",
        "data_file=a.data,data_file_raw=on",
    ] {
        qemu_img(&scratch, &format!("convert -f raw -O qcow2 -o {options} a.raw a.qcow2"));
        scratch.cow_ok("compare --backing-dir=. --strict -f qcow2 -F raw a.qcow2 a.raw");
        scratch.cow_ok("convert --backing-dir=. --force -f qcow2 -O raw a.qcow2 b.raw");
        assert_eq!(scratch.read("b.raw"), bytes, "{options}");
    }
    // Its data file is an input as well.
    scratch.cow_fails(
        "convert --backing-dir=. --force -f qcow2 -O raw a.qcow2 a.data",
        1,
        &["a.data", "same file"],
    );
    // Snapshots inside do not matter, nor does what was not closed: a dirty bit concerns reference
    // counts.
    qemu_img(&scratch, "convert -f raw -O qcow2 -o lazy_refcounts=on a.raw a.qcow2");
    qemu_img(&scratch, "snapshot -c one a.qcow2");
    qemu_io(&scratch, "a.qcow2", "write -P 9 0 65536");
    crate::common::patch(&scratch.path("a.qcow2"), 72, &[0, 0, 0, 0, 0, 0, 0, 1]);
    scratch.cow_ok("convert --force -f qcow2 -O raw a.qcow2 b.raw");
    assert_eq!(scratch.read("b.raw")[..65536], [9; 65536]);
    assert_eq!(scratch.read("b.raw")[65536..], bytes[65536..]);
    // A backing file is an input as well.
    qemu_img(&scratch, "create -q -f qcow2 -b a.raw -F raw top.qcow2");
    scratch.cow_fails(
        "convert --backing-dir=. --force -f qcow2 -O raw top.qcow2 a.raw",
        1,
        &["a.raw", "same file"],
    );
    assert_eq!(scratch.read("a.raw"), bytes);
    // Encrypted.
    let mut qemu_img = Command::new("qemu-img");
    qemu_img.args(["convert", "-f", "raw", "-O", "qcow2", "--object", "secret,id=s,data=x"]);
    let made = scratch.run(
        qemu_img
            .args(["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"])
            .args(["a.raw", "e.qcow2"]),
    );
    assert_eq!(made.status, 0, "{}", made.stderr);
    scratch.cow_fails("convert -f qcow2 -O raw e.qcow2 out", 1, &["e.qcow2", "encrypted"]);
    let over = ["rebase", "-u", "-f", "qcow2", "-b", "e.qcow2", "-F", "qcow2", "top.qcow2"];
    assert_eq!(scratch.run(Command::new("qemu-img").args(over)).status, 0);
    let over = "convert --backing-dir=. -f qcow2 -O raw top.qcow2 out";
    scratch.cow_fails(over, 1, &["e.qcow2", "encrypted"]);
    assert!(!scratch.path("out").exists());
}

/// What qemu-io writes when it wants a command.
const PROMPT: &[u8; 9] = b"qemu-io> ";

/// qemu-io that has a file open for writing.
struct Holder(Child);

impl Holder {
    fn new(scratch: &Scratch, format: &str, file: &str) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format, file]).current_dir(scratch.dir());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // It asks for commands when it has the file. To try the lock meanwhile could make it fail:
        // testing a lock of QEMU's means holding one for a moment.
        let mut prompt = [0; PROMPT.len()];
        child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
        assert_eq!(prompt, *PROMPT);
        assert_eq!(scratch.json(&format!("info {file}"))["in-use"], true);
        Holder(child)
    }

    fn end(mut self) {
        self.0.stdin.take().unwrap().write_all(b"quit\n").unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

#[test]
fn a_file_that_qemu_writes_is_refused() {
    if missing("qemu-img") || missing("qemu-io") {
        return;
    }
    let scratch = Scratch::new();
    holey(&scratch, "a.raw");
    qemu_img(&scratch, "convert -f raw -O qcow2 a.raw a.qcow2");
    qemu_img(&scratch, "create -q -f qcow2 -b a.qcow2 -F qcow2 top.qcow2");
    scratch.cow_ok("create -b a.raw a.cow");
    for (format, file, commands) in [
        (
            "raw",
            "a.raw",
            &["merge a.cow out", "convert -f raw a.raw out", "create -b a.raw out"][..],
        ),
        (
            "qcow2",
            "a.qcow2",
            &["convert -f qcow2 a.qcow2 out", "convert --backing-dir=. -f qcow2 top.qcow2 out"],
        ),
    ] {
        let holder = Holder::new(&scratch, format, file);
        for command in commands {
            scratch.cow_fails(command, 1, &[file, "in use"]);
        }
        let theirs = qemu_img_status(&scratch, &format!("convert -f {format} -O raw {file} out"));
        assert_eq!(theirs.0, 1, "as qemu-img refuses it");
        holder.end();
        for command in commands {
            scratch.cow_ok(command);
            std::fs::remove_file(scratch.path("out")).unwrap();
        }
    }
}
