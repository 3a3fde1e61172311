//! Frees the space of data that is not marked present: it was written but not flushed when the host
//! went down or the page cache was lost. This happens after opening, while the disk is in use.
//!
//! A block is punched out only while no write to it is in progress (`WriteTracker::exclusively`):
//! every write registers before its first byte, and has set its bits before it deregisters. So a
//! block without a set bit holds nothing that was ever acknowledged.

use std::ops::Range;
use std::sync::atomic::Ordering;

use cow_format::check::leaks;
use cow_format::{ByteOffset, Geometry, Header, SECTOR_SIZE, Sector, SectorCount, SectorRange};

use crate::disk::Disk;
use crate::image::write::writable::WritableCow;
use crate::shown::Shown;
use crate::storage::{Env, FS_BLOCK, Storage};
use crate::sync::lock;

/// Bytes that are examined, and punched out at most, at a time: a write may have to wait that long,
/// some milliseconds.
const PIECE_BYTES: u64 = 4 << 20;

impl<E: Env> Disk<E> {
    /// Frees leaked space until `go_on` returns false or the disk is closed. Call it once, on a
    /// thread of its own. Whatever it does not free is only lost space.
    pub fn sweep(&self, go_on: impl Fn() -> bool) {
        let Some(cow) = self.leaky() else { return };
        let mut at = cow.geometry.data_offset().get();
        let mut bytes = 0;
        while go_on() {
            let Some(piece) = self.next_piece(cow, at) else { break };
            at = piece.end;
            let Some(done) = self.sweep_piece(cow, &piece) else { return };
            bytes += done;
        }
        if bytes > 0 {
            log::info!(
                "{}: freed {bytes} bytes of writes that were not flushed before the page cache was lost",
                self.layers()[0].path().shown()
            );
        }
    }

    /// The next piece of data at or after `at`.
    fn next_piece(&self, cow: &WritableCow<E::File>, at: u64) -> Option<Range<u64>> {
        let file = self.layers()[0].file();
        let end = match &*lock(&cow.header) {
            Header::Native(_) => cow.geometry.sector_at(cow.geometry.all().end()).get(),
            // A new UML file is created by writing its last byte: that block is not leaked.
            Header::Uml(_) => file.len().ok()?.saturating_sub(1) / FS_BLOCK * FS_BLOCK,
        };
        let data = file.next_data(ByteOffset::new(at)).ok()??;
        let start = data.start.max(at);
        let end = data.end.min(end).min(start / FS_BLOCK * FS_BLOCK + PIECE_BYTES);
        (start < end).then_some(start..end)
    }

    /// The number of bytes freed; `None` if it is time to stop.
    fn sweep_piece(&self, cow: &WritableCow<E::File>, piece: &Range<u64>) -> Option<u64> {
        let geometry = &cow.geometry;
        let bitmap = self.known_top(sectors(geometry, piece)?)?;
        let len = piece.end - piece.start;
        let found: Vec<_> = leaks(geometry, bitmap, ByteOffset::new(piece.start), len).collect();
        let mut bytes = 0;
        for (at, len) in found {
            let blocks = at.get()..at.get() + len;
            let range = sectors(geometry, &blocks)?;
            // `close` waits for this lock, and nothing is punched after it: other processes may
            // have the file by then.
            let _open = lock(&self.sweeping);
            if self.is_closed() || self.is_failed() {
                return None;
            }
            let mut punched = Ok(());
            self.unflushed.exclusively(range, || {
                let free = bitmap.runs(range).all(|run| !run.present);
                if free {
                    punched = self.layers()[0].file().punch(at, len);
                    bytes += len;
                }
            });
            if let Err(err) = punched {
                log::debug!("leaked space not freed: {err}");
                return None;
            }
        }
        Some(bytes)
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// The sectors that a part of the file holds.
fn sectors(geometry: &Geometry, bytes: &Range<u64>) -> Option<SectorRange> {
    let sector = |at: u64| at.checked_sub(geometry.data_offset().get());
    let start = sector(bytes.start)? / SECTOR_SIZE;
    let end = sector(bytes.end)?.div_ceil(SECTOR_SIZE).min(geometry.sectors().get());
    SectorRange::new(Sector::new(start), SectorCount::new(end.checked_sub(start)?))
}
