//! Programs, the model of what they may leave behind, and the harness that crashes them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block_io::image::{CreateOptions, ImageError, Proof, create_cow, rebind, resize, snapshot};
use block_io::storage::{Env, Storage};
use block_io::testing::sim::{Choices, CrashKind, Operation, Sim, SimFile, Verdict};
use block_io::{CowFormat, Disk, DiskOptions};
use cow_format::{ByteOffset, Sector, SectorCount, SectorRange};

const BASE: &str = "/base";
/// Stands for the base's digest.
const DIGEST: [u8; 32] = [7; 32];
/// Two bitmap pages and a bit, the last sector partial.
const SECTORS: u64 = 70_000;
const SIZE: u64 = SECTORS * 512 - 100;
/// Where programs write: the beginning, the border of two bitmap pages, the end of the base and
/// what may grow behind it.
const AREAS: [std::ops::Range<u64>; 3] = [0..16, 32_764..32_772, SECTORS - 4..SECTORS + 4];
/// Sizes in sectors that a disk is given: less than the base has, more, and as many.
const SIZES: [u64; 4] = [SECTORS - 2, SECTORS, SECTORS + 4, 32_768];
/// Outcomes of a power cut that are tried at each step, besides everything lost and everything
/// kept.
const OUTCOMES: u64 = 2;
/// An enumeration of more outcomes than this is too long for a test; the programs are chosen to
/// stay below.
const OUTCOMES_MAX: usize = 20_000;
/// Room for two records of a few sectors: it fills up and is reset all the time.
const JOURNAL_LEN: u64 = 5 * 4096;

/// One step of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes sectors; each program step writes content of its own.
    Write {
        start: u64,
        count: u64,
    },
    Discard {
        start: u64,
        count: u64,
    },
    WriteZeroes {
        start: u64,
        count: u64,
    },
    Flush,
    /// Closes and opens.
    Reopen,
    /// Opens again without having closed: the process died between two steps.
    Die,
    /// A flush whose sync fails; then the process dies, and another opens the file in the same page
    /// cache.
    FailSync,
    /// The kernel fails to write to the disk, and the process dies before it hears of that.
    FailWriteback,
    /// Closes, moves the base, and opens with the base's new name.
    Move,
    /// Closes, moves and touches the base, and rebinds the file over it.
    Rebind,
    /// Closes, freezes, and continues with a new file on top.
    Snapshot,
    /// Closes, and changes the size of the disk.
    Resize {
        sectors: u64,
    },
}

/// A sequence of steps.
#[derive(Clone, Debug)]
pub struct Program(pub Vec<Op>);

/// What is done wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    FirstSyncLeftOut,
    BitmapBeforeData,
    LiveBitAfterAck,
    OtherBootBelieved,
    HeaderInPlace,
    RecordLeftOut,
    JournalNotBegunAnew,
    /// The boot id alone decides whether a page cache is believed.
    OtherCacheBelieved,
    /// The page cache that lives on is taken for another: the journal is put over newer writes.
    JournalOverNewerWrites,
    /// After a failed sync nothing is written for the successor.
    FailedSyncForgotten,
    /// The successor does not ask whether writing to the disk has failed.
    FailedWritebackUnseen,
    /// The successor continues with what the page cache shows, though it is void.
    CacheKept,
}

impl Program {
    /// `len` steps that a seed decides.
    pub fn random(seed: u64, len: usize) -> Self {
        let mut choices = Choices::seeded(seed);
        let mut choose = |n: u64| choices.choose(usize::try_from(n).unwrap()) as u64;
        let ops = (0..len).map(|_| {
            let area = &AREAS[usize::try_from(choose(3)).unwrap()];
            let start = area.start + choose(area.end - area.start);
            let count = 1 + choose((area.end - start).min(8));
            match choose(22) {
                0..=5 => Op::Write { start, count },
                6 => Op::Discard { start, count },
                7 => Op::WriteZeroes { start, count },
                8..=10 => Op::Flush,
                11 | 12 => Op::Reopen,
                13 | 14 => Op::Die,
                15 => Op::Move,
                16 => Op::Rebind,
                17 => Op::Snapshot,
                18 => Op::FailSync,
                19 => Op::FailWriteback,
                _ => Op::Resize { sectors: SIZES[usize::try_from(choose(4)).unwrap()] },
            }
        });
        Program(ops.collect())
    }
}

impl Program {
    /// Mostly writes that are flushed one by one, as the journal is made for.
    pub fn flushing(seed: u64, len: usize) -> Self {
        let mut choices = Choices::seeded(seed);
        let mut choose = |n: u64| choices.choose(usize::try_from(n).unwrap()) as u64;
        let mut ops = vec![Op::Flush, Op::Write { start: 0, count: 1 }, Op::Flush];
        for _ in 0..len {
            let area = &AREAS[usize::try_from(choose(3)).unwrap()];
            let start = area.start + choose(area.end - area.start);
            let count = 1 + choose((area.end - start).min(4));
            ops.push(match choose(14) {
                0..=4 => Op::Write { start, count },
                5 => Op::Discard { start, count },
                6 => Op::Die,
                7 => Op::FailSync,
                8 => Op::FailWriteback,
                _ => Op::Flush,
            });
        }
        Program(ops)
    }
}

type Content = [u8; 512];

/// What each sector may hold.
#[derive(Clone)]
struct Model {
    sectors: BTreeMap<u64, SectorModel>,
    /// The size of the disk, in sectors.
    capacity: u64,
    /// The size that it is just being given.
    resizing: Option<u64>,
}

#[derive(Clone)]
struct SectorModel {
    /// The last flushed content, then that of every write since, acknowledged or not.
    since_flush: Vec<Content>,
    /// What the last acknowledged write left, then what writes under way may have left.
    since_ack: Vec<Content>,
}

impl Model {
    fn new() -> Self {
        let one = |sector| {
            let content = base_content(sector);
            (sector, SectorModel { since_flush: vec![content], since_ack: vec![content] })
        };
        let sectors = AREAS.into_iter().flatten().map(one).collect();
        Model { sectors, capacity: SECTORS, resizing: None }
    }

    fn resized(&mut self, capacity: u64) {
        self.capacity = capacity;
        self.resizing = None;
        for (_, model) in self.sectors.range_mut(capacity..) {
            (model.since_flush, model.since_ack) = (vec![[0; 512]], vec![[0; 512]]);
        }
    }

    fn begin(&mut self, range: SectorRange, content: Content) {
        for sector in range.start().get()..range.end().get() {
            let model = self.sectors.get_mut(&sector).unwrap();
            model.since_flush.push(content);
            model.since_ack.push(content);
        }
    }

    fn acknowledge(&mut self, range: SectorRange) {
        for sector in range.start().get()..range.end().get() {
            let acked = &mut self.sectors.get_mut(&sector).unwrap().since_ack;
            acked.drain(..acked.len() - 1);
        }
    }

    fn flushed(&mut self) {
        for model in self.sectors.values_mut() {
            model.since_flush.drain(..model.since_flush.len() - 1);
        }
    }

    /// Compares a disk that was opened after a crash, and continues with its content.
    fn recover(&mut self, disk: &Disk<Sim>, power_cut: bool) -> Result<(), String> {
        let capacity = disk.capacity().get();
        if Some(capacity) == self.resizing {
            self.resized(capacity);
        } else if capacity != self.capacity {
            return Err(format!("the disk has {capacity} sectors, not {}", self.capacity));
        }
        self.resizing = None;
        for (&sector, model) in self.sectors.range_mut(..capacity) {
            let mut found = [0; 512];
            disk.read(range(sector, 1), &mut found).map_err(|err| err.to_string())?;
            let (allowed, rule) = match power_cut {
                true => (&model.since_flush, "flushed or written since"),
                false => (&model.since_ack, "acknowledged or under way"),
            };
            if !allowed.contains(&found) {
                let show = |content: &Content| u32::from_le_bytes(*content.first_chunk().unwrap());
                let allowed: Vec<_> = allowed.iter().map(show).collect();
                return Err(format!("sector {sector} has {}, {rule}: {allowed:?}", show(&found)));
            }
            model.since_ack = vec![found];
            // A power cut leaves nothing that is not durable; after a death all of it is still
            // under way.
            match power_cut {
                true => model.since_flush = vec![found],
                false => model.since_flush.push(found),
            }
        }
        Ok(())
    }
}

/// How a system ends.
#[derive(Clone, Debug)]
enum End {
    Death,
    PowerCut(Choices),
    /// The page cache goes without a reboot.
    CacheLoss(Choices),
}

impl End {
    /// Only what was flushed is sure to be there.
    fn keeps_flushed_only(&self) -> bool {
        !matches!(self, End::Death)
    }

    /// One of the two that leave what is durable, every other time.
    fn losing(number: u64, choices: Choices) -> Self {
        match number % 2 {
            0 => End::PowerCut(choices),
            _ => End::CacheLoss(choices),
        }
    }
}

/// Runs programs in one format, correctly or with a fault.
pub struct Harness {
    format: CowFormat,
    fault: Option<Fault>,
    /// One page cache can be told from another.
    witness: bool,
}

/// A system in the middle of a program.
struct Run<'a> {
    harness: &'a Harness,
    sim: Sim,
    model: Model,
    /// Sectors have got new bits since the last flush.
    new_bits: bool,
    /// For [`Fault::FirstSyncLeftOut`]: the next sync is to be left out.
    leave_out: Arc<AtomicBool>,
    /// For [`Fault::FailedSyncForgotten`]: so are writes of the header.
    forget: Arc<AtomicBool>,
    /// Writing to the disk has failed: until the disk has been opened again only what was flushed
    /// is sure to be there.
    doubtful: bool,
    next_tag: u32,
    /// Where the base is.
    base: PathBuf,
    /// Snapshots so far: the top is the file of this number.
    snapshots: u32,
    /// The last snapshot's new file has never been opened: a power cut may take it away.
    new_top: bool,
}

impl Harness {
    pub fn new(format: CowFormat, fault: Option<Fault>) -> Self {
        Harness { format, fault, witness: true }
    }

    /// Where no page cache can be told from another.
    pub fn without_witness(format: CowFormat) -> Self {
        Harness { witness: false, ..Harness::new(format, None) }
    }

    /// Crashes `program` at each of its steps in each way, tries some outcomes, and crashes the
    /// recovery from each at each of its steps as well.
    pub fn crash_everywhere(&self, program: &Program, seed: u64) -> Result<(), String> {
        let (first, last) = self.steps(program)?;
        for step in first..=last {
            let seed = seed ^ step << 8;
            let crashed = self.crashed(program, step, CrashKind::PowerCut);
            let random = (0..OUTCOMES).map(|n| Choices::seeded(seed.wrapping_mul(1_000_003) + n));
            let choices = [Choices::oldest(), Choices::newest()].into_iter().chain(random);
            for (number, choices) in (step..).zip(choices) {
                let end = End::losing(number, choices);
                let recovered = crashed.ended(&end).recover(true);
                recovered.map_err(|err| format!("step {step}, {end:?}: {err}"))?;
            }
            for part in [0, 1, usize::MAX / 2] {
                let name = format!("death at step {step}, part {part}");
                let crashed = self.crashed(program, step, CrashKind::ProcessDeath { part });
                // It got the error of a failed write, no process will get the error again, and it
                // has not passed that on yet.
                if crashed.sim.told_at() == Some(step - 1) {
                    continue;
                }
                crashed
                    .ended(&End::Death)
                    .recover(false)
                    .map_err(|err| format!("{name}: {err}"))?;
            }
            for end in [End::Death, End::losing(step / 2, Choices::seeded(seed))] {
                let recovered = crashed.ended(&end).crash_recovery(end.keeps_flushed_only(), seed);
                recovered.map_err(|err| format!("crash at step {step}, {end:?}, {err}"))?;
            }
        }
        Ok(())
    }

    /// Cuts the power at each step of `program` and tries every outcome.
    pub fn crash_exhaustively(&self, program: &Program) -> Result<(), String> {
        let (first, last) = self.steps(program)?;
        for step in first..=last {
            let crashed = self.crashed(program, step, CrashKind::PowerCut);
            let mut choices = Choices::enumerated();
            for count in 0.. {
                assert!(count < OUTCOMES_MAX, "step {step} has too many outcomes");
                let recovered = crashed.restarted(&mut choices).recover(true);
                recovered.map_err(|err| format!("power cut at step {step}, {choices:?}: {err}"))?;
                if !choices.advance() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The first and the last step of a run that does not crash.
    fn steps(&self, program: &Program) -> Result<(u64, u64), String> {
        let mut run = Run::prepare(self);
        let first = run.sim.steps() + 1;
        run.program(program)?;
        Ok((first, run.sim.steps()))
    }

    fn crashed(&self, program: &Program, step: u64, kind: CrashKind) -> Run<'_> {
        let mut run = Run::prepare(self);
        run.sim.crash_at(step, kind);
        let result = run.program(program);
        assert!(run.sim.crashed(), "step {step} was not reached: {result:?}");
        run
    }
}

impl Run<'_> {
    /// A base and an empty COW file over it, both durable.
    fn prepare(harness: &Harness) -> Run<'_> {
        let run = Run {
            harness,
            sim: Sim::new(),
            model: Model::new(),
            new_bits: false,
            leave_out: Arc::default(),
            forget: Arc::default(),
            doubtful: false,
            next_tag: 1,
            base: PathBuf::from(BASE),
            snapshots: 0,
            new_top: false,
        };
        run.set_hook();
        if !harness.witness {
            run.sim.hide_witness();
        }
        make_base(&run.sim);
        let mut options = CreateOptions::over(harness.format, Path::new(BASE));
        if harness.format == CowFormat::Native {
            options.base.as_mut().unwrap().digest = Some(DIGEST);
            options.journal_len = Some(JOURNAL_LEN);
        }
        create_cow(&run.sim, &cow_name(0), &options).unwrap();
        run
    }

    fn fork(&self) -> Self {
        let run = Run {
            sim: self.sim.fork(),
            model: self.model.clone(),
            leave_out: Arc::default(),
            forget: Arc::default(),
            base: self.base.clone(),
            ..*self
        };
        run.set_hook();
        run
    }

    /// The system after the crash and a power cut, up again.
    fn restarted(&self, choices: &mut Choices) -> Self {
        let mut run = self.fork();
        run.sim.power_cut(choices);
        if run.harness.fault == Some(Fault::OtherBootBelieved) {
            run.sim.forge_boot_id();
        }
        run.new_bits = true;
        run
    }

    /// The system after it ended so, up again.
    fn ended(&self, end: &End) -> Self {
        match end {
            End::PowerCut(choices) => self.restarted(&mut choices.clone()),
            End::CacheLoss(choices) => {
                let mut run = self.fork();
                run.sim.cache_loss(&mut choices.clone());
                if run.harness.fault == Some(Fault::OtherCacheBelieved) {
                    run.sim.forge_witness();
                }
                run.new_bits = true;
                run
            }
            End::Death => {
                let mut run = self.fork();
                run.die();
                run
            }
        }
    }

    fn die(&mut self) {
        self.sim.process_death();
        if self.harness.fault == Some(Fault::JournalOverNewerWrites) {
            self.sim.spoil_witness();
        }
        self.new_bits = true;
    }

    /// Compares a disk that has just been opened. Where only what was flushed is sure to be there,
    /// the page cache then evicts what it may, which must not be visible.
    fn compare(&mut self, disk: &Disk<Sim>, flushed_only: bool) -> Result<(), String> {
        let flushed_only = flushed_only || self.doubtful || !self.harness.witness;
        self.model.recover(disk, flushed_only)?;
        self.doubtful = false;
        if flushed_only {
            self.sim.evict();
        }
        Ok(())
    }

    /// Opens the disk after a crash, compares, and uses it for a while.
    fn recover(mut self, power_cut: bool) -> Result<(), String> {
        let disk = self.open()?;
        self.compare(&disk, power_cut)?;
        drop(disk);
        self.sim.process_death();
        let (start, count) = (2, 3);
        self.program(&Program(vec![Op::Write { start, count }, Op::Flush, Op::Reopen]))?;
        // The header now leads to the base by itself.
        let disk = self.open_over(None).map_err(|err| err.to_string())?;
        self.model.recover(&disk, false)
    }

    /// Crashes at each step of the recovery, and recovers from that.
    fn crash_recovery(&self, power_cut: bool, seed: u64) -> Result<(), String> {
        let first = self.sim.steps() + 1;
        let mut whole = self.fork();
        let disk = whole.open()?;
        disk.close().map_err(|err| err.to_string())?;
        drop(disk);
        for step in first..=whole.sim.steps() {
            // Each crash at every other step: together with the steps of the program all pairs come
            // about.
            let again = match step % 2 {
                0 => End::losing(step / 2, Choices::seeded(seed ^ step << 16)),
                _ => End::Death,
            };
            let mut run = self.fork();
            let kind = match again {
                End::Death => CrashKind::ProcessDeath { part: 1 },
                _ => CrashKind::PowerCut,
            };
            run.sim.crash_at(step, kind);
            if let Ok(disk) = run.open() {
                _ = disk.close();
            }
            assert!(run.sim.crashed());
            let recovered = run.ended(&again).recover(power_cut || again.keeps_flushed_only());
            recovered
                .map_err(|err| format!("then at step {step} of the recovery, {again:?}: {err}"))?;
        }
        Ok(())
    }

    /// Shows the simulated system the fault that its hook commits.
    fn set_hook(&self) {
        let leave_out = Arc::clone(&self.leave_out);
        let forget = Arc::clone(&self.forget);
        let fault = self.harness.fault;
        self.sim.set_hook(Some(Arc::new(move |_ino, operation| match operation {
            Operation::Sync if leave_out.swap(false, Ordering::Relaxed) => Verdict::Skip,
            Operation::CheckWriteback if fault == Some(Fault::FailedWritebackUnseen) => {
                Verdict::Skip
            }
            Operation::DropCache if fault == Some(Fault::CacheKept) => Verdict::Skip,
            Operation::Write { at, .. } | Operation::WriteDurably { at, .. }
                if at.get() < 8192 && forget.load(Ordering::Relaxed) =>
            {
                Verdict::Skip
            }
            Operation::Write { at, len: 4096 } | Operation::WriteDurably { at, len: 4096 }
                if fault == Some(Fault::HeaderInPlace) && at.get() == 4096 =>
            {
                Verdict::WriteAt(ByteOffset::new(0))
            }
            Operation::WriteDurably { at, .. }
                if fault == Some(Fault::JournalNotBegunAnew) && at.get() < 8192
                    || fault == Some(Fault::RecordLeftOut) && at.get() >= 8192 =>
            {
                Verdict::Skip
            }
            _ => Verdict::Proceed,
        })));
    }

    /// Opens the disk as a user would who knows what was being done when the system crashed: names
    /// the base where it is, does a rebind or a snapshot again that was not complete.
    fn open(&mut self) -> Result<Disk<Sim>, String> {
        let exists = |number| self.sim.exists(&cow_name(number)).map_err(|err| err.to_string());
        if exists(self.snapshots + 1)? {
            (self.snapshots, self.new_top) = (self.snapshots + 1, true);
        } else if self.new_top && !exists(self.snapshots)? {
            self.snapshots -= 1;
        }
        let base = (self.snapshots == 0).then(|| self.base.clone());
        let opened = match self.open_over(base.as_deref()) {
            Err(ImageError::Identity { .. } | ImageError::Backing { .. }) => {
                self.rebind(Proof::Trust)?;
                self.open_over(None)
            }
            Err(ImageError::Frozen { .. }) => {
                self.snapshot()?;
                self.open_over(None)
            }
            opened => opened,
        };
        let disk = opened.map_err(|err| err.to_string())?;
        self.new_top = false;
        Ok(disk)
    }

    fn open_over(&self, base: Option<&Path>) -> Result<Disk<Sim>, ImageError> {
        let options = DiskOptions { lock_wait: Duration::ZERO, ..DiskOptions::default() };
        Disk::open_cow_in(self.sim.clone(), &cow_name(self.snapshots), base, &options)
    }

    fn rebind(&self, proof: Proof<'_, SimFile>) -> Result<(), String> {
        rebind(&self.sim, &cow_name(0), Some(&self.base), proof).map_err(|err| err.to_string())
    }

    fn snapshot(&mut self) -> Result<(), String> {
        let new = self.snapshots + 1;
        snapshot(&self.sim, &cow_name(self.snapshots), &cow_name(new))
            .map_err(|err| err.to_string())?;
        self.snapshots = new;
        Ok(())
    }

    fn close(&mut self, disk: Disk<Sim>) -> Result<(), String> {
        self.flush(&disk)?;
        disk.close().map_err(|err| err.to_string())
    }

    fn move_base(&mut self) {
        let from = std::mem::replace(&mut self.base, base_name(self.next_tag));
        self.next_tag += 1;
        self.sim.move_durably(&from, &self.base);
    }

    fn program(&mut self, program: &Program) -> Result<(), String> {
        let mut disk = self.open()?;
        for op in &program.0 {
            match *op {
                Op::Write { start, count } => {
                    let content = tagged(1_000_000 + self.next_tag);
                    self.next_tag += 1;
                    self.write(&disk, range(start, count), content, |file, at, data| {
                        file.write_all_at(data, at)
                    })?;
                }
                Op::Discard { start, count } => {
                    let punch = |file: &SimFile, at, data: &[u8]| file.punch(at, data.len() as u64);
                    self.write(&disk, range(start, count), [0; 512], punch)?;
                }
                Op::WriteZeroes { start, count } => {
                    let zero = |file: &SimFile, at, data: &[u8]| {
                        file.zero_keep_allocated(at, data.len() as u64)
                    };
                    self.write(&disk, range(start, count), [0; 512], zero)?;
                }
                Op::Flush => self.flush(&disk)?,
                Op::Reopen => {
                    self.close(disk)?;
                    disk = self.open()?;
                }
                Op::Move => {
                    self.close(disk)?;
                    self.move_base();
                    disk = self.open()?;
                }
                Op::Rebind => {
                    self.close(disk)?;
                    self.move_base();
                    self.sim.touch(&self.base);
                    let mut digest = |_: &SimFile| Ok(DIGEST);
                    self.rebind(match self.harness.format {
                        CowFormat::Uml => Proof::Trust,
                        CowFormat::Native => Proof::Digest(&mut digest),
                    })?;
                    disk = self.open()?;
                }
                Op::Snapshot | Op::Resize { .. } if self.harness.format == CowFormat::Uml => {}
                Op::Snapshot => {
                    self.close(disk)?;
                    self.snapshot()?;
                    disk = self.open()?;
                }
                Op::Resize { sectors } => {
                    self.close(disk)?;
                    self.model.resizing = Some(sectors);
                    resize(&self.sim, &cow_name(self.snapshots), sectors * 512, true)
                        .map_err(|err| err.to_string())?;
                    self.model.resized(sectors);
                    disk = self.open()?;
                }
                Op::Die => {
                    drop(disk);
                    self.die();
                    disk = self.open()?;
                    if !self.harness.witness {
                        self.compare(&disk, true)?;
                    }
                }
                Op::FailSync => {
                    self.doubtful = true;
                    self.fail_flush(&disk)?;
                    drop(disk);
                    self.die();
                    disk = self.open()?;
                    self.compare(&disk, true)?;
                }
                Op::FailWriteback => {
                    self.doubtful = true;
                    let mut choices = self.choices();
                    self.sim.fail_writeback(&mut choices);
                    drop(disk);
                    self.die();
                    disk = self.open()?;
                    self.compare(&disk, true)?;
                }
            }
        }
        Ok(())
    }

    /// Changes sectors as the daemon does: the data, then [`Writing::written`], then the
    /// acknowledgement.
    fn write(
        &mut self,
        disk: &Disk<Sim>,
        range: SectorRange,
        content: Content,
        change: impl FnOnce(&SimFile, ByteOffset, &[u8]) -> std::io::Result<()>,
    ) -> Result<(), String> {
        let range = range.clipped_to(Sector::new(self.model.capacity));
        if range.is_empty() {
            return Ok(());
        }
        let data = content.repeat(usize::try_from(range.count().get()).unwrap());
        self.model.begin(range, content);
        self.new_bits |= !disk.is_present(range).unwrap();
        let writing = disk.begin_write(range);
        if self.harness.fault == Some(Fault::BitmapBeforeData) {
            disk.begin_write(range).written(&[range]).map_err(|err| err.to_string())?;
            disk.flush().map_err(|err| err.to_string())?;
        }
        change(disk.layers()[0].file(), disk.write_at(range), &data)
            .map_err(|err| err.to_string())?;
        if self.harness.fault == Some(Fault::LiveBitAfterAck) {
            self.model.acknowledge(range);
        }
        writing.written(&[range]).map_err(|err| err.to_string())?;
        self.model.acknowledge(range);
        Ok(())
    }

    fn choices(&mut self) -> Choices {
        self.next_tag += 1;
        Choices::seeded(self.next_tag.into())
    }

    /// A flush whose first sync fails, if it does one.
    fn fail_flush(&mut self, disk: &Disk<Sim>) -> Result<(), String> {
        let choices = self.choices();
        self.sim.fail_next_sync(Some(&choices));
        self.forget
            .store(self.harness.fault == Some(Fault::FailedSyncForgotten), Ordering::Relaxed);
        let flushed = disk.flush();
        self.forget.store(false, Ordering::Relaxed);
        self.sim.fail_next_sync(None);
        match flushed {
            Ok(()) => self.model.flushed(),
            Err(err) if !disk.is_failed() => return Err(err.to_string()),
            // Also if the system has crashed.
            Err(err) if self.sim.crashed() => return Err(err.to_string()),
            Err(_) => {}
        }
        Ok(())
    }

    fn flush(&mut self, disk: &Disk<Sim>) -> Result<(), String> {
        let first_of_two = self.harness.fault == Some(Fault::FirstSyncLeftOut) && self.new_bits;
        self.leave_out.store(first_of_two, Ordering::Relaxed);
        disk.flush().map_err(|err| err.to_string())?;
        self.new_bits = false;
        self.model.flushed();
        Ok(())
    }
}

fn make_base(sim: &Sim) {
    let file = sim.create_new(Path::new(BASE)).unwrap();
    for sector in AREAS.into_iter().flatten().filter(|sector| *sector < SECTORS) {
        file.write_all_at(&base_content(sector), ByteOffset::new(sector * 512)).unwrap();
    }
    file.set_len(SIZE).unwrap();
    file.sync().unwrap();
    sim.sync_parent(Path::new(BASE)).unwrap();
}

fn cow_name(number: u32) -> PathBuf {
    PathBuf::from(format!("/cow{number}"))
}

/// Names of all lengths: they end in any of the first sectors of a header.
fn base_name(tag: u32) -> PathBuf {
    let dirs = usize::try_from(tag % 4).unwrap();
    PathBuf::from(format!("{}/base{tag}", "/directory-with-a-long-name".repeat(dirs * 10)))
}

/// As a guest sees it: zeros after the end of the base.
fn base_content(sector: u64) -> Content {
    if sector >= SECTORS {
        return [0; 512];
    }
    let mut content = tagged(u32::try_from(sector + 1).unwrap());
    let held = usize::try_from(SIZE - sector * 512).unwrap().min(512);
    content[held..].fill(0);
    content
}

fn tagged(tag: u32) -> Content {
    let mut content = [0; 512];
    content.chunks_exact_mut(4).for_each(|chunk| chunk.copy_from_slice(&tag.to_le_bytes()));
    content
}

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}
