//! `cow convert` and `cow rebase`, with qemu-img as the second implementation.

use std::process::Command;

use crate::common::{Scratch, allocated, base_image, missing, patch};

/// A disk of 24 MiB with data, zeros and a partial last cluster, over several pieces.
fn content() -> Vec<u8> {
    let mut bytes = base_image('B', 1000).repeat(49);
    bytes[1 << 20..9 << 20].fill(0);
    bytes[20 << 20..(20 << 20) + 5000].fill(0);
    bytes
}

fn qemu_img(scratch: &Scratch, args: &str) {
    let run = scratch.run(Command::new("qemu-img").args(args.split_whitespace()));
    assert_eq!(run.status, 0, "qemu-img {args}: {}", run.stderr);
}

#[test]
fn native_and_raw_and_back_keep_every_byte() {
    let scratch = Scratch::new();
    let content = content();
    scratch.write("a.img", &content);
    scratch.cow_ok("convert -f raw a.img a.cow");
    let info = scratch.json("info a.cow");
    assert_eq!((&info["format"], &info["backing"]), (&"native".into(), &serde_json::Value::Null));
    assert!(allocated(&scratch.path("a.cow")) < content.len() as u64 - (7 << 20));
    scratch.cow_ok("check a.cow");
    scratch.cow_ok("compare -F raw a.cow a.img");
    scratch.cow_ok("convert -O raw a.cow b.img");
    assert_eq!(scratch.read("b.img"), content);
    assert!(allocated(&scratch.path("b.img")) < content.len() as u64 - (7 << 20));
    // A size that is no multiple of 512.
    scratch.write("odd.img", &content[..(9 << 20) + 12345]);
    scratch.cow_ok("convert -f raw odd.img odd.cow");
    scratch.cow_ok("convert -O raw odd.cow odd2.img");
    assert_eq!(scratch.read("odd2.img"), content[..(9 << 20) + 12345]);
}

#[test]
fn over_a_base_only_the_differences_are_written() {
    let scratch = Scratch::new();
    let base = content();
    scratch.write("base.img", &base);
    let mut other = base.clone();
    other[512..1024].fill(0);
    other[3 << 20..(3 << 20) + 512].fill(9);
    other[(16 << 20) - 512..(16 << 20) + 512].fill(8);
    scratch.write("other.img", &other);
    for format in ["uml", "native"] {
        scratch.cow_ok(&format!("convert --force -f raw -O {format} -b base.img other.img a.cow"));
        assert_eq!(scratch.json("info a.cow")["present-sectors"], 4, "{format}");
        scratch.cow_ok("merge --force a.cow out.img");
        assert_eq!(scratch.read("out.img"), other);
        scratch.cow_ok("check a.cow");
    }
    // Longer and shorter than the base.
    let mut longer = other.clone();
    longer.extend([7; 1024]);
    for image in [&longer[..], &other[..4 << 20]] {
        scratch.write("other.img", image);
        scratch.cow_ok("convert --force -f raw -b base.img other.img a.cow");
        scratch.cow_ok("merge --force a.cow out.img");
        assert_eq!(scratch.read("out.img"), image);
        scratch.cow_ok("check a.cow");
    }
    scratch.cow_fails(
        "convert -f raw -O uml -b base.img other.img u.cow",
        1,
        &["u.cow", "another size"],
    );
    assert_eq!(scratch.cow("convert -f raw -O uml other.img u.cow").status, 2);
    scratch.cow_fails("convert -f raw -O raw -b base.img other.img x", 2, &["--base"]);
    scratch.cow_fails("convert -f raw other.img a.cow", 1, &["a.cow", "exists"]);
    scratch.cow_fails("convert --force -f raw other.img other.img", 1, &["other.img", "same file"]);
    scratch.cow_fails(
        "convert --force -f raw -b base.img other.img base.img",
        1,
        &["base.img", "same file"],
    );
    scratch.cow_fails(
        "convert other.img x.cow",
        1,
        &["other.img", "not a COW file", "--format raw"],
    );
}

#[test]
fn qcow2_is_read_with_all_that_cloud_images_use() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    let content = content();
    scratch.write("a.img", &content);
    for options in [
        "",
        "-c",
        "-o compat=0.10",
        "-o cluster_size=2M",
        "-o cluster_size=512",
        "-o lazy_refcounts=on",
        // imago leaves these to qemu-img.
        "-c -o compression_type=zstd",
        "-o extended_l2=on,cluster_size=128k",
    ] {
        qemu_img(&scratch, &format!("convert -f raw -O qcow2 {options} a.img a.qcow2"));
        scratch.cow_ok("convert --force -f qcow2 a.qcow2 a.cow");
        scratch.cow_ok("compare -F raw a.cow a.img");
        scratch.cow_ok("convert --force -f qcow2 -O raw a.qcow2 b.img");
        assert_eq!(scratch.read("b.img"), content, "{options}");
        scratch.cow_ok("compare -f qcow2 -F raw a.qcow2 a.img");
    }
}

#[test]
fn a_qcow2_chain_is_read_through() {
    if missing("qemu-img") || missing("qemu-io") {
        return;
    }
    let scratch = Scratch::new();
    let mut expected = content();
    scratch.write("a.img", &expected);
    qemu_img(&scratch, "convert -f raw -O qcow2 -c a.img base.qcow2");
    qemu_img(&scratch, "create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2");
    qemu_img(&scratch, "create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2");
    let write = "write -P 7 512 1024";
    let run = scratch.run(Command::new("qemu-io").args(["-f", "qcow2", "-c", write, "mid.qcow2"]));
    assert_eq!(run.status, 0, "{}", run.stderr);
    let write = "write -z 0 65536";
    let run = scratch.run(Command::new("qemu-io").args(["-f", "qcow2", "-c", write, "top.qcow2"]));
    assert_eq!(run.status, 0, "{}", run.stderr);
    expected[..65536].fill(0);
    scratch.cow_ok("convert --backing-dir=. -f qcow2 -O raw top.qcow2 out.img");
    assert_eq!(scratch.read("out.img"), expected);
    // Over the raw image of the chain's base.
    scratch.cow_ok("convert --backing-dir=. -f qcow2 -b a.img top.qcow2 top.cow");
    assert_eq!(scratch.json("info top.cow")["present-sectors"], 128);
    scratch.cow_fails("convert -f qcow2 nope.qcow2 x.cow", 1, &["nope.qcow2", "No such file"]);
    scratch.write("garbage.qcow2", &[7; 4096]);
    scratch.cow_fails("convert -f qcow2 garbage.qcow2 x.cow", 1, &["garbage.qcow2", "not a qcow2"]);
    assert!(!scratch.path("x.cow").exists());
}

#[test]
fn qcow2_that_is_written_is_sound_and_the_same() {
    if missing("qemu-img") {
        return;
    }
    let scratch = Scratch::new();
    scratch.write("base.img", &content());
    scratch.cow_ok("create -b base.img a.cow");
    scratch.cow_ok("convert -O qcow2 a.cow a.qcow2");
    qemu_img(&scratch, "check -f qcow2 a.qcow2");
    qemu_img(&scratch, "compare -f qcow2 -F raw a.qcow2 base.img");
    assert!(allocated(&scratch.path("a.qcow2")) < (17 << 20));
    scratch.cow_fails("convert -O qcow2 a.cow a.qcow2", 1, &["a.qcow2", "exists"]);
    scratch.cow_ok("convert --force -O qcow2 a.cow a.qcow2");
}

#[test]
fn rebase_keeps_the_content_and_unsafe_does_not_look() {
    let scratch = Scratch::new();
    let base = content();
    scratch.write("base.img", &base);
    let mut other = base.clone();
    other[4096..8192].fill(0);
    other[5 << 20..(5 << 20) + 700].fill(9);
    scratch.write("other.img", &other);
    for format in ["uml", "native"] {
        scratch.cow_ok(&format!("create --force --format {format} -b base.img a.cow"));
        let geometry_data =
            std::fs::metadata(scratch.path("a.cow")).unwrap().len() - base.len() as u64;
        patch(&scratch.path("a.cow"), geometry_data, &[3; 512]);
        patch(&scratch.path("a.cow"), 8192, &[1]);
        let mut expected = base.clone();
        expected[..512].fill(3);
        scratch.cow_ok("rebase -b other.img a.cow");
        scratch.cow_ok("check a.cow");
        let info = scratch.json("info a.cow");
        assert!(info["backing"]["filename"].as_str().unwrap().ends_with("other.img"));
        // Its own sector, 8 where the new base has zeros, 2 where it has something.
        assert_eq!(info["present-sectors"], 11, "{format}");
        scratch.cow_ok("merge --force a.cow out.img");
        assert_eq!(scratch.read("out.img"), expected, "{format}");

        let run = scratch.cow("rebase --unsafe -b base.img a.cow");
        assert_eq!(run.status, 0, "{}", run.stderr);
        assert!(run.stderr.contains("warning"), "{}", run.stderr);
        scratch.cow_ok("merge --force a.cow out.img");
        // The copies of the old base's sectors are those of this one.
        assert_eq!(scratch.read("out.img"), expected);
    }
    // It stands alone.
    scratch.cow_ok("merge --force a.cow before.img");
    scratch.cow_ok("rebase --base= a.cow");
    assert_eq!(scratch.json("info a.cow")["backing"], serde_json::Value::Null);
    scratch.cow_ok("compare -F raw a.cow before.img");
    // Over a frozen layer of another size.
    scratch.cow_ok("create --size 4M layer.cow");
    scratch.cow_ok("snapshot layer.cow unused.cow");
    scratch.cow_ok("rebase -F native -b layer.cow a.cow");
    scratch.cow_ok("compare -F raw a.cow before.img");
    scratch.cow_fails("rebase -F native -b a.cow a.cow", 1, &["a.cow", "twice"]);
    scratch.cow_fails("rebase --unsafe -F native -b a.cow a.cow", 1, &["a.cow", "twice"]);
    scratch.cow_fails("rebase -b layer.cow a.cow", 2, &["layer.cow", "native"]);
    scratch.cow_ok("create --format uml -b base.img u.cow");
    scratch.write("short.img", &base[..512]);
    scratch.cow_fails("rebase -b short.img u.cow", 1, &["u.cow", "another size"]);
    scratch.cow_fails("rebase --base= u.cow", 1, &["u.cow", "without a backing file"]);
}
