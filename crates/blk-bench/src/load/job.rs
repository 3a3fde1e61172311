//! What a run does, and the requests that follow from it.

use std::time::Duration;

use crate::driver::queue::{Op, Request, Wait};
use crate::load::region::Region;
use crate::load::rng::{Permutation, Rng};

/// In which order sectors are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere.
    Random,
    /// One granule after the other, and again from the start.
    Sequential,
}

/// How often each operation is drawn, as weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mix {
    /// Reads.
    pub read: u32,
    /// Writes.
    pub write: u32,
    /// Discards.
    pub discard: u32,
    /// Write-zeroes that keep the space allocated.
    pub write_zeroes: u32,
    /// Write-zeroes with the unmap flag.
    pub unmap_zeroes: u32,
}

impl Mix {
    /// Reads only.
    pub const READ: Self = Self { read: 1, write: 0, discard: 0, write_zeroes: 0, unmap_zeroes: 0 };
    /// Writes only.
    pub const WRITE: Self =
        Self { read: 0, write: 1, discard: 0, write_zeroes: 0, unmap_zeroes: 0 };

    fn weights(&self) -> [(u32, Op); 5] {
        [
            (self.read, Op::Read),
            (self.write, Op::Write),
            (self.discard, Op::Discard),
            (self.write_zeroes, Op::WriteZeroes { unmap: false }),
            (self.unmap_zeroes, Op::WriteZeroes { unmap: true }),
        ]
    }

    /// Sum of the weights.
    pub fn total(&self) -> u32 {
        self.weights().iter().map(|(weight, _)| weight).sum()
    }

    /// Whether anything is drawn that changes the disk.
    pub fn changes(&self) -> bool {
        self.total() != self.read
    }

    fn draw(&self, rng: &mut Rng) -> Op {
        let total = self.total();
        let mut left = if total > 1 { rng.below(u64::from(total)) } else { 0 };
        for (weight, op) in self.weights() {
            match left.checked_sub(u64::from(weight)) {
                Some(rest) => left = rest,
                None => return op,
            }
        }
        unreachable!("drawn below the sum of the weights")
    }
}

/// A run.
#[derive(Clone, Debug)]
pub struct Job {
    /// Order.
    pub pattern: Pattern,
    /// Operations.
    pub mix: Mix,
    /// Where. Its granule is the longest request.
    pub region: Region,
    /// Shortest request in sectors. Longer ones, up to a granule, are multiples of it.
    pub min_sectors: u32,
    /// Each queue keeps to its own granules. Needed for verification and `once`.
    pub partitioned: bool,
    /// Each granule is visited at most once, then the run ends.
    pub once: bool,
    /// A queue flushes after this many writes.
    pub flush_every: Option<u64>,
    /// The run ends after this time (not counting the warm-up).
    pub runtime: Option<Duration>,
    /// Requests during this time before the run are not measured.
    pub warmup: Duration,
    /// The run ends after this many requests, flushes not counted, over all queues.
    pub count: Option<u64>,
    /// How completions are waited for.
    pub wait: Wait,
    /// Of the random numbers, and in the stamps.
    pub seed: u64,
    /// Writes carry stamps, reads are checked.
    pub verify: bool,
    /// A discarded sector must read as zeros; otherwise its content is unknown.
    pub discard_zeroes: bool,
    /// Failed requests are counted instead of ending the run.
    pub tolerate_errors: bool,
    /// The used ring must give exactly the number of bytes that were written.
    pub check_used_len: bool,
    /// If the backend goes away, the run ends as if its time were over. What was in flight may have
    /// happened or not.
    pub survive_disconnect: bool,
}

impl Job {
    /// Random reads of a region by one queue for ever, to be changed by the caller.
    pub fn new(region: Region) -> Self {
        Self {
            pattern: Pattern::Random,
            mix: Mix::READ,
            region,
            min_sectors: region.granule,
            partitioned: false,
            once: false,
            flush_every: None,
            runtime: None,
            warmup: Duration::ZERO,
            count: None,
            wait: Wait::Eventfd,
            seed: 0,
            verify: false,
            discard_zeroes: false,
            tolerate_errors: false,
            check_used_len: false,
            survive_disconnect: false,
        }
    }
}

/// The requests of one queue.
#[derive(Debug)]
pub(crate) struct Generator {
    pattern: Pattern,
    mix: Mix,
    region: Region,
    /// `None`: any queue may touch any granule.
    owner: Option<u16>,
    min_sectors: u32,
    flush_every: Option<u64>,
    writes_since_flush: u64,
    rng: Rng,
    order: Option<Permutation>,
    /// Granules to visit, if each is visited once.
    visits_left: Option<u64>,
    requests_left: Option<u64>,
    cursor: u64,
}

impl Generator {
    pub fn new(job: &Job, queue: u16) -> Self {
        let owned = job.region.owned(queue);
        let queues = u64::from(job.region.queues);
        let share = |count: u64| count / queues + u64::from(u64::from(queue) < count % queues);
        let random_once = job.once && job.pattern == Pattern::Random;
        let seed = job.seed ^ (u64::from(queue) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self {
            pattern: job.pattern,
            mix: job.mix,
            region: job.region,
            owner: (job.partitioned || job.pattern == Pattern::Sequential).then_some(queue),
            min_sectors: job.min_sectors,
            flush_every: job.flush_every,
            writes_since_flush: 0,
            rng: Rng::new(seed),
            order: random_once.then(|| Permutation::new(owned, seed)),
            visits_left: job.once.then_some(owned),
            requests_left: job.count.map(share),
            cursor: 0,
        }
    }

    /// The next request, or `None` at the end.
    pub fn next_request(&mut self) -> Option<Request> {
        if self.flush_every.is_some_and(|every| self.writes_since_flush >= every) {
            self.writes_since_flush = 0;
            return Some(Request { op: Op::Flush, sector: 0, sectors: 0 });
        }
        for left in [&mut self.requests_left, &mut self.visits_left].into_iter().flatten() {
            *left = left.checked_sub(1)?;
        }
        let op = self.mix.draw(&mut self.rng);
        self.writes_since_flush += u64::from(op != Op::Read);
        let (sector, sectors) = self.place();
        Some(Request { op, sector, sectors })
    }

    fn place(&mut self) -> (u64, u32) {
        let owned = self.owner.map_or(self.region.granules, |queue| self.region.owned(queue));
        let nth = match (&self.order, self.pattern) {
            (Some(order), _) => order.at(self.cursor),
            (None, Pattern::Sequential) => self.cursor % owned,
            (None, Pattern::Random) => self.rng.below(owned),
        };
        self.cursor += 1;
        let start = match self.owner {
            Some(queue) => self.region.owned_start(queue, nth),
            None => self.region.granule_start(nth),
        };
        let units = self.region.granule / self.min_sectors;
        if units == 1 || self.pattern == Pattern::Sequential {
            return (start, self.region.granule);
        }
        let len = self.rng.below(u64::from(units)) + 1;
        let at = self.rng.below(u64::from(units) - len + 1);
        let len = u32::try_from(len).expect("at most units");
        (start + at * u64::from(self.min_sectors), len * self.min_sectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: Region = Region { start: 64, granule: 8, granules: 10, queues: 3 };

    fn requests(job: &Job, queue: u16, limit: usize) -> Vec<Request> {
        let mut generator = Generator::new(job, queue);
        std::iter::from_fn(|| generator.next_request()).take(limit).collect()
    }

    #[test]
    fn once_visits_each_granule_once_over_all_queues() {
        for pattern in [Pattern::Random, Pattern::Sequential] {
            let job =
                Job { pattern, once: true, partitioned: true, mix: Mix::WRITE, ..Job::new(REGION) };
            let mut starts: Vec<u64> = (0..3)
                .flat_map(|queue| requests(&job, queue, 100))
                .map(|request| request.sector)
                .collect();
            starts.sort_unstable();
            assert_eq!(starts, (0..10).map(|n| 64 + 8 * n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn partitioned_requests_of_any_length_stay_with_their_owner() {
        let job = Job { partitioned: true, min_sectors: 1, ..Job::new(REGION) };
        let mut lengths = [false; 9];
        for request in
            (0..3).flat_map(|queue| requests(&job, queue, 500).into_iter().map(move |r| (queue, r)))
        {
            let (queue, request) = request;
            for sector in request.sector..request.sector + u64::from(request.sectors) {
                assert_eq!(REGION.owner(sector).0, queue);
            }
            lengths[request.sectors as usize] = true;
        }
        assert!(lengths[1..].iter().all(|&seen| seen), "{lengths:?}");
    }

    #[test]
    fn flushes_come_after_every_nth_write_and_are_not_counted() {
        let job = Job { mix: Mix::WRITE, flush_every: Some(2), count: Some(9), ..Job::new(REGION) };
        let ops: Vec<bool> =
            requests(&job, 0, 100).iter().map(|request| request.op == Op::Flush).collect();
        assert_eq!(ops, [false, false, true, false]);
    }

    #[test]
    fn a_mix_draws_by_weight() {
        let job = Job { mix: Mix { read: 3, write: 1, ..Mix::default() }, ..Job::new(REGION) };
        let drawn = requests(&job, 0, 4000);
        let reads = drawn.iter().filter(|request| request.op == Op::Read).count();
        assert!((2800..3200).contains(&reads), "{reads} of 4000 (seed 0)");
        assert_eq!(drawn.len(), 4000);
    }
}
