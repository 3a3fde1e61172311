//! Copying a whole disk into a new file, sparse.

use std::num::NonZeroUsize;

use cow_format::{ByteOffset, SectorRange};

use super::walk::{Piece, Source, Walker};
use super::zeroes::for_each_run;
use super::{OpError, parallel};
use crate::disk::Disk;
use crate::storage::{Env, Storage};

/// Bytes that a thread reads at once.
const BUFFER: usize = 1 << 20;

/// Where a disk is copied to: `at` is the place of the disk's first byte in `file`, which reads as zeros from there on.
pub struct Target<'a, S> {
    /// The file.
    pub file: &'a S,
    /// Its name, for errors.
    pub path: &'a std::path::Path,
    /// Where the disk begins in it.
    pub at: ByteOffset,
}

/// Copies the first `len` bytes of `disk` to `target`. Zeros are not written, whether they are holes or only look like
/// them. `progress` gets the number of bytes that are done since its last call. Nothing is synced.
pub fn copy<E: Env>(
    disk: &Disk<E>,
    len: u64,
    target: &Target<'_, impl Storage>,
    threads: NonZeroUsize,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), OpError> {
    let state = || (Walker::new(disk), vec![0; BUFFER]);
    let work = |(walker, buf): &mut (Walker<'_, E>, Vec<u8>), range: SectorRange| {
        for piece in walker.pieces(range)? {
            copy_piece(walker, clip(piece, len), target, buf)?;
        }
        progress(range.len_bytes().min(len - range.start_bytes().get()));
        Ok(())
    };
    parallel::for_each_piece(cow_format::SectorCount::covering(len), threads, state, work)
}

/// The part of `piece` that is within the first `len` bytes: the last sector of a disk may be partial.
fn clip(piece: Piece, len: u64) -> Piece {
    Piece { len: piece.len.min(len.saturating_sub(piece.at.get())), ..piece }
}

fn copy_piece<E: Env>(
    walker: &Walker<'_, E>,
    piece: Piece,
    target: &Target<'_, impl Storage>,
    buf: &mut [u8],
) -> Result<(), OpError> {
    let Source::Data { layer, at } = piece.source else { return Ok(()) };
    let mut done = 0;
    while done < piece.len {
        let n = usize::try_from(piece.len - done).map_or(buf.len(), |left| left.min(buf.len()));
        let bytes = &mut buf[..n];
        walker.read(layer, ByteOffset::new(at.get() + done), bytes)?;
        let place = target.at.get() + piece.at.get() + done;
        for_each_run(bytes, place, |run, zero| {
            if zero {
                return Ok(());
            }
            let at = place + run.start as u64;
            target
                .file
                .write_all_at(&bytes[run], ByteOffset::new(at))
                .map_err(OpError::write(target.path, at))
        })?;
        done += n as u64;
    }
    Ok(())
}
