//! Files from strangers: what they name, and what they make the tool use.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::process::Command;

use cow_format::VIRTUAL_SIZE_MAX;
use cow_format::header::NativeHeader;

use crate::common::{Run, Scratch, base_image};

/// The memory that a command may allocate in the tests, in KiB: what it uses anyway (a stack for
/// each thread included) and one window of a bitmap.
const MEMORY_MAX_KIB: u32 = 64 << 10;

/// Runs `cow`, which may allocate [`MEMORY_MAX_KIB`].
fn cow_in_little_memory(scratch: &Scratch, args: &str) -> Run {
    let limited = format!("ulimit -d {MEMORY_MAX_KIB} && exec \"$0\" {args}");
    scratch.run(Command::new("sh").args(["-c", &limited, env!("CARGO_BIN_EXE_cow")]))
}

/// A header of the largest disk there can be, whose bitmap has a page of alternating bits in every
/// fourth of its 16384 regions. That bitmap took 180 MiB in memory.
fn bitmap_bomb(scratch: &Scratch) {
    let mut header =
        NativeHeader::create(VIRTUAL_SIZE_MAX, uuid::Uuid::from_u128(7), None).unwrap();
    let file = fs::File::create(scratch.path("bomb.cow")).unwrap();
    for _ in ["one copy", "the other"] {
        let write = header.next_write().unwrap();
        file.write_all_at(&*write.bytes, write.at.get()).unwrap();
    }
    let geometry = *header.geometry();
    file.set_len(geometry.data_offset().get()).unwrap();
    for region in (0..geometry.bitmap_pages()).step_by(4 * 1024) {
        file.write_all_at(&[0xaa; 4096], geometry.page_at(region).get()).unwrap();
    }
}

#[test]
fn a_bitmap_of_any_size_is_looked_at_in_little_memory() {
    let scratch = Scratch::new();
    bitmap_bomb(&scratch);
    let info = cow_in_little_memory(&scratch, "info --output=json bomb.cow");
    assert_eq!(info.status, 0, "{}", info.stderr);
    let info: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
    assert_eq!(info["present-sectors"], 4096 * 4 * 4096);
    assert!(info["problem"].as_str().unwrap().contains("data truncated"), "{info}");
    let check = cow_in_little_memory(&scratch, "check bomb.cow");
    assert_eq!(check.status, 2, "{}", check.stderr);
    assert!(check.stdout.contains("data truncated"), "{}", check.stdout);
    for args in ["map bomb.cow", "merge bomb.cow out", "snapshot bomb.cow new"] {
        let run = cow_in_little_memory(&scratch, args);
        assert_eq!(run.status, 1, "{args}: {}", run.stderr);
        assert!(run.stderr.contains("data truncated"), "{args}: {}", run.stderr);
    }
}

#[test]
fn names_are_whole_in_json_and_harmless_in_text() {
    let scratch = Scratch::new();
    let name = OsStr::from_bytes(b"b\xff\nimage: \x1b[2J");
    fs::write(scratch.path(name), base_image('B', 64)).unwrap();
    let cow = OsStr::from_bytes(b"c\xfe.cow");
    let run = scratch.cow_args([OsStr::new("create"), OsStr::new("-b"), name, cow]);
    assert_eq!(run.status, 0, "{}", run.stderr);
    let json = scratch.cow_args([OsStr::new("info"), OsStr::new("--output=json"), cow]);
    assert_eq!(json.status, 0, "{}", json.stderr);
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["filename"], "c\u{fffd}.cow");
    assert_eq!(json["filename-hex"], "63fe2e636f77");
    let backing = &json["backing"];
    assert_eq!(backing["filename"], "b\u{fffd}\nimage: \u{1b}[2J");
    assert_eq!(backing["filename-hex"], "62ff0a696d6167653a201b5b324a");
    assert!(
        backing["full-filename-hex"].as_str().unwrap().ends_with("62ff0a696d6167653a201b5b324a")
    );
    let text = scratch.cow_args([OsStr::new("info"), cow]).stdout;
    assert!(text.contains(r"backing file: b\xff\nimage: \u{1b}[2J"), "{text}");
    assert!(!text.contains('\x1b') && text.matches("image: ").count() == 3, "{text}");
    // Of a file with a name in UTF-8 there is no second one.
    scratch.cow_ok("create plain.cow 1M");
    assert_eq!(scratch.json("info plain.cow")["filename-hex"], serde_json::Value::Null);
    let check = scratch.cow_args([OsStr::new("check"), OsStr::new("--output=json"), cow]);
    assert!(check.stdout.contains(r#""filename-hex": "63fe2e636f77""#), "{}", check.stdout);
    fs::write(scratch.path(name), "").unwrap();
    let run = scratch.cow_args([OsStr::new("merge"), cow, OsStr::new("out")]);
    assert_eq!((run.status, run.stderr.lines().count()), (1, 1), "{}", run.stderr);
}
