//! The client of the tests of what was flushed (`system_tests::flushed`). It runs in a guest that
//! is a host itself, or here.
//!
//!     flush-client tell LINE...
//!     flush-client dump SOCKET FILE SLOT        reads the whole disk, to a place of FILE
//!     flush-client same FILE SLOT FILE SLOT LEN compares LEN bytes of two such places
//!     flush-client run SOCKET SEED PROGRAM MODE plays a program
//!
//! MODE is a list of words: `count=N` ends after N operations and a last flush; `completions` also
//! reports each completion; `lies` reports flushes that were not sent; `tolerant` continues when
//! requests fail, and ends when a flush has, or [`MOST_FAILED`] others: with every write failed
//! there is nothing to flush.
//!
//! Lines go to the file that TOLD names; without it to QEMU's debug port, which puts each byte into
//! the file outside before the next instruction, so that all lines before the power cut are known.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use blk_bench::driver::device::{Device, Options};
use blk_bench::driver::queue::{Completion, Op, Queue, Request, SECTOR_SIZE, Status, Wait};
use system_tests::flushed::program::{MAX_DATA, Step, stamp};
use system_tests::flushed::{DISK_SECTORS, DUMP_SLOT, Program};

/// How long the daemon may take to listen.
const CONNECT_FOR: Duration = Duration::from_secs(120);
/// How long a request may take on a host that is a guest, on a busy machine.
const STALL_AFTER: Duration = Duration::from_secs(120);
/// Requests in flight while the disk is read.
const DUMP_DEPTH: u16 = 4;
/// Failed requests that are enough.
const MOST_FAILED: usize = 64;
/// How many operations are announced at a time.
const ANNOUNCED: u64 = 16;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args.as_slice() {
        ["tell", words @ ..] => tell(&words.join(" ")),
        ["dump", socket, file, slot] => dump(Path::new(socket), Path::new(file), slot),
        ["same", one, at, other, other_at, len] => same([(one, at), (other, other_at)], len),
        ["run", socket, seed, program, mode] => run(Path::new(socket), seed, program, mode),
        _ => Err("usage: see the beginning of tests/src/bin/flush-client.rs".into()),
    };
    if let Err(error) = outcome {
        eprintln!("flush-client: {error}");
        // If that fails as well, it cannot be reported.
        let _ = tell(&format!("client-failed {error}"));
        std::process::exit(1);
    }
}

fn tell(line: &str) -> Outcome<()> {
    let line = format!("{line}\n");
    match std::env::var_os("TOLD") {
        Some(file) => {
            let mut file = OpenOptions::new().append(true).create(true).open(file)?;
            Ok(file.write_all(line.as_bytes())?)
        }
        None => Ok(debug_port::write(line.as_bytes())?),
    }
}

#[cfg(target_arch = "x86_64")]
mod debug_port {
    use std::io;

    /// Where QEMU's isa-debugcon is.
    const PORT: u16 = 0xe9;

    pub fn write(bytes: &[u8]) -> io::Result<()> {
        // SAFETY: the call changes only which ports this thread may use.
        if unsafe { libc::ioperm(PORT.into(), 1, 1) } != 0 {
            return Err(io::Error::last_os_error());
        }
        for &byte in bytes {
            // SAFETY: the port was allowed to this thread; a byte written to it touches no memory.
            unsafe {
                std::arch::asm!("out dx, al", in("dx") PORT, in("al") byte,
                    options(nomem, nostack, preserves_flags));
            }
        }
        Ok(())
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod debug_port {
    use std::io;

    pub fn write(_: &[u8]) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "the debug port is x86's; set TOLD"))
    }
}

fn connect(socket: &Path, queues: u16, depth: u16, segment: Option<usize>) -> Outcome<Device> {
    let device = Device::connect(&Options {
        connect_for: CONNECT_FOR,
        stall_after: STALL_AFTER,
        queues,
        depth,
        segment,
        max_data: MAX_DATA,
        ..Options::new(socket)
    })?;
    tell("connected")?;
    Ok(device)
}

fn dump(socket: &Path, file: &Path, slot: &str) -> Outcome<()> {
    let start = slot.parse::<u64>()? * DUMP_SLOT;
    let mut device = connect(socket, 1, DUMP_DEPTH, None)?;
    let sectors = device.config().capacity;
    let mut queue = device.take_queues().pop().ok_or("no queue")?;
    let output = OpenOptions::new().write(true).create(true).truncate(false).open(file)?;
    let mut next = 0;
    let mut done = vec![];
    while next < sectors || queue.in_flight() > 0 {
        while next < sectors
            && let Some(slot) = queue.take_slot()
        {
            let len = (sectors - next).min((MAX_DATA / SECTOR_SIZE) as u64);
            queue
                .submit(slot, Request { op: Op::Read, sector: next, sectors: u32::try_from(len)? });
            next += len;
        }
        queue.kick()?;
        while queue.reap(&mut done)? == 0 {
            queue.wait(Wait::Eventfd)?;
        }
        for Completion { slot, request, status, .. } in done.drain(..) {
            if status != Status::Ok {
                return Err(format!("read at sector {}: {status:?}", request.sector).into());
            }
            let data = queue.data(&slot, request.data_len());
            output.write_all_at(data, start + request.sector * SECTOR_SIZE as u64)?;
            queue.release(slot);
        }
    }
    output.sync_all()?;
    tell(&format!("dumped {sectors}"))
}

fn same(places: [(&str, &str); 2], len: &str) -> Outcome<()> {
    const PIECE: usize = 1 << 20;
    let len: u64 = len.parse()?;
    let mut at = 0;
    while at < len {
        let mut pieces = [vec![0; PIECE], vec![0; PIECE]];
        let count = usize::try_from(len - at)?.min(PIECE);
        for ((file, slot), piece) in places.iter().zip(&mut pieces) {
            let start = slot.parse::<u64>()? * DUMP_SLOT + at;
            File::open(file)?.read_exact_at(&mut piece[..count], start)?;
        }
        if pieces[0] != pieces[1] {
            return Err(format!("{places:?} differ in the MiB from byte {at} on").into());
        }
        at += count as u64;
    }
    Ok(())
}

/// How a program is played.
struct Mode {
    count: Option<u64>,
    completions: bool,
    lies: bool,
    tolerant: bool,
}

impl Mode {
    fn parse(text: &str) -> Outcome<Self> {
        let mut mode = Self { count: None, completions: false, lies: false, tolerant: false };
        for word in text.split(',').filter(|word| !word.is_empty()) {
            match word.split_once('=') {
                Some(("count", count)) => mode.count = Some(count.parse()?),
                None if word == "completions" => mode.completions = true,
                None if word == "lies" => mode.lies = true,
                None if word == "tolerant" => mode.tolerant = true,
                _ => return Err(format!("mode {word:?}").into()),
            }
        }
        Ok(mode)
    }
}

/// An operation that is not complete.
struct Busy {
    number: u64,
    step: Step,
    /// Those that were not complete when it was submitted.
    open: Vec<u64>,
}

struct Player {
    queues: Vec<Queue>,
    program_number: u64,
    mode: Mode,
    depth: usize,
    /// In the order of their submission, each with its slot.
    busy: Vec<(u16, usize, Busy)>,
    failed: usize,
    flush_failed: bool,
}

fn run(socket: &Path, seed: &str, number: &str, mode: &str) -> Outcome<()> {
    let (seed, number): (u64, u64) = (seed.parse()?, number.parse()?);
    let form = Program::new(seed, number, DISK_SECTORS);
    let depth = u16::try_from(form.depth)?;
    let mut device = connect(socket, form.queues, depth, Some(form.segment))?;
    let sectors = device.config().capacity;
    // It depends on the size of the disk, but for its form.
    let mut program = Program::new(seed, number, sectors);
    tell(&format!("program {number} {sectors} {}", program.about()))?;
    let mut player = Player {
        queues: device.take_queues(),
        program_number: number,
        mode: Mode::parse(mode)?,
        depth: form.depth,
        busy: vec![],
        failed: 0,
        flush_failed: false,
    };
    let mut index = 0;
    loop {
        let enough = player.flush_failed || player.failed >= MOST_FAILED;
        if player.mode.count == Some(index) || enough {
            break;
        }
        player.begin(index, program.step())?;
        index += 1;
    }
    player.end(index)
}

impl Player {
    /// Submits an operation when it may be.
    fn begin(&mut self, number: u64, step: Step) -> Outcome<()> {
        while self.must_wait_for_others(&step) {
            self.complete_some()?;
        }
        // The reported limit is always ahead of the submitted operations.
        if number.is_multiple_of(ANNOUNCED) {
            tell(&format!("issued {}", number + ANNOUNCED))?;
        }
        let open: Vec<u64> = self.busy.iter().map(|(.., busy)| busy.number).collect();
        let busy = Busy { number, step, open };
        if step.op == Op::Flush && self.mode.lies {
            return self.tell_completion(&busy, Status::Ok);
        }
        self.submit(busy)
    }

    fn must_wait_for_others(&self, step: &Step) -> bool {
        let overlaps = |(_, _, busy): &(u16, usize, Busy)| busy.step.overlaps(step);
        self.busy.len() == self.depth
            || step.drain && !self.busy.is_empty()
            || self.busy.iter().any(overlaps)
    }

    fn submit(&mut self, busy: Busy) -> Outcome<()> {
        let Step { op, lba, sectors, queue: index, .. } = busy.step;
        let request = Request { op, sector: lba, sectors };
        let queue = &mut self.queues[usize::from(index)];
        let mut slot = queue.take_slot().ok_or("a queue is as deep as the program")?;
        let data = queue.data_mut(&mut slot, if op == Op::Write { request.data_len() } else { 0 });
        for (lba, sector) in (lba..).zip(data.chunks_exact_mut(SECTOR_SIZE)) {
            stamp(sector, lba, self.program_number, busy.number);
        }
        self.busy.push((index, slot.index(), busy));
        queue.submit(slot, request);
        Ok(queue.kick()?)
    }

    /// Waits until at least one operation is complete.
    fn complete_some(&mut self) -> Outcome<()> {
        let mut done = vec![];
        loop {
            for (index, queue) in (0..).zip(&mut self.queues) {
                let mut of_queue = vec![];
                queue.reap(&mut of_queue)?;
                done.extend(of_queue.into_iter().map(|completion| (index, completion)));
            }
            if !done.is_empty() {
                break;
            }
            let &(oldest, ..) = self.busy.first().ok_or("nothing to wait for")?;
            self.queues[usize::from(oldest)].wait(Wait::Eventfd)?;
        }
        for (index, Completion { slot, status, .. }) in done {
            let is_it =
                |(queue, at, _): &(u16, usize, Busy)| (*queue, *at) == (index, slot.index());
            let at = self.busy.iter().position(is_it).ok_or("an answer to nothing")?;
            self.queues[usize::from(index)].release(slot);
            let (.., busy) = self.busy.remove(at);
            self.tell_completion(&busy, status)?;
        }
        Ok(())
    }

    fn tell_completion(&mut self, busy: &Busy, status: Status) -> Outcome<()> {
        let Busy { number, step, open } = busy;
        if status != Status::Ok {
            if !self.mode.tolerant {
                return Err(format!("operation {number}: {step:?}: {status:?}").into());
            }
            self.failed += 1;
            self.flush_failed |= step.op == Op::Flush;
            return tell(&format!("failed {number}"));
        }
        if step.op == Op::Flush {
            let open: Vec<_> = open.iter().map(u64::to_string).collect();
            let open = if open.is_empty() { "-".into() } else { open.join(",") };
            return tell(&format!("flushed {number} {open}"));
        }
        if self.mode.completions { tell(&format!("completed {number}")) } else { Ok(()) }
    }

    /// Completes all, and flushes once more if nothing has failed.
    fn end(&mut self, index: u64) -> Outcome<()> {
        while !self.busy.is_empty() {
            self.complete_some()?;
        }
        if !self.flush_failed && self.failed == 0 {
            let flush = Step { op: Op::Flush, lba: 0, sectors: 0, drain: true, queue: 0 };
            // In place of the program's own operation of this number: both change only sectors that
            // are not reported as durable, since no later operation is.
            self.begin_last(index, flush)?;
        }
        tell(&format!("ended {index}"))
    }

    fn begin_last(&mut self, number: u64, flush: Step) -> Outcome<()> {
        self.submit(Busy { number, step: flush, open: vec![] })?;
        while !self.busy.is_empty() {
            self.complete_some()?;
        }
        Ok(())
    }
}
