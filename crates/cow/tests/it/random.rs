//! Random commands on random chains against a model, and commands that are killed at random
//! moments.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{Scratch, base_image, set_mtime};
use block_io::{Disk, DiskOptions};
use cow_format::{Sector, SectorCount, SectorRange};

/// Steps of a program.
const STEPS: u32 = 40;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// The seed in `COW_SEED`.
fn asked_for() -> Option<u64> {
    std::env::var("COW_SEED").ok()?.parse().ok()
}

/// A disk, and what it should hold.
struct World {
    scratch: Scratch,
    random: Random,
    seed: u64,
    /// The files of the chain, the base first.
    chain: Vec<String>,
    content: Vec<u8>,
    files: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let scratch = Scratch::new();
        let mut random = Random(seed);
        let content = base_image('B', 200 + random.below(3000));
        scratch.write("base.img", &content);
        scratch.cow_ok("create -b base.img 0.cow");
        let chain = vec!["base.img".to_owned(), "0.cow".to_owned()];
        World { scratch, random, seed, chain, content, files: 1 }
    }

    fn top(&self) -> String {
        self.chain.last().unwrap().clone()
    }

    fn new_name(&mut self) -> String {
        self.files += 1;
        format!("{}.cow", self.files)
    }

    fn sectors(&self) -> u64 {
        self.content.len() as u64 / 512
    }

    fn step(&mut self) -> String {
        let top = self.top();
        match self.random.below(11) {
            0..=3 => self.write(),
            4 => {
                let new = self.new_name();
                self.chain.push(new.clone());
                self.cow(&format!("snapshot {top} {new}"))
            }
            5 => {
                let target =
                    usize::try_from(self.random.below(self.chain.len() as u64 - 1)).unwrap();
                let fits =
                    target == 0 || self.size_of(&self.chain[target]) >= self.content.len() as u64;
                if !fits {
                    return "nothing".into();
                }
                let file = self.chain[target].clone();
                self.chain.truncate(target + 1);
                self.chain.push(top.clone());
                self.cow(&format!("merge --in-place --yes --drop-to {file} {top}"))
            }
            6 => {
                let size = (1 + self.random.below(self.sectors() * 2)) * 512;
                self.content.resize(usize::try_from(size).unwrap(), 0);
                self.cow(&format!("resize --shrink {top} {size}"))
            }
            7 => self.rebase(),
            8 => {
                // What a resize has hidden is part of what a reset drops.
                let below = self.below_as_it_is();
                let ran = self.cow(&format!("reset {top}"));
                self.content = below;
                ran
            }
            9 => self.convert(),
            _ => {
                let file = self.new_name();
                let base = self.chain[self.chain.len() - 2].clone();
                let format = if self.chain.len() == 2 { "raw" } else { "native" };
                self.cow(&format!("export-delta --force {top} d"));
                self.chain.pop();
                self.chain.push(file.clone());
                let ran = self.cow(&format!("apply-delta -b {base} -F {format} d {file}"));
                fs::remove_file(self.scratch.path(top)).unwrap();
                ran
            }
        }
    }

    fn cow(&self, args: &str) -> String {
        let run = self.scratch.cow(args);
        assert_eq!(run.status, 0, "seed {}: cow {args}: {}", self.seed, run.stderr);
        args.to_owned()
    }

    fn size_of(&self, file: &str) -> u64 {
        self.scratch.json(&format!("info {file}"))["virtual-size"].as_u64().unwrap()
    }

    /// What the file below the top holds, as long as the disk is.
    fn below_as_it_is(&self) -> Vec<u8> {
        let below = &self.chain[self.chain.len() - 2];
        let mut bytes = match self.chain.len() {
            2 => self.scratch.read(below),
            _ => {
                self.cow(&format!("merge --force {below} below.img"));
                self.scratch.read("below.img")
            }
        };
        bytes.resize(self.content.len(), 0);
        bytes
    }

    fn write(&mut self) -> String {
        let path = self.scratch.path(self.top());
        let disk = Disk::open_cow(&path, None, &DiskOptions::default()).unwrap();
        for _ in 0..1 + self.random.below(5) {
            let start = self.random.below(self.sectors());
            let count = 1 + self.random.below((self.sectors() - start).min(60));
            let range = SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap();
            let byte = u8::try_from(self.random.below(4)).unwrap();
            let at = usize::try_from(start * 512).unwrap();
            let bytes = &mut self.content[at..at + usize::try_from(count * 512).unwrap()];
            bytes.fill(byte);
            match byte {
                0 if self.random.below(2) == 0 => disk.discard(range).unwrap(),
                _ => disk.write(range, bytes).unwrap(),
            }
        }
        disk.close().unwrap();
        "write".into()
    }

    /// Over a copy of the base with other content.
    fn rebase(&mut self) -> String {
        let top = self.top();
        self.files += 1;
        let name = format!("base-{}.img", self.files);
        let mut other = self.scratch.read("base.img");
        let at = usize::try_from(self.random.below(other.len() as u64)).unwrap();
        other[at..].iter_mut().take(5000).for_each(|byte| *byte = 0xbb);
        let len = 512 * (1 + usize::try_from(self.random.below(other.len() as u64 / 512)).unwrap());
        other.truncate(len);
        self.scratch.write(&name, &other);
        self.chain = vec![name.clone(), top.clone()];
        self.cow(&format!("rebase -b {name} {top}"))
    }

    /// To raw, and back over the base.
    fn convert(&mut self) -> String {
        let (top, base) = (self.top(), self.chain[0].clone());
        self.cow(&format!("convert --force -O raw {top} whole.img"));
        assert_eq!(self.scratch.read("whole.img"), self.content, "seed {}", self.seed);
        let new = self.new_name();
        self.chain = vec![base.clone(), new.clone()];
        self.cow(&format!("convert -f raw -b {base} whole.img {new}"))
    }

    fn check(&mut self, what: &str) {
        let top = self.top();
        let told = format!("seed {}, after {what}, {:?}", self.seed, self.chain);
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let disk = Disk::open_cow(&self.scratch.path(&top), None, &options);
        let disk = disk.unwrap_or_else(|err| panic!("{told}: {err}"));
        assert_eq!(disk.size(), self.content.len() as u64, "{told}");
        let all = SectorRange::new(Sector::new(0), disk.capacity()).unwrap();
        let mut bytes = vec![0; self.content.len()];
        disk.read(all, &mut bytes).unwrap();
        let differs = bytes.iter().zip(&self.content).position(|(found, wanted)| found != wanted);
        assert_eq!(differs, None, "{told}");
        drop(disk);
        let check = self.scratch.cow(&format!("check {top}"));
        assert_eq!(check.status, 0, "{told}: {}", check.stdout);
    }
}

#[test]
fn random_commands_keep_the_content_that_the_model_says() {
    for seed in asked_for().map_or(1..4, |seed| seed..seed + 1) {
        println!("seed {seed}");
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            let what = world.step();
            world.check(&what);
        }
    }
}

#[test]
fn a_command_that_is_killed_leaves_nothing_or_can_be_run_again() {
    let scratch = Scratch::new();
    let base = base_image('B', 1000).repeat(64);
    let mut expected = base.clone();
    for at in (0..base.len() - 4096).step_by(65536) {
        expected[at..at + 4096].fill(7);
    }
    scratch.write("other.img", &expected);
    let seed = asked_for().unwrap_or(1);
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut killed = 0;
    for _ in 0..12 {
        scratch.write("base.img", &base);
        set_mtime(&scratch.path("base.img"), crate::common::VECTOR_MTIME);
        scratch.cow_ok("convert --force -f raw -b base.img other.img a.cow");
        let delay = Duration::from_micros(random.below(120_000));
        for args in ["merge a.cow out.img", "merge --in-place --yes a.cow"] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_cow"));
            command.args(args.split(' ')).current_dir(scratch.dir()).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            // Not a wait for something: any moment is a good one.
            std::thread::sleep(delay);
            _ = child.kill();
            killed += u32::from(!child.wait().unwrap().success());
            if args.ends_with("out.img") {
                let out = scratch.path("out.img");
                assert!(!out.exists() || fs::read(&out).unwrap() == expected, "{delay:?}");
                _ = fs::remove_file(out);
            }
        }
        let names = scratch.names();
        let left = names.iter().filter(|name| !name.ends_with(".merging"));
        assert_eq!(left.collect::<Vec<_>>(), ["a.cow", "base.img", "other.img"], "{delay:?}");
        let run = scratch.cow("merge --in-place --yes a.cow");
        assert_eq!(run.status, 0, "{delay:?}: {}", run.stderr);
        assert_eq!(scratch.read("base.img"), expected, "{delay:?}");
        assert_eq!(scratch.names(), ["a.cow", "base.img", "other.img"], "{delay:?}");
        scratch.cow_ok("check a.cow");
    }
    println!("{killed} of 24 commands were killed before their end");
}
