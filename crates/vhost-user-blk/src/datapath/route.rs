//! From a request's sectors to operations on files: the layer map's extents,
//! cut out of guest memory.

use std::os::fd::BorrowedFd;

use block_io::Disk;
use block_io::DiskError;
use block_io::Layer;
use block_io::ring::{FileSlot, Plan};
use block_io::storage::file::whole_blocks;
use cow_format::{ByteOffset, Extent, LayerIndex, SectorRange};

use crate::datapath::holes::Holes;
use crate::datapath::inline_write::PromptWrites;
use crate::datapath::resident::{Mappings, READ_MAX, Resident};
use crate::guest_memory::memory::Memory;
use crate::virtio::request::Segment;

/// Zeros for a file system that cannot make holes. In the binary's .bss: it
/// costs no memory until then.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Finds the file and the place for each piece of a request.
pub struct Router<'a> {
    disk: &'a Disk,
    /// Used again from one extent to the next.
    piece: Vec<libc::iovec>,
    resident: Resident<'a>,
    holes: &'a Holes,
    prompt: PromptWrites,
}

/// The top layer, buffered.
const TOP: FileSlot = FileSlot(0);

/// The most that is written through the page cache at once. The kernel makes one folio of as much as
/// a write brings, and ext4 looks at every block of a folio for each later write into it: after
/// writes of 1 MiB random ones of 4 KiB take 24 µs each, after writes of 256 KiB 8 µs, of 128 KiB
/// 6 µs. That makes the large ones slower by 7 and 11 %.
const PIECE: u64 = 256 << 10;

/// A page of the page cache, in bytes.
pub const PAGE: u64 = 4096;

/// The buffered and the direct description of each layer stand side by side.
const FILES_PER_LAYER: u32 = 2;

impl<'a> Router<'a> {
    /// A router for one queue.
    pub fn new(disk: &'a Disk, mappings: &'a Mappings, holes: &'a Holes) -> Self {
        let resident = Resident::new(mappings);
        Self { disk, piece: Vec::new(), resident, holes, prompt: PromptWrites::default() }
    }

    /// What this queue knows of the page cache.
    pub fn resident(&mut self) -> &mut Resident<'a> {
        &mut self.resident
    }

    /// The files in the order of the slots that the plans speak of.
    pub fn files(&self) -> Vec<Option<BorrowedFd<'a>>> {
        let files = self.disk.layers().iter().map(Layer::file);
        files.flat_map(|f| [Some(f.buffered()), f.direct().map(|(fd, _)| fd)]).collect()
    }

    /// Plans the read of `range` into `buffers`, which are as long as it. What
    /// no file holds, or what the page cache does, is filled in at once; with `offload` what the
    /// page cache holds is planned to be copied by a thread of the kernel.
    ///
    /// # Errors
    /// The bitmaps do not say where the range stands; nothing is planned then.
    pub fn plan_read(
        &mut self,
        range: SectorRange,
        memory: &Memory,
        buffers: &[libc::iovec],
        offload: bool,
        plan: &mut Plan,
    ) -> Result<(), DiskError> {
        let mut cursor = Cursor { left: buffers, skip: 0 };
        for extent in self.disk.extents(range)? {
            match extent {
                Extent::Data { layer, at, len } => {
                    let piece = cursor.take(len, &mut self.piece);
                    if self.holes.cover(layer, at, len) {
                        zero(memory, piece);
                    } else if offload && self.resident.holds(layer, at, len) {
                        plan.read(slot(self.disk, layer, at, piece), at, piece);
                        plan.set_aside();
                    } else if len > READ_MAX || !self.resident.copy(layer, at, len, memory, piece) {
                        plan.read(slot(self.disk, layer, at, piece), at, piece);
                    }
                }
                Extent::Zero { len } => zero(memory, cursor.take(len, &mut self.piece)),
            }
        }
        Ok(())
    }

    /// The next place to be touched ahead of a cold stream, see [`Resident::ahead`].
    #[inline]
    pub fn ahead(&mut self) -> Option<(FileSlot, ByteOffset)> {
        self.resident.ahead().map(|(layer, at)| (buffered(layer), at))
    }

    /// Plans the write of `buffers` to `range`, which is as long as they.
    pub fn plan_write(&mut self, range: SectorRange, buffers: &[libc::iovec], plan: &mut Plan) {
        let at = self.disk.write_at(range);
        let slot = write_slot(self.disk, at, range.len_bytes(), buffers);
        if slot == TOP {
            plan_pieces(at, range.len_bytes(), buffers, &mut self.piece, plan);
        } else {
            plan.write(slot, at, buffers);
        }
    }

    /// Writes `buffers` to `range` at once if that can be expected to be quick;
    /// whether it was done.
    ///
    /// # Safety
    /// As for [`PromptWrites::write`].
    pub unsafe fn write_promptly(&mut self, range: SectorRange, buffers: &[libc::iovec]) -> bool {
        let file = self.disk.layers()[0].file();
        // A disk is slower than a context switch.
        file.direct().is_none()
            // SAFETY: the caller vouches for the buffers.
            && unsafe { self.prompt.write(file.buffered(), self.disk.write_at(range), buffers) }
    }

    /// Plans to turn `segments` into zeros: holes where their space may be given
    /// back, else zeros that keep it. A file system that knows no such thing says
    /// EOPNOTSUPP; then [`Self::plan_written_zeros`]. A block device takes whole blocks
    /// only: what is left at the edges is written, or with `discard`, which promises
    /// nothing, left as it is.
    pub fn plan_zero(&self, segments: &[Segment], discard: bool, plan: &mut Plan) {
        for segment in segments {
            let (at, len) = (self.disk.write_at(segment.range), segment.range.len_bytes());
            let blocks = whole_blocks(at, len, self.disk.logical_block());
            let (start, blocks_len) = (ByteOffset::new(blocks.start), blocks.end - blocks.start);
            if blocks_len > 0 && segment.unmap {
                plan.punch(TOP, start, blocks_len);
            } else if blocks_len > 0 {
                plan.zero(TOP, start, blocks_len);
            }
            if !discard {
                plan_zeros(at, blocks.start - at.get(), plan);
                plan_zeros(ByteOffset::new(blocks.end), at.get() + len - blocks.end, plan);
            }
        }
    }

    /// Plans to write zeros to `segments`.
    pub fn plan_written_zeros(&self, segments: &[Segment], plan: &mut Plan) {
        for segment in segments {
            plan_zeros(self.disk.write_at(segment.range), segment.range.len_bytes(), plan);
        }
    }
}

/// The buffered description of a layer.
#[inline]
fn buffered(layer: LayerIndex) -> FileSlot {
    // At most 64 layers and a base.
    #[expect(clippy::cast_possible_truncation)]
    FileSlot(layer.get() as u32 * FILES_PER_LAYER)
}

/// The description to use: the direct one where the alignment allows it.
#[inline]
fn slot(disk: &Disk, layer: LayerIndex, at: ByteOffset, buffers: &[libc::iovec]) -> FileSlot {
    let buffered = buffered(layer);
    let Some((_, align)) = disk.layers()[layer.get()].file().direct() else { return buffered };
    let (memory, offset) = (u64::from(align.memory), u64::from(align.offset));
    let aligned = at.get().is_multiple_of(offset)
        && buffers.iter().all(|v| {
            (v.iov_base.addr() as u64).is_multiple_of(memory)
                && (v.iov_len as u64).is_multiple_of(offset)
        });
    if aligned { FileSlot(buffered.0 + 1) } else { buffered }
}

/// The description for a write of `len` bytes to the top: the direct one only for whole pages of the
/// file. What fills a page in part goes through the page cache, and so does all else that does so. If
/// of two neighbours in a page one went past the cache while the other is in it, the kernel could
/// write the old content of the one over the new, and it lets the next sync fail.
#[inline]
fn write_slot(disk: &Disk, at: ByteOffset, len: u64, buffers: &[libc::iovec]) -> FileSlot {
    if (at.get() | len).is_multiple_of(PAGE) {
        slot(disk, LayerIndex::TOP, at, buffers)
    } else {
        TOP
    }
}

/// Plans a write of `len` bytes through the page cache to the top, [`PIECE`] by piece.
fn plan_pieces(
    at: ByteOffset,
    len: u64,
    buffers: &[libc::iovec],
    piece: &mut Vec<libc::iovec>,
    plan: &mut Plan,
) {
    let mut cursor = Cursor { left: buffers, skip: 0 };
    let mut done = 0;
    while done < len {
        let take = (len - done).min(PIECE);
        // Within the file, whose end is a file offset.
        plan.write(TOP, ByteOffset::new(at.get() + done), cursor.take(take, piece));
        done += take;
    }
}

/// Fills guest memory with zeros.
fn zero(memory: &Memory, buffers: &[libc::iovec]) {
    for v in buffers {
        memory.zero_host(v.iov_base.cast(), v.iov_len);
    }
}

/// Plans to write zeros to `len` bytes of the top layer.
fn plan_zeros(at: ByteOffset, len: u64, plan: &mut Plan) {
    if len == 0 {
        return;
    }
    let chunk = ZEROS.len() as u64;
    let buffer = |len: u64| libc::iovec {
        iov_base: ZEROS.as_ptr().cast_mut().cast(),
        iov_len: usize::try_from(len).unwrap_or(ZEROS.len()),
    };
    let whole = usize::try_from(len / chunk).unwrap_or(usize::MAX);
    let mut buffers = vec![buffer(chunk); whole];
    if !len.is_multiple_of(chunk) {
        buffers.push(buffer(len % chunk));
    }
    plan.write(TOP, at, &buffers);
}

/// Cuts consecutive pieces out of a list of buffers.
struct Cursor<'b> {
    left: &'b [libc::iovec],
    /// Bytes of the first buffer that are taken.
    skip: usize,
}

impl<'b> Cursor<'b> {
    /// The next `len` bytes, as buffers in `piece`.
    fn take<'p>(&mut self, len: u64, piece: &'p mut Vec<libc::iovec>) -> &'p [libc::iovec] {
        piece.clear();
        let mut wanted = len;
        while wanted > 0
            && let Some((first, rest)) = self.left.split_first()
        {
            let have = first.iov_len - self.skip;
            let take = usize::try_from(wanted).unwrap_or(usize::MAX).min(have);
            piece.push(libc::iovec {
                iov_base: first.iov_base.cast::<u8>().wrapping_add(self.skip).cast(),
                iov_len: take,
            });
            wanted -= take as u64;
            if take == have {
                (self.left, self.skip) = (rest, 0);
            } else {
                self.skip += take;
            }
        }
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iovec(base: usize, len: usize) -> libc::iovec {
        libc::iovec { iov_base: std::ptr::without_provenance_mut(base), iov_len: len }
    }

    #[test]
    fn pieces_are_cut_in_order_without_gap_or_overlap() {
        let buffers = [iovec(1000, 512), iovec(5000, 1536), iovec(9000, 512)];
        let mut cursor = Cursor { left: &buffers, skip: 0 };
        let mut piece = Vec::new();
        let mut taken = |len| -> Vec<(usize, usize)> {
            cursor.take(len, &mut piece).iter().map(|v| (v.iov_base.addr(), v.iov_len)).collect()
        };
        assert_eq!(taken(512), [(1000, 512)]);
        assert_eq!(taken(65), [(5000, 65)]);
        assert_eq!(taken(447), [(5065, 447)]);
        assert_eq!(taken(1500), [(5512, 1024), (9000, 476)]);
        assert_eq!(taken(36), [(9476, 36)]);
        assert_eq!(taken(512), []);
    }

    #[test]
    fn a_long_write_is_planned_piece_by_piece() {
        let len = 2 * PIECE + 512;
        let whole = usize::try_from(len).unwrap();
        let (mut piece, mut plan) = (Vec::new(), Plan::default());
        let buffers = [iovec(1 << 20, 4096), iovec(1 << 30, whole - 4096)];
        plan_pieces(ByteOffset::new(9 << 20), len, &buffers, &mut piece, &mut plan);
        assert_eq!((plan.len_bytes(), plan.len()), (len, 3));
        let mut plan = Plan::default();
        plan_pieces(ByteOffset::new(9 << 20), PIECE, &buffers, &mut piece, &mut plan);
        assert_eq!((plan.len_bytes(), plan.len()), (PIECE, 1));
    }

    #[test]
    fn written_zeros_cover_the_range() {
        let mut plan = Plan::default();
        plan_zeros(ByteOffset::new(4096), (64 << 10) * 3 + 512, &mut plan);
        assert_eq!(plan.len_bytes(), (64 << 10) * 3 + 512);
    }
}
