//! A layer that cannot be read (EIO): a message that says which file and where, and nothing
//! half-written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{Run, Scratch, base_image, missing};

/// The first byte that cannot be read.
const BAD: usize = 5 << 20;

/// What lets reads fail, compiled; `None` where there is no compiler.
fn preload(scratch: &Scratch) -> Option<PathBuf> {
    if missing("cc") {
        return None;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/common/eio.c");
    let library = scratch.path("eio.so");
    let made =
        scratch.run(Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source));
    assert_eq!(made.status, 0, "{}", made.stderr);
    Some(library)
}

/// Runs `cow` while `file` cannot be read.
fn cow(scratch: &Scratch, library: &Path, file: &str, args: &str) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cow"));
    command.env("LD_PRELOAD", library).env("EIO_FILE", format!("/{file}"));
    scratch.run(command.env("EIO_AT", BAD.to_string()).args(args.split_whitespace()))
}

#[test]
fn it_is_named_and_nothing_is_left() {
    let scratch = Scratch::new();
    let Some(library) = preload(&scratch) else { return };
    let base = base_image('B', 1000).repeat(24);
    let mut other = base.clone();
    other[(6 << 20)..(7 << 20)].fill(7);
    scratch.write("base.img", &base);
    scratch.write("other.img", &other);
    scratch.cow_ok("convert -f raw -b base.img other.img a.cow");
    scratch.cow_ok("create --digest -b base.img digest.cow");
    scratch.cow_ok("export-delta a.cow a.delta");
    if !missing("qemu-img") {
        let args = "convert -f raw -O qcow2 base.img base.qcow2";
        let run = scratch.run(Command::new("qemu-img").args(args.split(' ')));
        assert_eq!(run.status, 0, "{}", run.stderr);
    }
    let names = scratch.names();
    let contents: Vec<_> = names.iter().map(|name| scratch.read(name)).collect();
    let mut cases = vec![
        ("base.img", "merge a.cow out.img"),
        ("a.cow", "merge a.cow out.img"),
        ("base.img", "convert -O raw a.cow out.img"),
        ("base.img", "convert -O native a.cow out.cow"),
        ("base.img", "convert -O qcow2 a.cow out.qcow2"),
        ("other.img", "convert -f raw -b base.img other.img out.cow"),
        ("base.img", "convert -f raw -b base.img other.img out.cow"),
        ("base.img", "compare -F raw a.cow other.img"),
        ("a.cow", "compare -f raw base.img a.cow"),
        ("a.cow", "export-delta a.cow out.delta"),
        ("base.img", "create --digest -b base.img out.cow"),
        ("base.img", "check --base digest.cow"),
        ("base.img", "rebase -b other.img digest.cow"),
    ];
    if names.iter().any(|name| name == "base.qcow2") {
        cases.push(("base.qcow2", "convert -f qcow2 -O raw base.qcow2 out.img"));
    }
    for (file, args) in cases {
        let run = cow(&scratch, &library, file, args);
        let status = if args.starts_with("compare") { 2 } else { 1 };
        assert_eq!(run.status, status, "{file}, {args}: {}{}", run.stdout, run.stderr);
        for word in [file, "cannot read", "Input/output error"] {
            assert!(run.stderr.contains(word), "{file}, {args}: no {word:?} in {}", run.stderr);
        }
        assert_eq!(run.stderr.lines().count(), 1, "{file}, {args}: {}", run.stderr);
        assert_eq!(scratch.names(), names, "{file}, {args}");
        for (name, content) in names.iter().zip(&contents) {
            // A rebase that fails leaves the same disk; its header said for a while that it is in
            // use.
            if name != "digest.cow" {
                assert_eq!(&scratch.read(name), content, "{file}, {args}: {name}");
            }
        }
        scratch.cow_ok("compare -F raw digest.cow base.img");
    }
}

#[test]
fn a_merge_in_place_is_run_again_when_it_can_be_read_again() {
    let scratch = Scratch::new();
    let Some(library) = preload(&scratch) else { return };
    let base = base_image('B', 1000).repeat(24);
    let mut other = base.clone();
    for at in (0..base.len() - 4096).step_by(1 << 20) {
        other[at..at + 4096].fill(7);
    }
    scratch.write("base.img", &base);
    scratch.write("other.img", &other);
    scratch.cow_ok("convert -f raw -b base.img other.img a.cow");
    let run = cow(&scratch, &library, "a.cow", "merge --in-place --yes a.cow");
    assert_eq!(run.status, 1, "{}", run.stderr);
    for word in ["a.cow", "cannot read at byte", "Input/output error"] {
        assert!(run.stderr.contains(word), "no {word:?} in {}", run.stderr);
    }
    assert_ne!(scratch.read("base.img"), other, "it was interrupted");
    assert_eq!(scratch.json("info a.cow")["interrupted-merge"], true);
    scratch.cow_ok("merge --in-place --yes a.cow");
    assert_eq!(scratch.read("base.img"), other);
    assert_eq!(fs::metadata(scratch.path("base.img")).unwrap().len(), base.len() as u64);
    scratch.cow_ok("check a.cow");
}
