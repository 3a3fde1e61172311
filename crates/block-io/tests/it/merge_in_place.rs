//! A merge in place on the simulated disk: the power goes, or the process dies, at every step; and
//! once more while the merge is run again. The disk's content stays the same throughout, and in the
//! end the target has it.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use block_io::image::{CreateOptions, ImageError, create_cow, snapshot};
use block_io::ops::check::check;
use block_io::ops::{Copying, merge_in_place};
use block_io::storage::{Access, Env, Storage};
use block_io::testing::sim::{Choices, CrashKind, Operation, Sim, Verdict};
use block_io::{CowFormat, Disk, DiskOptions};
use cow_format::identity::IdentityError;
use cow_format::{ByteOffset, Sector, SectorCount, SectorRange};

/// How every test copies.
const COPYING: Copying<'static> = Copying { detect_zeroes: true, progress: &|_| () };
const BASE: &str = "/base";
const COW: &str = "/cow";
/// Another COW file over the same base.
const OTHER: &str = "/other";
/// The layer between, where there is one.
const LAYER: &str = "/layer";
/// The last sector is partial.
const SIZE: usize = 40 * 512 - 100;
/// Random outcomes of a power cut that are tried at each step, besides everything lost and
/// everything kept.
const OUTCOMES: u64 = 3;

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn open(sim: &Sim, cow: &str, read_only: bool) -> Result<Disk<Sim>, ImageError> {
    let options = DiskOptions { read_only, ..DiskOptions::default() };
    Disk::open_cow_in(sim.clone(), Path::new(cow), None, &options)
}

/// The content of the disk. What a guest writes past the end, in the last sector, is no part of it.
fn content(disk: &Disk<Sim>) -> Vec<u8> {
    let mut bytes = vec![0; 40 * 512];
    disk.read(range(0, 40), &mut bytes).unwrap();
    bytes.truncate(SIZE);
    bytes
}

/// A base, a COW file over it with some of everything, and another COW file.
struct World {
    sim: Sim,
    expected: Vec<u8>,
    /// Nothing is lost by a power cut.
    flushed: bool,
    /// The merge goes into a layer, not into the base.
    layered: bool,
}

impl World {
    /// `closed`: the COW file was closed in order; otherwise some of its bits are only live, which
    /// a power cut may take.
    fn new(format: CowFormat, closed: bool) -> Self {
        let sim = Sim::new();
        let base = sim.create_new(Path::new(BASE)).unwrap();
        let bytes: Vec<u8> = (0..SIZE).map(|at| u8::try_from(at / 512 + 1).unwrap()).collect();
        base.write_all_at(&bytes, ByteOffset::new(0)).unwrap();
        base.sync().unwrap();
        sim.sync_parent(Path::new(BASE)).unwrap();
        drop(base);
        for cow in [COW, OTHER] {
            create_cow(&sim, Path::new(cow), &CreateOptions::over(format, Path::new(BASE)))
                .unwrap();
        }
        Self::filled(sim, closed, false)
    }

    /// The COW file and the other one are over a frozen layer that has some of the same sectors.
    fn layered() -> Self {
        let world = World::new(CowFormat::Native, true);
        let sim = world.sim;
        sim.move_durably(Path::new(COW), Path::new(LAYER));
        sim.remove(Path::new(OTHER)).unwrap();
        for cow in [COW, OTHER] {
            snapshot(&sim, Path::new(LAYER), Path::new(cow)).unwrap();
        }
        Self::filled(sim, true, true)
    }

    /// Writes to the COW file.
    fn filled(sim: Sim, closed: bool, layered: bool) -> Self {
        let disk = open(&sim, COW, false).unwrap();
        disk.write(range(3, 13), &[0xa1; 13 * 512]).unwrap();
        // Zeros that are written, and zeros that are a hole.
        disk.write(range(16, 9), &[0; 9 * 512]).unwrap();
        disk.discard(range(30, 2)).unwrap();
        disk.flush().unwrap();
        disk.write(range(38, 2), &[0xa2; 2 * 512]).unwrap();
        let expected = content(&disk);
        if closed {
            disk.close().unwrap();
        }
        drop(disk);
        sim.process_death();
        World { sim, expected, flushed: closed, layered }
    }

    fn fork(&self) -> Self {
        World { sim: self.sim.fork(), expected: self.expected.clone(), ..*self }
    }

    fn merge(&self) -> Result<(), String> {
        let depth = NonZeroUsize::MIN;
        let merged = merge_in_place(&self.sim, Path::new(COW), None, depth, COPYING);
        merged.map(|merged| assert!(merged.emptied)).map_err(|err| err.to_string())
    }

    /// After a crash: the disk can be opened and is right, or its header does not match the base.
    fn check_between(&self) -> Result<(), String> {
        let disk = match open(&self.sim, COW, true) {
            Ok(disk) => disk,
            Err(ImageError::Identity { source, .. }) if self.is_expected(&source) => return Ok(()),
            Err(err) => return Err(err.to_string()),
        };
        if content(&disk) == self.expected { Ok(()) } else { Err("the content changed".into()) }
    }

    /// Whether this is how a file that was merged into shows itself.
    fn is_expected(&self, err: &IdentityError) -> bool {
        match err {
            IdentityError::Mtime { .. } => !self.layered,
            IdentityError::Generation { .. } => self.layered,
            _ => false,
        }
    }

    fn check_base(&self) -> Result<(), String> {
        let base = self.sim.open(Path::new(BASE), Access::Read).unwrap();
        let mut bytes = vec![0; SIZE];
        base.read_exact_at(&mut bytes, ByteOffset::new(0)).map_err(|err| err.to_string())?;
        if base.len().unwrap() != SIZE as u64 || bytes != self.expected {
            return Err("the base is not what was merged".into());
        }
        Ok(())
    }

    /// After a merge that came to its end.
    fn check_end(&self) -> Result<(), String> {
        match self.layered {
            false => self.check_base()?,
            true => {
                let layer = open(&self.sim, LAYER, true).map_err(|err| err.to_string())?;
                if content(&layer) != self.expected || !layer.is_present(range(3, 1)).unwrap() {
                    return Err("the layer is not what was merged".into());
                }
            }
        }
        let disk = open(&self.sim, COW, false).map_err(|err| err.to_string())?;
        if content(&disk) != self.expected || disk.is_present(range(3, 1)).unwrap() {
            return Err("the COW file is not empty over the merged base".into());
        }
        disk.close().map_err(|err| err.to_string())?;
        drop(disk);
        let found = check(&self.sim, Path::new(COW), false).map_err(|err| err.to_string())?;
        if !found.is_empty() {
            return Err(format!("the COW file is not clean: {found:?}"));
        }
        match open(&self.sim, OTHER, true) {
            Err(ImageError::Identity { source, .. }) if self.is_expected(&source) => {}
            _ => return Err("the other COW file still takes the base".into()),
        }
        match self.sim.names().iter().find(|name| name.to_str().unwrap().ends_with(".merging")) {
            Some(name) => Err(format!("{} is left", name.display())),
            None => Ok(()),
        }
    }

    /// What follows a crash during a merge: the disk is right, a merge comes to its end.
    fn recover(&self) -> Result<(), String> {
        self.check_between()?;
        self.merge()?;
        self.check_end()
    }
}

/// What can be left by a crash at a step.
#[derive(Clone, Debug)]
enum Crash {
    Power(Choices),
    Death(usize),
}

fn crashes(world: &World, step: u64) -> Vec<Crash> {
    let death = (0..3).map(Crash::Death);
    if !world.flushed {
        return death.collect();
    }
    let seeded = (0..OUTCOMES).map(|n| Choices::seeded(step * 1000 + n));
    let power = [Choices::oldest(), Choices::newest()].into_iter().chain(seeded).map(Crash::Power);
    power.chain(death).collect()
}

/// Lets the merge crash at its step `step` (counted from 1); false if it has fewer.
fn crash_at(world: &World, step: u64, crash: &Crash) -> bool {
    let kind = match crash {
        Crash::Power(_) => CrashKind::PowerCut,
        Crash::Death(part) => CrashKind::ProcessDeath { part: *part },
    };
    world.sim.crash_at(world.sim.steps() + step, kind);
    let ended = world.merge().is_ok();
    // The last steps may be removals whose errors do not matter; only a crash does.
    let crashed = world.sim.crashed();
    world.sim.crash_at(u64::MAX, kind);
    world.sim.set_hook(None);
    assert!(ended || crashed, "a merge fails only by a crash");
    match crash {
        Crash::Power(choices) if crashed => world.sim.power_cut(&mut choices.clone()),
        _ => world.sim.process_death(),
    }
    crashed
}

/// Crashes at every step; with `twice`, also at every third step of what follows. Gives the first
/// failure.
fn every_crash(world: &World, twice: bool, fault: Option<&Fault>) -> Result<(), String> {
    for step in 1.. {
        let mut crashed = false;
        for crash in crashes(world, step) {
            let run = world.fork();
            run.sim.set_hook(fault.map(|fault| fault(&run.sim)));
            crashed |= crash_at(&run, step, &crash);
            let told = |err| format!("step {step}, {crash:?}: {err}");
            run.check_between().map_err(told)?;
            if !twice {
                run.recover().map_err(told)?;
                continue;
            }
            for again in (1 + step % 3..).step_by(3) {
                let run = run.fork();
                let second = Crash::Power(Choices::seeded(step * 1000 + again));
                let more = crash_at(&run, again, &second);
                let told = |err| format!("step {step}, {crash:?}, then {again}: {err}");
                run.recover().map_err(told)?;
                if !more {
                    break;
                }
            }
        }
        if !crashed {
            assert!(step > 15, "a merge has more steps than {step}");
            return Ok(());
        }
    }
    Ok(())
}

type Fault = dyn Fn(&Sim) -> Arc<dyn Fn(u64, Operation<'_>) -> Verdict + Send + Sync>;

#[test]
fn a_merge_outlives_every_crash() {
    for format in [CowFormat::Uml, CowFormat::Native] {
        for closed in [true, false] {
            let world = World::new(format, closed);
            every_crash(&world, false, None)
                .unwrap_or_else(|err| panic!("{format:?} {closed}: {err}"));
        }
    }
}

#[test]
fn a_merge_into_a_layer_outlives_every_crash() {
    let world = World::layered();
    every_crash(&world, false, None).unwrap_or_else(|err| panic!("{err}"));
    every_crash(&world, true, None).unwrap_or_else(|err| panic!("{err}"));
}

#[test]
fn a_merge_that_is_run_again_outlives_the_next_crash() {
    for format in [CowFormat::Uml, CowFormat::Native] {
        let world = World::new(format, true);
        every_crash(&world, true, None).unwrap_or_else(|err| panic!("{format:?}: {err}"));
    }
}

/// Skips every sync of the file at `path`.
fn without_syncs(
    sim: &Sim,
    path: &str,
) -> Arc<dyn Fn(u64, Operation<'_>) -> Verdict + Send + Sync> {
    let ino = sim.open(Path::new(path), Access::Read).unwrap().ino();
    Arc::new(move |file, operation| match operation {
        Operation::Sync if file == ino => Verdict::Skip,
        _ => Verdict::Proceed,
    })
}

#[test]
fn it_is_noticed_if_the_base_is_not_synced_or_the_bits_or_the_names_are_not() {
    let worlds = [
        ("uml", World::new(CowFormat::Uml, true)),
        ("native", World::new(CowFormat::Native, true)),
        ("layer", World::layered()),
    ];
    for (name, world) in worlds {
        let target = if world.layered { LAYER } else { BASE };
        let base: &Fault = &move |sim| without_syncs(sim, target);
        let cow: &Fault = &|sim| without_syncs(sim, COW);
        let names: &Fault = &|_| {
            Arc::new(|_, operation| match operation {
                Operation::SyncNames => Verdict::Skip,
                _ => Verdict::Proceed,
            })
        };
        for (what, fault) in [("target", base), ("cow", cow), ("names", names)] {
            let noticed = every_crash(&world, false, Some(fault));
            println!("{name}, no sync of {what}: {noticed:?}");
            assert!(noticed.is_err(), "{name}: nobody noticed that there is no sync of {what}");
        }
    }
}

#[test]
fn an_empty_cow_file_leaves_the_base_alone() {
    let world = World::new(CowFormat::Native, true);
    let merged =
        merge_in_place(&world.sim, Path::new(OTHER), None, NonZeroUsize::MIN, COPYING).unwrap();
    assert!(merged.emptied);
    assert!(open(&world.sim, COW, true).is_ok(), "the base is what it was");
    let two = NonZeroUsize::new(2).unwrap();
    let err = merge_in_place(&world.sim, Path::new(COW), None, two, COPYING).unwrap_err();
    assert!(err.to_string().contains("nothing to merge into"), "{err}");
}
