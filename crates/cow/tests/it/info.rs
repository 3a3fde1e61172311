//! `cow info` and `cow check`: what they say of sound, mismatched and broken files, and how they
//! end.

use std::fs;

use crate::common::{Scratch, VECTOR_MTIME, allocated, base_image, patch, set_mtime};
use block_io::Host;
use block_io::storage::{Access, Env, LockKind, Storage};
use serde_json::{Value, json};

/// Offset of the data in a native file of up to 16 GiB: both bitmaps have room for that.
const NATIVE_BITMAP: u64 = 8192;

#[test]
fn info_says_what_a_uml_file_is() {
    let scratch = Scratch::new();
    scratch.bases();
    scratch.vector("uml-1m");
    let info = scratch.json("info -b base-1m.img uml-1m.cow");
    let expected = json!({
        "filename": "uml-1m.cow",
        "format": "uml",
        "format-version": "3",
        "virtual-size": 1 << 20,
        "file-length": 1_060_864,
        "actual-size": allocated(&scratch.path("uml-1m.cow")),
        "in-use": false,
        "present-sectors": 282,
        "sectors": 2048,
        "state": "clean",
        "interrupted-merge": false,
        "backing": {
            "filename": "/umlvec/base-1m.img",
            "full-filename": "base-1m.img",
            "format": "raw",
            "stored": {"size": 1 << 20, "mtime": {"seconds": VECTOR_MTIME}},
            "actual": {"size": 1 << 20, "mtime": {"seconds": VECTOR_MTIME}},
            "matches": true,
        },
    });
    assert_eq!(info, expected);
    let text = scratch.cow_ok("info -b base-1m.img uml-1m.cow");
    for line in [
        "image: uml-1m.cow",
        "file format: uml (version 3)",
        "virtual size: 1 MiB (1048576 bytes)",
        "present: 282 of 2048 sectors (141 KiB)",
        "backing file: /umlvec/base-1m.img (at base-1m.img)",
        "backing size: 1 MiB (1048576 bytes)",
        "backing mtime: 2023-11-14 22:13:20.000000000 UTC",
        "backing file matches: yes",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    assert_eq!(scratch.json("info -b base-1m.img uml-1m.cow")["problem"], Value::Null);
}

#[test]
fn info_and_check_say_what_does_not_match() {
    let scratch = Scratch::new();
    for (format, name) in [("uml", "u.cow"), ("native", "n.cow")] {
        let base = scratch.write("base.img", &base_image('B', 64));
        scratch.cow_ok(&format!("create --format {format} -b base.img {name}"));
        assert_eq!(scratch.json(&format!("check {name}"))["corruptions"], 0);

        set_mtime(&base, VECTOR_MTIME + 5);
        let info = scratch.json(&format!("info {name}"));
        assert_eq!(info["backing"]["matches"], false);
        assert_eq!(info["backing"]["actual"]["mtime"]["seconds"], VECTOR_MTIME + 5);
        let problem = info["problem"].as_str().unwrap();
        assert!(problem.contains("mtime") && problem.contains("1700000005"), "{problem}");
        let text = scratch.cow_ok(&format!("info {name}"));
        assert!(text.contains("backing file matches: NO"), "{text}");

        scratch.write("base.img", &base_image('B', 65));
        let info = scratch.json(&format!("info {name}"));
        assert_eq!(info["backing"]["actual"]["size"], 65 * 512);
        assert!(info["problem"].as_str().unwrap().contains("size"), "{info}");
        let check = scratch.cow(&format!("check {name}"));
        assert_eq!(check.status, 2);
        assert!(
            check.stdout.contains("32768 bytes") && check.stdout.contains("33280"),
            "{}",
            check.stdout
        );

        fs::remove_file(&base).unwrap();
        let info = scratch.json(&format!("info {name}"));
        assert_eq!(
            (&info["backing"]["matches"], &info["backing"]["actual"]),
            (&json!(false), &Value::Null)
        );
        assert!(info["problem"].as_str().unwrap().contains("No such file"), "{info}");
        fs::create_dir(&base).unwrap();
        assert!(
            scratch.json(&format!("info {name}"))["problem"]
                .as_str()
                .unwrap()
                .contains("directory")
        );
        assert_eq!(scratch.cow(&format!("check {name}")).status, 2);
        fs::remove_dir(&base).unwrap();
    }
}

#[test]
fn info_of_every_bad_vector_shows_what_can_be_shown() {
    let scratch = Scratch::new();
    scratch.bases();
    for (name, status, word) in [
        ("bad-align-0", 1, "alignment"),
        ("bad-bitmap-truncated", 1, "8448"),
        ("bad-empty", 1, "header"),
        ("bad-path-empty", 1, "backing path"),
        ("bad-sectorsize-0", 1, "sectorsize"),
        ("bad-short-header-100", 1, "4128"),
        ("bad-version-4", 1, "version"),
        ("bad-mtime", 0, "mtime"),
        ("bad-size", 0, "size"),
    ] {
        scratch.vector(name);
        let run = scratch.cow(&format!("info -b base-1m.img --output=json {name}.cow"));
        assert_eq!(run.status, status, "{name}: {}", run.stderr);
        let info: Value = serde_json::from_str(&run.stdout).unwrap();
        assert!(info["problem"].as_str().unwrap().contains(word), "{name}: {info}");
        assert!(info["file-length"].is_u64(), "{name}");
        let check = scratch.cow(&format!("check {name}.cow"));
        match status {
            1 => assert_eq!(check.status, 2, "{name}"),
            // The header is right, and the base that it names is elsewhere.
            _ => assert!(check.stdout.contains("is outside of"), "{name}: {}", check.stdout),
        }
    }
    // Without its magic it cannot be distinguished from a raw image.
    scratch.vector("bad-magic");
    assert_eq!(scratch.json("info bad-magic.cow")["format"], "raw");
    scratch.cow_fails("check bad-magic.cow", 1, &["bad-magic.cow", "not a COW file"]);
    scratch.cow_fails("info nope", 1, &["nope", "No such file"]);
    scratch.cow_fails("check nope", 1, &["nope", "No such file"]);
    scratch.cow_fails("check .", 1, &["directory"]);
    assert_eq!(scratch.cow("check --frobnicate x").status, 1, "2 would mean corrupt");
}

#[test]
fn info_works_on_a_file_in_use_and_check_does_not() {
    let scratch = Scratch::new();
    scratch.write("base.img", &base_image('B', 64));
    scratch.cow_ok("create -b base.img n.cow");
    let daemon = Host.open(&scratch.path("n.cow"), Access::ReadWrite).unwrap();
    daemon.try_lock(LockKind::Exclusive).unwrap();
    assert_eq!(scratch.json("info n.cow")["in-use"], true);
    scratch.cow_fails("check n.cow", 1, &["n.cow", "in use"]);
    scratch.cow_fails("check --repair n.cow", 1, &["n.cow", "in use"]);
    drop(daemon);
    assert_eq!(scratch.json("info n.cow")["in-use"], false);
    scratch.cow_ok("check n.cow");
}

#[test]
fn a_broken_header_copy_is_found_and_repaired() {
    let scratch = Scratch::new();
    scratch.write("base.img", &base_image('B', 64));
    for copy in [0, 4096] {
        scratch.cow_ok("create --force -b base.img n.cow");
        let uuid = scratch.json("info n.cow")["uuid"].clone();
        patch(&scratch.path("n.cow"), copy + 100, b"rot");
        assert_eq!(scratch.json("info n.cow")["uuid"], uuid);
        let check = scratch.cow("check n.cow");
        assert_eq!(check.status, 2, "{}", check.stdout);
        assert!(check.stdout.contains("one copy of the header is broken"), "{}", check.stdout);
        let check = scratch.json("check --repair n.cow");
        assert_eq!(
            (&check["corruptions"], &check["findings"][0]["repaired"]),
            (&json!(0), &json!(true))
        );
        assert_eq!(scratch.json("check n.cow")["findings"], json!([]));
        // Now the other copy can break.
        patch(&scratch.path("n.cow"), 4096 - copy + 100, b"rot");
        assert_eq!(scratch.json("info n.cow")["uuid"], uuid);
    }
    patch(&scratch.path("n.cow"), 100, b"rot");
    patch(&scratch.path("n.cow"), 4196, b"rot");
    let run = scratch.cow("info n.cow");
    assert_eq!(run.status, 1);
    assert!(run.stdout.contains("both copies of the header are broken"), "{}", run.stdout);
    assert_eq!(scratch.cow("check --repair n.cow").status, 2);
}

#[test]
fn leaks_and_bits_beyond_the_end_are_found_and_repaired() {
    let scratch = Scratch::new();
    scratch.write("base.img", &base_image('B', 64));
    scratch.cow_ok("create -b base.img n.cow");
    let cow = scratch.path("n.cow");
    let clean = allocated(&cow);
    let data = fs::metadata(&cow).unwrap().len() - 64 * 512;
    patch(&cow, data, &[7; 8192]);
    patch(&cow, NATIVE_BITMAP + 8, &[1]);
    let check = scratch.cow("check n.cow");
    assert_eq!(check.status, 3, "{}", check.stdout);
    assert!(check.stdout.contains("8192 bytes are allocated"), "{}", check.stdout);
    assert!(check.stdout.contains("1 bits past the end"), "{}", check.stdout);
    let before = scratch.read("n.cow");
    assert_eq!(scratch.cow("check n.cow").status, 3);
    assert_eq!(scratch.read("n.cow"), before, "checking changes nothing");

    let check = scratch.json("check --repair n.cow");
    assert_eq!((&check["leaks"], check["findings"].as_array().unwrap().len()), (&json!(0), 2));
    assert_eq!(scratch.json("check n.cow")["findings"], json!([]));
    // One more block: the bitmap's page, now zeros.
    assert!(allocated(&cow) <= clean + 4096);
}

#[test]
fn lost_data_is_found_and_never_repaired() {
    let scratch = Scratch::new();
    scratch.write("base.img", &base_image('B', 64));
    for format in ["uml", "native"] {
        scratch.cow_ok(&format!("create --force --format {format} -b base.img a.cow"));
        let cow = scratch.path("a.cow");
        let len = fs::metadata(&cow).unwrap().len();
        patch(&cow, NATIVE_BITMAP + 7, &[0x80]);
        scratch.cow_ok("check a.cow");
        fs::File::options().write(true).open(&cow).unwrap().set_len(len - 1).unwrap();
        let before = scratch.read("a.cow");
        let check = scratch.cow("check --repair a.cow");
        assert_eq!(check.status, 2, "{}", check.stdout);
        assert!(
            check.stdout.contains("sector 63") && !check.stdout.contains("(repaired)"),
            "{}",
            check.stdout
        );
        assert_eq!(check.stdout.lines().count(), 2, "said once: {}", check.stdout);
        assert_eq!(scratch.read("a.cow"), before);
        scratch.cow_fails("merge a.cow out.img", 1, &["a.cow", "sector 63"]);
        assert!(scratch.json("info a.cow")["problem"].as_str().unwrap().contains("sector 63"));
    }
}

#[test]
fn a_base_that_looks_like_a_cow_file_needs_its_format_said() {
    let scratch = Scratch::new();
    scratch.write("base.img", &base_image('B', 64));
    for format in ["uml", "native"] {
        scratch.cow_ok(&format!("create --force --format {format} -b base.img a.cow"));
        scratch.cow_fails("create -b a.cow top.cow", 2, &["a.cow", format, "-F raw"]);
    }
    scratch.cow_fails("create -F native -b a.cow top.cow", 1, &["a.cow", "not frozen"]);
    scratch.cow_fails("create -F uml -b a.cow top.cow", 1, &["a.cow", "native"]);
    scratch.cow_fails("create -F native -b base.img top.cow", 1, &["base.img", "not a COW file"]);
    assert!(!scratch.path("top.cow").exists());
    scratch.cow_ok("create -F raw -b a.cow top.cow");
    scratch.cow_ok("merge top.cow out.img");
    assert_eq!(scratch.read("out.img"), scratch.read("a.cow"));
}

#[test]
fn a_chain_is_shown_and_its_cycles_are_refused() {
    let scratch = Scratch::new();
    scratch.write("base.img", &base_image('B', 64));
    scratch.cow_ok("create --format uml -b base.img a.cow");
    scratch.cow_ok("create -F uml -b a.cow --size 64K b.cow");
    let chain = scratch.json("info --chain b.cow");
    let names: Vec<_> =
        chain.as_array().unwrap().iter().map(|file| file["format"].clone()).collect();
    assert_eq!(names, ["native", "uml", "raw"]);
    scratch.cow_ok("check b.cow");
    scratch.cow_ok("merge b.cow out.img");
    let mut expected = base_image('B', 64);
    expected.resize(65536, 0);
    assert_eq!(scratch.read("out.img"), expected);

    // A COW file that is its own base.
    let own = scratch.path("own.cow");
    fs::copy(scratch.path("a.cow"), &own).unwrap();
    let name = own.to_str().unwrap().as_bytes();
    patch(&own, 32, &[name, &[0]].concat());
    for args in ["merge own.cow out2.img", "merge -b own.cow own.cow out2.img"] {
        scratch.cow_fails(args, 1, &["own.cow", "twice"]);
    }
    assert!(scratch.json("info own.cow")["problem"].as_str().unwrap().contains("twice"));
    assert_eq!(scratch.cow("check own.cow").status, 2);
}
