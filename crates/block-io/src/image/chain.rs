//! Opening a chain: the top, the file that its header names, and so on down to the base.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cow_format::header::{BackingFormat, NativeState};
use cow_format::identity::{BackingIdentity, Doubt};
use cow_format::{Geometry, Header};

use super::bitmap::source::BitmapSource;
use super::identity::verify;
use super::opened::Opened;
use super::references::{Below, References};
use super::trust::Trust;
use super::{CHAIN_DEPTH_MAX, CachePolicy, CowFormat, DiskOptions, ImageError};
use crate::shown::Shown;
use crate::storage::{Access, Env, FileId, FileKind, LockError, LockKind, Storage};

/// The pause between two attempts to get a lock.
const LOCK_RETRY: Duration = Duration::from_millis(1);

/// Opens the files of one chain. Each is locked, and none may occur twice.
pub(crate) struct Opener<'a, E: Env> {
    env: &'a E,
    options: &'a DiskOptions,
    top: PathBuf,
    seen: Vec<(FileId, PathBuf)>,
    /// The file below the top that is going to be written, counted from 0 for the nearest.
    writing: Option<usize>,
    accept_mismatch: Option<&'a AcceptMismatch<'a, E::File>>,
    /// The top, if it is open already.
    held: Option<Held<E::File>>,
    references: References<E::File>,
}

/// A top that is open already.
pub(crate) struct Held<F> {
    pub(crate) file: F,
    /// A predecessor, which may go on, has it in use, with its locks.
    pub(crate) inherited: bool,
    /// It still has its name here, and so have the files beside it.
    pub(crate) by_name: bool,
}

/// Decides whether to accept a file that does not match the reference.
pub(crate) type AcceptMismatch<'a, F> = dyn Fn(&Reference, &Opened<F>) -> bool + 'a;

impl<'a, E: Env> Opener<'a, E> {
    pub(crate) fn new(env: &'a E, options: &'a DiskOptions, top: &Path) -> Self {
        let (references, top) = (References::new(top), top.to_owned());
        Opener {
            env,
            options,
            top,
            seen: Vec::new(),
            writing: None,
            accept_mismatch: None,
            held: None,
            references,
        }
    }

    /// Takes a top that is open already.
    pub(crate) fn holding(self, top: Option<Held<E::File>>) -> Self {
        Opener { held: top, ..self }
    }

    /// Opens these files below the top, if any are named, whatever paths the headers have. If the
    /// top has no name here, nothing else.
    pub(crate) fn naming(self, below: impl IntoIterator<Item = Below<E::File>>) -> Self {
        let by_name = self.held.as_ref().is_none_or(|held| held.by_name);
        Opener { references: References::of_user(&self.top, by_name, below), ..self }
    }

    /// Opens the file at `index` below the top, counted from 0 for the nearest, for writing. It
    /// need not match its reference if `accept_mismatch` returns true.
    pub(crate) fn writing(
        self,
        index: usize,
        accept_mismatch: &'a AcceptMismatch<'a, E::File>,
    ) -> Self {
        Opener { writing: Some(index), accept_mismatch: Some(accept_mismatch), ..self }
    }

    /// Opens and locks the top.
    pub(crate) fn top(&mut self) -> Result<Opened<E::File>, ImageError> {
        let path = self.top.clone();
        let (access, lock) = match self.options.read_only {
            true => (Access::Read, LockKind::Shared),
            false => (Access::ReadWrite, LockKind::Exclusive),
        };
        let open = || self.env.open(&path, access).map_err(ImageError::io(&path, "open"));
        let held = match self.held.take() {
            None => return self.admit(open()?, path, access, self.options.cow_cache, lock),
            Some(held) => held,
        };
        // Its direct description, if any, is already open.
        let cache = CachePolicy::Buffered;
        if !held.by_name {
            let opened = self.admit(held.file, path, access, cache, lock)?;
            return Ok(Opened { by_name: false, ..opened });
        }
        let (held, file) = (held.file, open()?);
        let id = |file: &E::File| Ok(file.stat()?.id);
        let same = id(&file).and_then(|named| Ok(named == id(&held)?));
        if !same.map_err(ImageError::io(&path, "stat"))? {
            return Err(ImageError::NotHeld { path });
        }
        // Locking it again succeeds.
        self.admit(held, path, access, cache, lock)
    }

    /// Opens the base of a new COW file `cow`, and everything below it, in the same way as opening
    /// `cow` later will.
    pub(crate) fn new_base(
        &mut self,
        path: &Path,
        format: BackingFormat,
        cow: &Path,
    ) -> Result<(Opened<E::File>, Option<Header>), ImageError> {
        let opened = self.backing(cow, path)?;
        let header = opened.header_as(format, cow)?;
        if let Some(header) = &header {
            self.frozen(&opened, header, cow)?;
            // It must be durably frozen before anything builds on it.
            opened.file.sync().map_err(ImageError::io(path, "sync"))?;
            self.room_above(path, header)?;
        }
        Ok((opened, header))
    }

    /// Opens the chain below `cow`, which the user has named, and refuses one that has no room for
    /// another file on top.
    pub(crate) fn room_above(&mut self, cow: &Path, header: &Header) -> Result<(), ImageError> {
        self.references.also_beside(cow);
        let below = self.below(cow, header)?.len();
        if below + 2 > CHAIN_DEPTH_MAX {
            return Err(ImageError::TooDeep { top: self.top.clone() });
        }
        Ok(())
    }

    /// Opens and locks the file at `path`, which the user has named, to back `cow`.
    pub(crate) fn backing(
        &mut self,
        cow: &Path,
        path: &Path,
    ) -> Result<Opened<E::File>, ImageError> {
        self.references.name_next(path);
        self.referred(cow, path)
    }

    /// Opens and locks the file for which the header of `cow` has the path `stored`.
    pub(crate) fn referred(
        &mut self,
        cow: &Path,
        stored: &Path,
    ) -> Result<Opened<E::File>, ImageError> {
        if self.seen.len() == CHAIN_DEPTH_MAX {
            return Err(ImageError::TooDeep { top: self.top.clone() });
        }
        // `seen` includes the top.
        let (access, lock) = match self.writing.map(|index| index + 1) == Some(self.seen.len()) {
            true => (Access::ReadWrite, LockKind::Exclusive),
            false => (Access::Read, LockKind::Shared),
        };
        let (file, path, by_name) = self.references.open(self.env, cow, stored, access)?;
        let opened = self.admit(file, path, access, self.options.base_cache, lock)?;
        Ok(Opened { by_name, ..opened })
    }

    fn admit(
        &mut self,
        file: E::File,
        path: PathBuf,
        access: Access,
        cache: CachePolicy,
        lock: LockKind,
    ) -> Result<Opened<E::File>, ImageError> {
        let stat = file.stat().map_err(ImageError::io(&path, "stat"))?;
        if !matches!(stat.kind, FileKind::Regular | FileKind::BlockDevice) {
            return Err(ImageError::Kind {
                path,
                found: stat.kind,
                expected: "a regular file or a block device",
            });
        }
        if let Some((_, again)) = self.seen.iter().find(|(id, _)| *id == stat.id) {
            return Err(ImageError::Repeated { top: self.top.clone(), path, again: again.clone() });
        }
        let file = match cache {
            CachePolicy::Buffered => file,
            CachePolicy::Direct => self
                .env
                .with_direct(file, access)
                .map_err(ImageError::io(&path, "open for direct I/O"))?,
        };
        match wait_for_lock(&file, &path, lock, self.options.lock_wait) {
            Ok(()) => {}
            Err(LockError::Unsupported(err)) => self.admit_unlocked(&path, lock, err)?,
            Err(source) => return Err(ImageError::Locked { path, source }),
        }
        self.seen.push((stat.id, path.clone()));
        // Stat again: only the state under the lock matters.
        let stat = file.stat().map_err(ImageError::io(&path, "stat"))?;
        Ok(Opened { file, path, stat, by_name: true })
    }
}

impl<E: Env> Opener<'_, E> {
    /// Decides whether a file is accepted although it cannot be locked. A file that is only read
    /// is.
    fn admit_unlocked(
        &self,
        path: &Path,
        lock: LockKind,
        err: io::Error,
    ) -> Result<(), ImageError> {
        match lock {
            LockKind::Shared => log::warn!(
                "{}: its file system has no locks ({err}): nothing prevents another program from \
                 writing to it",
                path.shown()
            ),
            LockKind::Exclusive if self.options.unlocked => log::warn!(
                "{}: its file system has no locks ({err}): nothing prevents a second program from \
                 writing to it, which would destroy it",
                path.shown()
            ),
            LockKind::Exclusive => {
                return Err(ImageError::NoLocks { path: path.to_owned(), source: err });
            }
        }
        Ok(())
    }
}

/// A dead predecessor's lock is released when its I/O has ended, so this waits briefly for it.
pub(crate) fn wait_for_lock(
    file: &impl Storage,
    path: &Path,
    kind: LockKind,
    patience: Duration,
) -> Result<(), LockError> {
    let deadline = Instant::now() + patience;
    let mut said = false;
    loop {
        match file.try_lock(kind) {
            Err(LockError::Held { .. }) if Instant::now() < deadline => {
                if !std::mem::replace(&mut said, true) {
                    log::info!("{}: in use; waiting up to {patience:?} for its lock", path.shown());
                }
                std::thread::sleep(LOCK_RETRY);
            }
            result => return result,
        }
    }
}

/// What a header says of its backing file.
pub(crate) struct Reference {
    /// As recorded in the header.
    pub(crate) stored: PathBuf,
    pub(crate) identity: BackingIdentity,
    /// Never guessed from the file's first bytes.
    pub(crate) format: BackingFormat,
}

/// The backing file of a COW file; UML's is raw by definition.
pub(crate) fn reference(header: &Header) -> Option<Reference> {
    let (path, identity, format) = match header {
        Header::Uml(uml) => (uml.backing_path(), uml.backing_identity(), BackingFormat::Raw),
        Header::Native(native) => {
            let backing = native.backing()?;
            (backing.path(), *backing.identity(), backing.format())
        }
    };
    Some(Reference { stored: OsStr::from_bytes(path).into(), identity, format })
}

/// Resolves a path from the header of `cow`: a relative one starts at the directory in which the
/// COW file really is, whatever links led to it.
pub(crate) fn resolve<E: Env>(env: &E, cow: &Path, stored: &Path) -> Result<PathBuf, ImageError> {
    if stored.is_absolute() {
        return Ok(stored.to_owned());
    }
    Ok(real_dir(env, cow)?.join(stored))
}

/// The directory in which the file `path` really is, or will be created.
pub(crate) fn real_dir<E: Env>(env: &E, path: &Path) -> Result<PathBuf, ImageError> {
    let error = || ImageError::io(path, "resolve");
    let real = match env.canonical(path) {
        Ok(real) => real,
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            let absolute = env.absolute(path).map_err(error())?;
            let dir = absolute.parent().unwrap_or(Path::new("/"));
            return env.canonical(dir).map_err(error());
        }
        Err(err) => return Err(error()(err)),
    };
    Ok(real.parent().unwrap_or(Path::new("/")).to_owned())
}

/// One file below the top.
pub(crate) struct Lower<F> {
    pub(crate) opened: Opened<F>,
    /// `Some` for a COW file.
    pub(crate) header: Option<Header>,
    pub(crate) content: Content<F>,
}

/// What a file below the top holds.
pub(crate) enum Content<F> {
    /// A raw image.
    Raw,
    /// A frozen COW file.
    Cow(Geometry, BitmapSource<F>),
}

impl<F> Lower<F> {
    /// The size in bytes of the disk that it holds.
    pub(crate) fn disk_size(&self) -> u64 {
        match &self.content {
            Content::Raw => self.opened.stat.size,
            Content::Cow(geometry, _) => geometry.virtual_size(),
        }
    }
}

impl<E: Env> Opener<'_, E> {
    /// Opens everything below `cow`, nearest first.
    pub(crate) fn below(
        &mut self,
        cow: &Path,
        header: &Header,
    ) -> Result<Vec<Lower<E::File>>, ImageError> {
        let mut lowers = Vec::new();
        let (mut cow, mut next) = (cow.to_owned(), reference(header));
        while let Some(reference) = next {
            let opened = self.referred(&cow, &reference.stored)?;
            let header = opened.header_as(reference.format, &cow)?;
            match verify(&reference.identity, &opened, header.as_ref())? {
                Ok(doubt) => warn(&opened.path, doubt),
                Err(_)
                    if self
                        .accept_mismatch
                        .is_some_and(|accept_mismatch| accept_mismatch(&reference, &opened)) => {}
                Err(source) => return Err(ImageError::Identity { cow, path: opened.path, source }),
            }
            let content = match &header {
                None => Content::Raw,
                Some(header) => self.frozen(&opened, header, &cow)?,
            };
            cow.clone_from(&opened.path);
            next = header.as_ref().and_then(self::reference);
            lowers.push(Lower { opened, header, content });
        }
        self.references.check_all_used(&cow)?;
        Ok(lowers)
    }
}

/// Logs a match that is weaker than it should be.
fn warn(path: &Path, doubt: Option<Doubt>) {
    match doubt {
        // Reported when the reference was made, and by inspection: the sample compensates for this
        // weakness.
        None | Some(Doubt::Mtime { sampled: true, .. }) => {}
        Some(doubt) => log::warn!("{}: {doubt}", path.shown()),
    }
}

impl<E: Env> Opener<'_, E> {
    /// The content of a COW file below the top. A native one must be frozen; a UML one is
    /// identified by its mtime, and its live bitmap is valid as long as it belongs to this page
    /// cache.
    fn frozen(
        &self,
        opened: &Opened<E::File>,
        header: &Header,
        cow: &Path,
    ) -> Result<Content<E::File>, ImageError> {
        if let Header::Native(native) = header
            && native.state() != NativeState::Frozen
        {
            return Err(ImageError::NotFrozen { cow: cow.to_owned(), path: opened.path.clone() });
        }
        let bits = BitmapSource::find(self.env, opened, header, Trust::Witness)?;
        bits.check_data(opened)?;
        Ok(Content::Cow(*header.geometry(), bits))
    }
}

/// The path under which `cow` refers to `base`. UML's is always absolute. A native header's path is
/// relative if the base is in the COW file's directory or below it, so that the two can be moved
/// together.
pub(crate) fn path_to_store<E: Env>(
    env: &E,
    cow: &Path,
    base: &Path,
    format: CowFormat,
) -> Result<PathBuf, ImageError> {
    let absolute = env.absolute(base).map_err(ImageError::io(base, "resolve"))?;
    if format == CowFormat::Uml {
        return Ok(absolute);
    }
    let base = env.canonical(base).map_err(ImageError::io(base, "resolve"))?;
    let relative = base.strip_prefix(real_dir(env, cow)?);
    Ok(relative.map_or(absolute, Path::to_owned))
}
