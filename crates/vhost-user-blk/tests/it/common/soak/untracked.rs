//! The same without an account of what is in flight: nobody can tell the next daemon which requests
//! the dead one had not answered.

use std::time::Instant;

use blk_bench::driver::device::Device;
use blk_bench::driver::queue::{Op, Request, SECTOR_SIZE};
use blk_bench::load::model::{Content, Expectation};

use super::{End, GRANULE, Lane, PATIENCE, Soak, start};

/// What becomes of the guest when its daemon has died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// It is started again: its memory and rings are new.
    StartedAgain,
    /// It goes on, with rings that the next daemon serves from behind the last answer, as QEMU has
    /// it.
    GoesOn,
}

/// What went wrong for guests that went on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Losses {
    /// Requests that were never answered.
    pub never: u64,
    /// Answers to requests that were answered before.
    pub twice: u64,
    /// Sectors that hold neither what was acknowledged nor what a request in flight was to write:
    /// one that had been answered was done again, over what was written later.
    pub undone: u64,
}

impl Soak {
    /// Loads the daemon until it has given so many answers, kills it, and starts the next. Every
    /// sector must then hold what was acknowledged, or what a request wrote that was in flight; for
    /// a guest that goes on it is counted in `losses` how far that is not so. Nothing may be torn
    /// in any case.
    pub fn untracked_life(
        &mut self,
        args: &[&str],
        answers: u64,
        guest: Guest,
        losses: &mut Losses,
    ) {
        self.load(answers);
        assert!(!self.device.is_dead(), "the daemon has died by itself");
        self.bury();
        // What it answered before its end counts.
        (0..self.lanes.len()).for_each(|lane| _ = self.reap(lane));
        self.interrupted += self.in_flight();
        let doubtful: Vec<_> = self.lanes.iter().map(Lane::doubtful).collect();
        self.daemon = start(&self.directory, &self.way, args, &End::Killed { after: 0 });
        match guest {
            Guest::StartedAgain => self.start_again(),
            Guest::GoesOn => self.go_on(losses),
        }
        for (lane, doubtful) in doubtful.iter().enumerate() {
            let undone = self.compare(lane, doubtful);
            assert!(undone.is_empty() || guest == Guest::GoesOn, "lost: {undone:#?}");
            losses.undone += undone.len() as u64;
        }
    }

    fn start_again(&mut self) {
        self.device = Device::connect(&self.options).unwrap();
        for (lane, queue) in self.lanes.iter_mut().zip(self.device.take_queues()) {
            lane.queue = queue;
            lane.busy.fill(false);
        }
    }

    /// Has the rings served again until there is an answer for each entry of theirs.
    fn go_on(&mut self, losses: &mut Losses) {
        self.device.reconnect(&self.options).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        for lane in &mut self.lanes {
            while !lane.queue.is_caught_up() {
                assert!(Instant::now() < deadline && !self.device.is_dead(), "no answer");
                losses.twice += lane.queue.reap_repeated(&mut done).unwrap() as u64;
                for completion in done.drain(..) {
                    self.completed += 1;
                    // What it read may have been written meanwhile, by a request that is done
                    // again.
                    if let Some(content) = lane.written(completion.slot.index(), completion.request)
                    {
                        let Request { sector, sectors, .. } = completion.request;
                        lane.model.set(sector, sectors, content);
                    }
                    lane.queue.release(completion.slot);
                }
                std::thread::yield_now();
            }
            losses.never += lane.queue.give_up() as u64;
            lane.busy.fill(false);
        }
    }

    /// Reads all sectors of a lane, takes over what they hold, and says which of them do not hold
    /// what they must.
    fn compare(&mut self, lane: usize, doubtful: &[(Request, Content)]) -> Vec<String> {
        let mut undone = Vec::new();
        for nth in 0..self.lanes[lane].busy.len() as u64 {
            let (first, data) = self.read_granule(lane, nth);
            let lane = &mut self.lanes[lane];
            for (sector, data) in (first..).zip(data.chunks_exact(SECTOR_SIZE)) {
                let found = lane.identify(sector, data, &self.expectation);
                let acknowledged = lane.model.get(sector);
                let may = |(request, content): &(Request, Content)| {
                    let end = request.sector + u64::from(request.sectors);
                    (request.sector..end).contains(&sector) && *content == found
                };
                if found != acknowledged && !doubtful.iter().any(may) {
                    undone.push(format!("sector {sector}: {found:?}, not {acknowledged:?}"));
                }
                lane.model.set(sector, 1, found);
            }
        }
        undone
    }

    /// The first sector and the content of a lane's granule. Nothing else is in flight.
    fn read_granule(&mut self, lane: usize, nth: u64) -> (u64, Vec<u8>) {
        let queue = &mut self.lanes[lane].queue;
        let slot = queue.take_slot().unwrap();
        let sector = self.region.owned_start(queue.index(), nth);
        let request = Request { op: Op::Read, sector, sectors: GRANULE };
        queue.submit(slot, request);
        queue.kick().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        while queue.reap(&mut done).unwrap() == 0 {
            assert!(Instant::now() < deadline && !self.device.is_dead(), "no answer");
            std::thread::yield_now();
        }
        let slot = done.pop().unwrap().slot;
        let data = queue.data(&slot, request.data_len()).to_vec();
        queue.release(slot);
        (sector, data)
    }
}

impl Lane {
    /// What a request writes that is in a slot, if it writes.
    fn written(&self, slot: usize, request: Request) -> Option<Content> {
        match request.op {
            Op::Write => Some(Content::Write(self.sequences[slot])),
            Op::Discard | Op::WriteZeroes { .. } => Some(Content::Zeros),
            Op::Read | Op::Flush | Op::GetId => None,
        }
    }

    /// The requests that may have been done or not, with what they write.
    fn doubtful(&self) -> Vec<(Request, Content)> {
        let all = self.queue.unanswered();
        all.filter_map(|(slot, request)| Some((request, self.written(slot, request)?))).collect()
    }

    /// Which of the things that ever were to stand in a sector stands there; panics if it is none.
    fn identify(&self, sector: u64, data: &[u8], expectation: &Expectation) -> Content {
        let stamp = u32::from_le_bytes(data[16..20].try_into().unwrap());
        let mut candidates = vec![Content::Zeros, Content::Base];
        // A number that was never given out is a stamp of nothing.
        if (1..=self.sequence).contains(&stamp) {
            candidates.push(Content::Write(stamp));
        }
        let is = |content: &Content| {
            let mut expected = [0; SECTOR_SIZE];
            expectation.fill(sector, self.queue.index(), *content, &mut expected).unwrap()
                && expected == data
        };
        let torn = || panic!("sector {sector} holds what nobody wrote: {data:x?}");
        candidates.into_iter().find(is).unwrap_or_else(torn)
    }
}
