//! Files from strangers: what they name, and what they make the tool use.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use cow_format::VIRTUAL_SIZE_MAX;
use cow_format::header::NativeHeader;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::common::{Run, Scratch, base_image, missing, patch};

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

fn qemu_img(scratch: &Scratch, args: &[&str]) {
    let run = scratch.run(Command::new("qemu-img").args(args));
    assert_eq!(run.status, 0, "qemu-img {args:?}: {}", run.stderr);
}

/// Makes a qcow2 image that names `backing`, which need not exist.
fn qcow2_over(scratch: &Scratch, name: &str, backing: &str, format: &str, options: &str) {
    let create = ["create", "-q", "-u", "-f", "qcow2", "-o", options, "-b", backing, "-F", format];
    qemu_img(scratch, &[&create[..], &[name, "64K"]].concat());
}

/// Makes a qcow2 image whose data is in the file `data`, as it says.
fn qcow2_with_data_in(scratch: &Scratch, name: &str, data: &Path) {
    let data = data.as_os_str().as_bytes();
    let placeholder = "x".repeat(data.len());
    let options = format!("data_file={placeholder},data_file_raw=on");
    qemu_img(scratch, &["create", "-q", "-f", "qcow2", "-o", &options, name, "64K"]);
    let image = scratch.read(name);
    let at = image.windows(data.len()).position(|bytes| bytes == placeholder.as_bytes());
    patch(&scratch.path(name), at.unwrap() as u64, data);
    fs::remove_file(scratch.path(placeholder)).unwrap();
}

/// Notices when a file is opened, or closed by somebody who could write to it.
struct Watch(Inotify);

impl Watch {
    fn new(path: &Path, events: AddWatchFlags) -> Self {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        inotify.add_watch(path, events).unwrap();
        Watch(inotify)
    }

    fn has_seen_nothing(&self) -> bool {
        matches!(self.0.read_events(), Err(nix::Error::EAGAIN))
    }
}

#[test]
fn what_a_qcow2_image_names_is_not_opened() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let secret = scratch.write("secret", &[b's'; 65536]);
    let opened = Watch::new(&secret, AddWatchFlags::IN_OPEN);
    let absolute = secret.to_str().unwrap();
    let json =
        format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{absolute}"}}}}"#);
    fs::create_dir(scratch.path("allowed")).unwrap();
    symlink("../secret", scratch.path("allowed/link")).unwrap();
    let allowed = "--backing-dir=allowed";
    let dir = format!("--backing-dir={}", scratch.dir().canonicalize().unwrap().display());
    let dir = dir.as_str();
    let address = "nothing on a network";
    for (backing, option, word) in [
        (absolute, "", dir),
        ("secret", "", dir),
        (absolute, allowed, dir),
        ("allowed/../secret", allowed, dir),
        ("allowed/link", allowed, "leads out"),
        (&json, "--backing-dir=/", address),
        (&format!("file:{absolute}"), "--backing-dir=/", address),
        ("nbd://127.0.0.1:10899/x", "--backing-dir=/", address),
    ] {
        // Whether imago would read it or qemu-img.
        for options in ["compression_type=zlib", "compression_type=zstd"] {
            qcow2_over(&scratch, "evil.qcow2", backing, "raw", options);
            for command in ["convert -f qcow2 -O raw evil.qcow2 out", "measure -f qcow2 evil.qcow2"]
            {
                let words = ["evil.qcow2", &backing[..4], "backing file", word];
                scratch.cow_fails(&format!("{command} {option}"), 1, &words);
            }
            let info = scratch.json(&format!("info evil.qcow2 {option}"));
            assert_eq!(info["format"], "raw");
            assert_eq!(info["qcow2"]["backing-filename"], backing);
            assert_eq!(info["qcow2"]["backing-filename-format"], "raw");
        }
    }
    qcow2_with_data_in(&scratch, "evil.qcow2", &secret);
    let words = ["evil.qcow2", absolute, "data file", dir];
    scratch.cow_fails("convert -f qcow2 -O raw evil.qcow2 out", 1, &words);
    assert_eq!(scratch.json("info evil.qcow2")["qcow2"]["data-file"], absolute);
    let text = scratch.cow_ok("info evil.qcow2");
    assert!(text.contains(&format!("its data file, not opened: {absolute}")), "{text}");
    assert!(opened.has_seen_nothing());
    assert!(!scratch.path("out").exists());
}

#[test]
fn a_data_file_that_is_allowed_is_only_read() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let data = scratch.write("data", &base_image('D', 128));
    qcow2_with_data_in(&scratch, "a.qcow2", &data);
    let written = Watch::new(&data, AddWatchFlags::IN_CLOSE_WRITE);
    scratch.cow_ok("convert --backing-dir=. -f qcow2 -O raw a.qcow2 out");
    assert_eq!(scratch.read("out"), base_image('D', 128));
    assert!(written.has_seen_nothing());
}

#[test]
fn a_qcow2_chain_has_an_end() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    qcow2_over(&scratch, "00.qcow2", "99.qcow2", "qcow2", "compression_type=zlib");
    let image = scratch.read("00.qcow2");
    let at = image.windows(8).position(|bytes| bytes == b"99.qcow2").unwrap();
    patch(&scratch.path("00.qcow2"), at as u64, b"00");
    let own = "convert --backing-dir=. -f qcow2 00.qcow2 out";
    scratch.cow_fails(own, 1, &["00.qcow2", "twice"]);
    for number in 0..99 {
        let mut image = image.clone();
        image[at..at + 2].copy_from_slice(format!("{:02}", number + 1).as_bytes());
        scratch.write(&format!("{number:02}.qcow2"), &image);
    }
    scratch.cow_fails(own, 1, &["00.qcow2", "the chain has more than"]);
    // Without a format for the next one: it is not guessed.
    let mut image = image;
    let format = image.windows(4).position(|bytes| bytes == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
    image[format..format + 4].fill(0x11);
    scratch.write("00.qcow2", &image);
    scratch.cow_fails(own, 1, &["00.qcow2", "without its format"]);
}

/// Puts a program named qemu-img before the real one in PATH: it tells about its output, and about
/// the files beside that.
fn spy(scratch: &Scratch) -> String {
    let path = std::env::var("PATH").unwrap();
    fs::create_dir(scratch.path("bin")).unwrap();
    let script = format!(
        "#!/bin/sh\nfor last; do :; done\nstat -Lc '%F %a %h' \"$last\" >spied\nls -A out-dir tmp >>spied\n\
         PATH='{path}' exec qemu-img \"$@\"\n"
    );
    let program = scratch.write("bin/qemu-img", script.as_bytes());
    fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{path}", scratch.path("bin").display())
}

#[test]
fn the_image_that_qemu_img_makes_has_no_name() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let content = base_image('B', 2048);
    scratch.write("a.raw", &content);
    let zstd = ["-c", "-o", "compression_type=zstd", "a.raw", "a.qcow2"];
    qemu_img(&scratch, &[&["convert", "-f", "raw", "-O", "qcow2"][..], &zstd].concat());
    fs::create_dir(scratch.path("out-dir")).unwrap();
    fs::create_dir(scratch.path("tmp")).unwrap();
    let path = spy(&scratch);
    for args in
        ["convert -f qcow2 -O raw a.qcow2 out-dir/out", "compare -f qcow2 -F raw a.qcow2 a.raw"]
    {
        let mut cow = Command::new(env!("CARGO_BIN_EXE_cow"));
        cow.args(args.split(' ')).env("PATH", &path).env("TMPDIR", scratch.path("tmp"));
        let run = scratch.run(&mut cow);
        assert_eq!(run.status, 0, "{args}: {}", run.stderr);
        let spied = fs::read_to_string(scratch.path("spied")).unwrap();
        assert!(
            spied.starts_with("regular file 600 0\n") || spied.contains("empty file 600 0\n"),
            "{spied}"
        );
    }
    assert_eq!(scratch.read("out-dir/out"), content);
    assert_eq!(fs::read_dir(scratch.path("tmp")).unwrap().count(), 0);
}

#[test]
fn a_disk_that_is_too_large_is_refused_before_anything_is_written() {
    let scratch = Scratch::new();
    scratch.cow_ok("create big.cow 1T");
    scratch.cow_ok("create -f raw big.raw 1T");
    scratch.cow_ok("export-delta big.cow big.delta");
    let mut imports = vec!["convert big.cow", "convert -f raw big.raw", "apply-delta big.delta"];
    if !missing("qemu-img") {
        for (name, compression) in [("zlib.qcow2", "zlib"), ("zstd.qcow2", "zstd")] {
            let options = format!("compression_type={compression}");
            qemu_img(&scratch, &["create", "-q", "-f", "qcow2", "-o", &options, name, "1T"]);
        }
        imports.extend(["convert -f qcow2 zlib.qcow2", "convert -f qcow2 zstd.qcow2"]);
    }
    for import in imports {
        let file = import.rsplit(' ').next().unwrap();
        let args = format!("{import} out --max-size=1023G");
        scratch.cow_fails(&args, 1, &[file, "1 TiB", "--max-size"]);
        assert!(!scratch.path("out").exists(), "{import}");
        scratch.cow_ok(&format!("{import} out --max-size=1T"));
        fs::remove_file(scratch.path("out")).unwrap();
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

#[test]
fn what_a_command_makes_is_for_its_owner_only() {
    let scratch = Scratch::new();
    let base = scratch.write("base.img", &base_image('B', 64));
    fs::set_permissions(base, fs::Permissions::from_mode(0o644)).unwrap();
    for (args, new) in [
        ("create -b base.img a.cow", "a.cow"),
        ("create --format uml -b base.img u.cow", "u.cow"),
        ("create --format raw r.img 1M", "r.img"),
        ("convert a.cow c.cow", "c.cow"),
        ("convert -O raw a.cow c.img", "c.img"),
        ("convert -O qcow2 a.cow c.qcow2", "c.qcow2"),
        ("merge a.cow m.img", "m.img"),
        ("export-delta a.cow a.delta", "a.delta"),
        ("apply-delta -b base.img a.delta d.cow", "d.cow"),
        ("fork a.cow f.cow", "f.cow"),
        ("snapshot a.cow s.cow", "s.cow"),
    ] {
        let run = scratch.run(
            Command::new("sh")
                .args(["-c", &format!("umask 022 && exec \"$0\" {args}")])
                .arg(env!("CARGO_BIN_EXE_cow")),
        );
        assert_eq!(run.status, 0, "{args}: {}", run.stderr);
        let mode = fs::metadata(scratch.path(new)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600, "{args}: {mode:o}");
    }
}
