//! Comparing two disks.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use cow_format::{ByteOffset, Sector, SectorCount, SectorRange};

use super::walk::{Piece, Source, Walker};
use super::{OpError, Progress, parallel};
use crate::disk::{Disk, Layer};
use crate::storage::{Env, FileId, Storage};

/// Bytes that are compared at once.
const BUFFER: usize = 1 << 20;

/// The offset of the first byte in which two disks differ, or `None`. The end of the shorter one is taken for zeros. What
/// both read from the same place in the same file is not read at all.
pub fn first_difference<E: Env>(
    first: &Disk<E>,
    second: &Disk<E>,
    progress: Progress<'_>,
) -> Result<Option<u64>, OpError> {
    let size = first.size().max(second.size());
    let found = AtomicU64::new(u64::MAX);
    let (ids, other_ids) = (ids(first)?, ids(second)?);
    let state = || Pair {
        one: Side { disk: first, walker: Walker::new(first), ids: &ids, buf: vec![0; BUFFER] },
        two: Side {
            disk: second,
            walker: Walker::new(second),
            ids: &other_ids,
            buf: vec![0; BUFFER],
        },
    };
    let work = |pair: &mut Pair<'_, E>, range: SectorRange| {
        // What comes after a difference does not matter any more.
        if range.start_bytes().get() < found.load(Relaxed)
            && let Some(at) = pair.difference(range)?
        {
            found.fetch_min(at, Relaxed);
        }
        progress(range.len_bytes());
        Ok::<(), OpError>(())
    };
    parallel::for_each_piece(SectorCount::covering(size), parallel::threads(), state, work)?;
    Ok(Some(found.into_inner()).filter(|at| *at < size))
}

fn ids<E: Env>(disk: &Disk<E>) -> Result<Vec<FileId>, OpError> {
    let id = |layer: &Layer<E::File>| {
        Ok(layer.file().stat().map_err(OpError::io(layer.path(), "stat"))?.id)
    };
    disk.layers().iter().map(id).collect()
}

struct Pair<'a, E: Env> {
    one: Side<'a, E>,
    two: Side<'a, E>,
}

struct Side<'a, E: Env> {
    disk: &'a Disk<E>,
    walker: Walker<'a, E>,
    ids: &'a [FileId],
    buf: Vec<u8>,
}

impl<E: Env> Pair<'_, E> {
    /// The first byte of `range` in which the two differ.
    fn difference(&mut self, range: SectorRange) -> Result<Option<u64>, OpError> {
        let (ones, twos) = (self.one.pieces(range)?, self.two.pieces(range)?);
        let (mut ones, mut twos) = (ones.into_iter(), twos.into_iter());
        let (mut next_one, mut next_two) = (ones.next(), twos.next());
        while let (Some(one), Some(two)) = (next_one, next_two) {
            let len = one.len.min(two.len).min(BUFFER as u64);
            if let Some(at) = self.difference_in(&one, &two, len)? {
                return Ok(Some(at));
            }
            next_one = rest(one, len).or_else(|| ones.next());
            next_two = rest(two, len).or_else(|| twos.next());
        }
        Ok(None)
    }

    /// Compares the first `len` bytes of two pieces that begin at the same place.
    fn difference_in(
        &mut self,
        one: &Piece,
        two: &Piece,
        len: u64,
    ) -> Result<Option<u64>, OpError> {
        match (one.source, two.source) {
            (Source::Zero, Source::Zero) => return Ok(None),
            (Source::Data { layer, at }, Source::Data { layer: other, at: there })
                if at == there && self.one.ids[layer.get()] == self.two.ids[other.get()] =>
            {
                return Ok(None);
            }
            _ => {}
        }
        let (one, two) = (self.one.read(one, len)?, self.two.read(two, len)?);
        if one.1 == two.1 {
            return Ok(None);
        }
        let same = one.1.iter().zip(two.1).take_while(|(one, two)| one == two).count();
        Ok(Some(one.0 + same as u64))
    }
}

impl<E: Env> Side<'_, E> {
    /// The pieces of `range`, zeros past the end of the disk.
    fn pieces(&mut self, range: SectorRange) -> Result<Vec<Piece>, OpError> {
        let inside = range.clipped_to(Sector::new(self.disk.capacity().get()));
        let mut pieces = if inside.is_empty() { Vec::new() } else { self.walker.pieces(inside)? };
        let at = range.start_bytes().get() + inside.len_bytes();
        let len = range.len_bytes() - inside.len_bytes();
        if len > 0 {
            pieces.push(Piece { at: ByteOffset::new(at), len, source: Source::Zero });
        }
        Ok(pieces)
    }

    /// The first `len` bytes of a piece, and where they are in the disk. Past the end of the disk there are zeros, in
    /// its last sector too.
    fn read(&mut self, piece: &Piece, len: u64) -> Result<(u64, &[u8]), OpError> {
        let buf = &mut self.buf[..usize::try_from(len).unwrap_or(BUFFER)];
        match piece.source {
            Source::Zero => buf.fill(0),
            Source::Data { layer, at } => self.walker.read(layer, at, buf)?,
        }
        let inside = self.disk.size().saturating_sub(piece.at.get());
        if let Some(outside) = usize::try_from(inside).ok().and_then(|inside| buf.get_mut(inside..))
        {
            outside.fill(0);
        }
        Ok((piece.at.get(), buf))
    }
}

/// What is left of a piece without its first `len` bytes.
fn rest(piece: Piece, len: u64) -> Option<Piece> {
    let source = match piece.source {
        Source::Zero => Source::Zero,
        Source::Data { layer, at } => Source::Data { layer, at: ByteOffset::new(at.get() + len) },
    };
    let rest = Piece { at: ByteOffset::new(piece.at.get() + len), len: piece.len - len, source };
    (rest.len > 0).then_some(rest)
}
