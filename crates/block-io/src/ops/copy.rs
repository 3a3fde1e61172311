//! Copying a whole disk to an output that reads as zeros.

use std::num::NonZeroUsize;

use cow_format::{ByteOffset, SectorCount, SectorRange};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::walk::{Image, Piece, Reader, Source};
use super::zeroes::for_each_run;
use super::{Copying, OpError, parallel};
use crate::storage::{PAGE, Storage};

/// Bytes that a thread reads at once.
const BUFFER: usize = 2 << 20;

/// Receives copied bytes, with their offset in the disk. Called from every thread.
pub(super) type Write<'a> = &'a (dyn Fn(u64, &[u8]) -> Result<(), OpError> + Sync);

/// Tries to share the bytes of a piece instead of copying them; returns how many, from its
/// beginning on.
pub(super) type Share<'a> = &'a (dyn Fn(&Piece) -> Result<u64, OpError> + Sync);

/// Copies `image` by passing to `write` all bytes that `share` leaves, except holes, and except
/// zeros in data if `copying` says so.
pub fn copy<I: Image>(
    image: &I,
    write: Write<'_>,
    share: Share<'_>,
    threads: NonZeroUsize,
    copying: Copying<'_>,
) -> Result<(), OpError> {
    let size = image.size();
    let state = || (image.reader(), PageBuffer::new(BUFFER));
    let work = |(reader, buf): &mut (I::Reader<'_>, PageBuffer), range: SectorRange| {
        for piece in reader.pieces(range)? {
            // The last sector may be partial.
            let piece = piece.before(size);
            if let Some(rest) = piece.after(share(&piece)?) {
                copy_piece(reader, rest, write, copying, buf)?;
            }
        }
        (copying.progress)(range.len_bytes().min(size - range.start_bytes().get()));
        Ok(())
    };
    parallel::for_each_piece(SectorCount::covering(size), threads, state, work)
}

fn copy_piece(
    reader: &impl Reader,
    piece: Piece,
    write: Write<'_>,
    copying: Copying<'_>,
    buf: &mut PageBuffer,
) -> Result<(), OpError> {
    let Source::Data { layer, at } = piece.source else { return Ok(()) };
    let mut done = 0;
    while done < piece.len {
        let place = piece.at.get() + done;
        let room = buf.for_place(place);
        let n = usize::try_from(piece.len - done).map_or(room.len(), |left| left.min(room.len()));
        let bytes = &mut room[..n];
        reader.read(layer, ByteOffset::new(at.get() + done), bytes)?;
        for_each_run(bytes, place, |run, zero| match zero {
            true if copying.detect_zeroes => Ok(()),
            _ => write(place + run.start as u64, &bytes[run]),
        })?;
        done += n as u64;
    }
    Ok(())
}

/// Threads that fill one new file. With direct I/O one reads while the other waits for the disk.
/// Writes to a file through the page cache are serialised in the kernel, and a waiting thread burns
/// CPU (with two threads the same merge took 1.3 to 6 times the CPU and no less time: 2 GiB, 2
/// cores, ext4).
pub(super) fn writers(output: &impl Storage) -> NonZeroUsize {
    NonZeroUsize::MIN.saturating_add(output.bypasses_cache().into())
}

/// Page-aligned memory, for direct transfers.
pub(super) struct PageBuffer(Vec<Page>);

/// A page of memory.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

impl PageBuffer {
    /// A buffer of at least `len` zeros.
    pub(super) fn new(len: usize) -> Self {
        PageBuffer(vec![Page([0; PAGE]); len.div_ceil(PAGE)])
    }

    /// The buffer from the position at which a byte belongs that is written to or read from `place`
    /// in a file, so that memory and file have the same alignment within a page.
    pub(super) fn for_place(&mut self, place: u64) -> &mut [u8] {
        let into = usize::try_from(place % PAGE as u64).unwrap_or(0);
        &mut self.0.as_mut_bytes()[into..]
    }
}
