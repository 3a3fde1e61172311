//! What has been written since the last flush, as long as it is little, and whether a write is under way: what the
//! journal needs to know.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use cow_format::{SectorRange, journal};

/// Sectors (128 KiB) up to which a flush goes into the journal: writing so much twice costs less than a second sync and a
/// commit of the file system's own journal.
const SECTORS_MAX: u64 = 256;
/// Ranges up to which it does: a list to be looked through at each write.
const RANGES_MAX: usize = 64;
const _: () = assert!(RANGES_MAX <= journal::RANGES_MAX);

/// See above. A write that does not call it is a write that a flush may miss.
#[derive(Debug)]
pub(crate) struct Unflushed {
    begun: AtomicU64,
    ended: AtomicU64,
    /// More than a few, or nobody knows: the rest is not looked at. Writers then share a cache line that nobody changes.
    much: AtomicBool,
    few: Mutex<Few>,
}

#[derive(Debug, Default)]
struct Few {
    ranges: Vec<SectorRange>,
    sectors: u64,
}

/// A moment at which no write was under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quiet(u64);

impl Unflushed {
    /// Of a disk that has just been opened: what its predecessor did is not known.
    pub(crate) fn new() -> Self {
        let (begun, ended) = (AtomicU64::new(0), AtomicU64::new(0));
        Unflushed { begun, ended, much: AtomicBool::new(true), few: Mutex::default() }
    }

    /// A write of data begins.
    pub(crate) fn begin(&self) {
        self.begun.fetch_add(1, Ordering::SeqCst);
    }

    /// It has ended, and [`Self::add`] has been told of it if it succeeded.
    pub(crate) fn end(&self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
    }

    /// A moment without a write under way, if that is now.
    pub(crate) fn quiet(&self) -> Option<Quiet> {
        // In this order: what had begun when `begun` is read and not ended when `ended` was read makes them differ.
        let ended = self.ended.load(Ordering::SeqCst);
        (self.begun.load(Ordering::SeqCst) == ended).then_some(Quiet(ended))
    }

    /// Whether no write has begun since that moment.
    pub(crate) fn quiet_since(&self, moment: Quiet) -> bool {
        self.begun.load(Ordering::SeqCst) == moment.0
    }

    /// `ranges` have been written, and are about to be acknowledged.
    pub(crate) fn add(&self, ranges: &[SectorRange]) {
        // A flush that takes note of `much` after this looked at it covers this write: its data was there before.
        if self.much.load(Ordering::SeqCst) {
            return;
        }
        let mut few = self.few();
        ranges.iter().for_each(|range| few.add(*range));
        if few.ranges.len() > RANGES_MAX || few.sectors > SECTORS_MAX {
            *few = Few::default();
            self.much.store(true, Ordering::SeqCst);
        }
    }

    /// Nobody knows what has been flushed.
    pub(crate) fn add_everything(&self) {
        let mut few = self.few();
        *few = Few::default();
        self.much.store(true, Ordering::SeqCst);
    }

    /// What has been written since the last call, for a flush that begins now; `None` for much.
    pub(crate) fn take(&self) -> Option<Vec<SectorRange>> {
        let mut few = self.few();
        let much = self.much.swap(false, Ordering::SeqCst);
        let ranges = std::mem::take(&mut *few).ranges;
        (!much).then_some(ranges)
    }

    fn few(&self) -> MutexGuard<'_, Few> {
        self.few.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Few {
    fn add(&mut self, range: SectorRange) {
        let inside =
            |known: &SectorRange| known.start() <= range.start() && range.end() <= known.end();
        if range.is_empty() || self.ranges.iter().any(inside) {
            return;
        }
        self.sectors += range.count().get();
        self.ranges.push(range);
    }
}

#[cfg(test)]
mod tests {
    use cow_format::{Sector, SectorCount};

    use super::*;

    fn range(start: u64, count: u64) -> SectorRange {
        SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
    }

    #[test]
    fn little_is_remembered_and_much_is_not() {
        let unflushed = Unflushed::new();
        assert_eq!(unflushed.take(), None, "nobody knows what came before");
        assert_eq!(unflushed.take(), Some(vec![]));
        unflushed.add(&[range(8, 8), range(3, 0), range(9, 2), range(20, 1)]);
        unflushed.add(&[range(8, 8)]);
        assert_eq!(unflushed.take(), Some(vec![range(8, 8), range(20, 1)]));
        unflushed.add(&[range(0, SECTORS_MAX)]);
        assert!(unflushed.take().is_some());
        unflushed.add(&[range(0, SECTORS_MAX), range(1 << 20, 1)]);
        unflushed.add(&[range(8, 8)]);
        assert_eq!(unflushed.take(), None);
        (0..=RANGES_MAX as u64).for_each(|n| unflushed.add(&[range(n * 2, 1)]));
        assert_eq!(unflushed.take(), None);
        unflushed.add_everything();
        assert_eq!(unflushed.take(), None);
        assert_eq!(unflushed.take(), Some(vec![]));
    }

    #[test]
    fn a_write_under_way_or_between_is_seen() {
        let unflushed = Unflushed::new();
        let before = unflushed.quiet().unwrap();
        assert!(unflushed.quiet_since(before));
        unflushed.begin();
        assert!(unflushed.quiet().is_none() && !unflushed.quiet_since(before));
        unflushed.begin();
        unflushed.end();
        assert!(unflushed.quiet().is_none());
        unflushed.end();
        assert!(unflushed.quiet().is_some() && !unflushed.quiet_since(before));
    }
}
