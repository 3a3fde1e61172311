//! The journal of a COW file that is open for writing, and its replay after a power cut
//! (`docs/spec/format-native.md` section 7).
//!
//! A small flush is one durable write of the data itself. A large flush, or one for which the
//! journal has no room left, is a checkpoint: everything is made durable in its final place, and
//! then the journal is reset.

use std::io;

use cow_format::journal::{Epoch, JournalArea, RECORD_BLOCK_LEN, Records, record_len, seal};
use cow_format::{Bitmap, ByteOffset, Geometry, Header, PAGE_SECTORS, SectorRange};
use uuid::Uuid;

use super::flush::flush;
use super::header_io::{UpdateError, write_native_synced};
use super::write_tracker::WriteTracker;
use crate::image::ImageError;
use crate::image::opened::Opened;
use crate::shown::Shown;
use crate::storage::Storage;

/// How often a flush waits for overlapping writes to end before it falls back to a checkpoint: they
/// take microseconds, or waiting is not worthwhile.
const ATTEMPTS: usize = 8;

/// Used by one flush pass at a time.
#[derive(Debug)]
pub(crate) struct Journal {
    area: Option<JournalArea>,
    state: State,
    /// The buffer for records, reused.
    record: Vec<u8>,
}

#[derive(Debug)]
enum State {
    /// Not in use: no small flush has happened yet, or the journal is disabled.
    Unused,
    /// It could not be preallocated: it is not used.
    Unable,
    /// Its blocks have just been written; the flush in progress makes them durable.
    Filled,
    /// A predecessor's: unchanged until everything is durable in its final place.
    Inherited,
    /// Records are being written.
    Begun { epoch: Epoch, tail: u64, sequence: u64 },
}

impl Journal {
    /// Of a disk that has none.
    pub(crate) fn none() -> Self {
        Journal { area: None, state: State::Unused, record: Vec::new() }
    }

    /// The journal of a file that has just been opened for writing; `wanted`: flushes may use it.
    pub(crate) fn new(header: &Header, wanted: bool) -> Self {
        let (area, epoch) = match header {
            Header::Uml(_) => (None, None),
            Header::Native(native) => (native.journal(), native.journal_epoch()),
        };
        let state = match epoch {
            Some(_) => State::Inherited,
            None => State::Unused,
        };
        let area = area.filter(|_| wanted);
        Journal { area, state, ..Self::none() }
    }

    /// Whether flushes may use it.
    pub(crate) fn is_wanted(&self) -> bool {
        self.area.is_some()
    }

    /// Whether it has valid records, so that a checkpoint must be followed by a reset.
    pub(crate) fn has_records(&self) -> bool {
        matches!(self.state, State::Inherited | State::Begun { tail: 1.., .. })
    }

    /// Makes `few`, everything written since the last flush, durable. Returns false if a checkpoint
    /// is needed instead. An error is that of a sync.
    pub(crate) fn commit(
        &mut self,
        file: &impl Storage,
        geometry: &Geometry,
        unflushed: &WriteTracker,
        few: &[SectorRange],
    ) -> io::Result<bool> {
        let (Some(area), State::Begun { epoch, tail, sequence }) = (self.area, &mut self.state)
        else {
            return Ok(false);
        };
        let Some(len) = record_len(few) else { return Ok(false) };
        if *tail + len as u64 > area.len() {
            return Ok(false);
        }
        self.record.clear();
        self.record.resize(len, 0);
        let data = &mut self.record[RECORD_BLOCK_LEN..];
        if !read_if_quiet(file, geometry, unflushed, few, data) {
            return Ok(false);
        }
        seal(&mut self.record, *epoch, *sequence, few);
        file.write_durably(&self.record, ByteOffset::new(area.at().get() + *tail))?;
        *tail += len as u64;
        *sequence += 1;
        Ok(true)
    }

    /// Writes to all of an unused journal, to allocate its blocks: the checkpoint that follows
    /// makes them durable.
    pub(crate) fn preallocate(&mut self, file: &impl Storage) {
        let (Some(area), State::Unused) = (self.area, &self.state) else { return };
        self.state = match file.write_zeros(area.at(), area.len()) {
            Ok(()) => State::Filled,
            Err(err) => {
                log::debug!("journal not preallocated: {err}");
                // Without it flushes are slower, but no less durable. The space may be more useful
                // elsewhere.
                release_space(file, area);
                State::Unable
            }
        };
    }

    /// After a checkpoint: invalidates all records, so that new ones can be written. After an error
    /// it is unknown which records are valid, and whether the copy of the header that was written
    /// is durable.
    pub(crate) fn reset(
        &mut self,
        file: &impl Storage,
        header: &mut Header,
    ) -> Result<(), UpdateError> {
        let Header::Native(native) = header else { return Ok(()) };
        match self.state {
            State::Unused | State::Unable | State::Begun { tail: 0, .. } => return Ok(()),
            State::Filled | State::Inherited | State::Begun { .. } => {}
        }
        let epoch = self.area.and_then(|_| Epoch::from_bytes(Uuid::new_v4().into_bytes()));
        self.state = match epoch {
            Some(epoch) => {
                native.begin_journal(epoch);
                State::Begun { epoch, tail: 0, sequence: 0 }
            }
            None => {
                native.end_journal();
                State::Unused
            }
        };
        // The copy before this one is durable: the checkpoint has just synced the file.
        let write = native.next_write()?;
        file.write_durably(&write.bytes[..], write.at)?;
        if epoch.is_none()
            && let Some(area) = native.journal()
        {
            release_space(file, area);
        }
        Ok(())
    }

    /// Frees the journal's space once the header of the closed file is durable. A failure only
    /// costs space.
    pub(crate) fn close(&mut self, file: &impl Storage, header: &Header) {
        let Header::Native(native) = header else { return };
        if let Some(area) = native.journal()
            && !matches!(self.state, State::Unused | State::Unable)
        {
            release_space(file, area);
        }
        self.state = State::Unused;
    }
}

fn release_space(file: &impl Storage, area: JournalArea) {
    if let Err(err) = file.punch(area.at(), area.len()) {
        log::debug!("journal space not freed: {err}");
    }
}

/// Reads `ranges` into `data`, which may be longer; false if that fails, or if they are being
/// written all the time.
fn read_if_quiet(
    file: &impl Storage,
    geometry: &Geometry,
    unflushed: &WriteTracker,
    ranges: &[SectorRange],
    data: &mut [u8],
) -> bool {
    (0..ATTEMPTS).any(|attempt| {
        if attempt > 0 {
            std::thread::yield_now();
        }
        unflushed.copy_if_quiet(ranges, || read(file, geometry, ranges, data))
    })
}

fn read(
    file: &impl Storage,
    geometry: &Geometry,
    ranges: &[SectorRange],
    mut data: &mut [u8],
) -> bool {
    for range in ranges {
        let len = usize::try_from(range.len_bytes()).unwrap_or(usize::MAX);
        let Some((piece, rest)) = data.split_at_mut_checked(len) else { return false };
        if file.read_exact_at(piece, geometry.sector_at(range.start())).is_err() {
            return false;
        }
        data = rest;
    }
    true
}

/// Replays the journal of a file whose live bitmap is not valid: makes its records durable in their
/// final place. For a file under its exclusive lock, before its bitmaps are read. Can be
/// interrupted, and then starts over.
pub(crate) fn replay<F: Storage>(cow: &Opened<F>, header: &mut Header) -> Result<(), ImageError> {
    let Header::Native(native) = header else { return Ok(()) };
    let Some((area, epoch)) = native.journal().zip(native.journal_epoch()) else { return Ok(()) };
    let count = apply(cow, native.geometry(), area, epoch)?;
    if count > 0 {
        log::info!("{}: {count} flushes replayed from the journal", cow.path.shown());
    }
    native.end_journal();
    write_native_synced(&cow.file, native).map_err(|err| err.at(&cow.path))?;
    release_space(&cow.file, area);
    Ok(())
}

pub(crate) fn read_journal<F: Storage>(
    cow: &Opened<F>,
    area: JournalArea,
) -> Result<Vec<u8>, ImageError> {
    let mut journal = vec![0; usize::try_from(area.len()).unwrap_or(0)];
    let read = cow.file.read_zero_filled(&mut journal, area.at());
    read.map_err(ImageError::io(&cow.path, "read the journal"))?;
    Ok(journal)
}

fn apply<F: Storage>(
    cow: &Opened<F>,
    geometry: &Geometry,
    area: JournalArea,
    epoch: Epoch,
) -> Result<usize, ImageError> {
    let io = |action| ImageError::io(&cow.path, action);
    let journal = read_journal(cow, area)?;
    let records = Records::new(&journal, epoch, geometry.sectors());
    let records = records.collect::<Result<Vec<_>, _>>();
    let records = records.map_err(|err| io("use the journal")(io::Error::other(err)))?;
    let bitmap = Bitmap::unknown(geometry.sectors());
    for (range, data) in records.iter().flatten() {
        let at = geometry.sector_at(range.start());
        cow.file.write_all_at(data, at).map_err(io("write what the journal holds"))?;
        load_known(&cow.file, geometry, &bitmap, *range).map_err(io("read the bitmap"))?;
        bitmap.insert(*range);
    }
    // The data, then the bits, in the order of every flush.
    flush(&cow.file, &bitmap, geometry).map_err(|failure| failure.at(&cow.path))?;
    Ok(records.len())
}

/// Loads the durable bits of the pages that cover `range`, unless they are already known.
fn load_known(
    file: &impl Storage,
    geometry: &Geometry,
    bitmap: &Bitmap,
    range: SectorRange,
) -> io::Result<()> {
    let pages = range.start().get() / PAGE_SECTORS..range.end().get().div_ceil(PAGE_SECTORS);
    for page in pages.filter(|page| !bitmap.is_known(*page)) {
        let mut bytes = vec![0; geometry.bitmap_page_len(page)];
        file.read_zero_filled(&mut bytes, geometry.page_at(page))?;
        bitmap.load_durable(page, &bytes);
        bitmap.set_known(page..page + 1);
    }
    Ok(())
}
