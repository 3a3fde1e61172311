//! `cow merge --in-place`: what it asks, what it leaves, and `uml_moo -d` beside it.

use std::fs;
use std::process::Command;

use crate::common::{
    Scratch, VECTOR_MTIME, allocated, base_image, missing, mtime_secs, patch, sha256,
};
use serde_json::json;

const MERGED_1M: &str = "fc9d1c72527e3cb384e9d41fc6e153bf766935dc4f98fd87bcdbc0f1c99e7fc4";
const MERGED_V1: &str = "cbe2fcdece08a29b9afd64cc1913f9f3f5aeb9d4331d0a3cfef136998d462ee6";
const MERGED_ODD: &str = "9a9191a3513cd5bcc678e5812da085764123be1a28506b4695332a64d07ba4ab";

#[test]
fn it_is_asked_for_twice_and_says_who_becomes_invalid() {
    let scratch = Scratch::new();
    scratch.write("base.img", &base_image('B', 64));
    for name in ["a.cow", "b.cow", "c.cow"] {
        scratch.cow_ok(&format!("create -b base.img {name}"));
    }
    let before = scratch.read("base.img");
    // Those over others of them as well, and those that stand beside the COW file; where it looked
    // is said.
    scratch.cow_ok("snapshot c.cow over-c.cow");
    fs::create_dir(scratch.path("sub")).unwrap();
    scratch.cow_ok("create -b base.img sub/d.cow");
    scratch.cow_ok("create -b base.img sub/e.cow");
    let found = ["base.img", "b.cow, ", "c.cow, ", "over-c.cow; found in ", "--yes"];
    scratch.cow_fails("merge --in-place a.cow", 1, &found);
    let found = ["/a.cow, ", "over-c.cow, sub/e.cow; found in ", " and sub)", "--yes"];
    scratch.cow_fails("--backing-dir=. merge --in-place sub/d.cow", 1, &found);
    scratch.cow_ok("create --size 1M alone.cow");
    scratch.cow_ok("snapshot alone.cow over-alone.cow");
    scratch.cow_fails("merge --in-place over-alone.cow", 1, &["alone.cow", "none found in /"]);
    assert_eq!(scratch.read("base.img"), before);
    for args in [
        "merge --in-place a.cow out.img",
        "merge --yes a.cow out.img",
        "merge --in-place --force a.cow",
        "merge --drop-to base.img a.cow",
        "merge --yes a.cow",
        "merge a.cow",
    ] {
        assert_eq!(scratch.cow(args).status, 2, "{args}");
    }
    // Nothing in it: nothing changes, although --yes was said.
    scratch.cow_ok("merge --in-place --yes a.cow");
    assert_eq!(mtime_secs(&scratch.path("base.img")), VECTOR_MTIME);
    assert_eq!(scratch.json("info b.cow")["backing"]["matches"], true);
}

#[test]
fn every_vector_is_merged_as_uml_moo_does_and_stays_usable() {
    let scratch = Scratch::new();
    for (name, base, merged) in [
        ("uml-1m", "base-1m.img", MERGED_1M),
        ("odd-le-magic", "base-1m.img", MERGED_1M),
        ("v3-align512-1m", "base-1m.img", MERGED_V1),
        ("v3broken-1m", "base-1m.img", MERGED_V1),
        ("uml-odd", "base-odd.img", MERGED_ODD),
    ] {
        scratch.bases();
        scratch.vector(name);
        let run = scratch.cow(&format!("merge --in-place --yes -b {base} {name}.cow"));
        assert_eq!(run.status, 0, "{name}: {}", run.stderr);
        assert!(
            run.stderr.contains("warning") && run.stderr.contains(base),
            "{name}: {}",
            run.stderr
        );
        assert_eq!(sha256(&scratch.read(base)), merged, "{name}");
        assert_ne!(mtime_secs(&scratch.path(base)), VECTOR_MTIME);
        let info = scratch.json(&format!("info {name}.cow"));
        assert_eq!(
            (&info["present-sectors"], &info["backing"]["matches"]),
            (&json!(0), &json!(true)),
            "{name}"
        );
        assert_eq!(info["backing"]["full-filename"], scratch.path(base).to_str().unwrap());
        assert!(allocated(&scratch.path(format!("{name}.cow"))) <= 16384, "{name}");
        scratch.cow_ok(&format!("check {name}.cow"));
        scratch.cow_ok(&format!("merge --force {name}.cow out.img"));
        assert_eq!(sha256(&scratch.read("out.img")), merged, "{name}");
        if !missing("uml_moo") && merged != MERGED_ODD {
            let run =
                scratch.run(Command::new("uml_moo").args([&format!("{name}.cow"), "moo.img"]));
            assert_eq!(run.status, 0, "{name}: uml_moo takes what is left: {}", run.stderr);
            assert_eq!(sha256(&scratch.read("moo.img")), merged, "{name}");
        }
    }
}

#[test]
fn old_versions_are_merged_and_left_as_they_were() {
    let scratch = Scratch::new();
    for name in ["v1-1m", "v2-1m"] {
        scratch.bases();
        scratch.vector(name);
        let before = scratch.read(format!("{name}.cow"));
        let run = scratch.cow(&format!("merge --in-place --yes -b base-1m.img {name}.cow"));
        assert_eq!(run.status, 0, "{}", run.stderr);
        assert!(run.stderr.contains("no longer matches; remove it"), "{}", run.stderr);
        assert_eq!(sha256(&scratch.read("base-1m.img")), MERGED_V1);
        assert_eq!(scratch.read(format!("{name}.cow")), before);
        let info = scratch.json(&format!("info -b base-1m.img {name}.cow"));
        assert_eq!(info["backing"]["matches"], false);
    }
}

#[test]
fn uml_moo_d_leaves_the_same_base() {
    if missing("uml_moo") {
        return;
    }
    let merged = ["cow merge", "uml_moo"].map(|program| {
        let scratch = Scratch::new();
        scratch.bases();
        let run = scratch.run(Command::new("uml_mkcow").args(["a.cow", "base-1m.img"]));
        assert_eq!(run.status, 0, "{}", run.stderr);
        let cow = scratch.path("a.cow");
        patch(&cow, 8192, &[0b1000_0010, 0, 0xff]);
        patch(&cow, 12288 + 512, &[0xaa; 512]);
        patch(&cow, 12288 + 16 * 512, &[0xbb; 4096]);
        if program == "uml_moo" {
            let run = scratch.run(Command::new(program).args(["-d", "a.cow"]));
            assert_eq!(run.status, 0, "{}", run.stderr);
        } else {
            scratch.cow_ok("merge --in-place --yes a.cow");
        }
        scratch.read("base-1m.img")
    });
    assert_ne!(merged[0], base_image('B', 2048));
    assert_eq!(merged[0], merged[1]);
}

#[test]
fn a_killed_merge_is_run_again() {
    let scratch = Scratch::new();
    scratch.bases();
    scratch.vector("uml-1m");
    // Without room for the note nothing begins.
    let note = scratch.path("uml-1m.cow.merging");
    fs::create_dir(&note).unwrap();
    let run = scratch.cow("merge --in-place --yes -b base-1m.img uml-1m.cow");
    assert_eq!(run.status, 1);
    assert!(run.stderr.contains("uml-1m.cow.merging"), "{}", run.stderr);
    assert_eq!(mtime_secs(&scratch.path("base-1m.img")), VECTOR_MTIME);
    fs::remove_dir(&note).unwrap();
    // A limit on the length of files kills it (SIGXFSZ) at its first write past that.
    let limited = "ulimit -f 512; exec \"$0\" merge --in-place --yes -b base-1m.img uml-1m.cow";
    let run = scratch.run(Command::new("bash").args(["-c", limited, env!("CARGO_BIN_EXE_cow")]));
    assert_ne!(run.status, 0, "{}", run.stderr);
    let info = scratch.json("info -b base-1m.img uml-1m.cow");
    assert_eq!(
        (&info["interrupted-merge"], &info["backing"]["matches"]),
        (&json!(true), &json!(false))
    );
    let check = scratch.cow("check uml-1m.cow");
    assert!(
        check.stdout.contains("note: uml-1m.cow: a merge of it was interrupted"),
        "{}",
        check.stdout
    );
    // Only the merge goes on: for all others the base is not what it was.
    scratch.cow_fails("merge -b base-1m.img uml-1m.cow out.img", 1, &["base-1m.img", "mtime"]);
    scratch.cow_ok("merge --in-place --yes -b base-1m.img uml-1m.cow");
    assert_eq!(sha256(&scratch.read("base-1m.img")), MERGED_1M);
    assert_eq!(scratch.json("info uml-1m.cow")["interrupted-merge"], false);
    assert_eq!(scratch.json("info uml-1m.cow")["present-sectors"], 0);
}

#[test]
fn a_base_that_others_read_is_refused() {
    use block_io::Host;
    use block_io::storage::{Access, Env, LockKind, Storage};
    let scratch = Scratch::new();
    scratch.bases();
    scratch.vector("uml-1m");
    let reader = Host.open(&scratch.path("base-1m.img"), Access::Read).unwrap();
    reader.try_lock(LockKind::Shared).unwrap();
    let run = scratch.cow("merge --in-place --yes -b base-1m.img uml-1m.cow");
    assert_eq!(run.status, 1);
    assert!(run.stderr.contains("base-1m.img: in use"), "{}", run.stderr);
    drop(reader);
    assert_eq!(mtime_secs(&scratch.path("base-1m.img")), VECTOR_MTIME);
}
