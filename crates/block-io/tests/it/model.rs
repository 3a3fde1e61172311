//! A chain of disks against the plainest model of one: a `Vec<u8>` of its content for each layer.
//! Random operations, and opened again at any point; every layer is compared with what it was when
//! it was frozen.

use std::path::PathBuf;
use std::time::Duration;

use block_io::image::{CreateOptions, create_cow, resize, snapshot};
use block_io::storage::{Env, Storage};
use block_io::testing::sim::{Choices, Sim};
use block_io::{CowFormat, Disk, DiskOptions};
use cow_format::{ByteOffset, Sector, SectorCount, SectorRange};

/// A base that is no whole number of sectors, of more than one bitmap page.
const BASE_LEN: usize = 33_000 * 512 + 77;
const STEPS: usize = 80;

/// `MODEL_SEEDS=100 cargo test -p block-io --release --test model` digs deeper.
fn seeds() -> std::ops::Range<u64> {
    0..std::env::var("MODEL_SEEDS").map_or(2, |seeds| seeds.parse().expect("MODEL_SEEDS: a number"))
}

struct Random(Choices);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0.choose(usize::try_from(limit).unwrap()) as u64
    }

    /// Mostly small ranges, some that span bitmap pages, many at the borders of things.
    fn range(&mut self, sectors: u64) -> SectorRange {
        let edge = [0, 32_768, 33_000, sectors, self.below(sectors)]
            [usize::try_from(self.below(5)).unwrap()];
        let start = (edge + self.below(16)).saturating_sub(self.below(24)).min(sectors - 1);
        let longest = [1, 8, 8, 64, 64, 64, 1000, sectors][usize::try_from(self.below(8)).unwrap()];
        let count = 1 + self.below(longest.min(sectors - start));
        SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
    }
}

struct Model {
    sim: Sim,
    format: CowFormat,
    random: Random,
    /// Not there only while something is done to the closed file.
    disk: Option<Disk<Sim>>,
    /// What the disk holds, whole sectors.
    content: Vec<u8>,
    /// What the frozen layers hold, the oldest first.
    frozen: Vec<Vec<u8>>,
}

fn name(number: usize) -> PathBuf {
    PathBuf::from(format!("/layers/{number}"))
}

fn open(sim: &Sim, number: usize, read_only: bool) -> Disk<Sim> {
    let options = DiskOptions { read_only, lock_wait: Duration::ZERO, ..DiskOptions::default() };
    Disk::open_cow_in(sim.clone(), &name(number), None, &options).unwrap()
}

fn bytes(range: SectorRange) -> std::ops::Range<usize> {
    let start = usize::try_from(range.start_bytes().get()).unwrap();
    start..start + usize::try_from(range.len_bytes()).unwrap()
}

impl Model {
    fn new(format: CowFormat, seed: u64) -> Self {
        let (sim, base) = (Sim::new(), PathBuf::from("/layers/base"));
        let mut content: Vec<u8> =
            (0..BASE_LEN).map(|at| u8::try_from(at / 512 % 251 + 1).unwrap()).collect();
        sim.create_new(&base).unwrap().write_all_at(&content, ByteOffset::new(0)).unwrap();
        content.resize(BASE_LEN.next_multiple_of(512), 0);
        create_cow(&sim, &name(0), &CreateOptions::over(format, &base)).unwrap();
        let disk = open(&sim, 0, false);
        Model {
            disk: Some(disk),
            sim,
            format,
            random: Random(Choices::seeded(seed)),
            content,
            frozen: Vec::new(),
        }
    }

    fn step(&mut self) {
        let range = self.random.range(self.disk().capacity().get());
        match self.random.below(20) {
            0..=7 => {
                let fill = u8::try_from(self.random.below(256)).unwrap();
                self.content[bytes(range)].fill(fill);
                self.disk().write(range, &self.content[bytes(range)]).unwrap();
            }
            8 | 9 => {
                self.disk().discard(range).unwrap();
                self.content[bytes(range)].fill(0);
            }
            10 => {
                self.disk().write_zeroes(range).unwrap();
                self.content[bytes(range)].fill(0);
            }
            11 => self.disk().flush().unwrap(),
            12 | 13 => self.reopen(true, |_| ()),
            14 | 15 => self.reopen(false, |_| ()),
            16 if self.format == CowFormat::Native => self.reopen(true, |model| {
                let top = model.frozen.len();
                snapshot(&model.sim, &name(top), &name(top + 1)).unwrap();
                model.frozen.push(model.content.clone());
            }),
            17 if self.format == CowFormat::Native => self.reopen(true, |model| {
                let sectors = 30_000 + usize::try_from(model.random.below(10_000)).unwrap();
                resize(&model.sim, &name(model.frozen.len()), sectors as u64 * 512, true).unwrap();
                model.content.resize(sectors * 512, 0);
            }),
            _ => self.compare(range),
        }
    }

    /// Closes, or dies, does something while the disk is not open, and opens again.
    fn reopen(&mut self, close: bool, meanwhile: impl FnOnce(&mut Self)) {
        if close {
            self.disk().close().unwrap();
        } else {
            self.sim.process_death();
        }
        self.disk = None;
        meanwhile(self);
        self.disk = Some(open(&self.sim, self.frozen.len(), false));
        assert_eq!(self.disk().capacity().get() * 512, self.content.len() as u64);
    }

    fn disk(&self) -> &Disk<Sim> {
        self.disk.as_ref().unwrap()
    }

    fn compare(&self, range: SectorRange) {
        let mut found = vec![0xaa; bytes(range).len()];
        self.disk().read(range, &mut found).unwrap();
        same(&found, &self.content[bytes(range)], "the top");
    }

    fn compare_all(&self) {
        for (number, expected) in self.frozen.iter().chain([&self.content]).enumerate() {
            let top = number == self.frozen.len();
            let layer = (!top).then(|| open(&self.sim, number, true));
            let disk = layer.as_ref().unwrap_or(self.disk());
            let mut found = vec![0xaa; expected.len()];
            let all = SectorRange::new(Sector::new(0), disk.capacity()).unwrap();
            disk.read(all, &mut found).unwrap();
            same(&found, expected, &format!("layer {number}"));
        }
    }
}

fn same(found: &[u8], expected: &[u8], what: &str) {
    let differ = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(differ, None, "{what}: first difference at this byte of the range");
    assert_eq!(found.len(), expected.len(), "{what}");
}

#[test]
fn a_chain_is_what_a_vector_is() {
    for format in [CowFormat::Native, CowFormat::Uml] {
        for seed in seeds() {
            println!("{format:?}, seed {seed}");
            let mut model = Model::new(format, seed);
            for _ in 0..STEPS {
                model.step();
            }
            model.compare_all();
        }
    }
}
