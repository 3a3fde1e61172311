//! The layers of a disk as files of the ring: which descriptor is used for what.
//!
//! All of the data path that takes a layer for a file whose bytes are those of the disk begins
//! here: the ring's list of files, the slot of each operation, and the one descriptor that may be
//! mapped or written to directly. A layer of another kind is told apart here; how it is read then
//! is decided beside the other ways (`ReadPath` in `route.rs`).

use std::os::fd::BorrowedFd;

use block_io::ring::FileSlot;
use block_io::storage::file::File;
use block_io::{Disk, Layer};
use cow_format::{ByteOffset, LayerIndex};

use crate::guest_memory::PAGE_SIZE;

/// The top layer, buffered.
pub(crate) const TOP: FileSlot = FileSlot(0);

/// The buffered and the direct description of each layer stand side by side.
const FILES_PER_LAYER: u32 = 2;

/// The files of a disk, in the order of their slots.
#[derive(Clone, Copy)]
pub(crate) struct LayerFiles<'a> {
    disk: &'a Disk,
}

impl<'a> LayerFiles<'a> {
    /// The files of `disk`.
    pub(crate) fn new(disk: &'a Disk) -> Self {
        Self { disk }
    }

    /// The descriptors in the order of their slots.
    pub(crate) fn descriptors(self) -> Vec<Option<BorrowedFd<'a>>> {
        let files = self.disk.layers().iter().map(Layer::file);
        files.flat_map(|f| [Some(f.buffered()), f.direct().map(|(fd, _)| fd)]).collect()
    }

    /// The slot for a read of `layer` at `at` into `buffers`, or for a write to it: the direct
    /// description where the alignment allows it.
    #[inline]
    pub(crate) fn slot(
        self,
        layer: LayerIndex,
        at: ByteOffset,
        buffers: &[libc::iovec],
    ) -> FileSlot {
        let buffered = buffered_slot(layer);
        let layer = &self.disk.layers()[layer.get()];
        let Some((_, align)) = layer.file().direct() else { return buffered };
        let (memory, offset) = (u64::from(align.memory), u64::from(align.offset));
        let aligned = at.get().is_multiple_of(offset)
            && buffers.iter().all(|v| {
                (v.iov_base.addr() as u64).is_multiple_of(memory)
                    && (v.iov_len as u64).is_multiple_of(offset)
            });
        if aligned { FileSlot(buffered.0 + 1) } else { buffered }
    }

    /// The slot for a write of `len` bytes to the top: the direct description only for whole pages
    /// of the file. A write of part of a page goes through the page cache, and so do all other such
    /// writes. If one of two neighbours in a page bypassed the cache while the other is in it, the
    /// kernel could write the old content of the one over the new, and it fails the next sync.
    #[inline]
    pub(crate) fn write_slot(self, at: ByteOffset, len: u64, buffers: &[libc::iovec]) -> FileSlot {
        if (at.get() | len).is_multiple_of(PAGE_SIZE) {
            self.slot(LayerIndex::TOP, at, buffers)
        } else {
            TOP
        }
    }

    /// [`cached_file`] of the top.
    #[inline]
    pub(crate) fn cached_top(self) -> Option<BorrowedFd<'a>> {
        cached_file(&self.disk.layers()[0])
    }
}

/// The file of a layer that is used through the page cache only. Only such a file is mapped, or
/// written to without the ring.
#[inline]
pub(crate) fn cached_file(layer: &Layer<File>) -> Option<BorrowedFd<'_>> {
    let file = layer.file();
    file.direct().is_none().then(|| file.buffered())
}

/// The slot of a layer's buffered description.
#[inline]
pub(crate) fn buffered_slot(layer: LayerIndex) -> FileSlot {
    // At most 64 layers and a base.
    #[expect(clippy::cast_possible_truncation)]
    FileSlot(layer.get() as u32 * FILES_PER_LAYER)
}
