//! The order of a flush, enforced by types: data is synced before the bits that describe it are
//! written, and these are synced before the flush is complete (docs/architecture.md, "Durability").
//!
//! ```text
//! FlushPass::begin        snapshot of the dirty pages
//!   AwaitSync::synced     → Next::Complete            nothing was dirty: one sync was enough
//!                         → Next::Write(WritePages)   the data is durable, the bits may follow
//!   WritePages::written   snapshot of the next batch; → AwaitSync: the bits are not durable yet
//! ```
//!
//! The machine does no I/O. The caller syncs and writes, and reports each step; it never runs two
//! passes at once. Writers continue meanwhile: bits set after the snapshot stay dirty and belong to
//! the next pass.

use crate::bitmap::{BITMAP_PAGE_LEN, Bitmap};
use crate::geometry::Geometry;
use crate::units::ByteOffset;

/// Bitmap pages in one snapshot: 1 MiB of memory, 4 GiB of disk. With more dirty pages the pass
/// goes in batches, each sharing its data sync with the sync that completes the one before.
pub const FLUSH_BATCH_PAGES: usize = 256;

/// Shared by all states. If dropped before it is complete, it marks its pages dirty again.
#[derive(Debug)]
struct Pass<'a> {
    bitmap: &'a Bitmap,
    geometry: &'a Geometry,
    /// Where the search for the next batch starts. It only goes up, so a pass ends however much is
    /// written meanwhile.
    next_page: u64,
    /// Pages that were written but not synced.
    unsynced: Vec<u64>,
    /// Pages whose bytes are in `bytes`, not yet written.
    pages: Vec<u64>,
    bytes: Vec<u8>,
}

/// One flush of a COW file's durable bitmap.
#[derive(Debug)]
pub struct FlushPass;

/// The caller must sync the file now, data and length (fdatasync).
#[derive(Debug)]
#[must_use = "a flush is complete only at Next::Complete"]
pub struct AwaitSync<'a>(Pass<'a>);

/// The data is durable; the caller must write these pages now.
#[derive(Debug)]
#[must_use = "a flush is complete only at Next::Complete"]
pub struct WritePages<'a>(Pass<'a>);

/// What to do after a sync.
#[derive(Debug)]
pub enum Next<'a> {
    /// Write these pages of the bitmap.
    Write(WritePages<'a>),
    /// Everything that was written and inserted before the pass began is durable.
    Complete,
}

/// Some neighbouring pages of the durable bitmap, as one write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapWrite<'a> {
    /// Where in the file.
    pub at: ByteOffset,
    /// What to write there; not empty.
    pub bytes: &'a [u8],
}

impl FlushPass {
    /// Takes a snapshot of the dirty pages of `bitmap`. The caller then syncs.
    pub fn begin<'a>(bitmap: &'a Bitmap, geometry: &'a Geometry) -> AwaitSync<'a> {
        let (pages, bytes) = (Vec::new(), Vec::new());
        let mut pass = Pass { bitmap, geometry, next_page: 0, unsynced: Vec::new(), pages, bytes };
        pass.snapshot();
        AwaitSync(pass)
    }
}

impl<'a> AwaitSync<'a> {
    /// Call this when a sync that began after this state was reached has succeeded. After a failed
    /// sync, drop the pass and trust no later sync of this file: the kernel may have discarded the
    /// data.
    pub fn synced(mut self) -> Next<'a> {
        self.0.unsynced.clear();
        if self.0.pages.is_empty() { Next::Complete } else { Next::Write(WritePages(self.0)) }
    }
}

impl<'a> WritePages<'a> {
    /// The writes to make, in ascending order. Any order is valid.
    pub fn writes(&self) -> impl Iterator<Item = BitmapWrite<'_>> {
        let pass = &self.0;
        let mut from = 0;
        pass.pages.chunk_by(|a, b| a + 1 == *b).map(move |run| {
            let (first, last) = (run[0], run[run.len() - 1]);
            let len = (run.len() - 1) * BITMAP_PAGE_LEN + pass.geometry.bitmap_page_len(last);
            let bytes = &pass.bytes[from..from + len];
            from += run.len() * BITMAP_PAGE_LEN;
            BitmapWrite { at: pass.geometry.page_at(first), bytes }
        })
    }

    /// Call this when all writes have succeeded. If one failed, drop the pass: its pages are dirty
    /// again and a later pass may retry them.
    pub fn written(mut self) -> AwaitSync<'a> {
        std::mem::swap(&mut self.0.unsynced, &mut self.0.pages);
        self.0.snapshot();
        AwaitSync(self.0)
    }
}

impl Pass<'_> {
    fn snapshot(&mut self) {
        self.pages.clear();
        self.next_page = self.bitmap.take_dirty(self.next_page, FLUSH_BATCH_PAGES, &mut self.pages);
        self.bytes.resize(self.pages.len() * BITMAP_PAGE_LEN, 0);
        for (&page, bytes) in self.pages.iter().zip(self.bytes.as_chunks_mut().0) {
            self.bitmap.render_page(page, bytes);
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.bitmap.put_back_dirty(&self.unsynced);
        self.bitmap.put_back_dirty(&self.pages);
    }
}
