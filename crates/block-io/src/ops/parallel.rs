//! A long job on a disk, divided into pieces for all cores.

use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use cow_format::{Sector, SectorCount, SectorRange};

use crate::sync::lock;

/// Sectors of a piece (8 MiB): a thread takes the next one when it is done, so pieces are small
/// compared with a disk and large compared with a system call.
const PIECE: u64 = 16384;

/// The number of threads for work that mostly moves bytes: one for each core.
pub fn threads() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Calls `work` for pieces that together are the first `sectors` sectors, from `threads` threads,
/// in ascending order in each thread. `state` creates what each thread keeps between its pieces.
/// The first error ends everything.
pub(super) fn for_each_piece<S, E: Send>(
    sectors: SectorCount,
    threads: NonZeroUsize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, SectorRange) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let error = Mutex::new(None);
    let thread = || {
        let mut state = state();
        while !stop.load(Relaxed) {
            let Some(range) = piece(next.fetch_add(1, Relaxed), sectors) else { break };
            if let Err(err) = work(&mut state, range) {
                stop.store(true, Relaxed);
                lock(&error).get_or_insert(err);
            }
        }
    };
    let pieces = sectors.get().div_ceil(PIECE);
    let threads = u64::try_from(threads.get()).unwrap_or(u64::MAX).min(pieces);
    std::thread::scope(|scope| {
        (1..threads).for_each(|_| _ = scope.spawn(thread));
        thread();
    });
    match error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(err) => Err(err),
        None => Ok(()),
    }
}

/// Piece number `number` of the first `sectors` sectors.
fn piece(number: u64, sectors: SectorCount) -> Option<SectorRange> {
    let start = number.checked_mul(PIECE).filter(|start| *start < sectors.get())?;
    let count = PIECE.min(sectors.get() - start);
    SectorRange::new(Sector::new(start), SectorCount::new(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sector_is_in_one_piece() {
        for sectors in [0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 7] {
            let seen = Mutex::new(Vec::new());
            let work = |(): &mut (), range: SectorRange| {
                seen.lock().unwrap().push((range.start().get(), range.end().get()));
                Ok::<(), ()>(())
            };
            for_each_piece(SectorCount::new(sectors), NonZeroUsize::new(3).unwrap(), || (), work)
                .unwrap();
            let mut seen = seen.into_inner().unwrap();
            seen.sort_unstable();
            let end = seen.iter().fold(0, |end, (from, to)| {
                assert_eq!(*from, end);
                *to
            });
            assert_eq!(end, sectors);
        }
    }

    #[test]
    fn an_error_ends_all() {
        let done = AtomicU64::new(0);
        let work = |(): &mut (), range: SectorRange| {
            done.fetch_add(1, Relaxed);
            if range.start().get() == 2 * PIECE { Err("third") } else { Ok(()) }
        };
        let one = NonZeroUsize::MIN;
        assert_eq!(for_each_piece(SectorCount::new(100 * PIECE), one, || (), work), Err("third"));
        assert_eq!(done.into_inner(), 3);
    }
}
