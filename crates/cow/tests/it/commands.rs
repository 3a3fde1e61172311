//! compare, measure, reset, fork, the names of the UML programs, man pages.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use crate::common::{Run, Scratch, VECTOR_MTIME, allocated, base_image, missing, patch};

#[test]
fn compare_finds_the_first_difference_as_qemu_img_does() {
    let scratch = Scratch::new();
    let base = base_image('B', 1000).repeat(40);
    scratch.write("a.img", &base);
    let qemu = !missing("qemu-img");
    for at in [0, 511, 512, 4096, 9_000_000, base.len() - 1] {
        let mut other = base.clone();
        other[at] ^= 0x80;
        // Another one further on, in another piece.
        let last = other.len() - 1;
        other[last] ^= 0x40;
        scratch.write("b.img", &other);
        let run = scratch.cow("compare -f raw -F raw a.img b.img");
        assert_eq!(run.status, 1, "{}", run.stderr);
        assert_eq!(run.stdout, format!("The disks differ, first at offset {at}.\n"));
        if qemu {
            let theirs = scratch
                .run(Command::new("qemu-img").args("compare -f raw -F raw a.img b.img".split(' ')));
            assert_eq!(theirs.status, run.status);
        }
    }
    scratch.cow_ok("create -b a.img a.cow");
    scratch.cow_ok("create --format uml -b a.img u.cow");
    scratch.cow_ok("compare a.cow u.cow");
    scratch.cow_ok("compare -F raw a.cow a.img");
    // A longer one is the same as long as the rest is zeros.
    let mut longer = base.clone();
    longer.resize(base.len() + 100_000, 0);
    scratch.write("b.img", &longer);
    scratch.cow_ok("compare -f raw -F raw a.img b.img");
    scratch.cow_ok("compare -f raw -F raw b.img a.img");
    assert_eq!(scratch.cow("compare -s -f raw -F raw b.img a.img").status, 1);
    longer[base.len() + 7] = 1;
    scratch.write("b.img", &longer);
    let run = scratch.cow("compare -f raw -F raw a.img b.img");
    assert_eq!(run.stdout, format!("The disks differ, first at offset {}.\n", base.len() + 7));
    // 1 would mean that they differ.
    scratch.cow_fails("compare -f raw -F raw a.img nope.img", 2, &["nope.img", "No such file"]);
    scratch.cow_fails("compare a.cow a.img", 2, &["a.img", "not a COW file", "raw"]);
    assert_eq!(scratch.cow("compare a.cow").status, 2);
}

#[test]
fn a_partial_last_sector_is_compared_to_its_last_byte() {
    let scratch = Scratch::new();
    scratch.bases();
    scratch.cow_ok("create --format uml -b base-odd.img a.cow");
    scratch.cow_ok("create -b base-odd.img b.cow");
    scratch.cow_ok("compare a.cow b.cow");
    scratch.cow_ok("merge a.cow a.img");
    scratch.cow_ok("compare -f raw a.img b.cow");
    patch(&scratch.path("a.img"), 1_000_000, b"!");
    let run = scratch.cow("compare -f raw a.img b.cow");
    assert_eq!((run.status, &*run.stdout), (1, "The disks differ, first at offset 1000000.\n"));
}

#[test]
fn measure_says_what_a_merge_will_take() {
    let scratch = Scratch::new();
    let mut base = base_image('B', 8192);
    base[1 << 20..3 << 20].fill(0);
    scratch.write("base.img", &base);
    // A copy that has the zeros as a hole.
    scratch.cow_ok("create -b base.img x.cow");
    scratch.cow_ok("merge x.cow holes.img");
    scratch.cow_ok("create -b holes.img a.cow");
    let measured = scratch.json("measure a.cow");
    assert_eq!(
        (&measured["required"], &measured["fully-allocated"]),
        (&(2 << 20).into(), &(4 << 20).into())
    );
    assert_eq!(scratch.json("measure -f raw holes.img"), measured);
    assert!(scratch.cow_ok("measure a.cow").contains("required size: 2097152 bytes (2 MiB)"));
}

#[test]
fn reset_drops_all_changes_and_gives_the_space_back() {
    let scratch = Scratch::new();
    let base = base_image('B', 2048);
    scratch.write("base.img", &base);
    for format in ["uml", "native"] {
        scratch.cow_ok(&format!("create --force --format {format} -b base.img a.cow"));
        let data = fs::metadata(scratch.path("a.cow")).unwrap().len() - (1 << 20);
        patch(&scratch.path("a.cow"), data, &vec![7; 1 << 20]);
        patch(&scratch.path("a.cow"), 8192, &[0xff; 256]);
        scratch.cow_ok("merge --force a.cow out.img");
        assert_eq!(scratch.read("out.img"), vec![7; 1 << 20]);
        scratch.cow_ok("reset a.cow");
        scratch.cow_ok("merge --force a.cow out.img");
        assert_eq!(scratch.read("out.img"), base);
        scratch.cow_ok("check a.cow");
        assert!(allocated(&scratch.path("a.cow")) <= 16384);
    }
    scratch.cow_ok("snapshot a.cow top.cow");
    scratch.cow_fails("reset a.cow", 1, &["a.cow", "frozen"]);
    scratch.vector("v1-1m");
    scratch.cow_fails("reset v1-1m.cow", 1, &["v1-1m.cow", "version 1"]);
    scratch.cow_fails("reset base.img", 1, &["base.img", "not a COW file"]);
}

#[test]
fn a_fork_stands_beside_or_on_top() {
    let scratch = Scratch::new();
    let base = base_image('B', 64);
    scratch.write("base.img", &base);
    scratch.cow_ok("create --digest -b base.img a.cow");
    scratch.cow_ok("create --format uml -b base.img u.cow");
    for (from, format) in [("a.cow", "native"), ("u.cow", "uml")] {
        use block_io::storage::{Access, Env, LockKind, Storage};
        let daemon = block_io::Host.open(&scratch.path(from), Access::ReadWrite).unwrap();
        daemon.try_lock(LockKind::Exclusive).unwrap();
        scratch.cow_ok(&format!("fork {from} beside-{from}"));
        let info = scratch.json(&format!("info beside-{from}"));
        assert_eq!((&info["format"], &info["backing"]["matches"]), (&format.into(), &true.into()));
        drop(daemon);
    }
    assert!(scratch.json("info beside-a.cow")["backing"]["digest"].is_string());
    scratch.cow_ok("snapshot a.cow top.cow");
    scratch.cow_ok("fork a.cow ontop.cow");
    assert_eq!(scratch.json("info ontop.cow")["backing"]["filename"], "a.cow");
    scratch.cow_fails("fork a.cow ontop.cow", 1, &["ontop.cow", "exists"]);
    crate::common::set_mtime(&scratch.path("base.img"), VECTOR_MTIME + 1);
    scratch.cow_fails("fork u.cow x.cow", 1, &["base.img", "mtime"]);
    scratch.cow_fails("fork base.img x.cow", 1, &["base.img", "not a COW file"]);
}

#[test]
fn messages_say_what_was_found_and_what_to_do() {
    let scratch = Scratch::new();
    scratch.write("base.img", &base_image('B', 64));
    scratch.write("empty.img", b"");
    scratch.cow_ok("create -b base.img a.cow");
    scratch.cow_ok("create --format uml -b base.img u.cow");
    scratch.cow_ok("create alone.cow 1M");
    for (args, status, words) in [
        ("merge a.cow", 2, &["OUT", "--in-place"][..]),
        ("rebind alone.cow", 1, &["alone.cow", "has no backing file"]),
        ("merge --in-place --yes alone.cow", 1, &["alone.cow", "has no file below it"]),
        ("convert -f uml a.cow out", 1, &["a.cow", "native"]),
        ("compare -f native u.cow a.cow", 2, &["u.cow", "uml"]),
        ("convert -O uml a.cow out", 2, &["--base", "UML"]),
        ("convert -f raw empty.img out", 1, &["empty.img", "is empty"]),
        ("convert -f raw . out", 1, &[".: is a directory"]),
        ("convert -f raw /dev/zero out", 1, &["/dev/zero", "special file"]),
        ("create -b nope out", 1, &["nope", "out", "No such file"]),
    ] {
        scratch.cow_fails(args, status, words);
    }
    assert_eq!(scratch.names(), ["a.cow", "alone.cow", "base.img", "empty.img", "u.cow"]);
    // Progress can be asked for where there is no terminal, and is else not shown.
    let run = scratch.cow("merge -p a.cow out");
    assert!(run.stderr.contains("merge 100 %"), "{}", run.stderr);
    assert_eq!(scratch.cow("merge --force a.cow out").stderr, "");
}

/// Runs the tool under another name.
fn named(scratch: &Scratch, name: &str, args: &str) -> Run {
    let link = scratch.path(name);
    if !link.exists() {
        symlink(env!("CARGO_BIN_EXE_cow"), &link).unwrap();
    }
    scratch.run(Command::new(link).args(args.split_whitespace()))
}

#[test]
fn the_uml_names_take_the_uml_command_lines() {
    let scratch = Scratch::new();
    scratch.bases();
    let ok = |name: &str, args: &str| {
        let run = named(&scratch, name, args);
        assert_eq!(run.status, 0, "{name} {args}: {}", run.stderr);
    };
    ok("uml_mkcow", "a.cow base-odd.img");
    assert_eq!(scratch.json("info a.cow")["format"], "uml");
    assert_eq!(named(&scratch, "uml_mkcow", "a.cow base-odd.img").status, 1);
    ok("uml_mkcow", "-f a.cow base-odd.img");
    ok("uml_moo", "a.cow out.img");
    ok("uml_moo", "-b base-odd.img a.cow out.img");
    assert_eq!(scratch.read("out.img"), scratch.read("base-odd.img"), "the last sector too");
    for out in ["a.cow", "base-odd.img"] {
        let run = named(&scratch, "uml_moo", &format!("a.cow {out}"));
        assert_eq!(run.status, 1);
        assert!(run.stderr.contains("same file"), "{}", run.stderr);
    }
    patch(&scratch.path("a.cow"), 8192, &[1]);
    patch(&scratch.path("a.cow"), 12288, &[7; 512]);
    ok("uml_moo", "-d a.cow");
    assert_eq!(scratch.read("base-odd.img")[..513], [&[7; 512][..], b"B"].concat());
    for (name, args) in
        [("uml_moo", "a.cow"), ("uml_moo", "-d a.cow out.img"), ("uml_mkcow", "a.cow")]
    {
        assert_eq!(named(&scratch, name, args).status, 2, "{name} {args}");
    }
}

#[test]
fn every_command_has_a_man_page() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("man")).unwrap();
    scratch.cow_ok("man man");
    let page =
        |name: &str| String::from_utf8(scratch.read(PathBuf::from("man").join(name))).unwrap();
    let help = scratch.cow_ok("--help");
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands: Vec<_> = commands
        .map_while(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    assert!(commands.len() > 10, "{commands:?}");
    for command in commands {
        assert!(page(&format!("cow-{command}.1")).contains(".SH SYNOPSIS"), "{command}");
        if command != "bench" {
            let help = scratch.cow_ok(&format!("{command} --help"));
            assert!(help.contains("Usage: cow"), "{command}");
        }
    }
    assert!(page("cow.1").contains("Exit status"));
}
