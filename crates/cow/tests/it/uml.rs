//! The tool against the UML vectors, and against `uml_mkcow` and `uml_moo` as a second
//! implementation.

use std::process::Command;

use crate::common::{Scratch, VECTOR_MTIME, missing, mtime_secs, set_mtime, sha256, vectors};

/// A line of the manifest.
struct Vector {
    name: String,
    base: &'static str,
    merged_sha256: String,
    moo_sha256: String,
}

/// The vectors that are good images.
fn good_vectors() -> Vec<Vector> {
    let manifest = std::fs::read_to_string(vectors().join("manifest.tsv")).unwrap();
    let good = manifest.lines().skip(1).filter_map(|line| {
        let columns: Vec<_> = line.split('\t').collect();
        let name = columns[0].strip_suffix(".cow").unwrap();
        let base = match name {
            _ if name.starts_with("bad-") => return None,
            _ if name.ends_with("-odd") => "base-odd.img",
            _ if name.ends_with("-512") => "base-512.img",
            _ => "base-1m.img",
        };
        let (merged, moo) = (columns[10].to_owned(), columns[12].to_owned());
        Some(Vector { name: name.to_owned(), base, merged_sha256: merged, moo_sha256: moo })
    });
    let good: Vec<_> = good.collect();
    assert_eq!(good.len(), 11);
    good
}

#[test]
fn merging_every_vector_gives_the_right_image() {
    let scratch = Scratch::new();
    scratch.bases();
    for Vector { name, base, merged_sha256, .. } in good_vectors() {
        scratch.vector(&name);
        let before = scratch.read(format!("{name}.cow"));
        scratch.cow_ok(&format!("merge -b {base} {name}.cow {name}.img"));
        assert_eq!(sha256(&scratch.read(format!("{name}.img"))), merged_sha256, "{name}");
        assert_eq!(scratch.read(format!("{name}.cow")), before, "{name}");
        assert_eq!(mtime_secs(&scratch.path(base)), VECTOR_MTIME);
    }
}

#[test]
fn uml_moo_gives_the_same_bytes() {
    if missing("uml_moo") {
        return;
    }
    let scratch = Scratch::new();
    scratch.bases();
    for Vector { name, base, moo_sha256, merged_sha256 } in good_vectors() {
        scratch.vector(&name);
        scratch.cow_ok(&format!("merge -b {base} {name}.cow {name}.img"));
        let (cow, out) = (format!("{name}.cow"), format!("{name}.moo"));
        let run = scratch.run(Command::new("uml_moo").args(["-b", base, &cow, &out]));
        assert_eq!(run.status, 0, "{name}: {}", run.stderr);
        let (ours, theirs) = (scratch.read(format!("{name}.img")), scratch.read(&out));
        assert_eq!(sha256(&theirs), moo_sha256, "{name}");
        if moo_sha256 == merged_sha256 {
            assert_eq!(ours, theirs, "{name}");
        } else {
            // uml_moo drops a partial last sector; up to it the bytes are the same.
            assert!(name.ends_with("-odd"), "{name}");
            assert_eq!(ours[..ours.len() / 512 * 512], theirs, "{name}");
        }
    }
}

#[test]
fn new_uml_files_are_those_of_uml_mkcow() {
    if missing("uml_mkcow") {
        return;
    }
    let scratch = Scratch::new();
    scratch.bases();
    for base in ["base-1m.img", "base-odd.img", "base-512.img"] {
        let (ours, theirs) = (format!("{base}.ours"), format!("{base}.theirs"));
        scratch.cow_ok(&format!("create --format uml -b {base} {ours}"));
        let run = scratch.run(Command::new("uml_mkcow").args([&theirs, base]));
        assert_eq!(run.status, 0, "{}", run.stderr);
        assert_eq!(scratch.read(&ours), scratch.read(&theirs), "{base}");
        assert!(crate::common::allocated(&scratch.path(&ours)) <= 16384);

        let run = scratch.run(Command::new("uml_moo").args([&ours, &format!("{base}.moo")]));
        assert_eq!(run.status, 0, "uml_moo takes our file: {}", run.stderr);
        scratch.cow_ok(&format!("merge {theirs} {base}.merged"));
        assert_eq!(scratch.read(format!("{base}.merged")), scratch.read(base), "{base}");
    }
}

#[test]
fn every_bad_vector_is_refused_by_name() {
    let scratch = Scratch::new();
    scratch.bases();
    for (name, words) in [
        ("bad-align-0", &["alignment", "found 0"][..]),
        ("bad-bitmap-truncated", &["bitmap", "8448", "8292"]),
        ("bad-empty", &["header", "found 0"]),
        ("bad-magic", &["magic", "OOOM"]),
        ("bad-mtime", &["mtime", "base-1m.img", "1700000000", "touch"]),
        ("bad-path-empty", &["backing path", "empty"]),
        ("bad-sectorsize-0", &["sectorsize", "found 0", "512"]),
        ("bad-sectorsize-4096", &["sectorsize", "found 4096", "512"]),
        ("bad-short-header-100", &["header", "found 100", "4128"]),
        ("bad-short-header-4", &["header", "found 4"]),
        ("bad-size", &["size", "1048576", "base-1m.img"]),
        ("bad-version-0", &["version", "found 0"]),
        ("bad-version-4", &["version", "found 4"]),
    ] {
        scratch.vector(name);
        let before = scratch.read(format!("{name}.cow"));
        let file = format!("{name}.cow");
        let words: Vec<_> = words.iter().copied().chain([&*file]).collect();
        scratch.cow_fails(&format!("merge -b base-1m.img {name}.cow out.img"), 1, &words);
        assert_eq!(scratch.read(format!("{name}.cow")), before, "{name}");
        assert!(!scratch.path("out.img").exists(), "{name}");
    }
    scratch.vector("bad-path-missing");
    let words = ["bad-path-missing.cow", "/xmlvec/base-1m.img", "--backing-dir=/xmlvec"];
    scratch.cow_fails("merge bad-path-missing.cow out.img", 1, &words);
    // Its directory does not exist either.
    let words = ["--backing-dir", "/xmlvec", "No such file"];
    scratch.cow_fails("merge --backing-dir /xmlvec bad-path-missing.cow out.img", 2, &words);
    let words = ["bad-path-missing.cow", "No such file"];
    scratch.cow_fails("merge -b gone.img bad-path-missing.cow out.img", 1, &words);
}

#[test]
fn a_base_that_changed_is_refused_and_one_that_moved_is_found() {
    let scratch = Scratch::new();
    let base = scratch.write("base.img", &crate::common::base_image('B', 8));
    scratch.cow_ok("create --format uml -b base.img a.cow");
    set_mtime(&base, VECTOR_MTIME + 1);
    scratch.cow_fails(
        "merge a.cow out.img",
        1,
        &["base.img", "a.cow", "mtime", "1700000000", "1700000001"],
    );
    set_mtime(&base, VECTOR_MTIME);
    std::fs::rename(&base, scratch.path("moved.img")).unwrap();
    scratch.cow_fails("merge a.cow out.img", 1, &["base.img", "a.cow", "No such file"]);
    scratch.cow_ok("merge -b moved.img a.cow out.img");
    assert_eq!(scratch.read("out.img"), scratch.read("moved.img"));
}
