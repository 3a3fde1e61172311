//! From a request's sectors to operations on files: the layer map's extents,
//! cut out of guest memory.
//!
//! How the data of an extent gets into guest memory is decided in [`Router::read_path`], and
//! carried out in [`Router::read_extent`]. One more way of reading is one more [`ReadPath`].
//!
//! A long request is planned in windows: so much of it at a time as a [`Window`] takes.

use block_io::ring::{FileSlot, Plan};
use block_io::storage::ZEROS;
use block_io::storage::file::whole_blocks;
use block_io::{Disk, DiskError};
use cow_format::{ByteOffset, Extent, LayerIndex, SECTOR_SIZE, Sector, SectorCount, SectorRange};

use crate::datapath::holes::Holes;
use crate::datapath::inline_write::InlineWrites;
use crate::datapath::layer_files::{LayerFiles, TOP, buffered_slot};
use crate::datapath::resident::{Mappings, READ_MAX, Resident, ResidentRange};
use crate::guest_memory::memory::Memory;
use crate::virtio::request::Segment;

/// How much of a request is planned at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// To be read or written, in bytes: a multiple of the page size.
    pub(crate) bytes: u64,
    /// Parts of a read, which has one for each extent.
    pub(crate) parts: usize,
    /// To be punched or zeroed by the file system, in bytes: a multiple of the page size. A
    /// fragmented file takes some tenths of a second for a GiB.
    pub(crate) allocated: u64,
}

/// A read to be planned.
pub(crate) struct ReadWindow {
    /// Its sectors, at most what a window takes.
    pub(crate) range: SectorRange,
    /// It ends after so many parts.
    pub(crate) parts_max: usize,
    /// It may be offloaded.
    pub(crate) offload: bool,
}

/// More than guests send in one request, and no more than a worker copies in a millisecond.
pub(crate) const WINDOW: Window = Window { bytes: 4 << 20, parts: 256, allocated: 128 << 20 };

impl Window {
    /// As much of `range` as is read or written at once.
    #[inline]
    pub(crate) fn of(&self, range: SectorRange) -> SectorRange {
        cut(range, self.bytes)
    }
}

/// All of `range` if it has at most `bytes` bytes; else its beginning, up to a multiple of them: so
/// no page or block is divided.
#[inline]
fn cut(range: SectorRange, bytes: u64) -> SectorRange {
    if range.len_bytes() <= bytes {
        return range;
    }
    let unit = bytes / SECTOR_SIZE;
    range.clipped_to(Sector::new((range.start().get() / unit + 1) * unit))
}

/// `range` without its first `done` sectors.
pub(crate) fn after(range: SectorRange, done: u64) -> SectorRange {
    let done = done.min(range.count().get());
    let count = SectorCount::new(range.count().get() - done);
    SectorRange::new(Sector::new(range.start().get() + done), count).unwrap_or(range)
}

/// Finds the file and the place for each piece of a request.
pub(crate) struct Router<'a> {
    disk: &'a Disk,
    files: LayerFiles<'a>,
    /// Used again from one extent to the next.
    piece: Vec<libc::iovec>,
    resident: Resident<'a>,
    holes: &'a Holes,
    inline_writes: InlineWrites,
}

/// The most that is written through the page cache at once. The kernel makes one folio of as much
/// as a write brings, and ext4 looks at every block of a folio for each later write into it: after
/// writes of 1 MiB random ones of 4 KiB take 24 µs each, after writes of 256 KiB 8 µs, of 128 KiB 6
/// µs. That makes the large ones slower by 7 and 11 %.
const PIECE: u64 = 256 << 10;

/// How the data of an extent gets into guest memory.
enum ReadPath<'a> {
    /// No file has any: the extent is zeros, or all of it is in a hole.
    Zeros,
    /// It is in the page cache. A thread of the kernel copies it, while this one does something
    /// else.
    Offload(FilePlace),
    /// It is in the page cache, and copied at once. Should that fail, the ring reads it from the
    /// file.
    Copy(ResidentRange<'a>, FilePlace),
    /// The ring reads it from the file.
    Submit(FilePlace),
}

/// Where an extent begins.
#[derive(Clone, Copy)]
struct FilePlace {
    layer: LayerIndex,
    at: ByteOffset,
}

impl<'a> Router<'a> {
    /// A router for one queue.
    pub(crate) fn new(disk: &'a Disk, mappings: &'a Mappings, holes: &'a Holes) -> Self {
        Self {
            disk,
            files: LayerFiles::new(disk),
            piece: Vec::new(),
            resident: Resident::new(mappings),
            holes,
            inline_writes: InlineWrites::default(),
        }
    }

    /// What this queue knows of the page cache.
    pub(crate) fn resident(&mut self) -> &mut Resident<'a> {
        &mut self.resident
    }

    /// The files that the plans name.
    pub(crate) fn files(&self) -> LayerFiles<'a> {
        self.files
    }

    /// Plans a read into the buffers at `cursor`; how many sectors that makes. Zeros and what is in
    /// the page cache are filled in at once; if it is offloaded, a kernel thread is planned to copy
    /// what is in the page cache.
    ///
    /// # Errors
    /// The bitmaps could not be read, so nothing is planned.
    pub(crate) fn plan_read(
        &mut self,
        read: &ReadWindow,
        memory: &Memory,
        cursor: &mut Cursor<'_>,
        plan: &mut Plan,
    ) -> Result<u64, DiskError> {
        let mut done = 0;
        for extent in self.disk.extents(read.range)? {
            let (Extent::Data { len, .. } | Extent::Zero { len }) = extent;
            let path = self.read_path(extent, read.offload);
            self.read_extent(path, len, cursor, memory, plan);
            done += len;
            if plan.len() >= read.parts_max {
                break;
            }
        }
        Ok(done / SECTOR_SIZE)
    }

    /// The first way that is open to an extent, from the cheapest on. With `offload` what is in the
    /// page cache is not copied here.
    #[inline]
    fn read_path(&mut self, extent: Extent, offload: bool) -> ReadPath<'a> {
        let Extent::Data { layer, at, len } = extent else { return ReadPath::Zeros };
        let place = FilePlace { layer, at };
        if self.holes.cover(layer, at, len) {
            return ReadPath::Zeros;
        }
        if offload && self.resident.holds(layer, at, len) {
            return ReadPath::Offload(place);
        }
        if len > READ_MAX {
            return ReadPath::Submit(place);
        }
        match self.resident.find(layer, at, len) {
            Some(range) => ReadPath::Copy(range, place),
            None => ReadPath::Submit(place),
        }
    }

    /// Goes that way with the next `len` bytes of the request.
    #[inline]
    fn read_extent(
        &mut self,
        path: ReadPath<'a>,
        len: u64,
        cursor: &mut Cursor<'_>,
        memory: &Memory,
        plan: &mut Plan,
    ) {
        let piece = cursor.take(len, &mut self.piece);
        let files = self.files;
        let mut submit = |FilePlace { layer, at }| {
            plan.read(files.slot(layer, at, piece), at, piece);
        };
        match path {
            ReadPath::Zeros => zero(memory, piece),
            ReadPath::Submit(place) => submit(place),
            ReadPath::Copy(range, place) => {
                if !self.resident.copy(&range, memory, piece) {
                    submit(place);
                }
            }
            ReadPath::Offload(place) => {
                submit(place);
                plan.force_async();
            }
        }
    }

    /// The next place to be touched ahead of a cold stream, see [`Resident::ahead`].
    #[inline]
    pub(crate) fn ahead(&mut self) -> Option<(FileSlot, ByteOffset)> {
        self.resident.ahead().map(|(layer, at)| (buffered_slot(layer), at))
    }

    /// Plans the write of the buffers at `cursor` to `range`.
    pub(crate) fn plan_write(
        &mut self,
        range: SectorRange,
        cursor: &mut Cursor<'_>,
        plan: &mut Plan,
    ) {
        let (at, len) = (self.disk.write_at(range), range.len_bytes());
        let start = *cursor;
        let buffers = cursor.take(len, &mut self.piece);
        let slot = self.files.write_slot(at, len, buffers);
        if slot == TOP {
            *cursor = start;
            plan_pieces(at, len, cursor, &mut self.piece, plan);
        } else {
            plan.write(slot, at, buffers);
        }
    }

    /// Writes `buffers` to `range` at once if that can be expected to be quick;
    /// whether it was done.
    ///
    /// # Safety
    /// As for [`InlineWrites::write`].
    pub(crate) unsafe fn write_inline(
        &mut self,
        range: SectorRange,
        buffers: &[libc::iovec],
    ) -> bool {
        // A disk is slower than a context switch.
        let Some(file) = self.files.cached_top() else { return false };
        // SAFETY: the caller vouches for the buffers.
        unsafe { self.inline_writes.write(file, self.disk.write_at(range), buffers) }
    }

    /// Plans to turn the sectors of `segments` into zeros, as many as `window` takes: holes where
    /// their space may be given back, else zeros that keep it. A file system that knows no such
    /// thing says EOPNOTSUPP; then [`Self::plan_written_zeros`]. A block device takes whole blocks
    /// only: what is left at the edges is written, or with `discard`, which promises nothing, left
    /// as it is.
    pub(crate) fn plan_zero(
        &self,
        segments: &mut Segments,
        discard: bool,
        window: &Window,
        plan: &mut Plan,
    ) {
        let mut taken = 0;
        while taken < window.allocated
            && let Some(segment) = segments.take(window.allocated)
        {
            taken += segment.range.len_bytes();
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

    /// Plans to write zeros to the sectors of `segments`, as many as `window` takes.
    pub(crate) fn plan_written_zeros(
        &self,
        segments: &mut Segments,
        window: &Window,
        plan: &mut Plan,
    ) {
        let mut taken = 0;
        while taken < window.bytes
            && let Some(Segment { range, .. }) = segments.take(window.bytes)
        {
            taken += range.len_bytes();
            plan_zeros(self.disk.write_at(range), range.len_bytes(), plan);
        }
    }
}

/// The ranges of a discard or write-zeroes, and how far it has come.
pub(crate) struct Segments {
    all: Vec<Segment>,
    next: usize,
    /// Sectors of the next one that were taken.
    done: u64,
}

impl Segments {
    /// Nothing of `all`, none of which is empty, was taken.
    pub(crate) fn new(all: Vec<Segment>) -> Self {
        Self { all, next: 0, done: 0 }
    }

    /// All of them.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = SectorRange> {
        self.all.iter().map(|segment| segment.range)
    }

    /// Everything was taken.
    pub(crate) fn is_over(&self) -> bool {
        self.next == self.all.len()
    }

    /// Takes everything once more.
    pub(crate) fn rewind(&mut self) {
        (self.next, self.done) = (0, 0);
    }

    /// The next one, or as much of it as makes `bytes` bytes.
    fn take(&mut self, bytes: u64) -> Option<Segment> {
        let segment = self.all.get(self.next)?;
        let left = after(segment.range, self.done);
        let range = cut(left, bytes);
        if range == left {
            (self.next, self.done) = (self.next + 1, 0);
        } else {
            self.done += range.count().get();
        }
        Some(Segment { range, ..*segment })
    }
}

/// Plans a write of `len` bytes through the page cache to the top, [`PIECE`] by piece.
fn plan_pieces(
    at: ByteOffset,
    len: u64,
    cursor: &mut Cursor<'_>,
    piece: &mut Vec<libc::iovec>,
    plan: &mut Plan,
) {
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

/// Plans to write zeros to `len` bytes of the top layer, at most what a window takes.
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
#[derive(Clone, Copy)]
pub(crate) struct Cursor<'b> {
    pub(crate) left: &'b [libc::iovec],
    /// Bytes of the first buffer that are taken.
    pub(crate) skip: usize,
}

impl<'b> Cursor<'b> {
    /// At the beginning of `buffers`.
    #[inline]
    pub(crate) fn new(buffers: &'b [libc::iovec]) -> Self {
        Self { left: buffers, skip: 0 }
    }

    /// The buffers that are left, and the bytes of the first that are taken.
    #[inline]
    pub(crate) fn place(&self) -> (usize, usize) {
        (self.left.len(), self.skip)
    }

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
        let mut cursor = Cursor::new(&buffers);
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
        let mut cursor = Cursor::new(&buffers);
        plan_pieces(ByteOffset::new(9 << 20), len, &mut cursor, &mut piece, &mut plan);
        assert_eq!((plan.len_bytes(), plan.len()), (len, 3));
        let mut plan = Plan::default();
        let mut cursor = Cursor::new(&buffers);
        plan_pieces(ByteOffset::new(9 << 20), PIECE, &mut cursor, &mut piece, &mut plan);
        assert_eq!((plan.len_bytes(), plan.len()), (PIECE, 1));
    }

    #[test]
    fn written_zeros_cover_the_range() {
        let mut plan = Plan::default();
        plan_zeros(ByteOffset::new(4096), (64 << 10) * 3 + 512, &mut plan);
        assert_eq!(plan.len_bytes(), (64 << 10) * 3 + 512);
    }
}
