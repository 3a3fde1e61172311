//! Comparing two disks.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cow_format::{SectorCount, SectorRange};

use super::copy::PageBuffer;
use super::walk::{Image, Piece, Reader, Source};
use super::{OpError, Progress, parallel};
use crate::storage::{PAGE, SECTOR};

/// Bytes that are compared at once.
const BUFFER: usize = 1 << 20;

/// The offset of the first byte in which two disks differ, or `None`. Beyond its end, the shorter
/// one counts as zeros. What both read from the same offset of the same file is not read at all.
pub fn first_difference<A: Image, B: Image>(
    first: &A,
    second: &B,
    progress: Progress<'_>,
) -> Result<Option<u64>, OpError> {
    let size = first.size().max(second.size());
    let found = AtomicU64::new(u64::MAX);
    let work = |pair: &mut Pair<A::Reader<'_>, B::Reader<'_>>, range: SectorRange| {
        // A later difference no longer matters.
        if range.start_bytes().get() < found.load(Relaxed) {
            pair.compare(range, |at, one, two| {
                if one != two {
                    let same = one.iter().zip(two).take_while(|(one, two)| one == two).count();
                    found.fetch_min(at + same as u64, Relaxed);
                }
                Ok(())
            })?;
        }
        progress(range.len_bytes());
        Ok::<(), OpError>(())
    };
    let sectors = SectorCount::covering(size);
    parallel::for_each_piece(sectors, parallel::threads(), || Pair::new(first, second), work)?;
    Ok(Some(found.into_inner()).filter(|at| *at < size))
}

/// Two disks that are read side by side, by one thread.
pub struct Pair<A, B> {
    one: Side<A>,
    two: Side<B>,
}

impl<A: Reader, B: Reader> Pair<A, B> {
    /// `one` and `two` side by side.
    pub fn new<'a, 'b, I: Image<Reader<'a> = A> + 'a, J: Image<Reader<'b> = B> + 'b>(
        one: &'a I,
        two: &'b J,
    ) -> Self {
        let one =
            Side { size: one.size(), reader: one.reader(), buf: PageBuffer::new(BUFFER + PAGE) };
        Pair {
            one,
            two: Side {
                size: two.size(),
                reader: two.reader(),
                buf: PageBuffer::new(BUFFER + PAGE),
            },
        }
    }

    /// Passes to `found` the bytes of both, in order, wherever they may differ.
    pub fn compare(
        &mut self,
        range: SectorRange,
        mut found: impl FnMut(u64, &[u8], &[u8]) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        let mut ones = self.one.reader.pieces(range)?.into_iter();
        let mut twos = self.two.reader.pieces(range)?.into_iter();
        let (mut next_one, mut next_two) = (ones.next(), twos.next());
        while let (Some(one), Some(two)) = (next_one, next_two) {
            let len = one.len.min(two.len).min(BUFFER as u64);
            if !self.are_same(&one, &two) {
                found(one.at.get(), self.one.read(&one, len)?, self.two.read(&two, len)?)?;
            }
            next_one = one.after(len).or_else(|| ones.next());
            next_two = two.after(len).or_else(|| twos.next());
        }
        Ok(())
    }

    /// Whether two pieces that begin at the same offset of the disks are the same bytes of the same
    /// file.
    fn are_same(&self, one: &Piece, two: &Piece) -> bool {
        match (one.source, two.source) {
            (Source::Zero, Source::Zero) => true,
            (Source::Data { layer, at }, Source::Data { layer: other, at: there }) => {
                let file = self.one.reader.file(layer);
                at == there && file.is_some() && file == self.two.reader.file(other)
            }
            _ => false,
        }
    }

    /// Passes to `found` the bytes of the first disk that differ in the second, in whole sectors
    /// and runs as long as possible.
    pub(crate) fn differences(
        &mut self,
        range: SectorRange,
        mut found: impl FnMut(u64, &[u8]) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        self.compare(range, |at, one, two| {
            runs_of_difference(one, two, |run| found(at + run.start as u64, &one[run]))
        })
    }
}

/// Calls `found` with each run of sectors that differ.
fn runs_of_difference(
    one: &[u8],
    two: &[u8],
    mut found: impl FnMut(Range<usize>) -> Result<(), OpError>,
) -> Result<(), OpError> {
    let mut start = None;
    for (index, (one, two)) in one.chunks(SECTOR).zip(two.chunks(SECTOR)).enumerate() {
        match (one == two, start) {
            (true, Some(from)) => {
                found(from..index * SECTOR)?;
                start = None;
            }
            (false, None) => start = Some(index * SECTOR),
            _ => {}
        }
    }
    start.map_or(Ok(()), |from| found(from..one.len()))
}

struct Side<R> {
    size: u64,
    reader: R,
    buf: PageBuffer,
}

impl<R: Reader> Side<R> {
    /// The first `len` bytes of a piece. Past the end of the disk there are zeros, in its last
    /// sector too.
    fn read(&mut self, piece: &Piece, len: u64) -> Result<&[u8], OpError> {
        let place = match piece.source {
            Source::Zero => 0,
            Source::Data { at, .. } => at.get(),
        };
        let buf = &mut self.buf.for_place(place)[..usize::try_from(len).unwrap_or(BUFFER)];
        match piece.source {
            Source::Zero => buf.fill(0),
            Source::Data { layer, at } => self.reader.read(layer, at, buf)?,
        }
        let inside = usize::try_from(self.size.saturating_sub(piece.at.get())).ok();
        if let Some(outside) = inside.and_then(|inside| buf.get_mut(inside..)) {
            outside.fill(0);
        }
        Ok(buf)
    }
}
