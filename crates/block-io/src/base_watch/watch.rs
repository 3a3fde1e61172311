//! Watches the files below the top. Locks only keep out programs that ask for them; an editor, `dd`
//! or `cp` does not ask, and a base that changes while a disk uses it corrupts the disk. This
//! cannot be prevented, so it is reported loudly and at once.
//!
//! Two mechanisms are used. A lease reports the open for writing itself, before anything is
//! written, but only the file's owner and root can take one, and not every file system supports
//! them. inotify reports each write and the close after each open for writing.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread::{Builder, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::base_watch::lease::{Lease, Leases};
use crate::disk::Disk;
use crate::image::layer::Layer;
use crate::shown::Shown;
use crate::storage::file::{File, Host};
use crate::storage::proc_fs::{descriptor_path, shows_descriptors};
use crate::storage::{Access, Env, Storage};
use crate::threads::{self, Task};

/// Stack of the watching thread in bytes: it only writes an occasional log line.
const STACK_BYTES: usize = 128 << 10;

/// A released lease is taken again when the file is closed. The kernel reports the close a moment
/// before it is complete, so this many attempts are made, this many milliseconds apart.
const RETRIES: u32 = 10;
const RETRY_MS: u16 = 100;
/// Without inotify there is no notification of the close, so the lease is retried at this interval.
const UNTOLD_RETRY_MS: u16 = 1000;

/// What happened to a file that a disk uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BaseEvent {
    /// It is being opened for writing, or truncated.
    Opened,
    /// Its content was written: what the disk reads from it is no longer valid.
    Written,
    /// It was open for writing. Its mtime shows whether it was written.
    OpenForWriting,
    /// Its mtime, links or owner changed: the next open of the disk may find its base changed or
    /// gone.
    Attributes,
    /// It was moved: the next open of the disk will not find it.
    Moved,
}

impl BaseEvent {
    /// The events that inotify reports.
    const NOTIFIED: [BaseEvent; 4] =
        [BaseEvent::Written, BaseEvent::OpenForWriting, BaseEvent::Attributes, BaseEvent::Moved];

    fn flag(self) -> AddWatchFlags {
        match self {
            BaseEvent::Opened => AddWatchFlags::empty(),
            BaseEvent::Written => AddWatchFlags::IN_MODIFY,
            BaseEvent::OpenForWriting => AddWatchFlags::IN_CLOSE_WRITE,
            BaseEvent::Attributes => AddWatchFlags::IN_ATTRIB,
            BaseEvent::Moved => AddWatchFlags::IN_MOVE_SELF,
        }
    }

    fn log(self, path: &Path) {
        let path = path.shown();
        match self {
            BaseEvent::Opened => log::error!(
                "{path}: is being OPENED FOR WRITING by another program while a disk uses it; it must \
                 never be written"
            ),
            BaseEvent::Written => log::error!(
                "{path}: was WRITTEN by another program while a disk uses it: the disk's content is damaged"
            ),
            BaseEvent::OpenForWriting => log::error!(
                "{path}: was open for writing in another program while a disk uses it; it must never be \
                 written"
            ),
            BaseEvent::Attributes => log::warn!(
                "{path}: its times, links or owner changed while a disk uses it; the disk may not open \
                 again until its reference is updated (rebind)"
            ),
            BaseEvent::Moved => {
                log::warn!(
                    "{path}: was moved while a disk uses it; update the disk's reference (rebind)"
                )
            }
        }
    }
}

/// A watch on the files below a disk's top. Ends when it is dropped.
#[derive(Debug)]
pub struct BaseWatch {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl BaseWatch {
    /// Watches the files below `disk`'s top and logs what happens to them, each kind of event once
    /// for each file.
    pub fn spawn(disk: &Disk) -> io::Result<Self> {
        Self::spawn_with(disk, |path, harm| harm.log(path))
    }

    /// The same, but calls `report` instead of logging.
    pub(crate) fn spawn_with(
        disk: &Disk,
        report: impl Fn(&Path, BaseEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let flags = BaseEvent::NOTIFIED.into_iter().map(BaseEvent::flag).collect();
        let below = &disk.layers()[1..];
        let paths = below.iter().map(way_to).collect::<io::Result<Vec<_>>>()?;
        let (inotify, descriptors) = match notify(&paths, flags) {
            Ok((inotify, descriptors)) => (Some(inotify), descriptors),
            Err(errno) => {
                log::warn!("{}", without_inotify(errno));
                (None, Vec::new())
            }
        };
        let mut descriptors = descriptors.into_iter();
        let mut watched = Vec::new();
        for layer in below {
            let (descriptor, lease) = (descriptors.next(), Lease::new(layer.file()).ok());
            let path = layer.path().to_owned();
            watched.push(Watched { descriptor, path, lease, unseen: flags, opened: false });
        }
        let leases = Leases::new()?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        // The thread has its own descriptor of the same event.
        let theirs = stop.as_fd().try_clone_to_owned()?;
        let builder = Builder::new().name("base-watch".to_owned()).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || {
            threads::started(Task::BaseWatch);
            if let Err(err) = watch(inotify.as_ref(), &leases, &mut watched, &theirs, &report) {
                log::warn!("the files below the disk are no longer watched: {err}");
            }
        })?;
        Ok(BaseWatch { stop, thread: Some(thread) })
    }
}

impl Drop for BaseWatch {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A panic of the thread has already been reported.
            _ = thread.join();
        }
    }
}

/// A path that leads to the very file that is open, whichever file has its name by now.
fn way_to(layer: &Layer<File>) -> io::Result<PathBuf> {
    if shows_descriptors() {
        return Ok(descriptor_path(layer.file()));
    }
    let named = Host.open(layer.path(), Access::Read)?.stat()?;
    if named.id != layer.file().stat()?.id {
        return Err(io::Error::other(format!("{}: is a different file now", layer.path().shown())));
    }
    Ok(layer.path().to_owned())
}

/// Asks inotify to report events of each of the files.
fn notify(paths: &[PathBuf], flags: AddWatchFlags) -> nix::Result<(Inotify, Vec<WatchDescriptor>)> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let descriptors = paths.iter().map(|path| inotify.add_watch(path, flags));
    let descriptors = descriptors.collect::<nix::Result<_>>()?;
    Ok((inotify, descriptors))
}

/// What an error of inotify means, and how to fix it.
fn without_inotify(errno: Errno) -> String {
    let remedy = match errno {
        Errno::EMFILE => {
            ": this user has reached the limit of inotify instances, and each daemon needs one; raise \
             fs.inotify.max_user_instances (sysctl -w fs.inotify.max_user_instances=8192)"
        }
        Errno::ENOSPC => {
            ": this user has reached the limit of inotify watches; raise \
             fs.inotify.max_user_watches"
        }
        _ => "",
    };
    format!(
        "no inotify ({errno}){remedy}. The disk works, but writes by other programs to the files below \
         it are only noticed where the daemon gets a lease"
    )
}

struct Watched {
    /// None without inotify.
    descriptor: Option<WatchDescriptor>,
    path: PathBuf,
    /// None if it was refused permanently.
    lease: Option<Lease>,
    /// Events that have not been reported yet: a writer causes an event for each write.
    unseen: AddWatchFlags,
    /// [`BaseEvent::Opened`] has been reported.
    opened: bool,
}

fn watch(
    inotify: Option<&Inotify>,
    leases: &Leases,
    watched: &mut [Watched],
    stopped: &impl AsFd,
    report: &impl Fn(&Path, BaseEvent),
) -> io::Result<()> {
    // The inotify watches are in place: any later close that makes a lease possible is reported.
    leases.block()?;
    watched.iter_mut().for_each(|file| file.begin_lease(leases));
    let mut tries = 0;
    loop {
        let untold = inotify.is_none() && watched.iter().any(Watched::lacks_lease);
        let timeout = match () {
            () if tries > 0 => RETRY_MS.into(),
            () if untold => UNTOLD_RETRY_MS.into(),
            () => PollTimeout::NONE,
        };
        let fds = [stopped.as_fd(), leases.as_fd()].into_iter();
        let fds = fds.chain(inotify.map(AsFd::as_fd));
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => continue,
            result => result?,
        };
        let stop = fds[0].any() == Some(true);
        if leases.told() {
            watched.iter_mut().for_each(|file| file.release_space(report));
        }
        let events = match inotify.map(Inotify::read_events) {
            None | Some(Err(Errno::EAGAIN | Errno::EINTR)) => Vec::new(),
            Some(events) => events?,
        };
        for event in events {
            for file in watched.iter_mut().filter(|file| file.descriptor == Some(event.wd)) {
                let new = file.unseen & event.mask;
                file.unseen &= !new;
                let harms =
                    BaseEvent::NOTIFIED.into_iter().filter(|harm| new.contains(harm.flag()));
                harms.for_each(|harm| report(&file.path, harm));
                if event.mask.contains(AddWatchFlags::IN_CLOSE_WRITE) {
                    tries = RETRIES;
                }
            }
        }
        if stop {
            return Ok(());
        }
        if tries > 0 || untold {
            tries = tries.saturating_sub(1);
            if watched.iter_mut().all(|file| file.take_lease(leases)) {
                tries = 0;
            }
        }
    }
}

impl Watched {
    fn begin_lease(&mut self, leases: &Leases) {
        let path = self.path.shown();
        match self.lease.as_mut().map(|lease| lease.take(leases)) {
            Some(Ok(())) => log::debug!("{path}: leased: an open for writing is noticed"),
            Some(Err(err)) => {
                log::debug!("{path}: no lease ({err}): an open is not noticed");
                self.forget_unless_busy(&err);
            }
            None => log::debug!("{path}: no lease: an open is not noticed"),
        }
    }

    /// Tries again; returns whether no further attempt is needed.
    fn take_lease(&mut self, leases: &Leases) -> bool {
        if let Some(Err(err)) = self.lease.as_mut().map(|lease| lease.take(leases)) {
            self.forget_unless_busy(&err);
        }
        !self.lacks_lease()
    }

    /// It may become available later.
    fn lacks_lease(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| !lease.is_held())
    }

    /// A refusal for any other reason than that the file is open for writing is permanent.
    fn forget_unless_busy(&mut self, err: &io::Error) {
        if err.raw_os_error() != Some(libc::EAGAIN) {
            self.lease = None;
        }
    }

    fn release_space(&mut self, report: &impl Fn(&Path, BaseEvent)) {
        if self.lease.as_mut().is_some_and(Lease::give_back_if_broken)
            && !std::mem::replace(&mut self.opened, true)
        {
            report(&self.path, BaseEvent::Opened);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DiskOptions;
    use std::fs;
    use std::os::unix::fs::FileExt;
    use std::sync::mpsc;

    struct Fixture {
        dir: tempfile::TempDir,
        base: PathBuf,
        disk: Disk,
        watch: BaseWatch,
        reports: mpsc::Receiver<(PathBuf, BaseEvent)>,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let (base, cow) = (dir.path().join("base"), dir.path().join("cow"));
        fs::write(&base, [1; 4096]).unwrap();
        let disk = Disk::open_cow(&cow, Some(&base), &DiskOptions::default()).unwrap();
        let (send, reports) = mpsc::channel();
        let watch = BaseWatch::spawn_with(&disk, move |path, harm| {
            send.send((path.to_owned(), harm)).unwrap()
        });
        let watch = watch.unwrap();
        // None of this is harmful.
        fs::read(&base).unwrap();
        disk.write(disk_range(), &[2; 512]).unwrap();
        disk.close().unwrap();
        Fixture { dir, base, disk, watch, reports }
    }

    #[test]
    fn a_writer_of_the_base_is_reported() {
        let Fixture { dir, base, disk: _disk, watch, reports } = fixture();
        // Whether the opening is seen depends on the file system: see the next test.
        let next = || loop {
            match reports.recv() {
                Ok((_, BaseEvent::Opened)) => {}
                report => return report,
            }
        };
        let file = fs::File::options().write(true).open(&base).unwrap();
        file.write_all_at(b"x", 0).unwrap();
        file.write_all_at(b"y", 1).unwrap();
        assert_eq!(next().unwrap(), (base.clone(), BaseEvent::Written));
        drop(file);
        assert_eq!(next().unwrap(), (base.clone(), BaseEvent::OpenForWriting));
        let moved = dir.path().join("moved");
        fs::rename(&base, &moved).unwrap();
        assert_eq!(next().unwrap(), (base.clone(), BaseEvent::Moved));
        fs::set_permissions(&moved, fs::metadata(&moved).unwrap().permissions()).unwrap();
        assert_eq!(next().unwrap(), (base, BaseEvent::Attributes));
        drop(watch);
        assert!(next().is_err(), "each once");
    }

    #[test]
    fn who_opens_the_base_for_writing_is_reported_before_a_write() {
        let Fixture { dir, base, disk: _disk, watch, reports } = fixture();
        let leases = Leases::new().unwrap();
        leases.block().unwrap();
        let other = dir.path().join("other");
        fs::write(&other, b"").unwrap();
        let mut lease = Lease::new(fs::File::open(&other).unwrap()).unwrap();
        match lease.take(&leases) {
            // A child process that another test is just starting may have it open for a moment.
            Err(err) if err.raw_os_error() != Some(libc::EAGAIN) => {
                println!("skipped: no leases here: {err}");
                return;
            }
            _ => {}
        }
        // For the same reason the watch may get its lease only when this one has closed the file.
        let opened = (0..).find_map(|_| {
            // Returns when the lease has been released.
            drop(fs::File::options().read(true).write(true).open(&base).unwrap());
            let next = reports.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
            assert_ne!(next.1, BaseEvent::Written, "nobody wrote");
            (next.1 == BaseEvent::Opened).then_some(next.0)
        });
        assert_eq!(opened, Some(base));
        drop(watch);
        assert!(reports.iter().all(|(_, harm)| harm == BaseEvent::OpenForWriting), "each once");
    }

    fn disk_range() -> cow_format::SectorRange {
        cow_format::SectorRange::new(cow_format::Sector::new(0), cow_format::SectorCount::new(1))
            .unwrap()
    }
}
