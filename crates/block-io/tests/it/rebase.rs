//! Rebase, conversion and reset on the simulated disk: a crash at every step.

use std::path::Path;

use block_io::image::{BaseOptions, CreateOptions, create_cow};
use block_io::ops::{Copying, convert_to_cow, convert_to_raw, rebase, reset};
use block_io::storage::{Env, Storage};
use block_io::testing::sim::{Choices, CrashKind, Sim};
use block_io::{CowFormat, Disk, DiskOptions};
use cow_format::header::BackingFormat;
use cow_format::{ByteOffset, Sector, SectorCount, SectorRange};

/// How every test copies.
const COPYING: Copying<'static> = Copying { detect_zeroes: true, progress: &|_| () };
const OLD: &str = "/old";
const NEW: &str = "/new";
const COW: &str = "/cow";
const OUT: &str = "/out";
const SIZE: usize = 40 * 512;
/// Random outcomes of a power cut that are tried at each step, besides everything lost and
/// everything kept.
const OUTCOMES: u64 = 3;

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn raw(sim: &Sim, path: &str, bytes: &[u8]) {
    let file = sim.create_new(Path::new(path)).unwrap();
    file.write_all_at(bytes, ByteOffset::new(0)).unwrap();
    file.sync().unwrap();
    sim.sync_parent(Path::new(path)).unwrap();
}

fn open(sim: &Sim, cow: &str) -> Result<Disk<Sim>, String> {
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    Disk::open_cow_in(sim.clone(), Path::new(cow), None, &options).map_err(|err| err.to_string())
}

fn content(disk: &Disk<Sim>) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    disk.read(range(0, 40), &mut bytes).unwrap();
    bytes
}

/// Two images that differ in places, and a COW file over the old one.
fn world(format: CowFormat) -> (Sim, Vec<u8>) {
    let sim = Sim::new();
    let old: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at / 512 + 1).unwrap()).collect();
    let mut new = old.clone();
    new[1024..4096].fill(0xee);
    new[10 * 512..12 * 512].fill(0);
    raw(&sim, OLD, &old);
    raw(&sim, NEW, &new);
    create_cow(&sim, Path::new(COW), &CreateOptions::over(format, Path::new(OLD))).unwrap();
    let options = DiskOptions::default();
    let disk = Disk::open_cow_in(sim.clone(), Path::new(COW), None, &options).unwrap();
    disk.write(range(4, 2), &[0xa1; 1024]).unwrap();
    disk.discard(range(30, 2)).unwrap();
    let expected = content(&disk);
    disk.close().unwrap();
    drop(disk);
    sim.process_death();
    (sim, expected)
}

fn base(path: &str) -> BaseOptions {
    BaseOptions { path: path.into(), format: BackingFormat::Raw, digest: None }
}

/// Lets `work` crash at every step in many ways, and calls `check` after each.
fn every_crash(sim: &Sim, work: impl Fn(&Sim) -> bool, check: impl Fn(&Sim, &str)) {
    for step in 1.. {
        let seeded = (0..OUTCOMES).map(|n| Some(Choices::seeded(step * 1000 + n)));
        let power = [Some(Choices::oldest()), Some(Choices::newest())].into_iter().chain(seeded);
        let mut crashed = false;
        for (part, choices) in power.chain([None, None]).enumerate() {
            let run = sim.fork();
            let kind = match choices {
                Some(_) => CrashKind::PowerCut,
                None => CrashKind::ProcessDeath { part },
            };
            run.crash_at(run.steps() + step, kind);
            let ended = work(&run);
            assert!(ended || run.crashed(), "it fails only by a crash");
            crashed |= run.crashed();
            run.crash_at(u64::MAX, kind);
            let what = format!("step {step}, {choices:?}");
            match choices {
                Some(mut choices) => run.power_cut(&mut choices),
                None => run.process_death(),
            }
            check(&run, &what);
        }
        if !crashed {
            assert!(step > 5, "there are more steps than {step}");
            return;
        }
    }
}

#[test]
fn a_rebase_keeps_the_content_through_every_crash() {
    for format in [CowFormat::Uml, CowFormat::Native] {
        let (sim, expected) = world(format);
        let again = |sim: &Sim| rebase(sim, Path::new(COW), Some(&base(NEW)), &|_| ());
        every_crash(
            &sim,
            |sim| again(sim).is_ok(),
            |sim, what| {
                let told = |err| -> Disk<Sim> { panic!("{format:?}, {what}: {err}") };
                assert_eq!(content(&open(sim, COW).unwrap_or_else(told)), expected, "{what}");
                again(sim).unwrap_or_else(|err| panic!("{format:?}, {what}: {err}"));
                let disk = open(sim, COW).unwrap_or_else(told);
                assert_eq!(content(&disk), expected, "{format:?}, {what}");
                assert_eq!(disk.layers()[1].path(), Path::new(NEW), "{format:?}, {what}");
            },
        );
    }
}

#[test]
fn an_output_is_complete_or_not_there() {
    let (sim, expected) = world(CowFormat::Native);
    let inputs = [Path::new(COW)];
    let to_raw = |sim: &Sim| {
        let disk = open(sim, COW).unwrap();
        convert_to_raw(sim, &disk, &inputs, Path::new(OUT), false, COPYING).is_ok()
    };
    every_crash(&sim, to_raw, |sim, what| {
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        if let Ok(disk) = Disk::open_raw_in(sim.clone(), Path::new(OUT), &options) {
            assert_eq!(content(&disk), expected, "{what}");
        }
    });
    let to_cow = |sim: &Sim| {
        let disk = open(sim, COW).unwrap();
        let reading = DiskOptions { read_only: true, ..DiskOptions::default() };
        let below = Disk::open_raw_in(sim.clone(), Path::new(NEW), &reading).unwrap();
        let options = CreateOptions::over(CowFormat::Native, Path::new(NEW));
        let out = (Path::new(OUT), &options);
        convert_to_cow(sim, &disk, &inputs, out, Some(&below), COPYING).is_ok()
    };
    every_crash(&sim, to_cow, |sim, what| {
        if sim.exists(Path::new(OUT)).unwrap() {
            let disk = open(sim, OUT).unwrap_or_else(|err| panic!("{what}: {err}"));
            assert_eq!(content(&disk), expected, "{what}");
        }
    });
}

#[test]
fn a_reset_leaves_each_sector_as_it_was_or_as_the_base_has_it() {
    for format in [CowFormat::Uml, CowFormat::Native] {
        let (sim, before) = world(format);
        let after: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at / 512 + 1).unwrap()).collect();
        let work = |sim: &Sim| reset(sim, Path::new(COW));
        every_crash(
            &sim,
            |sim| work(sim).is_ok(),
            |sim, what| {
                let found = content(&open(sim, COW).unwrap());
                for (sector, found) in found.chunks(512).enumerate() {
                    let at = sector * 512..(sector + 1) * 512;
                    let allowed = [&before[at.clone()], &after[at]];
                    assert!(allowed.contains(&found), "{format:?}, {what}, sector {sector}");
                }
                work(sim).unwrap();
                assert_eq!(content(&open(sim, COW).unwrap()), after, "{format:?}, {what}");
            },
        );
    }
}
