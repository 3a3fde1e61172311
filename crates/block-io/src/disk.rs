//! [`Disk`]: an open image, as the daemon and the tool use it.
//!
//! The caller does the I/O on data: [`Disk::extents`] says what to read from where,
//! [`Disk::write_at`] where to write, and the caller reports completion with [`Writing::written`].
//! Everything that must happen in a certain order (docs/architecture.md, "Durability") happens
//! here.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use cow_format::{Bitmap, ByteOffset, Extents, Header, LayerMap, Sector, SectorCount, SectorRange};

use crate::fault_injection;
use crate::image::bitmap::demand_load::{Failed, demand_load, demand_load_top};
use crate::image::bitmap::source::BitmapSource;
use crate::image::chain::Held;
use crate::image::layer::Layer;
use crate::image::references::Below;
use crate::image::write::flush::{FlushFailure, flush};
use crate::image::write::header_io::{Newest, NotMarked, log_not_marked, mark_settled, void_live};
use crate::image::write::journal::Journal;
use crate::image::write::writable::WritableCow;
use crate::image::write::write_tracker::{WritePlace, WriteTracker};
use crate::image::{Chain, DiskError, DiskOptions, ImageError, Source, open_chain, open_single};
use crate::shown::Shown;
use crate::storage::file::{File, Host};
use crate::storage::{Env, Storage};
use crate::sync::lock;

/// An open disk. Dropping it without [`Disk::close`] is equivalent to the death of the process: no
/// acknowledged write is lost, and the next open finds the file marked as in use.
pub struct Disk<E: Env = Host> {
    env: E,
    /// Layer 0 is the top.
    layers: Vec<Layer<E::File>>,
    map: LayerMap,
    /// The source of each COW file's bits, the top first.
    bits: Vec<BitmapSource<E::File>>,
    /// The offset of sector 0 in layer 0.
    data_offset: ByteOffset,
    size: u64,
    logical_block: u32,
    /// The state of a COW file that is open for writing; `None` for a raw image or a read-only
    /// disk.
    cow: Option<WritableCow<E::File>>,
    read_only: bool,
    /// A sync has failed; this is permanent.
    failed: AtomicBool,
    /// The failure is recorded durably in the file.
    marked: AtomicBool,
    pub(crate) closed: AtomicBool,
    /// The file may contain data that is not marked present.
    leaky: bool,
    /// Held while some of that space is being freed.
    pub(crate) sweeping: Mutex<()>,
    /// What the next flush has to make durable, if it is little.
    pub(crate) unflushed: WriteTracker,
    /// One flush pass at a time, as `FlushPass` requires. This is the only lock that is held across
    /// I/O, to keep that I/O in order.
    flushing: Mutex<Journal>,
}

/// A write of data into layer 0, from before its first byte is moved until it has ended.
pub struct Writing<'a, E: Env = Host> {
    disk: &'a Disk<E>,
    place: WritePlace,
}

impl Disk {
    /// Opens the COW file at `path`, or creates it over `base` if it does not exist. The file below
    /// is `base`, or the one that its header names, if that is allowed (see
    /// [`Host::allow_backing_dir`]). It must be the one that the header was made for.
    pub fn open_cow(
        path: &Path,
        base: Option<&Path>,
        options: &DiskOptions,
    ) -> Result<Self, ImageError> {
        Self::open_cow_in(Host, path, base, options)
    }

    /// Opens a raw image: a regular file or a block device. Its size is its length. If that is not
    /// a multiple of 512 it can only be read (zeros follow the last byte), since a guest's write of
    /// the last sector would extend it.
    pub fn open_raw(path: &Path, options: &DiskOptions) -> Result<Self, ImageError> {
        Self::open_raw_in(Host, path, options)
    }

    /// [`Disk::open_cow`] with all the files `below` it, nearest first. If any is named, those are
    /// used whatever paths the headers have, and only [`Host::allow_backing_dir`] allows others.
    pub fn open_named(
        path: &Path,
        below: &[PathBuf],
        options: &DiskOptions,
    ) -> Result<Self, ImageError> {
        let chain = open_chain(&Host, Source::named(path, below), options)?;
        Ok(Self::new(Host, chain, options))
    }

    /// [`Disk::open_named`] for the successor of a process that has it open: the descriptions of
    /// `top`, with their locks, are passed on and nothing is written, so that the predecessor can
    /// continue if the successor fails. The successor must not write until the predecessor has
    /// exited. The files below are opened again.
    pub fn inherit_cow(
        path: &Path,
        below: &[PathBuf],
        top: File,
        options: &DiskOptions,
    ) -> Result<Self, ImageError> {
        let held = Some(Held { file: top, inherited: true, by_name: true });
        let chain = open_chain(&Host, Source { held, ..Source::named(path, below) }, options)?;
        Ok(Self::new(Host, chain, options))
    }

    /// The same for [`Disk::open_raw`].
    pub fn inherit_raw(path: &Path, top: File, options: &DiskOptions) -> Result<Self, ImageError> {
        let held = Some(Held { file: top, inherited: true, by_name: true });
        let chain = open_single(&Host, Source { held, ..Source::named(path, &[]) }, options)?;
        Ok(Self::new(Host, chain, options))
    }

    /// A native COW file, and all files below it, that are open already; no path is opened. With
    /// `inherited` as for [`Disk::inherit_cow`].
    pub fn open_cow_files(
        files: GivenFiles,
        inherited: bool,
        options: &DiskOptions,
    ) -> Result<Self, ImageError> {
        let chain = open_chain(&Host, files.source(inherited), options)?;
        Ok(Self::new(Host, chain, options))
    }

    /// The same for a raw image.
    pub fn open_raw_files(
        files: GivenFiles,
        inherited: bool,
        options: &DiskOptions,
    ) -> Result<Self, ImageError> {
        let chain = open_single(&Host, files.source(inherited), options)?;
        Ok(Self::new(Host, chain, options))
    }
}

/// Files that are open already, each with a name for messages. See [`File::given`].
#[derive(Debug)]
pub struct GivenFiles {
    /// The top.
    pub top: File,
    /// Its name.
    pub name: PathBuf,
    /// The files below it, nearest first.
    pub below: Vec<(File, PathBuf)>,
}

impl GivenFiles {
    /// The same files once more: see [`File::again`].
    pub fn again(&self) -> io::Result<Self> {
        let below = self.below.iter().map(|(file, name)| Ok((file.again()?, name.clone())));
        let below = below.collect::<io::Result<_>>()?;
        Ok(GivenFiles { top: self.top.again()?, name: self.name.clone(), below })
    }

    fn source(self, inherited: bool) -> Source<File> {
        let held = Some(Held { file: self.top, inherited, by_name: false });
        let below = self.below.into_iter().map(|(file, name)| Below::Open(file, name)).collect();
        Source { path: self.name, held, below }
    }
}

impl<E: Env> Disk<E> {
    /// [`Disk::open_cow`] in another environment.
    pub fn open_cow_in(
        env: E,
        path: &Path,
        base: Option<&Path>,
        options: &DiskOptions,
    ) -> Result<Self, ImageError> {
        let base = base.map(Path::to_owned);
        let chain = open_chain(&env, Source::named(path, base.as_slice()), options)?;
        Ok(Self::new(env, chain, options))
    }

    /// [`Disk::open_raw`] in another environment.
    pub fn open_raw_in(env: E, path: &Path, options: &DiskOptions) -> Result<Self, ImageError> {
        let chain = open_single(&env, Source::named(path, &[]), options)?;
        Ok(Self::new(env, chain, options))
    }

    fn new(env: E, chain: Chain<E::File>, options: &DiskOptions) -> Self {
        Disk {
            env,
            layers: chain.layers,
            map: chain.map,
            bits: chain.bits,
            data_offset: chain.data_offset,
            size: chain.size,
            logical_block: chain.logical_block,
            cow: chain.cow,
            read_only: options.read_only,
            failed: AtomicBool::new(false),
            marked: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            leaky: chain.leaky,
            sweeping: Mutex::default(),
            unflushed: WriteTracker::new(chain.journal.is_wanted(), chain.leaky),
            flushing: Mutex::new(chain.journal),
        }
    }

    /// The size of the disk; a partial last sector counts as a whole one.
    pub fn capacity(&self) -> SectorCount {
        self.map.sectors()
    }

    /// The size of the disk in bytes; need not be a multiple of 512.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The alignment that addresses and lengths should have, in bytes: 512, or the logical block
    /// size if the disk is a block device. Unaligned reads and writes work, through the page cache.
    pub fn logical_block(&self) -> u32 {
        self.logical_block
    }

    /// Whether the disk refuses writes.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether a sync has failed. Every flush and every [`Writing::written`] fails from then on.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// The files, the top first.
    pub fn layers(&self) -> &[Layer<E::File>] {
        &self.layers
    }

    /// What to read from where, for a range within the capacity. The first call for a part of the
    /// disk may read some of the bitmaps; if that fails, the location of the range is unknown.
    #[inline]
    pub fn extents(&self, range: SectorRange) -> Result<Extents<'_>, DiskError> {
        if self.map.next_unknown(range).is_some() {
            self.demand_load(range)?;
        }
        Ok(self.map.extents(range))
    }

    #[cold]
    fn demand_load(&self, range: SectorRange) -> Result<(), DiskError> {
        fault_injection::fails(4, libc::EIO).map_err(|source| self.not_loaded((0, source)))?;
        demand_load(&self.map, &self.sources(), range).map_err(|failed| self.not_loaded(failed))
    }

    fn sources(&self) -> Vec<(&E::File, &BitmapSource<E::File>)> {
        self.layers.iter().map(|layer| &layer.file).zip(&self.bits).collect()
    }

    fn not_loaded(&self, (layer, source): Failed) -> DiskError {
        let path = self.layers[layer].path.clone();
        DiskError::Io { path, action: "read the bitmap", source }
    }

    /// The offset in layer 0 of the sectors of `range`, which is within the capacity; they are
    /// contiguous. Write, punch or zero them there, between [`Disk::begin_write`] and
    /// [`Writing::written`].
    pub fn write_at(&self, range: SectorRange) -> ByteOffset {
        ByteOffset::new(self.data_offset.get() + range.start_bytes().get())
    }

    /// Whether every sector of `range` is present in layer 0, so that [`Writing::written`] will
    /// cost nothing.
    pub fn is_present(&self, range: SectorRange) -> Result<bool, DiskError> {
        self.demand_load_top(range)?;
        Ok(self.map.top().is_none_or(|bitmap| bitmap.contains(range)))
    }

    #[inline]
    fn demand_load_top(&self, range: SectorRange) -> Result<(), DiskError> {
        if self.map.top().is_none_or(|bitmap| bitmap.next_unknown(range).is_none()) {
            return Ok(());
        }
        demand_load_top(&self.map, &self.sources(), range).map_err(|failed| self.not_loaded(failed))
    }

    /// Must be called before data is moved (or punched, or zeroed) in layer 0, anywhere within
    /// `range`.
    pub fn begin_write(&self, range: SectorRange) -> Writing<'_, E> {
        Writing { disk: self, place: self.unflushed.begin(range) }
    }

    fn written(&self, ranges: &[SectorRange]) -> Result<(), DiskError> {
        self.check_writable()?;
        let Some((cow, bitmap)) = self.writable_cow() else { return Ok(()) };
        ranges.iter().try_for_each(|range| self.demand_load_top(*range))?;
        fault_injection::fails(32, libc::ENOSPC)
            .and_then(|()| cow.live.set(&self.top().file, bitmap, ranges))
            .map_err(|source| self.io_error("write the live bitmap", source))?;
        self.unflushed.add(ranges);
        Ok(())
    }

    /// Makes every write durable whose [`Writing::written`] returned before this call. Blocks. A
    /// failed sync fails the disk permanently; after a failed write of the bitmap (no space) the
    /// next flush tries again.
    pub fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        if self.is_failed() {
            self.retry_mark();
        }
        self.check_writable()?;
        let mut journal = lock(&self.flushing);
        self.check_not_failed()?;
        let Some((cow, bitmap)) = self.writable_cow() else {
            return self.top().file.sync().map_err(|err| self.fail(&err));
        };
        let flushed = match self.unflushed.take() {
            Some(few) => self.flush_to_journal(cow, bitmap, &mut journal, &few),
            None => self.checkpoint(cow, bitmap, &mut journal),
        };
        flushed.inspect_err(|_| self.unflushed.add_everything())
    }

    /// Makes `few` durable, which is everything written since the last flush.
    fn flush_to_journal(
        &self,
        cow: &WritableCow<E::File>,
        bitmap: &Bitmap,
        journal: &mut Journal,
        few: &[SectorRange],
    ) -> Result<(), DiskError> {
        if few.is_empty() {
            return Ok(());
        }
        // If no bit is new, one sync is enough, unless journal records would then override newer
        // data.
        if journal.has_records() || bitmap.dirty_pages() > 0 {
            let top = &self.top().file;
            let committed = journal.commit(top, &cow.geometry, &self.unflushed, few);
            if committed.map_err(|err| self.fail(&err))? {
                return Ok(());
            }
            journal.preallocate(top);
        }
        self.checkpoint(cow, bitmap, journal)
    }

    /// Makes everything durable in its final place, without the journal.
    fn checkpoint(
        &self,
        cow: &WritableCow<E::File>,
        bitmap: &Bitmap,
        journal: &mut Journal,
    ) -> Result<(), DiskError> {
        self.flush_bitmap(cow, bitmap)?;
        let begun = journal.reset(&self.top().file, &mut lock(&cow.header));
        begun.map_err(|err| self.fail_with(&err.into(), Newest::InDoubt))
    }

    fn flush_bitmap(&self, cow: &WritableCow<E::File>, bitmap: &Bitmap) -> Result<(), DiskError> {
        self.read_predecessor()?;
        flush(&self.top().file, bitmap, &cow.geometry).map_err(|failure| match failure {
            FlushFailure::Sync(err) => self.fail(&err),
            FlushFailure::Write(source) => self.io_error("write the bitmap", source),
        })
    }

    /// Writes that a dead predecessor acknowledged must be durable after a flush as well. Only bits
    /// that are not durable yet are read into memory.
    fn read_predecessor(&self) -> Result<(), DiskError> {
        let Some((cow, bitmap)) = self.writable_cow() else { return Ok(()) };
        if !cow.unread.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some((file, bits)) = self.layers.first().map(|top| &top.file).zip(self.bits.first())
        else {
            return Ok(());
        };
        let read = bits.for_each_stray(file, |page| bits.load(file, bitmap, page..page + 1));
        read.map_err(|source| self.io_error("read the bitmap", source))?;
        cow.unread.store(false, Ordering::Release);
        Ok(())
    }

    /// Ends the disk's use: flushes, and marks the file clean. Must be called when no write is in
    /// progress; later writes are refused, and reads still work. After an error in the flush the
    /// disk is as open as before; an error in the header fails the disk. The file then stays marked
    /// as in use.
    pub fn close(&self) -> Result<(), DiskError> {
        if self.read_only || self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // A sweep in progress ends and no new one starts: once the locks are released other
        // processes may write.
        drop(lock(&self.sweeping));
        let closed = self.end_use();
        if closed.is_err() {
            self.closed.store(false, Ordering::Release);
        }
        closed
    }

    /// Makes everything durable in its final place: then neither live bitmap nor journal is needed
    /// any more.
    fn end_use(&self) -> Result<(), DiskError> {
        let mut journal = lock(&self.flushing);
        self.check_not_failed().inspect_err(|_| self.retry_mark())?;
        let top = &self.top().file;
        let Some((cow, bitmap)) = self.writable_cow() else {
            return top.sync().map_err(|err| self.fail(&err));
        };
        self.flush_bitmap(cow, bitmap)?;
        let settled = mark_settled(top, &mut lock(&cow.header));
        settled.map_err(|err| self.fail_with(&err.into(), Newest::InDoubt))?;
        journal.close(top, &lock(&cow.header));
        let removed = cow.live.close(&self.env);
        removed.map_err(|(path, source)| DiskError::Io {
            path,
            action: "remove the live bitmap",
            source,
        })
    }

    /// Whether [`Disk::sweep`] may find something.
    pub fn is_leaky(&self) -> bool {
        self.leaky().is_some()
    }

    pub(crate) fn leaky(&self) -> Option<&WritableCow<E::File>> {
        self.cow.as_ref().filter(|_| self.leaky)
    }

    /// The top's bitmap, with `range` loaded.
    pub(crate) fn known_top(&self, range: SectorRange) -> Option<&Bitmap> {
        self.demand_load_top(range).ok()?;
        self.map.top()
    }

    /// The complete bitmap of the COW file.
    pub(crate) fn top_bitmap(&self) -> Result<Option<&Bitmap>, DiskError> {
        let Some(bitmap) = self.map.top() else { return Ok(None) };
        if let Some(all) = SectorRange::new(Sector::new(0), bitmap.sectors()) {
            self.demand_load_top(all)?;
        }
        Ok(Some(bitmap))
    }

    /// The header of the COW file, if it is open for writing.
    pub(crate) fn header(&self) -> Option<MutexGuard<'_, Header>> {
        Some(lock(&self.cow.as_ref()?.header))
    }

    fn top(&self) -> &Layer<E::File> {
        &self.layers[0]
    }

    fn writable_cow(&self) -> Option<(&WritableCow<E::File>, &Bitmap)> {
        self.cow.as_ref().zip(self.map.top())
    }

    pub(crate) fn check_writable(&self) -> Result<(), DiskError> {
        self.check_not_failed()?;
        if self.read_only || self.closed.load(Ordering::Acquire) {
            return Err(DiskError::ReadOnly { path: self.top().path.clone() });
        }
        Ok(())
    }

    fn check_not_failed(&self) -> Result<(), DiskError> {
        match self.is_failed() {
            true => Err(DiskError::Failed { path: self.top().path.clone() }),
            false => Ok(()),
        }
    }

    /// A sync has failed: from now on this disk can make no claim about durability.
    fn fail(&self, err: &std::io::Error) -> DiskError {
        self.fail_with(err, Newest::Durable)
    }

    fn fail_with(&self, err: &std::io::Error, newest: Newest) -> DiskError {
        let path = self.top().path.clone();
        if !self.failed.swap(true, Ordering::AcqRel) {
            log::error!(
                "{}: sync failed: {err}; writes since the last flush may be lost, and the disk takes \
                 no writes until it is opened again",
                path.shown()
            );
            if let Err(err) = self.mark_failed(newest) {
                log_not_marked(&path, &err);
            }
        }
        DiskError::Failed { path }
    }

    /// The next process to open the file must not trust the page cache either: the kernel reports a
    /// failed sync once, and afterwards considers the lost pages written.
    fn mark_failed(&self, newest: Newest) -> Result<(), NotMarked> {
        let top = self.top();
        match &self.cow {
            None => {
                // From now on, reads return what is on the disk.
                if let Err(err) = top.file.drop_cache() {
                    log::debug!("{}: page cache not dropped: {err}", top.path.shown());
                }
            }
            Some(cow) => match &mut *lock(&cow.header) {
                Header::Native(native) => void_live(&top.file, native, newest)?,
                Header::Uml(_) => cow.live.make_void().map_err(NotMarked::AtAll)?,
            },
        }
        self.marked.store(true, Ordering::Release);
        Ok(())
    }

    /// A device that took nothing when the sync failed may be back: a failure that is not recorded
    /// yet is recorded with the next flush that the guest asks for, and when the disk is closed.
    fn retry_mark(&self) {
        if self.marked.load(Ordering::Acquire) {
            return;
        }
        let path = self.top().path.shown();
        match self.mark_failed(Newest::InDoubt) {
            Ok(()) => log::warn!("{path}: the failed sync is recorded on the disk now"),
            Err(err) => log::debug!("{path}: the failed sync is still not recorded: {err:?}"),
        }
    }

    fn io_error(&self, action: &'static str, source: std::io::Error) -> DiskError {
        DiskError::Io { path: self.top().path.clone(), action, source }
    }
}

impl<E: Env> Writing<'_, E> {
    /// Must be called when the data of `ranges` has been written (or punched, or zeroed) in layer
    /// 0, before the write is acknowledged. Once it returns, reads find the sectors in layer 0, and
    /// so does a process that opens the file after this one has died. A flush that begins later
    /// makes them durable. Several ranges are cheapest when sorted: those in one bitmap page share
    /// a write. After an error some bits may have been set.
    ///
    /// The write has then ended: a flush that follows at once finds nothing in progress that would
    /// keep it out of the journal.
    pub fn written(self, ranges: &[SectorRange]) -> Result<(), DiskError> {
        self.disk.written(ranges)
    }
}

impl<E: Env> Drop for Writing<'_, E> {
    fn drop(&mut self) {
        self.disk.unflushed.end(self.place);
    }
}
