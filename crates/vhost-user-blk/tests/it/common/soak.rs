//! A load that does not mind that its daemon is killed: it starts another one, gives it the same
//! memory and in-flight area, and checks that every request is answered once and every sector holds
//! what was acknowledged.

pub mod restarts;
pub mod untracked;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use blk_bench::driver::device::{Device, Options};
use blk_bench::driver::queue::{Completion, Op, Queue, Request, SECTOR_SIZE, Status};
use blk_bench::load::model::{Base, Content, Expectation, Model};
use blk_bench::load::region::Region;
use blk_bench::load::rng::Rng;
use blk_bench::load::stamp::Stamp;
use nix::sys::signal::Signal;

use super::{Daemon, PROGRAM};
use restarts::Way;

const QUEUES: u16 = 3;
/// Requests in flight in each queue, if nothing else is said.
pub const DEPTH: u16 = 24;
/// Sectors that one request covers at most; each request in flight has as many to itself.
const GRANULE: u32 = 16;
const GRANULES: u64 = 600;
/// Only a request that is lost takes so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the life of a daemon ends.
#[derive(Clone, Debug)]
pub enum End {
    /// It is killed after so many completions.
    Killed { after: u64 },
    /// It kills itself at this place, when that is reached for the nth time (src/fault.rs); if that
    /// does not happen, it is killed after so many completions.
    Fault { place: &'static str, nth: u64, or_after: u64 },
}

/// One queue and what is known about its sectors.
struct Lane {
    queue: Queue,
    model: Model,
    /// By number among the queue's granules.
    busy: Vec<bool>,
    sequence: u32,
    /// What the last write of each slot wrote.
    sequences: Vec<u32>,
    /// Order in which slots were submitted.
    tickets: Vec<u64>,
    next_ticket: u64,
    newest_done: u64,
}

pub struct Soak {
    directory: PathBuf,
    way: Way,
    options: Options,
    pub daemon: Daemon,
    device: Device,
    lanes: Vec<Lane>,
    region: Region,
    expectation: Expectation,
    pub rng: Rng,
    done: Vec<Completion>,
    /// Requests answered so far.
    pub completed: u64,
    /// Answers that overtook an earlier request of their queue.
    pub out_of_order: u64,
    /// Requests that were in flight when a daemon died.
    pub interrupted: u64,
    /// From the death of a daemon to the first answer of the next.
    pub recoveries: Vec<Duration>,
}

impl Soak {
    /// A daemon on a new COW file in `directory`, with extra arguments, and a device connected to
    /// it that keeps an account of what is in flight.
    pub fn new(directory: &Path, args: &[&str], first: &End) -> Self {
        Self::with_inflight(directory, args, first, true)
    }

    /// The same; `inflight` says whether there is such an account.
    pub fn with_inflight(directory: &Path, args: &[&str], first: &End, inflight: bool) -> Self {
        Self::with_depth(directory, args, first, inflight, DEPTH)
    }

    /// The same with so many requests in flight in each queue.
    pub fn with_depth(
        directory: &Path,
        args: &[&str],
        first: &End,
        inflight: bool,
        depth: u16,
    ) -> Self {
        let seed = from_env("RECOVERY_SEED").unwrap_or_else(rand_seed);
        println!("RECOVERY_SEED={seed}");
        let region = Region { start: 3, granule: GRANULE, granules: GRANULES, queues: QUEUES };
        let base = directory.join("base");
        let sectors = region.end() + 5;
        let content: Vec<u8> = (0..sectors).flat_map(super::sector).collect();
        std::fs::write(&base, content).unwrap();
        let daemon = start(directory, &Way::Path, args, first);
        let mut options = Options::new(&daemon.socket);
        options.queues = QUEUES;
        options.depth = depth;
        options.max_data = GRANULE as usize * SECTOR_SIZE;
        options.inflight = inflight;
        options.stall_after = PATIENCE;
        let mut device = Device::connect(&options).unwrap();
        let lane = |queue: Queue| Lane {
            model: Model::new(region, queue.index()),
            busy: vec![false; usize::try_from(region.owned(queue.index())).unwrap()],
            queue,
            sequence: 0,
            sequences: vec![0; depth.into()],
            tickets: vec![0; depth.into()],
            next_ticket: 0,
            newest_done: 0,
        };
        let lanes = device.take_queues().into_iter().map(lane).collect();
        let expectation = Expectation { base: Some(Base::open(&base).unwrap()), seed };
        Soak {
            directory: directory.to_owned(),
            way: Way::Path,
            options,
            daemon,
            device,
            lanes,
            region,
            expectation,
            rng: Rng::new(seed),
            done: Vec::new(),
            completed: 0,
            out_of_order: 0,
            interrupted: 0,
            recoveries: Vec::new(),
        }
    }

    /// Loads the daemon until its life ends as `end` says, and starts the next, whose end will be
    /// `next`. Whether `end` came as planned (that is, at its place).
    pub fn life(&mut self, args: &[&str], end: &End, next: &End) -> bool {
        let completions = match *end {
            End::Killed { after } => after,
            End::Fault { or_after, .. } => or_after,
        };
        self.load(completions);
        let by_itself = self.device.is_dead();
        self.restart(args, next);
        by_itself
    }

    /// Loads the daemon until it has given so many answers more, or dies.
    fn load(&mut self, completions: u64) {
        let until = self.completed + completions;
        while self.completed < until && !self.device.is_dead() {
            self.turn(true);
        }
    }

    /// Requests that are not answered.
    fn in_flight(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.queue.in_flight() as u64).sum()
    }

    fn restart(&mut self, args: &[&str], next: &End) {
        let killed_at = Instant::now();
        self.interrupted += self.in_flight();
        self.bury();
        self.daemon = start(&self.directory, &self.way, args, next);
        let completed = self.completed;
        // It may die again before it has answered anything, even before it is connected.
        if let Err(e) = self.device.reconnect(&self.options) {
            println!("reconnect: {e}");
            return;
        }
        while self.completed == completed && !self.device.is_dead() {
            self.turn(true);
        }
        self.recoveries.push(killed_at.elapsed());
    }

    /// Loads the daemon while `meanwhile` says so.
    pub fn load_while(&mut self, mut meanwhile: impl FnMut(&Daemon) -> bool) {
        while meanwhile(&self.daemon) {
            if self.device.is_dead() {
                panic!("the daemon has hung up; it said\n{}", self.daemon.said());
            }
            self.turn(true);
        }
    }

    /// Loads the daemon until something was answered on each queue.
    pub fn load_until_each_queue_answers(&mut self) {
        let seen: Vec<_> = self.lanes.iter().map(|lane| lane.newest_done).collect();
        while self.lanes.iter().zip(&seen).any(|(lane, &seen)| lane.newest_done == seen) {
            self.turn(true);
        }
    }

    /// Kills the daemon, whatever it is doing, and starts the next.
    pub fn kill(&mut self, args: &[&str]) {
        self.restart(args, &End::Killed { after: 0 });
    }

    /// Kills the daemon, if it is alive, and waits until it is gone.
    fn bury(&mut self) {
        self.daemon.signal(Signal::SIGKILL);
        self.daemon.reap();
    }

    /// Looks at every queue once; with `load`, fills it again.
    fn turn(&mut self, load: bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut progress = false;
            for lane in 0..self.lanes.len() {
                progress |= self.reap(lane);
                if load {
                    self.fill(lane);
                }
            }
            if progress || self.device.is_dead() {
                return;
            }
            assert!(Instant::now() < deadline, "requests were lost: no answer for {PATIENCE:?}");
            std::thread::yield_now();
        }
    }

    fn reap(&mut self, lane: usize) -> bool {
        let mut done = std::mem::take(&mut self.done);
        let lane = &mut self.lanes[lane];
        // An answer to what is not in flight is an error here.
        lane.queue.reap(&mut done).unwrap();
        let progress = !done.is_empty();
        for completion in done.drain(..) {
            self.completed += 1;
            let ticket = lane.tickets[completion.slot.index()];
            self.out_of_order += u64::from(ticket < lane.newest_done);
            lane.newest_done = lane.newest_done.max(ticket);
            lane.check(&completion, &self.region, &self.expectation);
            lane.queue.release(completion.slot);
        }
        self.done = done;
        progress
    }

    fn fill(&mut self, lane: usize) {
        let lane = &mut self.lanes[lane];
        while let Some(mut slot) = lane.queue.take_slot() {
            let request = lane.request(&self.region, &mut self.rng);
            if request.op == Op::Write {
                lane.sequence += 1;
                let stamp = Stamp {
                    sector: request.sector,
                    sequence: lane.sequence,
                    queue: lane.queue.index().into(),
                    seed: self.expectation.seed,
                };
                lane.sequences[slot.index()] = lane.sequence;
                let data = lane.queue.data_mut(&mut slot, request.data_len());
                stamp.write_sectors(data);
            }
            lane.next_ticket += 1;
            lane.tickets[slot.index()] = lane.next_ticket;
            lane.queue.submit(slot, request);
        }
        lane.queue.kick().unwrap();
    }

    /// Waits for what is in flight, reads everything back, and ends the daemon.
    pub fn finish(mut self) {
        while self.in_flight() > 0 {
            assert!(!self.device.is_dead(), "the last daemon has died");
            self.turn(false);
        }
        for lane in 0..self.lanes.len() {
            for nth in 0..self.lanes[lane].busy.len() as u64 {
                let queue = &mut self.lanes[lane].queue;
                let slot = queue.take_slot().unwrap();
                let sector = self.region.owned_start(queue.index(), nth);
                queue.submit(slot, Request { op: Op::Read, sector, sectors: GRANULE });
                queue.kick().unwrap();
                self.turn(false);
                assert_eq!(self.lanes[lane].queue.in_flight(), 0);
            }
        }
        drop(self.device);
        match self.way {
            Way::Path => self.daemon.terminate(),
            // Whoever made the socket removes it.
            Way::Fd | Way::Held(_) => self.daemon.end(),
        };
        if self.recoveries.is_empty() {
            return;
        }
        self.recoveries.sort();
        let at = |part: usize| self.recoveries[(self.recoveries.len() - 1) * part / 100];
        println!(
            "{} recoveries, from the death to the next answer: median {:?}, 95 % {:?}, longest {:?}; \
             {} requests were interrupted, {} answered, {} out of order",
            self.recoveries.len(),
            at(50),
            at(95),
            at(100),
            self.interrupted,
            self.completed,
            self.out_of_order,
        );
    }
}

impl Lane {
    /// A request for sectors that no other one in flight touches.
    fn request(&mut self, region: &Region, rng: &mut Rng) -> Request {
        let op = match rng.below(100) {
            0..10 => return Request { op: Op::Flush, sector: 0, sectors: 0 },
            10..40 => Op::Read,
            40..85 => Op::Write,
            85..90 => Op::Discard,
            _ => Op::WriteZeroes { unmap: rng.below(2) == 0 },
        };
        let nth = loop {
            let nth = rng.below(self.busy.len() as u64);
            if !self.busy[usize::try_from(nth).unwrap()] {
                break nth;
            }
        };
        self.busy[usize::try_from(nth).unwrap()] = true;
        let first = rng.below(GRANULE.into());
        let sectors = 1 + rng.below(u64::from(GRANULE) - first);
        let sector = region.owned_start(self.queue.index(), nth) + first;
        Request { op, sector, sectors: u32::try_from(sectors).unwrap() }
    }

    fn check(&mut self, completion: &Completion, region: &Region, expectation: &Expectation) {
        let Request { op, sector, sectors } = completion.request;
        assert_eq!(completion.status, Status::Ok, "{:?}", completion.request);
        assert_eq!(completion.used_len, completion.request.expected_used_len());
        if op == Op::Flush {
            return;
        }
        let (owner, nth) = region.owner(sector);
        self.busy[usize::try_from(nth / u64::from(GRANULE)).unwrap()] = false;
        let data = self.queue.data(&completion.slot, completion.request.data_len());
        match op {
            Op::Read => {
                let lookup = |sector| (owner, self.model.get(sector));
                let result = expectation.check(sector, data, lookup).unwrap();
                assert_eq!(result, Ok(0), "{result:?}");
            }
            Op::Write => {
                let stamp = data[16..20].try_into().unwrap();
                self.model.set(sector, sectors, Content::Write(u32::from_le_bytes(stamp)));
            }
            _ => self.model.set(sector, sectors, Content::Zeros),
        }
    }
}

/// A daemon that listens. On a machine whose disk is busy enough a dead daemon's I/O takes longer
/// to end than its successor waits for the lock; then it is started again, as a service manager
/// does.
fn start(directory: &Path, way: &Way, args: &[&str], end: &End) -> Daemon {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut daemon = spawn(directory, way, args, end);
        if daemon.listens() {
            return daemon;
        }
        let said = daemon.said();
        assert!(said.contains("in use by another program"), "it does not listen:\n{said}");
        assert!(Instant::now() < deadline, "the disk is not let go for {PATIENCE:?}");
        println!("started again: its predecessor's I/O has not ended");
    }
}

fn spawn(directory: &Path, way: &Way, args: &[&str], end: &End) -> Daemon {
    let socket = directory.join("socket");
    let mut command = way.listen(Command::new(PROGRAM), &socket);
    command.arg(format!("--num-queues={QUEUES}"));
    let at = directory.display();
    command.arg(format!("--control={at}/control")).arg(format!("--upgrade-dir={at}"));
    command.arg(format!("{at}/cow,{at}/base")).args(args);
    if let End::Fault { place, nth, .. } = end {
        command.env("VHOST_USER_BLK_FAULT", format!("{place}:{nth}"));
    }
    Daemon::spawn(command, socket)
}

/// A number from the environment.
pub fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

fn rand_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_secs() << 20 ^ u64::from(now.subsec_nanos())
}
