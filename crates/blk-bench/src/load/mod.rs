//! Runs a job: one thread per queue, and the measurement around them.

pub mod job;
pub mod model;
pub mod region;
pub mod rng;
pub mod stamp;
pub mod stats;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::driver::queue::{
    Completion, Notifications, Op, Queue, Request, SECTOR_SIZE, Slot, Status,
};
use crate::error::Error;
use crate::load::job::{Generator, Job};
use crate::load::model::{Content, Expectation, Expected, MAX_SEQUENCE, Mismatch, Model};
use crate::load::rng::Rng;
use crate::load::stamp::Stamp;
use crate::load::stats::Stats;
use crate::server::{Sample, Server, cpu_between};

/// Why a run ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Connection or protocol.
    #[error(transparent)]
    Device(#[from] Error),
    /// A request failed.
    #[error("queue {queue}: {op:?} of {sectors} sectors at sector {sector}: {status:?}")]
    Request {
        /// Index of the queue.
        queue: u16,
        /// The operation.
        op: Op,
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u32,
        /// The device's answer.
        status: Status,
    },
    /// The disk does not hold what was written to it.
    #[error("queue {queue}: verification failed: {mismatch}")]
    Mismatch {
        /// The queue that read it.
        queue: u16,
        /// Where and what.
        mismatch: Mismatch,
    },
    /// The length in the used ring is wrong.
    #[error(
        "queue {queue}: {op:?} of {sectors} sectors: used length: found {found} bytes, expected {expected}"
    )]
    UsedLen {
        /// Index of the queue.
        queue: u16,
        /// The operation.
        op: Op,
        /// Number of sectors.
        sectors: u32,
        /// What the backend put into the used ring.
        found: u32,
        /// The bytes that it must have written.
        expected: u32,
    },
}

/// What a run came to.
#[derive(Debug)]
pub struct Outcome {
    pub(crate) stats: Stats,
    /// Length of the measured part.
    pub elapsed: Duration,
    /// CPU time of the backend in it.
    pub server_cpu: Option<Duration>,
    /// CPU time of this process in it.
    pub client_cpu: Duration,
    /// What each queue's sectors must hold now, if the job verified.
    pub models: Vec<Model>,
    /// The queues, idle; of no further use if the backend has gone.
    pub queues: Vec<Queue>,
}

impl Outcome {
    /// Requests of all kinds in the measured part.
    pub fn requests(&self) -> u64 {
        self.stats.requests()
    }

    /// Sectors that reads of the run were compared on.
    pub fn sectors_checked(&self) -> u64 {
        self.stats.checked_sectors
    }

    /// Requests that failed, if the job tolerates it.
    pub fn errors(&self) -> u64 {
        self.stats.errors
    }
}

const WARMUP: u8 = 0;
const MEASURE: u8 = 1;
const STOP: u8 = 2;

/// Runs a job on all queues of a device to its end.
///
/// # Errors
/// The first error of any queue; the others are stopped then.
pub fn run(
    queues: Vec<Queue>,
    job: &Job,
    expectation: &Expectation,
    server: Option<Server>,
) -> Result<Outcome, RunError> {
    let phase = AtomicU8::new(if job.warmup.is_zero() { MEASURE } else { WARMUP });
    let client = Server { pid: i32::try_from(std::process::id()).unwrap_or(0) };
    let samples = || (server.map(|server| server.sample()), client.sample());
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            queues.into_iter().map(|queue| Worker::new(queue, job, expectation, &phase)).collect();
        let (finished, all_finished) = mpsc::channel::<()>();
        let mut before = samples();
        let mut start = Instant::now();
        let threads: Vec<_> = workers
            .into_iter()
            .map(|worker| {
                let index = worker.queue.index();
                let finished = finished.clone();
                let body = move || {
                    let result = worker.run();
                    drop(finished);
                    result
                };
                let name = format!("queue-{index}");
                std::thread::Builder::new().name(name).spawn_scoped(scope, body)
            })
            .collect::<Result<_, _>>()
            .map_err(Error::io("start a thread"))?;
        drop(finished);
        // Nothing is ever sent: an error means that all threads have finished, a time-out that they
        // have not.
        let wait = |time: Duration| {
            all_finished.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout)
        };

        if !job.warmup.is_zero() && wait(job.warmup) {
            before = samples();
            phase.store(MEASURE, Ordering::Relaxed);
            start = Instant::now();
        }
        wait(job.runtime.unwrap_or(Duration::MAX));
        let elapsed = start.elapsed();
        let after = samples();
        phase.store(STOP, Ordering::Relaxed);
        let results =
            threads.into_iter().map(|thread| thread.join().expect("no panic in a queue thread"));
        collect(results, elapsed, &before, &after)
    })
}

type Samples = (Option<Sample>, Sample);

fn collect(
    results: impl Iterator<Item = Result<WorkerResult, RunError>>,
    elapsed: Duration,
    before: &Samples,
    after: &Samples,
) -> Result<Outcome, RunError> {
    let mut stats = Stats::default();
    let (mut models, mut queues) = (Vec::new(), Vec::new());
    let mut error = None;
    for result in results {
        match result {
            Ok(result) => {
                stats.merge(&result.stats);
                models.extend(result.model);
                queues.push(result.queue);
            }
            Err(first) => error = error.or(Some(first)),
        }
    }
    if let Some(error) = error {
        return Err(error);
    }
    let server_cpu =
        before.0.as_ref().zip(after.0.as_ref()).map(|(before, after)| cpu_between(before, after));
    let client_cpu = cpu_between(&before.1, &after.1);
    Ok(Outcome { stats, elapsed, server_cpu, client_cpu, models, queues })
}

struct WorkerResult {
    stats: Stats,
    model: Option<Model>,
    queue: Queue,
}

/// What a worker knows of a slot in flight.
#[derive(Clone, Copy, Debug)]
struct Pending {
    request: Request,
    submitted: Instant,
    sequence: u32,
}

struct Worker<'a> {
    queue: Queue,
    generator: Generator,
    job: &'a Job,
    expectation: &'a Expectation,
    phase: &'a AtomicU8,
    measuring: bool,
    model: Option<Model>,
    pending: Vec<Option<Pending>>,
    /// Slots filled since the last kick, which is when their time begins.
    fresh: Vec<usize>,
    /// A request that overlaps one in flight, and waits for it.
    held: Option<Request>,
    sequence: u32,
    /// When the clock was last read.
    clock: Instant,
    stats: Stats,
    notifications_before: Notifications,
}

impl<'a> Worker<'a> {
    fn new(
        mut queue: Queue,
        job: &'a Job,
        expectation: &'a Expectation,
        phase: &'a AtomicU8,
    ) -> Self {
        let slots = fill_with_noise(&mut queue, job.seed);
        Self {
            generator: Generator::new(job, queue.index()),
            model: job.verify.then(|| Model::new(job.region, queue.index())),
            pending: vec![None; slots],
            fresh: Vec::with_capacity(slots),
            held: None,
            sequence: 0,
            clock: Instant::now(),
            stats: Stats::default(),
            notifications_before: queue.notifications(),
            measuring: phase.load(Ordering::Relaxed) == MEASURE,
            queue,
            job,
            expectation,
            phase,
        }
    }

    fn run(mut self) -> Result<WorkerResult, RunError> {
        let mut result = self.drive();
        if matches!(result, Err(RunError::Device(Error::Disconnected { .. })))
            && self.job.survive_disconnect
        {
            self.forget_pending();
            result = Ok(());
        }
        if result.is_err() {
            self.phase.store(STOP, Ordering::Relaxed);
        }
        result?;
        let now = self.queue.notifications();
        self.stats.notifications = Notifications {
            kicks: now.kicks - self.notifications_before.kicks,
            wakeups: now.wakeups - self.notifications_before.wakeups,
        };
        Ok(WorkerResult { stats: self.stats, model: self.model, queue: self.queue })
    }

    fn drive(&mut self) -> Result<(), RunError> {
        let mut done = Vec::with_capacity(self.pending.len());
        loop {
            let phase = self.phase.load(Ordering::Relaxed);
            if phase == MEASURE && !self.measuring {
                self.measuring = true;
                self.stats = Stats::default();
                self.notifications_before = self.queue.notifications();
            }
            if phase != STOP {
                self.fill();
                self.clock = Instant::now();
                for slot in self.fresh.drain(..) {
                    if let Some(pending) = &mut self.pending[slot] {
                        pending.submitted = self.clock;
                    }
                }
                self.queue.kick()?;
            }
            if self.queue.in_flight() == 0 {
                return Ok(());
            }
            while self.queue.reap(&mut done)? == 0 {
                self.queue.wait(self.job.wait)?;
            }
            self.clock = Instant::now();
            // What is drained after the end belongs to no measured time.
            let counts = phase != STOP;
            for completion in done.drain(..) {
                self.complete(completion, counts)?;
            }
        }
    }

    fn fill(&mut self) {
        while let Some(slot) = self.queue.take_slot() {
            let request = match self.held.take() {
                Some(request) => Some(request),
                None if self.sequence >= MAX_SEQUENCE => None,
                None => self.generator.next_request(),
            };
            match request {
                Some(request) if self.model.is_some() && self.overlaps(&request) => {
                    self.held = Some(request);
                    self.queue.release(slot);
                    return;
                }
                Some(request) => self.submit(slot, request),
                None => {
                    self.queue.release(slot);
                    return;
                }
            }
        }
    }

    /// Whether the request's outcome would depend on the order in which the device does what is in
    /// flight.
    fn overlaps(&self, request: &Request) -> bool {
        let end = |request: &Request| request.sector + u64::from(request.sectors);
        self.pending.iter().flatten().any(|Pending { request: other, .. }| {
            other.sector < end(request)
                && request.sector < end(other)
                && !(request.op == Op::Read && other.op == Op::Read)
        })
    }

    fn submit(&mut self, mut slot: Slot, request: Request) {
        if request.op == Op::Write && self.job.verify {
            self.sequence += 1;
            let stamp = Stamp {
                sector: request.sector,
                sequence: self.sequence,
                queue: u32::from(self.queue.index()),
                seed: self.job.seed,
            };
            stamp.write_sectors(self.queue.data_mut(&mut slot, request.data_len()));
        }
        self.fresh.push(slot.index());
        let pending = Pending { request, submitted: self.clock, sequence: self.sequence };
        self.pending[slot.index()] = Some(pending);
        self.queue.submit(slot, request);
    }

    fn complete(&mut self, completion: Completion, counts: bool) -> Result<(), RunError> {
        let Completion { slot, request, status, used_len } = completion;
        let pending =
            self.pending[slot.index()].take().expect("the queue gives back what was submitted");
        if counts {
            self.stats.record(&request, self.clock.duration_since(pending.submitted));
        }
        if status != Status::Ok {
            self.failed(&request, status)?;
        } else if self.job.check_used_len && used_len != request.expected_used_len() {
            return Err(RunError::UsedLen {
                queue: self.queue.index(),
                op: request.op,
                sectors: request.sectors,
                found: used_len,
                expected: request.expected_used_len(),
            });
        }
        self.note(&slot, &request, status, pending.sequence)?;
        self.queue.release(slot);
        Ok(())
    }

    fn failed(&mut self, request: &Request, status: Status) -> Result<(), RunError> {
        let &Request { op, sector, sectors } = request;
        self.stats.errors += 1;
        if self.job.tolerate_errors {
            return Ok(());
        }
        Err(RunError::Request { queue: self.queue.index(), op, sector, sectors, status })
    }

    /// The backend is gone: it is unknown which of the requests in flight were executed.
    fn forget_pending(&mut self) {
        let Some(model) = &mut self.model else { return };
        for Pending { request, .. } in self.pending.iter().flatten() {
            if !matches!(request.op, Op::Read | Op::Flush | Op::GetId) {
                model.set(request.sector, request.sectors, Content::Unknown);
            }
        }
    }

    /// Brings the model up to date, or compares with it.
    fn note(
        &mut self,
        slot: &Slot,
        request: &Request,
        status: Status,
        sequence: u32,
    ) -> Result<(), RunError> {
        let queue = self.queue.index();
        let Some(model) = &mut self.model else { return Ok(()) };
        let content = match request.op {
            Op::Flush | Op::GetId => return Ok(()),
            Op::Read if status != Status::Ok => return Ok(()),
            Op::Read => {
                let data = self.queue.data(slot, request.data_len());
                let lookup = |sector| (queue, model.get(sector));
                let unknown = self
                    .expectation
                    .check(request.sector, data, lookup)?
                    .map_err(|mismatch| RunError::Mismatch { queue, mismatch })?;
                self.stats.checked_sectors += u64::from(request.sectors - unknown);
                return Ok(());
            }
            _ if status != Status::Ok => Content::Unknown,
            Op::Write => Content::Write(sequence),
            Op::WriteZeroes { .. } => Content::Zeros,
            Op::Discard if self.job.discard_zeroes => Content::Zeros,
            Op::Discard => Content::Unknown,
        };
        model.set(request.sector, request.sectors, content);
        Ok(())
    }
}

/// Fills the data of all slots with random bytes, so that nothing can treat them as zeros; returns
/// their number.
fn fill_with_noise(queue: &mut Queue, seed: u64) -> usize {
    let mut rng = Rng::new(seed ^ u64::from(queue.index()));
    let len = queue.max_data();
    let mut slots: Vec<Slot> = std::iter::from_fn(|| queue.take_slot()).collect();
    for slot in &mut slots {
        for chunk in queue.data_mut(slot, len).chunks_exact_mut(8) {
            chunk.copy_from_slice(&rng.next_u64().to_le_bytes());
        }
    }
    let count = slots.len();
    for slot in slots.into_iter().rev() {
        queue.release(slot);
    }
    count
}

/// Reads sectors `range` through all queues and compares them with their expected content. Returns
/// the number of sectors that were compared; the content of the others is unknown.
///
/// # Errors
/// The first difference; or what went wrong with the device.
pub fn read_back(
    queues: &mut [Queue],
    expected: &Expected,
    range: std::ops::Range<u64>,
    wait: crate::driver::queue::Wait,
) -> Result<u64, RunError> {
    let parts = queues.len() as u64;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(queues)
            .map(|(part, queue)| {
                let range = range.clone();
                scope.spawn(move || read_back_part(queue, expected, range, (part, parts), wait))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic in a queue thread")).sum()
    })
}

/// Every `parts`th run of sectors from the `part`th on.
fn read_back_part(
    queue: &mut Queue,
    expected: &Expected,
    range: std::ops::Range<u64>,
    (part, parts): (u64, u64),
    wait: crate::driver::queue::Wait,
) -> Result<u64, RunError> {
    let index = queue.index();
    let step = (queue.max_data() / SECTOR_SIZE).max(1) as u64;
    let mut next = range.start + part * step;
    let mut checked = 0;
    let mut done = Vec::new();
    loop {
        while next < range.end
            && let Some(slot) = queue.take_slot()
        {
            let sectors =
                u32::try_from(step.min(range.end - next)).expect("at most what a slot holds");
            queue.submit(slot, Request { op: Op::Read, sector: next, sectors });
            next += parts * step;
        }
        queue.kick()?;
        if queue.in_flight() == 0 {
            return Ok(checked);
        }
        while queue.reap(&mut done)? == 0 {
            queue.wait(wait)?;
        }
        for Completion { slot, request, status, .. } in done.drain(..) {
            let Request { op, sector, sectors } = request;
            if status != Status::Ok {
                return Err(RunError::Request { queue: index, op, sector, sectors, status });
            }
            let data = queue.data(&slot, request.data_len());
            let unknown = expected
                .expectation
                .check(sector, data, |sector| expected.lookup(sector))?
                .map_err(|mismatch| RunError::Mismatch { queue: index, mismatch })?;
            checked += u64::from(sectors - unknown);
            queue.release(slot);
        }
    }
}
