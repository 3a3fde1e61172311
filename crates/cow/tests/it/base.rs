//! A base that is not the one that the COW file means, or may not be: what the tool says of it.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};

use crate::common::{Scratch, base_image, set_mtime};
use serde_json::Value;
use testkit::loop_device::LoopDevice;

/// The mtime of every file in a Nix store.
const NIX: u64 = 1;

/// Two images of one size and time in a store, and a link to the first, as a profile has it.
fn store(scratch: &Scratch) {
    fs::create_dir(scratch.path("store")).unwrap();
    for (name, tag) in [("store/v1.img", 'A'), ("store/v2.img", 'B')] {
        scratch.write(name, &base_image(tag, 64));
        set_mtime(&scratch.path(name), NIX);
    }
    fs::create_dir(scratch.path("vm")).unwrap();
    link(scratch, "v1.img");
}

fn link(scratch: &Scratch, image: &str) {
    _ = fs::remove_file(scratch.path("base"));
    symlink(scratch.path("store").join(image), scratch.path("base")).unwrap();
}

fn warns(scratch: &Scratch, args: &str, words: &[&str]) {
    let run = scratch.cow(args);
    assert_eq!(run.status, 0, "cow {args}: {}", run.stderr);
    let warning = run.stderr.lines().find(|line| line.starts_with("cow: warning: "));
    let warning = warning.unwrap_or_else(|| panic!("cow {args}: no warning: {}", run.stderr));
    for word in words {
        assert!(warning.contains(word), "cow {args}: no {word:?} in {warning}");
    }
}

#[test]
fn another_base_of_the_same_size_and_time_is_refused() {
    let scratch = Scratch::new();
    store(&scratch);
    warns(&scratch, "create -b base vm/native.cow", &["does not identify it", "sample"]);
    warns(
        &scratch,
        "create -f uml -b base vm/uml.cow",
        &["does not identify it", "is not noticed"],
    );
    warns(&scratch, "create --digest -b base vm/digest.cow", &["does not identify it"]);
    for cow in ["vm/native.cow", "vm/uml.cow", "vm/digest.cow"] {
        let info = scratch.json(&format!("--backing-dir=. info {cow}"));
        assert_eq!(info["backing"]["matches"], true, "{info}");
        assert!(
            info["backing"]["warning"].as_str().unwrap().contains("does not identify it"),
            "{info}"
        );
    }
    link(&scratch, "v2.img");
    let uml = scratch.json("--backing-dir=. info vm/uml.cow");
    assert!(uml["backing"]["warning"].as_str().unwrap().contains("is not noticed"), "{uml}");
    for cow in ["vm/native.cow", "vm/digest.cow"] {
        let info = scratch.json(&format!("--backing-dir=. info {cow}"));
        assert_eq!(info["backing"]["matches"], false, "{info}");
        let words = ["replaced by another of the same size and time", "cow rebind"];
        assert!(words.iter().all(|word| info["problem"].as_str().unwrap().contains(word)));
        for command in [
            "--backing-dir=. merge CRE out.img",
            "--backing-dir=. fork CRE vm/new.cow",
            "--backing-dir=. map CRE",
        ] {
            scratch.cow_fails(&command.replace("CRE", cow), 1, &words);
        }
    }
    // The whole digest decides where there is one, and the user where there is none.
    scratch.cow_fails("--backing-dir=. rebind vm/digest.cow", 1, &["digests differ"]);
    scratch.cow_fails("--backing-dir=. rebind vm/native.cow", 1, &["no digest", "--trust"]);
    scratch.cow_ok("--backing-dir=. rebind --trust vm/native.cow");
    assert_eq!(scratch.json("--backing-dir=. info vm/native.cow")["backing"]["matches"], true);
    link(&scratch, "v1.img");
    assert_eq!(scratch.json("--backing-dir=. info vm/native.cow")["backing"]["matches"], false);
    assert_eq!(scratch.json("--backing-dir=. info vm/digest.cow")["backing"]["matches"], true);
    // A copy is as good.
    fs::copy(scratch.path("store/v1.img"), scratch.path("store/v3.img")).unwrap();
    set_mtime(&scratch.path("store/v3.img"), NIX);
    link(&scratch, "v3.img");
    assert_eq!(scratch.json("--backing-dir=. info vm/digest.cow")["backing"]["matches"], true);
    scratch.cow_ok("--backing-dir=. rebind vm/digest.cow");
}

#[test]
fn nothing_is_said_of_a_base_with_a_time_of_its_own() {
    let scratch = Scratch::new();
    fs::write(scratch.path("base.img"), base_image('A', 64)).unwrap();
    for format in ["native", "uml"] {
        let run = scratch.cow(&format!("create -f {format} -b base.img {format}.cow"));
        assert_eq!((run.status, run.stderr.as_str()), (0, ""));
        let info = scratch.json(&format!("info {format}.cow"));
        assert_eq!(info["backing"]["warning"], Value::Null, "{info}");
        assert!(!scratch.cow_ok(&format!("info {format}.cow")).contains("warning"));
    }
}

#[test]
fn a_block_device_is_a_base_whatever_the_time_of_its_node() {
    let scratch = Scratch::new();
    scratch.write("image", &base_image('A', 2048));
    let Some(device) = LoopDevice::new(&scratch.path("image"), 512) else { return };
    let base = device.path().display();
    let run = scratch.cow(&format!("create -b {base} native.cow"));
    assert_eq!((run.status, run.stderr.as_str()), (0, ""));
    warns(&scratch, &format!("create -f uml -b {base} uml.cow"), &["size alone"]);
    set_mtime(device.path(), 5);
    for (cow, warned) in [("native.cow", false), ("uml.cow", true)] {
        let info = scratch.json(&format!("--backing-dir=/dev info {cow}"));
        assert_eq!(info["backing"]["matches"], true, "{info}");
        assert_eq!(info["backing"]["warning"].is_string(), warned, "{info}");
        assert_eq!(info["backing"]["stored"]["mtime"], Value::Null, "{info}");
        scratch.cow_ok(&format!("--backing-dir=/dev map {cow}"));
    }
    // Its content is.
    let file = fs::File::options().write(true).open(device.path()).unwrap();
    file.write_all_at(&[7; 512], 1024).unwrap();
    assert_eq!(scratch.json("--backing-dir=/dev info native.cow")["backing"]["matches"], false);
}
