//! Giving back the space of data that no bit speaks of: what was written and not flushed when the
//! host went down, or the page cache. It is done behind the opening, while the disk is in use.
//!
//! A block is punched out only while nobody writes to it (`WriteTracker::exclusively`): all that
//! write announce themselves before their first byte and have set their bits before they say that
//! they have ended. So a block of which no bit is set then holds nothing that anybody was told is
//! there.

use std::ops::Range;
use std::sync::atomic::Ordering;

use cow_format::check::leaks;
use cow_format::{ByteOffset, Geometry, Header, SECTOR_SIZE, Sector, SectorCount, SectorRange};

use crate::disk::Disk;
use crate::image::write::writable::WritableCow;
use crate::storage::{Env, FS_BLOCK, Storage};
use crate::sync::lock;

/// Bytes that are looked at, and punched out at most, at a time: so long may a write have to wait,
/// some milliseconds.
const PIECE_BYTES: u64 = 4 << 20;

impl<E: Env> Disk<E> {
    /// Gives back what leaked, for as long as `go_on` says so and the disk is not closed. To be
    /// called once, by a thread of its own. What it leaves is only space.
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
                "{}: {bytes} bytes given back of writes that were not flushed when the page cache went",
                self.layers()[0].path().display()
            );
        }
    }

    /// The next data at or after `at`, a piece of it.
    fn next_piece(&self, cow: &WritableCow<E::File>, at: u64) -> Option<Range<u64>> {
        let file = self.layers()[0].file();
        let end = match &*lock(&cow.header) {
            Header::Native(_) => cow.geometry.sector_at(cow.geometry.all().end()).get(),
            // A new UML file is made by writing its last byte: that block is no leak.
            Header::Uml(_) => file.len().ok()?.saturating_sub(1) / FS_BLOCK * FS_BLOCK,
        };
        let data = file.next_data(ByteOffset::new(at)).ok()??;
        let start = data.start.max(at);
        let end = data.end.min(end).min(start / FS_BLOCK * FS_BLOCK + PIECE_BYTES);
        (start < end).then_some(start..end)
    }

    /// How many bytes were given back; `None` if it is time to stop.
    fn sweep_piece(&self, cow: &WritableCow<E::File>, piece: &Range<u64>) -> Option<u64> {
        let geometry = &cow.geometry;
        let bitmap = self.known_top(sectors(geometry, piece)?)?;
        let len = piece.end - piece.start;
        let found: Vec<_> = leaks(geometry, bitmap, ByteOffset::new(piece.start), len).collect();
        let mut bytes = 0;
        for (at, len) in found {
            let blocks = at.get()..at.get() + len;
            let range = sectors(geometry, &blocks)?;
            // Whoever closes the disk waits for this, and then nothing more is done: others may
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
                log::debug!("leaked space stays: {err}");
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
