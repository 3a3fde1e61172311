//! Reading a bitmap from a file: only where the file has data.

use std::io;
use std::ops::Range;

use cow_format::{BITMAP_PAGE_LEN, ByteOffset, Geometry};

use crate::storage::Storage;

/// Bitmap pages read at once (256 KiB): few system calls for a dense bitmap, little memory.
const READ_PAGES: u64 = 64;

/// Passes to `found` those of `pages` of the bitmap at `bitmap` in `file` that may have a bit set.
/// A page at the end of the bitmap or of the file is shorter than 4096 bytes.
pub(crate) fn read_pages(
    file: &impl Storage,
    bitmap: ByteOffset,
    geometry: &Geometry,
    pages: &Range<u64>,
    mut found: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let page_len = BITMAP_PAGE_LEN as u64;
    let start = bitmap.get();
    let end = start + (pages.end * page_len).min(geometry.bitmap_len());
    let mut buf = Vec::new();
    let mut at = start + pages.start * page_len;
    while at < end {
        let Some(data) = file.next_data(ByteOffset::new(at))? else { break };
        // Round down to the page that holds the first byte, which is never before `at`.
        let from = start + (data.start.max(at) - start) / page_len * page_len;
        let to = data.end.min(end).min(from + READ_PAGES * page_len);
        if from >= to {
            break;
        }
        let to = (start + (to - start).div_ceil(page_len) * page_len).min(end);
        buf.resize(usize::try_from(to - from).map_err(io::Error::other)?, 0);
        let n = file.read_at(&mut buf, ByteOffset::new(from))?;
        for (page, bytes) in ((from - start) / page_len..).zip(buf[..n].chunks(BITMAP_PAGE_LEN)) {
            // Where holes are unknown, most of it is zeros.
            if bytes.iter().any(|&byte| byte != 0) {
                found(page, bytes)?;
            }
        }
        at = to;
    }
    Ok(())
}

/// Passes to `found` the pages in which the live bitmap at `at` in `live` has bits that the durable
/// one of `cow` lacks.
pub(crate) fn for_each_stray<F: Storage>(
    cow: &F,
    geometry: &Geometry,
    live: &F,
    at: ByteOffset,
    mut found: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut known = [0; BITMAP_PAGE_LEN];
    read_pages(live, at, geometry, &(0..u64::MAX / BITMAP_PAGE_LEN as u64), |page, bytes| {
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        cow.read_zero_filled(&mut known[..geometry.bitmap_page_len(page)], geometry.page_at(page))?;
        match bytes.iter().zip(&known).all(|(live, known)| live & !known == 0) {
            true => Ok(()),
            false => found(page),
        }
    })
}
