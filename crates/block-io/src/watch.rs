//! Watching the files below the top. Locks keep out those who ask for them; an editor, a `dd` or a `cp` does not, and a
//! base that changes under a disk spoils it. This cannot be prevented, so it is said loudly and at once.
//!
//! By inotify, which sees each write and the end of each opening for writing. A lease (`F_SETLEASE`) would see the opening
//! itself, but stops the other program for as long as this one takes to answer, and is refused to all but the file's owner.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::thread::{Builder, JoinHandle};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::disk::Disk;

/// Stack of the watching thread in bytes: it writes a log line now and then.
const STACK_BYTES: usize = 128 << 10;

/// What was done to a file on which a disk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// Its content was written: what the disk reads from it is wrong from now on.
    Written,
    /// It was open for writing. If it was not written, its mtime tells.
    OpenForWriting,
    /// Its mtime, links or owner changed: the disk may find its base changed or gone when it is opened the next time.
    Attributes,
    /// It was moved: the disk will not find it when it is opened the next time.
    Moved,
}

impl Harm {
    const ALL: [Harm; 4] = [Harm::Written, Harm::OpenForWriting, Harm::Attributes, Harm::Moved];

    fn flag(self) -> AddWatchFlags {
        match self {
            Harm::Written => AddWatchFlags::IN_MODIFY,
            Harm::OpenForWriting => AddWatchFlags::IN_CLOSE_WRITE,
            Harm::Attributes => AddWatchFlags::IN_ATTRIB,
            Harm::Moved => AddWatchFlags::IN_MOVE_SELF,
        }
    }

    fn log(self, path: &Path) {
        let path = path.display();
        match self {
            Harm::Written => log::error!(
                "{path}: was WRITTEN by another program while a disk stands on it: the disk's content is damaged"
            ),
            Harm::OpenForWriting => log::error!(
                "{path}: was open for writing in another program while a disk stands on it; it must never be written"
            ),
            Harm::Attributes => log::warn!(
                "{path}: its times, links or owner changed while a disk stands on it; the disk may not open again \
                 (cow info says; cow rebind helps)"
            ),
            Harm::Moved => {
                log::warn!("{path}: was moved while a disk stands on it; cow rebind tells the disk")
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
    /// Watches what `disk` stands on, and logs what is done to it, each kind once for each file.
    pub fn spawn(disk: &Disk) -> io::Result<Self> {
        Self::spawn_with(disk, |path, harm| harm.log(path))
    }

    /// The same, telling `report`.
    pub fn spawn_with(
        disk: &Disk,
        report: impl Fn(&Path, Harm) + Send + 'static,
    ) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let flags = Harm::ALL.into_iter().map(Harm::flag).collect();
        let mut watched = Vec::new();
        for layer in &disk.layers()[1..] {
            // By descriptor: the very file that is open, whatever has its name by now.
            let path = format!("/proc/self/fd/{}", layer.file().as_fd().as_raw_fd());
            let descriptor = inotify.add_watch(path.as_str(), flags)?;
            watched.push(Watched { descriptor, path: layer.path().to_owned(), unseen: flags });
        }
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        // The thread has its own descriptor of the same event.
        let theirs = stop.as_fd().try_clone_to_owned()?;
        let builder = Builder::new().name("base-watch".to_owned()).stack_size(STACK_BYTES);
        let thread = builder.spawn(move || {
            if let Err(err) = watch(&inotify, &mut watched, &theirs, &report) {
                log::warn!("the files below the disk are not watched any more: {err}");
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
            // A panic of the thread has been reported by itself.
            _ = thread.join();
        }
    }
}

struct Watched {
    descriptor: WatchDescriptor,
    path: PathBuf,
    /// What has not been reported yet: a writer causes an event for each write.
    unseen: AddWatchFlags,
}

fn watch(
    inotify: &Inotify,
    watched: &mut [Watched],
    stop: &impl AsFd,
    report: &impl Fn(&Path, Harm),
) -> io::Result<()> {
    loop {
        let mut fds = [
            PollFd::new(inotify.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            result => result?,
        };
        if fds[1].any() == Some(true) {
            return Ok(());
        }
        let events = match inotify.read_events() {
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            events => events?,
        };
        for event in events {
            for file in watched.iter_mut().filter(|file| file.descriptor == event.wd) {
                let new = file.unseen & event.mask;
                file.unseen &= !new;
                let harms = Harm::ALL.into_iter().filter(|harm| new.contains(harm.flag()));
                harms.for_each(|harm| report(&file.path, harm));
            }
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

    #[test]
    fn a_writer_of_the_base_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let (base, cow) = (dir.path().join("base"), dir.path().join("cow"));
        fs::write(&base, [1; 4096]).unwrap();
        let disk = Disk::open_cow(&cow, Some(&base), &DiskOptions::default()).unwrap();
        let (send, reports) = mpsc::channel();
        let watch = BaseWatch::spawn_with(&disk, move |path, harm| {
            send.send((path.to_owned(), harm)).unwrap()
        });
        let watch = watch.unwrap();
        // Nothing of this is harm.
        fs::read(&base).unwrap();
        disk.write(disk_range(), &[2; 512]).unwrap();
        disk.close().unwrap();

        let file = fs::File::options().write(true).open(&base).unwrap();
        file.write_all_at(b"x", 0).unwrap();
        file.write_all_at(b"y", 1).unwrap();
        assert_eq!(reports.recv().unwrap(), (base.clone(), Harm::Written));
        drop(file);
        assert_eq!(reports.recv().unwrap(), (base.clone(), Harm::OpenForWriting));
        fs::rename(&base, dir.path().join("moved")).unwrap();
        assert_eq!(reports.recv().unwrap(), (base.clone(), Harm::Moved));
        fs::set_permissions(
            dir.path().join("moved"),
            fs::metadata(dir.path().join("moved")).unwrap().permissions(),
        )
        .unwrap();
        assert_eq!(reports.recv().unwrap(), (base, Harm::Attributes));
        drop(watch);
        assert!(reports.recv().is_err(), "each once");
    }

    fn disk_range() -> cow_format::SectorRange {
        cow_format::SectorRange::new(cow_format::Sector::new(0), cow_format::SectorCount::new(1))
            .unwrap()
    }
}
