//! Tracks what has been written since the last flush, as long as it is little, and what is being
//! written: the journal needs both.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use cow_format::{SectorRange, journal};

use crate::sync::lock;

/// Sectors (128 KiB) up to which a flush goes into the journal: writing this much twice costs less
/// than a second sync and a commit of the file system's own journal.
const SECTORS_MAX: u64 = 256;
/// The same limit in ranges: each write searches this list.
const RANGES_MAX: usize = 64;
const _: () = assert!(RANGES_MAX <= journal::RANGES_MAX);

/// See the module's text. A write that is not reported here may be missed by a flush.
#[derive(Debug)]
pub(crate) struct WriteTracker {
    /// Set when the tracked set overflowed or is unknown; tracking stops until the next flush.
    /// Writers share a flag that seldom changes.
    overflowed: AtomicBool,
    /// There is a journal, whose records are copies of what was written.
    has_journal: bool,
    /// Writes in progress must be tracked, for the journal or for the sweep of leaked space.
    tracked: bool,
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Written since the last flush, and how many sectors these are.
    ranges: Vec<SectorRange>,
    sectors: u64,
    /// Being written; `None` where no write is, which `free` lists. There may be thousands, so each
    /// knows its place.
    under_way: Vec<Option<SectorRange>>,
    free: Vec<usize>,
    /// Being copied into a record, and whether a write has overlapped the copy.
    copied: Vec<SectorRange>,
    overlapped: bool,
    /// No write may begin here for the moment.
    reserved: Option<SectorRange>,
}

/// Where a write in progress is listed, if it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WritePlace(Option<usize>);

impl WriteTracker {
    /// For a disk that has just been opened: what its predecessor flushed is unknown. `leaky`: the
    /// file may contain data that is not marked present.
    pub(crate) fn new(has_journal: bool, leaky: bool) -> Self {
        WriteTracker {
            overflowed: AtomicBool::new(true),
            has_journal,
            tracked: has_journal || leaky,
            state: Mutex::default(),
            released: Condvar::new(),
        }
    }

    /// A write of data within `range` begins. The answer is for [`Self::end`].
    pub(crate) fn begin(&self, range: SectorRange) -> WritePlace {
        if !self.tracked {
            return WritePlace(None);
        }
        let reserved = |state: &mut State| state.reserved.is_some_and(|held| meet(held, range));
        let waited = self.released.wait_while(self.state(), reserved);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.overlapped |= overlaps(&state.copied, range);
        let place = state.free.pop().unwrap_or_else(|| {
            state.under_way.push(None);
            state.under_way.len() - 1
        });
        state.under_way[place] = Some(range);
        WritePlace(Some(place))
    }

    /// It has ended; if it succeeded, [`Self::add`] was called before.
    pub(crate) fn end(&self, WritePlace(place): WritePlace) {
        let Some(place) = place else { return };
        let mut state = self.state();
        state.under_way[place] = None;
        state.free.push(place);
    }

    /// `ranges` have been written, and are about to be acknowledged.
    pub(crate) fn add(&self, ranges: &[SectorRange]) {
        // A flush that clears `overflowed` after this load covers this write: its data was there
        // before.
        if self.overflowed.load(Ordering::SeqCst) {
            return;
        }
        let mut state = self.state();
        ranges.iter().for_each(|range| state.add(*range));
        if state.ranges.len() > RANGES_MAX || state.sectors > SECTORS_MAX {
            self.overflowed.store(true, Ordering::SeqCst);
        }
    }

    /// It is unknown what has been flushed.
    pub(crate) fn add_everything(&self) {
        self.overflowed.store(true, Ordering::SeqCst);
    }

    /// What has been written since the last call, for a flush that begins now; `None` if it is not
    /// tracked.
    pub(crate) fn take(&self) -> Option<Vec<SectorRange>> {
        let mut state = self.state();
        state.sectors = 0;
        let ranges = std::mem::take(&mut state.ranges);
        (!self.overflowed.swap(false, Ordering::SeqCst)).then_some(ranges)
    }

    /// Lets `copy` read the content of `ranges`. Returns false if `copy` does, or if a sector may
    /// have been read half old and half new, which no disk ever shows. One copy at a time.
    pub(crate) fn copy_if_quiet(
        &self,
        ranges: &[SectorRange],
        copy: impl FnOnce() -> bool,
    ) -> bool {
        debug_assert!(self.has_journal);
        let mut state = self.state();
        if state.under_way.iter().flatten().any(|range| overlaps(ranges, *range)) {
            return false;
        }
        state.copied.extend_from_slice(ranges);
        state.overlapped = false;
        drop(state);
        let copied = copy();
        let mut state = self.state();
        state.copied.clear();
        copied && !state.overlapped
    }

    /// Runs `change` on `range` while no write there is in progress; new writes of it wait, so it
    /// must be short. Returns false without calling it if a write is in progress. One at a time.
    pub(crate) fn exclusively(&self, range: SectorRange, change: impl FnOnce()) -> bool {
        debug_assert!(self.tracked);
        let mut state = self.state();
        if state.under_way.iter().flatten().any(|other| meet(*other, range)) {
            return false;
        }
        state.reserved = Some(range);
        drop(state);
        change();
        self.state().reserved = None;
        self.released.notify_all();
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
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

fn overlaps(ranges: &[SectorRange], range: SectorRange) -> bool {
    ranges.iter().any(|other| meet(*other, range))
}

fn meet(one: SectorRange, other: SectorRange) -> bool {
    one.start() < other.end() && other.start() < one.end()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::thread::yield_now;

    use cow_format::{Sector, SectorCount};

    use super::*;

    fn range(start: u64, count: u64) -> SectorRange {
        SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
    }

    #[test]
    fn a_small_set_is_tracked_and_a_large_one_is_not() {
        let tracker = WriteTracker::new(true, false);
        assert_eq!(tracker.take(), None, "what came before is unknown");
        assert_eq!(tracker.take(), Some(vec![]));
        tracker.add(&[range(8, 8), range(3, 0), range(9, 2), range(20, 1)]);
        tracker.add(&[range(8, 8)]);
        assert_eq!(tracker.take(), Some(vec![range(8, 8), range(20, 1)]));
        tracker.add(&[range(0, SECTORS_MAX)]);
        assert!(tracker.take().is_some());
        tracker.add(&[range(0, SECTORS_MAX), range(1 << 20, 1)]);
        tracker.add(&[range(8, 8)]);
        assert_eq!(tracker.take(), None);
        (0..=RANGES_MAX as u64).for_each(|n| tracker.add(&[range(n * 2, 1)]));
        assert_eq!(tracker.take(), None);
        tracker.add(&[range(8, 8)]);
        tracker.add_everything();
        assert_eq!(tracker.take(), None);
        assert_eq!(tracker.take(), Some(vec![]));
    }

    #[test]
    fn no_write_overlaps_an_exclusive_change() {
        let tracker = WriteTracker::new(false, true);
        let write = tracker.begin(range(8, 8));
        assert!(!tracker.exclusively(range(15, 4), || panic!("it is being written")));
        assert!(tracker.exclusively(range(16, 4), || ()));
        tracker.end(write);
        let changed = AtomicBool::new(false);
        let (held, is_held) = std::sync::mpsc::channel();
        let (tracker, changed) = (&tracker, &changed);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                is_held.recv().unwrap();
                let write = tracker.begin(range(8, 8));
                assert!(changed.load(Ordering::SeqCst), "it did not wait");
                tracker.end(write);
            });
            assert!(tracker.exclusively(range(15, 4), || {
                held.send(()).unwrap();
                // Writes elsewhere do not wait.
                tracker.end(tracker.begin(range(19, 4)));
                changed.store(true, Ordering::SeqCst);
            }));
        });
    }

    #[test]
    fn a_copy_is_disturbed_by_writes_of_its_sectors_only() {
        let tracker = WriteTracker::new(true, false);
        let few = [range(8, 8), range(100, 1)];
        assert!(tracker.copy_if_quiet(&few, || true));
        assert!(!tracker.copy_if_quiet(&few, || false));
        for (write, disturbs) in [
            (range(15, 1), true),
            (range(0, 9), true),
            (range(99, 4), true),
            (range(0, 8), false),
            (range(16, 84), false),
            (range(101, 1), false),
        ] {
            let write_now = || tracker.end(tracker.begin(write));
            write_now();
            let found = tracker.copy_if_quiet(&few, || {
                write_now();
                true
            });
            assert_eq!(found, !disturbs, "{write} in between");
            let first = tracker.begin(write);
            let second = tracker.begin(write);
            tracker.end(first);
            assert_eq!(tracker.copy_if_quiet(&few, || true), !disturbs, "{write} under way");
            tracker.end(second);
        }
        assert!(tracker.copy_if_quiet(&few, || true));
        assert_eq!(tracker.state().under_way.len(), 2, "places are used again");
    }

    /// Writers and a flusher in threads of their own. What a writer was told is written when a flush
    /// begins must be covered by that flush or one before.
    #[test]
    fn no_write_is_missed_by_a_flush_that_begins_after_it() {
        const WRITERS: usize = 3;
        const WRITES: u64 = if cfg!(miri) { 20 } else { 500 };
        let tracker = WriteTracker::new(true, false);
        // The page cache, which has a lock of its own; what each writer has acknowledged.
        let cached = Mutex::new([0; WRITERS]);
        let acknowledged = [const { AtomicU64::new(0) }; WRITERS];
        let flushes = AtomicU64::new(0);
        let (mut durable, mut missed) = ([0; WRITERS], false);
        std::thread::scope(|scope| {
            let (tracker, cached, flushes) = (&tracker, &cached, &flushes);
            let writers = (0..).zip(&acknowledged).map(|(writer, acknowledged)| {
                scope.spawn(move || {
                    for write in 1..=WRITES {
                        lock(cached)[writer] = write;
                        match write % 8 {
                            0 => tracker.add_everything(),
                            4 => tracker.add(&[range(writer as u64, SECTORS_MAX + 1)]),
                            _ => tracker.add(&[range(writer as u64, 1)]),
                        }
                        acknowledged.store(write, Ordering::Release);
                        // The next write would cover this one too; a whole flush goes first.
                        let begun = flushes.load(Ordering::Acquire) + 1;
                        while flushes.load(Ordering::Acquire) <= begun {
                            yield_now();
                        }
                    }
                })
            });
            let writers: Vec<_> = writers.collect();
            while writers.iter().any(|writer| !writer.is_finished()) {
                let before = acknowledged.each_ref().map(|write| write.load(Ordering::Acquire));
                let written = tracker.take();
                let cached = *lock(cached);
                for (writer, durable) in durable.iter_mut().enumerate() {
                    let its = range(writer as u64, 1);
                    if written.as_ref().is_none_or(|ranges| overlaps(ranges, its)) {
                        *durable = cached[writer];
                    }
                }
                missed |= durable.iter().zip(&before).any(|(durable, before)| durable < before);
                flushes.fetch_add(1, Ordering::Release);
            }
        });
        assert!(!missed);
    }

    /// Two words of a sector are written one after the other, by a thread of its own.
    #[test]
    fn no_copy_and_no_change_sees_half_a_write() {
        const WRITES: u64 = if cfg!(miri) { 50 } else { 2000 };
        let tracker = WriteTracker::new(true, true);
        let words = [const { AtomicU64::new(0) }; 2];
        let sector = [range(8, 1)];
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for write in 1..=WRITES {
                    let place = tracker.begin(sector[0]);
                    words[0].store(write, Ordering::Relaxed);
                    yield_now();
                    words[1].store(write, Ordering::Relaxed);
                    tracker.end(place);
                    yield_now();
                }
            });
            let is_whole = || {
                let second = words[1].load(Ordering::Relaxed);
                yield_now();
                words[0].load(Ordering::Relaxed) == second
            };
            while !writer.is_finished() {
                let mut whole = true;
                let copied = tracker.copy_if_quiet(&sector, || {
                    whole = is_whole();
                    true
                });
                assert!(whole || !copied, "copied half a write");
                whole = true;
                tracker.exclusively(sector[0], || whole = is_whole());
                assert!(whole, "changed in the middle of a write");
            }
        });
    }
}
