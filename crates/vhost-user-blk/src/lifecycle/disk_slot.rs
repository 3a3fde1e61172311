//! The daemon's disk, open or not. It is opened at the start or, if its guest is still to arrive,
//! with the first ring. It is released when a migration takes the guest away, and opened again if
//! the guest stays.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use block_io::Shown;
use block_io::base_watch::watch::BaseWatch;
use block_io::storage::Env;
use block_io::storage::file::File;
use block_io::{Committer, Disk, GivenFiles, Host};
use cow_format::SectorCount;
use log::Level;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::cli::Options;
use crate::datapath::holes::Holes;
use crate::datapath::queue_threads::QueueThreads;
use crate::datapath::resident::Mappings;
use crate::datapath::worker::handle::{StopOrder, WorkerHandle, any_abandoned};
use crate::datapath::worker::{self, RingStart, Shared};
use crate::lifecycle::error::DaemonError;
use crate::lifecycle::handover;
use crate::lifecycle::open_disk::{describe, given_files, look, open_disk};
use crate::process::log_limit::DISK;
use crate::process::requirements::Engine;
use crate::process::{signals, systemd, watchdog};
use crate::session::Device;
use crate::session::vring::RunningRing;
use crate::virtio::config::DiskShape;
use crate::virtio::request::ParseLimits;

/// A disk that is open or will be.
pub struct DiskSlot {
    options: Options,
    /// The files of the disk, if they were open when the daemon started.
    given: Option<GivenFiles>,
    /// The size reported to frontends. The disk must still have it when it is opened.
    capacity: SectorCount,
    threads: Arc<QueueThreads>,
    logical_block: u32,
    failure: Arc<EventFd>,
    /// The paths of its files at the start, the top first.
    files: Vec<PathBuf>,
    open: Mutex<Option<Open>>,
}

/// What exists only while the disk is open.
struct Open {
    shared: Arc<Shared>,
    // Only warns if another process changes a base; the disk works without it.
    _watch: Option<BaseWatch>,
}

impl DiskSlot {
    /// Opens the disk; or only looks at it, if its guest is still to arrive. It is used only after
    /// [`DiskSlot::begin`].
    pub fn open(options: &Options) -> Result<(Self, Option<Disk>), DaemonError> {
        if options.incoming {
            return Ok((Self::incoming(options)?, None));
        }
        // Before a COW file is created.
        let engine = choose_engine(options)?;
        engine.report();
        let given = given_files(options)?;
        let disk = open_disk(options, given.as_ref(), None)?;
        describe(&disk);
        Ok((Self::of_disk(options, given, &disk, engine)?, Some(disk)))
    }

    /// Takes the disk over from a predecessor by the descriptions of its top file: the buffered one
    /// and possibly the direct one. Without any, the disk is read-only and is opened beside the
    /// predecessor's. A `rehearsal` changes nothing.
    pub fn inherit(
        options: &Options,
        top: &[RawFd],
        rehearsal: bool,
    ) -> Result<(Self, Disk), DaemonError> {
        let engine = choose_engine(options)?;
        // The successor logs this, so its rehearsal does not.
        if !rehearsal {
            engine.report();
        }
        let mut top = top.iter().map(|&fd| handover::inherit(fd));
        let (buffered, direct) = (top.next().transpose()?, top.next().transpose()?);
        let file = buffered.map(|buffered| File::inherit(buffered, direct)).transpose();
        let file = file.map_err(DaemonError::system("use the predecessor's files"))?;
        let given = given_files(options)?;
        let disk = open_disk(options, given.as_ref(), file)?;
        describe(&disk);
        Ok((Self::of_disk(options, given, &disk, engine)?, disk))
    }

    fn of_disk(
        options: &Options,
        given: Option<GivenFiles>,
        disk: &Disk,
        engine: Engine,
    ) -> Result<Self, DaemonError> {
        let files = disk.layers().iter().map(|layer| layer.path().to_owned()).collect();
        Self::of(options, given, (disk.capacity(), disk.logical_block(), files), engine)
    }

    /// Starts the threads that the disk needs.
    pub fn begin(&self, disk: Option<Disk>) -> Result<(), DaemonError> {
        let open = disk.map(|disk| self.serve(disk)).transpose();
        *self.lock() = open.map_err(DaemonError::system("start a thread"))?;
        Ok(())
    }

    /// The paths of the disk's files at the start, the top first.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The disk, if it is open.
    pub fn disk(&self) -> Option<Arc<Disk>> {
        self.lock().as_ref().map(|open| Arc::clone(&open.shared.disk))
    }

    /// Reads only the size of the disk, which another daemon has open. The disk is opened when a
    /// ring starts.
    ///
    /// # Errors
    /// The reason, if opening the disk would fail even without the other daemon, as far as can be
    /// seen.
    fn incoming(options: &Options) -> Result<Self, DaemonError> {
        let engine = choose_engine(options)?;
        engine.report();
        let given = given_files(options)?;
        let seen = look(options, given.as_ref())?;
        // Read now; it may not be allowed later. An error is reported when the disk opens.
        _ = Host.boot_id();
        log::info!("disk {}: opens when its guest arrives", seen.name.shown());
        Self::of(options, given, (seen.capacity, seen.logical_block, seen.files), engine)
    }

    fn of(
        options: &Options,
        given: Option<GivenFiles>,
        (capacity, logical_block, files): (SectorCount, u32, Vec<PathBuf>),
        engine: Engine,
    ) -> Result<Self, DaemonError> {
        let failure = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
            .map_err(DaemonError::system("make an eventfd"))?;
        let (options, failure) = (options.clone(), Arc::new(failure));
        let (threads, open) = (Arc::new(QueueThreads::new(engine)), Mutex::new(None));
        Ok(DiskSlot { options, given, capacity, logical_block, threads, failure, files, open })
    }

    /// The disk's properties, for the session.
    pub fn shape(&self) -> DiskShape {
        DiskShape {
            capacity: self.capacity.get(),
            num_queues: self.options.num_queues,
            queue_size_max: self.options.queue_size_max,
            read_only: self.options.read_only,
            logical_block: self.logical_block,
        }
    }

    /// Whether guest memory may be in files of any file system.
    pub fn allows_file_memory(&self) -> bool {
        self.options.allow_file_memory
    }

    /// Closes the disk, if it is open, and makes everything durable. No ring may be running.
    ///
    /// # Errors
    /// If not everything could be made durable, or a ring is running that cannot be stopped: then
    /// the disk is flushed. In both cases it stays open.
    pub fn close(&self) -> Result<(), DaemonError> {
        let mut open = self.lock();
        if let Some(held) = &*open {
            if any_abandoned() {
                held.shared.disk.flush()?;
                return Err(DaemonError::RingRuns);
            }
            held.shared.disk.close()?;
            for layer in held.shared.disk.layers() {
                // No ring runs, so no I/O is in flight. If this fails the lock goes a little later.
                _ = layer.file().unlock();
            }
            *open = None;
            DISK.say(Level::Info, format_args!("disk closed"));
        }
        Ok(())
    }

    /// The open disk; opens it if necessary.
    fn shared(&self) -> io::Result<Arc<Shared>> {
        let mut open = self.lock();
        if open.is_none() {
            let disk = self.reopen().map_err(io::Error::other)?;
            *open = Some(self.serve(disk)?);
        }
        open.as_ref().map(|open| Arc::clone(&open.shared)).ok_or(io::ErrorKind::NotFound.into())
    }

    /// Opens a disk whose size is known from before.
    fn reopen(&self) -> Result<Disk, DaemonError> {
        if let Some(path) = self.options.image.path() {
            // A file that is gone must not be created again.
            std::fs::metadata(path)
                .map_err(|source| DaemonError::Gone { path: path.to_owned(), source })?;
        }
        let disk =
            open_disk(&self.options, self.given.as_ref(), None).map_err(DaemonError::confined)?;
        let path = disk.layers()[0].path();
        DISK.say(Level::Info, format_args!("disk {}: opened", path.shown()));
        let (found, expected) = (disk.capacity().get(), self.capacity.get());
        if found != expected {
            disk.close()?;
            return Err(DaemonError::Capacity { path: path.to_owned(), found, expected });
        }
        Ok(disk)
    }

    fn serve(&self, disk: Disk) -> io::Result<Open> {
        signals::starting_threads(|| self.start_serving(disk))
    }

    fn start_serving(&self, disk: Disk) -> io::Result<Open> {
        let disk = Arc::new(disk);
        let watch = BaseWatch::spawn(&disk)
            .inspect_err(|e| log::warn!("cannot watch the files below the disk for changes: {e}"));
        let options = &self.options;
        let committer = Committer::spawn(Arc::clone(&disk), options.num_queues.into())?;
        watchdog::watch("committer", committer.pulse());
        let shared = Shared {
            mappings: Mappings::new(&disk),
            holes: Holes::new(&disk),
            committer,
            serial: options.serial,
            limits: ParseLimits { capacity: disk.capacity(), read_only: disk.read_only() },
            poll: Duration::from_micros(options.poll_us.into()),
            threads: Arc::clone(&self.threads),
            failure: Arc::clone(&self.failure),
            disk,
        };
        Ok(Open { shared: Arc::new(shared), _watch: watch.ok() })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn choose_engine(options: &Options) -> Result<Engine, DaemonError> {
    Ok(Engine::choose(options.io_engine, options.num_queues, options.queue_size_max)?)
}

impl Device for Arc<DiskSlot> {
    type Ring = WorkerHandle;

    fn start(&self, ring: RingStart) -> io::Result<WorkerHandle> {
        if any_abandoned() {
            // Its last worker may still be there.
            return Err(io::Error::other("the daemon is shutting down"));
        }
        let shared = self.shared()?;
        signals::starting_threads(|| worker::spawn(ring, shared))
    }

    fn flush(&self) -> io::Result<()> {
        match &*self.lock() {
            Some(open) => open.shared.disk.flush().map_err(io::Error::other),
            // A closed disk is durable.
            None => Ok(()),
        }
    }

    fn release(&self) -> io::Result<()> {
        self.close().map_err(io::Error::other)
    }

    fn failure(&self) -> &EventFd {
        &self.failure
    }
}

impl RunningRing for WorkerHandle {
    fn ask(&self, order: StopOrder) {
        WorkerHandle::ask(self, order);
    }

    fn stop(self, asked: Instant) -> Option<u16> {
        WorkerHandle::stop(self, asked, || _ = systemd::ping_watchdog())
    }
}
