//! What each sector of a disk may hold.
//!
//! A sector has a list of versions: the first is durable, the others came after it, in their order.
//! After a cut any of them may be there. One that was read after the cut is the only one as soon as
//! a flush has succeeded since.

use std::fmt;

use blk_bench::driver::queue::{Op, SECTOR_SIZE};

use super::client_log::{ClientLog, Event, Run};
use super::program::{BASE_PROGRAM, DISK_SECTORS, Program, Seen, base_op, index, look};

/// Wrong sectors that a report shows one by one, and runs of them.
const SHOWN: usize = 12;

/// What an operation leaves in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Its stamp.
    Data {
        /// Program.
        program: u64,
        /// Operation.
        op: u64,
    },
    /// Zeros.
    Zero,
}

impl Version {
    fn shows_as(self, seen: Seen) -> bool {
        match self {
            Self::Zero => seen == Seen::Zero,
            Self::Data { program, op } => seen == Seen::Data { program, op },
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => write!(f, "zeros"),
            Self::Data { program: BASE_PROGRAM, op } => write!(f, "base {op}"),
            Self::Data { program, op } => write!(f, "{program}.{op}"),
        }
    }
}

/// What a tool does to the content of a disk that is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `cow snapshot`: a new file on top.
    Snapshot,
    /// `cow merge --in-place`: the changes into the file below.
    Merge,
    /// `cow reset`: the disk is what is below.
    Reset,
    /// `cow rebase`: onto base image 1.
    Rebase,
    /// `cow resize`: [`GROWTH`] more sectors.
    Resize,
}

/// How much `cow resize` adds: an odd number of sectors.
pub const GROWTH: u64 = 2049;

impl Tool {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Snapshot, Self::Merge, Self::Reset, Self::Rebase, Self::Resize];

    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Merge => "merge",
            Self::Reset => "reset",
            Self::Rebase => "rebase",
            Self::Resize => "resize",
        }
    }
}

/// What was found wrong, and how much there was that could have been.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Whole disks that were read and judged.
    pub dumps: u64,
    /// What no version allows, in words.
    pub violations: Vec<String>,
    /// Sectors that had more than one version when they were read.
    pub open: u64,
    /// Of them, those that held a newer one than the durable one.
    pub newer: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Sectors of durable operations.
    pub durable_sectors: u64,
}

/// The disk as it may be.
pub struct Model {
    seed: u64,
    versions: Vec<Vec<Version>>,
    /// What the file below the top may hold.
    below: Vec<Vec<Version>>,
    /// What the last dump showed, until something has made it durable.
    shown: Option<Vec<Version>>,
    /// A resize may or may not have happened.
    may_have_grown: bool,
}

impl Model {
    /// A new disk over base image 0; its programs are those of `seed`.
    pub fn new(seed: u64) -> Self {
        let base = base_image(0);
        Self {
            seed,
            versions: base.iter().map(|&version| vec![version]).collect(),
            below: vec![base],
            shown: None,
            may_have_grown: false,
        }
    }

    /// Follows the report of one boot. `dump` returns the sectors of the next disk that was read.
    pub fn follow(
        &mut self,
        client_log: &ClientLog,
        mut dump: impl FnMut(u64) -> Vec<u8>,
    ) -> Verdict {
        let mut verdict = Verdict::default();
        self.shown = None;
        let mut events = client_log.events.as_slice();
        while let Some((event, rest)) = events.split_first() {
            events = rest;
            match event {
                Event::Dumped(sectors) => self.judge(*sectors, &dump(*sectors), &mut verdict),
                Event::Closed(0) => self.settle(),
                Event::Closed(_) => {}
                Event::Tool(name, status) => self.tool(name, *status == Some(0)),
                Event::Run(first) => {
                    let is_run = |event: &&Event| matches!(event, Event::Run(_));
                    let more = rest.iter().take_while(is_run).count();
                    let (runs, rest) = rest.split_at(more);
                    let runs = runs.iter().filter_map(|event| match event {
                        Event::Run(run) => Some(run),
                        _ => None,
                    });
                    self.play([first].into_iter().chain(runs).collect(), &mut verdict);
                    events = rest;
                }
            }
        }
        verdict
    }

    /// The content that was read is durable.
    fn settle(&mut self) {
        for (versions, shown) in
            self.versions.iter_mut().zip(self.shown.take().into_iter().flatten())
        {
            *versions = vec![shown];
        }
    }

    fn judge(&mut self, sectors: u64, content: &[u8], verdict: &mut Verdict) {
        verdict.dumps += 1;
        self.judge_size(sectors, verdict);
        let mut wrong = vec![];
        let mut shown = Vec::with_capacity(index(sectors));
        let contents = content.chunks_exact(SECTOR_SIZE);
        for ((lba, sector), versions) in (0..).zip(contents).zip(&mut self.versions) {
            let seen = look(sector, lba);
            let at = versions.iter().rposition(|version| version.shows_as(seen));
            let open = versions.len() > 1;
            verdict.open += u64::from(open);
            verdict.newer += u64::from(open && at.is_some_and(|at| at > 0));
            if at.is_none() {
                let may: Vec<_> = versions.iter().map(Version::to_string).collect();
                wrong.push((
                    lba,
                    format!("{seen:?}; may be, the first is durable: {}", may.join(" ")),
                ));
                // Continues from the content found, so that one fault is reported once.
                versions.push(as_version(seen));
            }
            shown.push(versions[at.unwrap_or(versions.len() - 1)]);
        }
        self.shown = Some(shown);
        report(&wrong, &mut verdict.violations);
    }

    fn judge_size(&mut self, sectors: u64, verdict: &mut Verdict) {
        let len = self.versions.len() as u64;
        if self.may_have_grown && sectors == len + GROWTH {
            self.grow();
        } else if sectors != len {
            verdict.violations.push(format!("the disk has {sectors} sectors; expected {len}"));
            self.versions.resize(index(sectors), vec![Version::Zero]);
        }
        self.may_have_grown = false;
    }

    fn grow(&mut self) {
        let sectors = self.versions.len() + index(GROWTH);
        self.versions.resize(sectors, vec![Version::Zero]);
        for below in &mut self.below {
            below.resize(sectors, Version::Zero);
        }
    }

    /// A tool was run on the disk, whose content was settled before; `done` if it came to its end.
    fn tool(&mut self, name: &str, done: bool) {
        self.settle();
        let now = || self.versions.iter().map(|versions| versions[versions.len() - 1]).collect();
        match Tool::ALL.into_iter().find(|tool| tool.name() == name) {
            // One that was interrupted is run again before anything else, so in the end it is done.
            Some(Tool::Snapshot | Tool::Merge) => self.below = vec![now()],
            Some(Tool::Reset) => self.reset(done),
            Some(Tool::Rebase) => {
                let mut base = base_image(1);
                base.resize(self.versions.len(), Version::Zero);
                if done {
                    self.below.clear();
                }
                self.below.push(base);
            }
            Some(Tool::Resize) if done => self.grow(),
            Some(Tool::Resize) => self.may_have_grown = true,
            None => panic!("no tool {name:?}"),
        }
    }

    fn reset(&mut self, done: bool) {
        for (lba, versions) in self.versions.iter_mut().enumerate() {
            if done {
                versions.clear();
            }
            for below in &self.below {
                if !versions.contains(&below[lba]) {
                    versions.push(below[lba]);
                }
            }
        }
    }

    /// Programs that follow each other without a cut between them: a later one after the death of
    /// the daemon.
    fn play(&mut self, runs: Vec<&Run>, verdict: &mut Verdict) {
        if runs.iter().any(|run| !run.flushes.is_empty()) {
            self.settle();
        }
        for (at, run) in runs.iter().enumerate() {
            let mut durable = run.durable();
            verdict.flushes += run.flushes.len() as u64;
            // What a daemon that died had acknowledged is made durable by its successor's flush.
            if runs[at + 1..].iter().any(|later| !later.flushes.is_empty()) {
                durable.extend(&run.completed);
            }
            let mut program = Program::new(self.seed, run.program, run.disk_sectors);
            for op in 0..run.issued {
                let step = program.step();
                let version = match step.op {
                    Op::Write => Version::Data { program: run.program, op },
                    Op::Discard | Op::WriteZeroes { .. } => Version::Zero,
                    Op::Flush | Op::Read | Op::GetId => continue,
                };
                let lbas = index(step.lba)..index(step.lba + u64::from(step.sectors));
                for versions in &mut self.versions[lbas] {
                    if durable.contains(&op) {
                        versions.clear();
                        verdict.durable_sectors += 1;
                    }
                    versions.push(version);
                }
            }
        }
    }
}

fn base_image(number: usize) -> Vec<Version> {
    let data = |lba| Version::Data { program: BASE_PROGRAM, op: base_op(number, lba) };
    (0..DISK_SECTORS).map(data).collect()
}

fn as_version(seen: Seen) -> Version {
    match seen {
        Seen::Data { program, op } => Version::Data { program, op },
        Seen::Zero | Seen::Garbage { .. } => Version::Zero,
    }
}

/// The first wrong sectors, and runs of them, to see a shape.
fn report(wrong: &[(u64, String)], violations: &mut Vec<String>) {
    let shown = wrong.iter().take(SHOWN);
    violations.extend(shown.map(|(lba, text)| format!("sector {lba}: {text}")));
    let mut runs: Vec<(u64, u64)> = vec![];
    for &(lba, _) in wrong {
        match runs.last_mut() {
            Some((start, len)) if *start + *len == lba => *len += 1,
            _ => runs.push((lba, 1)),
        }
    }
    if wrong.len() > SHOWN {
        let first = &runs[..runs.len().min(SHOWN)];
        violations.push(format!("{} sectors in {} runs: {first:?}", wrong.len(), runs.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::program::stamp;
    use super::*;

    /// The disk as it was made, with the writes of these operations of program 1 of seed 7.
    fn disk_with(ops: &[u64]) -> Vec<u8> {
        let mut disk = vec![0; index(DISK_SECTORS) * SECTOR_SIZE];
        for (lba, sector) in (0..).zip(disk.chunks_exact_mut(SECTOR_SIZE)) {
            stamp(sector, lba, BASE_PROGRAM, 0);
        }
        let mut program = Program::new(7, 1, DISK_SECTORS);
        for op in 0..=ops.iter().copied().max().unwrap_or(0) {
            let step = program.step();
            if !ops.contains(&op) {
                continue;
            }
            let bytes = index(step.lba) * SECTOR_SIZE..;
            let sectors = disk[bytes].chunks_exact_mut(SECTOR_SIZE).take(step.sectors as usize);
            for (lba, sector) in (step.lba..).zip(sectors) {
                match step.op {
                    Op::Write => stamp(sector, lba, 1, op),
                    _ => sector.fill(0),
                }
            }
        }
        disk
    }

    /// The first operation that is a flush, and all that change the disk before it.
    fn before_first_flush() -> (u64, Vec<u64>) {
        let mut program = Program::new(7, 1, DISK_SECTORS);
        let flush = (0..).find(|_| program.step().op == Op::Flush).expect("a flush");
        (flush, (0..flush).collect())
    }

    fn client_log(text: &str) -> ClientLog {
        ClientLog::parse(text)
    }

    fn begun() -> String {
        format!("program 1 {DISK_SECTORS}\nissued 64\n")
    }

    fn violations_of(dump: &[u8], lines: &str) -> Vec<String> {
        let mut model = Model::new(7);
        let nothing = |_| panic!("no dump was reported");
        assert!(model.follow(&client_log(&(begun() + lines)), nothing).violations.is_empty());
        let dumped = client_log(&format!("dumped {DISK_SECTORS}\n"));
        model.follow(&dumped, |_| dump.to_vec()).violations
    }

    #[test]
    fn what_was_not_flushed_may_be_there_or_not() {
        let (_, ops) = before_first_flush();
        assert!(violations_of(&disk_with(&[]), "").is_empty());
        assert!(violations_of(&disk_with(&ops), "").is_empty());
        assert!(violations_of(&disk_with(&ops[..1]), "").is_empty());
    }

    #[test]
    fn what_was_flushed_must_be_there() {
        let (flush, ops) = before_first_flush();
        let flushed = format!("flushed {flush} -\n");
        assert!(violations_of(&disk_with(&ops), &flushed).is_empty());
        let violations = violations_of(&disk_with(&[]), &flushed);
        assert!(violations.iter().any(|text| text.contains("op: 0")), "{violations:?}");
    }

    #[test]
    fn what_was_open_at_a_flush_or_failed_is_not_flushed_by_it() {
        let (flush, ops) = before_first_flush();
        let all: Vec<_> = ops.iter().map(u64::to_string).collect();
        let open = format!("flushed {flush} {}\n", all.join(","));
        assert!(violations_of(&disk_with(&[]), &open).is_empty());
        let failed: String = ops.iter().map(|op| format!("failed {op}\n")).collect();
        let failed = format!("{failed}flushed {flush} -\n");
        assert!(violations_of(&disk_with(&[]), &failed).is_empty());
    }

    #[test]
    fn what_a_dead_daemon_had_acknowledged_is_flushed_by_its_successor() {
        let (_, ops) = before_first_flush();
        let completed: String = ops.iter().map(|op| format!("completed {op}\n")).collect();
        let lines = format!("{completed}program 2 {DISK_SECTORS}\nissued 0\nflushed 0 -\n");
        assert!(violations_of(&disk_with(&ops), &lines).is_empty());
        assert!(!violations_of(&disk_with(&[]), &lines).is_empty());
    }

    #[test]
    fn a_sector_of_no_program_is_wrong_and_reported_once() {
        let mut disk = disk_with(&[]);
        disk[5 * SECTOR_SIZE] ^= 1;
        let dumps = client_log(&format!("dumped {DISK_SECTORS}\n"));
        let mut model = Model::new(7);
        assert_eq!(model.follow(&dumps, |_| disk.clone()).violations.len(), 1);
        disk[5 * SECTOR_SIZE..6 * SECTOR_SIZE].fill(0);
        assert!(model.follow(&dumps, |_| disk.clone()).violations.is_empty());
    }

    #[test]
    fn what_was_read_after_a_cut_must_stay_once_it_was_flushed() {
        let (_, ops) = before_first_flush();
        let mut model = Model::new(7);
        model.follow(&client_log(&begun()), |_| vec![]);
        let closed = client_log(&format!("dumped {DISK_SECTORS}\nclosed 0\n"));
        assert!(model.follow(&closed, |_| disk_with(&ops)).violations.is_empty());
        assert!(!model.follow(&closed, |_| disk_with(&[])).violations.is_empty());
    }

    #[test]
    fn a_reset_shows_what_is_below_and_an_interrupted_one_either() {
        let (flush, ops) = before_first_flush();
        let flushed = format!("{}flushed {flush} -\n", begun());
        for (tool, old_is_wrong) in
            [("tool reset\ntool-ended reset 0\n", true), ("tool reset\n", false)]
        {
            for (dump, wrong) in [(disk_with(&[]), false), (disk_with(&ops), old_is_wrong)] {
                let mut model = Model::new(7);
                model.follow(&client_log(&flushed), |_| vec![]);
                let read = client_log(&format!("dumped {DISK_SECTORS}\nclosed 0\n{tool}"));
                assert!(model.follow(&read, |_| disk_with(&ops)).violations.is_empty());
                let dumped = client_log(&format!("dumped {DISK_SECTORS}\n"));
                let found = model.follow(&dumped, |_| dump.clone()).violations;
                assert_eq!(!found.is_empty(), wrong, "{tool}: {found:?}");
            }
        }
    }

    #[test]
    fn an_interrupted_resize_leaves_the_old_size_or_the_new_one() {
        for (sectors, right) in
            [(DISK_SECTORS, true), (DISK_SECTORS + GROWTH, true), (DISK_SECTORS + 1, false)]
        {
            let mut model = Model::new(7);
            model.follow(&client_log("tool resize\n"), |_| vec![]);
            let mut dump = disk_with(&[]);
            dump.resize(index(sectors) * SECTOR_SIZE, 0);
            let dumped = client_log(&format!("dumped {sectors}\n"));
            let found = model.follow(&dumped, |_| dump.clone()).violations;
            assert_eq!(found.is_empty(), right, "{sectors}: {found:?}");
        }
    }
}
