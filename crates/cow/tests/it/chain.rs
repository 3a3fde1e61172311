//! Chains: snapshot, map, merges in place to any depth, resize, rebind, digests.

use std::fs;

use crate::common::{Scratch, VECTOR_MTIME, base_image, set_mtime};
use serde_json::{Value, json};

/// Writes sectors of the disk in the COW file `name`, as a daemon would.
fn write(scratch: &Scratch, name: &str, start: u64, bytes: &[u8]) {
    use block_io::{Disk, DiskOptions};
    use cow_format::{Sector, SectorCount, SectorRange};
    let disk = Disk::open_cow(&scratch.path(name), None, &DiskOptions::default()).unwrap();
    let count = SectorCount::new(bytes.len() as u64 / 512);
    disk.write(SectorRange::new(Sector::new(start), count).unwrap(), bytes).unwrap();
    disk.close().unwrap();
}

/// The content of the disk in a COW file.
fn content(scratch: &Scratch, name: &str) -> Vec<u8> {
    scratch.cow_ok(&format!("merge --force {name} content.img"));
    scratch.read("content.img")
}

/// base.img ← l0.cow (1 in sectors 2..4) ← l1.cow (2 in 3..5) ← top.cow (3 in 60..62)
fn three(scratch: &Scratch) -> Vec<u8> {
    let mut expected = base_image('B', 64);
    scratch.write("base.img", &expected);
    scratch.cow_ok("create -b base.img l0.cow");
    write(scratch, "l0.cow", 2, &[1; 1024]);
    scratch.cow_ok("snapshot l0.cow l1.cow");
    write(scratch, "l1.cow", 3, &[2; 1024]);
    scratch.cow_ok("snapshot l1.cow top.cow");
    write(scratch, "top.cow", 60, &[3; 1024]);
    expected[1024..2048].fill(1);
    expected[1536..2560].fill(2);
    expected[60 * 512..62 * 512].fill(3);
    expected
}

#[test]
fn a_snapshot_keeps_the_disk_and_freezes_the_layer() {
    let scratch = Scratch::new();
    let expected = three(&scratch);
    assert_eq!(content(&scratch, "top.cow"), expected);
    assert_eq!(scratch.json("info l1.cow")["state"], "frozen");
    let chain = scratch.json("info --chain top.cow");
    let names = chain.as_array().unwrap().iter().map(|file| file["filename"].as_str().unwrap());
    let names: Vec<_> = names.map(|name| name.rsplit('/').next().unwrap()).collect();
    assert_eq!(names, ["top.cow", "l1.cow", "l0.cow", "base.img"]);
    scratch.cow_ok("check top.cow");
    // Another one beside, over the same layer.
    scratch.cow_ok("snapshot l1.cow other.cow");
    assert_eq!(content(&scratch, "other.cow")[60 * 512..], base_image('B', 64)[60 * 512..]);
    scratch.cow_fails("snapshot l1.cow other.cow", 1, &["other.cow", "exists"]);
    scratch.cow_fails("snapshot base.img x.cow", 1, &["base.img", "not a COW file"]);
    scratch.cow_fails("merge --in-place --yes l1.cow", 1, &["l1.cow", "frozen"]);
    scratch.cow_fails("resize l1.cow 1M", 1, &["l1.cow", "frozen"]);
    // The files move together.
    fs::create_dir(scratch.path("moved")).unwrap();
    for name in ["base.img", "l0.cow", "l1.cow", "top.cow"] {
        fs::rename(scratch.path(name), scratch.path("moved").join(name)).unwrap();
    }
    assert_eq!(content(&scratch, "moved/top.cow"), expected);
    scratch.cow_ok("create --format uml -b moved/base.img u.cow");
    scratch.cow_fails("snapshot u.cow x.cow", 1, &["u.cow", "UML", "frozen"]);
}

#[test]
fn map_says_which_file_each_part_is_read_from() {
    let scratch = Scratch::new();
    three(&scratch);
    let map = scratch.json("map top.cow");
    let part = |start: u64, length: u64, depth: u64| (start * 512, length * 512, depth);
    let found = map.as_array().unwrap().iter().map(|part| {
        assert_eq!((&part["data"], &part["zero"]), (&json!(true), &json!(false)));
        let number = |key: &str| part[key].as_u64().unwrap();
        (number("start"), number("length"), number("depth"))
    });
    let expected = [
        part(0, 2, 3),
        part(2, 1, 2),
        part(3, 2, 1),
        part(5, 55, 3),
        part(60, 2, 0),
        part(62, 2, 3),
    ];
    assert_eq!(found.collect::<Vec<_>>(), expected);
    assert_eq!(map[0]["offset"], 0);
    let text = scratch.cow_ok("map top.cow");
    let line: Vec<_> = text.lines().nth(2).unwrap().split_whitespace().collect();
    assert_eq!(line[..3], ["0x400", "0x200", "2"]);
    assert!(line[4].ends_with("l0.cow"), "{text}");
    // A disk of zeros is one part.
    scratch.cow_ok("create --size 3G z.cow");
    assert_eq!(
        scratch.json("map z.cow"),
        json!([{"start": 0, "length": 3u64 << 30, "depth": 0, "zero": true, "data": false}])
    );
}

#[test]
fn a_merge_goes_to_the_layer_below_or_to_a_given_one() {
    for (args, left) in [
        ("top.cow", &["top.cow", "l1.cow", "l0.cow", "base.img"][..]),
        ("--drop-to l0.cow top.cow", &["top.cow", "l0.cow", "base.img"]),
        ("--drop-to base.img top.cow", &["top.cow", "base.img"]),
    ] {
        let scratch = Scratch::new();
        let expected = three(&scratch);
        scratch.cow_ok("snapshot l1.cow other.cow");
        scratch.cow_ok(&format!("merge --in-place --yes {args}"));
        assert_eq!(content(&scratch, "top.cow"), expected, "{args}");
        scratch.cow_ok("check top.cow");
        let chain = scratch.json("info --chain top.cow");
        let names = chain.as_array().unwrap().iter().map(|file| file["filename"].as_str().unwrap());
        let names: Vec<_> = names.map(|name| name.rsplit('/').next().unwrap()).collect();
        assert_eq!(names, left, "{args}");
        assert_eq!(chain[0]["present-sectors"], 0);
        let run = scratch.cow("merge other.cow other.img");
        assert_eq!(run.status, 1, "{args}: the other one is invalid: {}", run.stderr);
        if args.contains("base.img") {
            assert_eq!(scratch.read("base.img"), expected);
        }
        // It goes on.
        write(&scratch, "top.cow", 10, &[9; 512]);
        assert_eq!(content(&scratch, "top.cow")[10 * 512..11 * 512], [9; 512]);
    }
    // Where nothing has to be copied, the files between are left out all the same.
    let scratch = Scratch::new();
    let base = base_image('B', 64);
    scratch.write("base.img", &base);
    scratch.cow_ok("create -b base.img l0.cow");
    scratch.cow_ok("snapshot l0.cow top.cow");
    scratch.cow_ok("merge --in-place --yes --drop-to base.img top.cow");
    let backing = scratch.json("info top.cow")["backing"].clone();
    assert_eq!((&backing["filename"], &backing["matches"]), (&"base.img".into(), &true.into()));
    assert_eq!(content(&scratch, "l0.cow"), base, "it stays valid");

    let scratch = Scratch::new();
    three(&scratch);
    scratch.write("stranger.img", &[0; 512]);
    for file in ["stranger.img", "top.cow", "nowhere.img"] {
        scratch.cow_fails(
            &format!("merge --in-place --yes --drop-to {file} top.cow"),
            1,
            &[file, "not one of"],
        );
    }
}

#[test]
fn resizing_grows_with_zeros_and_shrinks_only_when_told() {
    let scratch = Scratch::new();
    let base = base_image('B', 64);
    scratch.write("base.img", &base);
    scratch.cow_ok("create -b base.img a.cow");
    write(&scratch, "a.cow", 63, &[7; 512]);
    scratch.cow_ok("resize a.cow +32K");
    let mut expected = base.clone();
    expected[63 * 512..].fill(7);
    expected.resize(65536, 0);
    assert_eq!(content(&scratch, "a.cow"), expected);
    scratch.cow_fails("resize a.cow 16K", 1, &["a.cow", "65536", "16384", "--shrink"]);
    scratch.cow_fails("resize --shrink a.cow 0", 1, &["a.cow", "size 0"]);
    scratch.cow_fails("resize a.cow +1", 1, &["a.cow", "512"]);
    scratch.cow_fails("resize a.cow -1M", 2, &["65536"]);
    scratch.cow_fails("resize base.img +1M", 2, &["base.img", "not a COW file"]);
    scratch.cow_ok("resize --shrink a.cow -48K");
    assert_eq!(content(&scratch, "a.cow"), base[..16384]);
    // What was cut off does not come back, neither the layer's nor the base's.
    scratch.cow_ok("resize a.cow 64K");
    let mut expected = base[..16384].to_vec();
    expected.resize(65536, 0);
    assert_eq!(content(&scratch, "a.cow"), expected);
    scratch.cow_ok("check a.cow");
    // In place, the base grows with it.
    scratch.cow_ok("merge --in-place --yes a.cow");
    assert_eq!(scratch.read("base.img"), expected);
    scratch.cow_ok("create --format uml -b base.img u.cow");
    scratch.cow_fails("resize u.cow 1M", 1, &["u.cow", "UML"]);
    scratch.cow_ok("create --size 1M big.cow");
    scratch.cow_ok("resize big.cow 2G");
    assert_eq!(scratch.json("info big.cow")["virtual-size"], 2u64 << 30);
}

#[test]
fn a_digest_proves_that_a_base_is_the_same() {
    let scratch = Scratch::new();
    let content = base_image('B', 4096);
    let base = scratch.write("base.img", &content);
    scratch.cow_ok("create --digest -b base.img a.cow");
    scratch.cow_ok("create -b base.img plain.cow");
    let digest = format!("blake3:{}", blake3::hash(&content).to_hex());
    assert_eq!(scratch.json("info a.cow")["backing"]["digest"], Value::from(digest));
    let check = scratch.cow_ok("check --base a.cow");
    assert!(check.contains("matches the digest"), "{check}");
    assert!(scratch.cow_ok("check --base plain.cow").contains("there is no digest"));

    // Touched; copied elsewhere.
    set_mtime(&base, VECTOR_MTIME + 7);
    scratch.cow_fails("merge a.cow out.img", 1, &["mtime", "cow rebind"]);
    scratch.cow_ok("rebind a.cow");
    scratch.cow_ok("merge a.cow out.img");
    fs::copy(&base, scratch.path("copy.img")).unwrap();
    fs::remove_file(&base).unwrap();
    scratch.cow_ok("rebind a.cow copy.img");
    assert_eq!(scratch.json("info a.cow")["backing"]["filename"], "copy.img");
    scratch.cow_ok("merge --force a.cow out.img");
    assert_eq!(scratch.read("out.img"), content);

    // Other content of the same size; another size.
    let mut other = content.clone();
    other[100] ^= 1;
    scratch.write("copy.img", &other);
    scratch.cow_fails("rebind a.cow", 1, &["copy.img", "a.cow", "digests differ"]);
    // Its mtime set back, so that only the digest shows the change.
    let mtime = scratch.json("info a.cow")["backing"]["stored"]["mtime"].clone();
    let time = std::time::Duration::new(
        mtime["seconds"].as_u64().unwrap(),
        u32::try_from(mtime["nanoseconds"].as_u64().unwrap()).unwrap(),
    );
    let file = fs::File::options().write(true).open(scratch.path("copy.img")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + time).unwrap();
    scratch.cow_ok("check a.cow");
    let check = scratch.cow("check --base a.cow");
    assert_eq!(check.status, 2, "{}", check.stdout);
    assert!(check.stdout.contains("does not match the digest"), "{}", check.stdout);
    scratch.write("copy.img", &content[..content.len() - 512]);
    scratch.cow_fails("rebind a.cow", 1, &["copy.img", "2096640", "2097152"]);
    scratch.cow_fails("rebind --trust a.cow", 1, &["copy.img", "2096640", "2097152"]);
}

#[test]
fn without_a_digest_only_trust_rebinds() {
    let scratch = Scratch::new();
    let base = scratch.write("base.img", &base_image('B', 64));
    for format in ["uml", "native"] {
        scratch.cow_ok(&format!("create --force --format {format} -b base.img a.cow"));
        set_mtime(&base, VECTOR_MTIME + 9);
        scratch.cow_fails("rebind a.cow", 1, &["a.cow", "no digest", "--trust"]);
        let run = scratch.cow("rebind --trust a.cow");
        assert_eq!(run.status, 0, "{}", run.stderr);
        assert!(
            run.stderr.contains("warning") && run.stderr.contains("without proof"),
            "{}",
            run.stderr
        );
        scratch.cow_ok("check a.cow");
        set_mtime(&base, VECTOR_MTIME);
    }
    scratch.cow_fails("create --format uml --digest -b base.img u.cow", 1, &["u.cow", "digest"]);
    scratch.cow_fails("rebind base.img", 1, &["base.img", "not a COW file"]);
}
