//! Copying a whole disk to where it reads as zeros.

use std::num::NonZeroUsize;

use cow_format::{ByteOffset, SectorCount, SectorRange};

use super::walk::{Image, Piece, Reader, Source};
use super::zeroes::for_each_run;
use super::{OpError, Progress, parallel};

/// Bytes that a thread reads at once.
const BUFFER: usize = 256 << 10;

/// Where copied bytes go: told their place in the disk. Called from every thread.
pub type Write<'a> = &'a (dyn Fn(u64, &[u8]) -> Result<(), OpError> + Sync);

/// Tries to have the bytes of a piece without a copy; says how many of them, from its beginning on, that did.
pub type Share<'a> = &'a (dyn Fn(&Piece) -> Result<u64, OpError> + Sync);

/// Copies `image` by giving `write` all bytes that `share` leaves but zeros, whether those are holes or only look like them. `progress` gets
/// the number of bytes that are done since its last call.
pub fn copy<I: Image>(
    image: &I,
    write: Write<'_>,
    share: Share<'_>,
    threads: NonZeroUsize,
    progress: Progress<'_>,
) -> Result<(), OpError> {
    let size = image.size();
    let state = || (image.reader(), vec![0; BUFFER]);
    let work = |(reader, buf): &mut (I::Reader<'_>, Vec<u8>), range: SectorRange| {
        for piece in reader.pieces(range)? {
            // The last sector may be partial.
            let piece = piece.before(size);
            if let Some(rest) = piece.after(share(&piece)?) {
                copy_piece(reader, rest, write, buf)?;
            }
        }
        progress(range.len_bytes().min(size - range.start_bytes().get()));
        Ok(())
    };
    parallel::for_each_piece(SectorCount::covering(size), threads, state, work)
}

fn copy_piece(
    reader: &impl Reader,
    piece: Piece,
    write: Write<'_>,
    buf: &mut [u8],
) -> Result<(), OpError> {
    let Source::Data { layer, at } = piece.source else { return Ok(()) };
    let mut done = 0;
    while done < piece.len {
        let n = usize::try_from(piece.len - done).map_or(buf.len(), |left| left.min(buf.len()));
        let bytes = &mut buf[..n];
        reader.read(layer, ByteOffset::new(at.get() + done), bytes)?;
        let place = piece.at.get() + done;
        for_each_run(bytes, place, |run, zero| match zero {
            true => Ok(()),
            false => write(place + run.start as u64, &bytes[run]),
        })?;
        done += n as u64;
    }
    Ok(())
}
