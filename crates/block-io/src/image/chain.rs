//! Opening a chain: the top, what its header names, and so on down to the base.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cow_format::identity::{ActualIdentity, BackingIdentity};
use cow_format::{
    Bitmap, ByteOffset, Geometry, HEADER_PREFIX_LEN, Header, LayerMap, LowerLayer, SECTOR_SIZE,
};

use super::create::{CreateOptions, create_cow};
use super::pages::read_pages;
use super::state::{UpdateError, check_writable, load_live, make_writable, set_backing_path};
use super::{CHAIN_DEPTH_MAX, CachePolicy, DiskOptions, OpenError};
use crate::disk::{Layer, WritableCow};
use crate::storage::{Access, Env, FileId, FileKind, FileStat, LockError, LockKind, Storage};

/// Between two attempts to get a lock.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Opens the files of one chain: each locked, none twice.
pub(crate) struct Opener<'a, E: Env> {
    env: &'a E,
    options: &'a DiskOptions,
    top: PathBuf,
    seen: Vec<(FileId, PathBuf)>,
}

/// An opened and locked file of a chain.
pub(crate) struct Opened<F> {
    pub(crate) file: F,
    pub(crate) path: PathBuf,
    pub(crate) stat: FileStat,
}

impl<'a, E: Env> Opener<'a, E> {
    pub(crate) fn new(env: &'a E, options: &'a DiskOptions, top: &Path) -> Self {
        Opener { env, options, top: top.to_owned(), seen: Vec::new() }
    }

    /// Opens and locks the top.
    pub(crate) fn top(&mut self) -> Result<Opened<E::File>, OpenError> {
        let path = self.top.clone();
        let (access, lock) = match self.options.read_only {
            true => (Access::Read, LockKind::Shared),
            false => (Access::ReadWrite, LockKind::Exclusive),
        };
        let file = self.env.open(&path, access).map_err(OpenError::io(&path, "open"))?;
        self.admit(file, path, access, self.options.cow_cache, lock)
    }

    /// Opens and locks the file at `path` that backs `cow`.
    pub(crate) fn backing(
        &mut self,
        cow: &Path,
        path: PathBuf,
    ) -> Result<Opened<E::File>, OpenError> {
        if self.seen.len() == CHAIN_DEPTH_MAX {
            return Err(OpenError::TooDeep { top: self.top.clone() });
        }
        let file = match self.env.open(&path, Access::Read) {
            Ok(file) => file,
            Err(source) => return Err(OpenError::Backing { cow: cow.to_owned(), path, source }),
        };
        self.admit(file, path, Access::Read, self.options.base_cache, LockKind::Shared)
    }

    fn admit(
        &mut self,
        file: E::File,
        path: PathBuf,
        access: Access,
        cache: CachePolicy,
        lock: LockKind,
    ) -> Result<Opened<E::File>, OpenError> {
        let stat = file.stat().map_err(OpenError::io(&path, "stat"))?;
        if !matches!(stat.kind, FileKind::Regular | FileKind::BlockDevice) {
            return Err(OpenError::Kind {
                path,
                found: stat.kind,
                expected: "a regular file or a block device",
            });
        }
        if let Some((_, again)) = self.seen.iter().find(|(id, _)| *id == stat.id) {
            return Err(OpenError::Repeated { top: self.top.clone(), path, again: again.clone() });
        }
        let file = match cache {
            CachePolicy::Buffered => file,
            CachePolicy::Direct => self
                .env
                .with_direct(file, access)
                .map_err(OpenError::io(&path, "open for direct I/O"))?,
        };
        if let Err(source) = wait_for_lock(&file, lock, self.options.lock_wait) {
            return Err(OpenError::Locked { path, source });
        }
        self.seen.push((stat.id, path.clone()));
        // Once more: what counts is how it is under the lock.
        let stat = file.stat().map_err(OpenError::io(&path, "stat"))?;
        Ok(Opened { file, path, stat })
    }
}

/// A dead predecessor's lock falls when its I/O has ended, so this waits a moment for it.
fn wait_for_lock(file: &impl Storage, kind: LockKind, patience: Duration) -> Result<(), LockError> {
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock(kind) {
            Err(LockError::Held { .. }) if Instant::now() < deadline => {
                std::thread::sleep(LOCK_RETRY)
            }
            result => return result,
        }
    }
}

impl<F: Storage> Opened<F> {
    /// Reads and checks the header of a COW file, which must be a regular file.
    pub(crate) fn header(&self) -> Result<Header, OpenError> {
        if self.stat.kind != FileKind::Regular {
            let path = self.path.clone();
            return Err(OpenError::Kind {
                path,
                found: self.stat.kind,
                expected: "a regular file for a COW file",
            });
        }
        let prefix = self.prefix().map_err(OpenError::io(&self.path, "read the header"))?;
        Header::check(&prefix, self.stat.size).map_err(OpenError::header(&self.path))
    }

    fn prefix(&self) -> io::Result<Vec<u8>> {
        let mut prefix = vec![0; HEADER_PREFIX_LEN];
        let n = self.file.read_at(&mut prefix, ByteOffset::new(0))?;
        prefix.truncate(n);
        Ok(prefix)
    }
}

impl<F> Opened<F> {
    fn into_layer(self) -> Layer<F> {
        Layer { file: self.file, path: self.path }
    }
}

/// What a header says of its backing file.
pub(crate) struct Reference {
    /// As it stands in the header.
    pub(crate) stored: PathBuf,
    pub(crate) identity: BackingIdentity,
    /// A COW file; otherwise a raw image, whatever it begins with: formats are never guessed.
    pub(crate) is_cow: bool,
}

/// The backing file of a COW file; UML's is raw by definition.
pub(crate) fn reference(header: &Header) -> Option<Reference> {
    match header {
        Header::Uml(uml) => Some(Reference {
            stored: OsStr::from_bytes(uml.backing_path()).into(),
            identity: uml.backing_identity(),
            is_cow: false,
        }),
        _ => None,
    }
}

/// Where a path leads that stands in the header of `cow`: a relative one begins at the directory in which the COW
/// file really is, whatever links led to it.
pub(crate) fn resolve<E: Env>(env: &E, cow: &Path, stored: &Path) -> Result<PathBuf, OpenError> {
    if stored.is_absolute() {
        return Ok(stored.to_owned());
    }
    let real = env.canonical(cow).map_err(OpenError::io(cow, "resolve"))?;
    Ok(real.parent().unwrap_or(Path::new("/")).join(stored))
}

/// One file below the top.
pub(crate) struct Lower<F> {
    pub(crate) opened: Opened<F>,
    pub(crate) content: Content,
}

/// What a file below the top holds.
pub(crate) enum Content {
    /// A raw image.
    Raw,
    /// A frozen COW file.
    Cow(Geometry, Bitmap),
}

impl<E: Env> Opener<'_, E> {
    /// Opens everything below `cow`, nearest first. `named` stands in for the path in the first header.
    pub(crate) fn below(
        &mut self,
        cow: &Path,
        header: &Header,
        named: Option<&Path>,
    ) -> Result<Vec<Lower<E::File>>, OpenError> {
        let mut lowers = Vec::new();
        let (mut cow, mut next, mut named) = (cow.to_owned(), reference(header), named);
        while let Some(reference) = next {
            let path = match named.take() {
                Some(path) => path.to_owned(),
                None => resolve(self.env, &cow, &reference.stored)?,
            };
            let opened = self.backing(&cow, path)?;
            let (content, below) =
                if reference.is_cow { opened.frozen()? } else { (Content::Raw, None) };
            let identity = opened.identity();
            if let Err(source) = reference.identity.verify(&identity) {
                return Err(OpenError::Identity { cow, path: opened.path, source });
            }
            cow.clone_from(&opened.path);
            next = below;
            lowers.push(Lower { opened, content });
        }
        Ok(lowers)
    }
}

impl<F: Storage> Opened<F> {
    fn identity(&self) -> ActualIdentity {
        ActualIdentity { size: self.stat.size, mtime: self.stat.mtime, layer: None }
    }

    /// What a frozen COW file holds, and what it refers to in turn.
    fn frozen(&self) -> Result<(Content, Option<Reference>), OpenError> {
        let header = self.header()?;
        let geometry = *header.geometry();
        let bitmap = self.bitmap(&geometry)?;
        self.check_data(&geometry, &bitmap)?;
        Ok((Content::Cow(geometry, bitmap), reference(&header)))
    }

    /// The durable bitmap.
    pub(crate) fn bitmap(&self, geometry: &Geometry) -> Result<Bitmap, OpenError> {
        let bitmap = Bitmap::new(geometry.sectors());
        let read = read_pages(&self.file, geometry.bitmap_offset(), geometry, |page, bytes| {
            bitmap.load_durable(page, bytes);
        });
        read.map_err(OpenError::io(&self.path, "read the bitmap"))?;
        Ok(bitmap)
    }

    /// Refuses a file that lacks the data of a present sector.
    pub(crate) fn check_data(&self, geometry: &Geometry, bitmap: &Bitmap) -> Result<(), OpenError> {
        let checked = geometry.check_data(bitmap, self.stat.size);
        checked.map_err(|source| OpenError::Data { path: self.path.clone(), source })
    }
}

/// Everything that an open disk consists of.
pub(crate) struct Chain<F> {
    pub(crate) layers: Vec<Layer<F>>,
    pub(crate) map: LayerMap,
    pub(crate) data_offset: ByteOffset,
    pub(crate) size: u64,
    pub(crate) cow: Option<WritableCow<F>>,
}

/// Opens a raw image.
pub(crate) fn open_single<E: Env>(
    env: &E,
    path: &Path,
    options: &DiskOptions,
) -> Result<Chain<E::File>, OpenError> {
    let top = Opener::new(env, options, path).top()?;
    let len = top.stat.size;
    if len == 0 || (!options.read_only && !len.is_multiple_of(SECTOR_SIZE)) {
        return Err(OpenError::RawLength { path: top.path, len });
    }
    let layers = vec![top.into_layer()];
    Ok(Chain {
        layers,
        map: LayerMap::raw(len),
        data_offset: ByteOffset::new(0),
        size: len,
        cow: None,
    })
}

/// Opens the COW file at `path` and everything below it. Makes it first if it does not exist and `base` is given.
/// Nothing is changed on disk before every file has been found to be right.
pub(crate) fn open_chain<E: Env>(
    env: &E,
    path: &Path,
    base: Option<&Path>,
    options: &DiskOptions,
) -> Result<Chain<E::File>, OpenError> {
    if let Some(base) = base
        && !options.read_only
        && !env.exists(path).map_err(OpenError::io(path, "look for"))?
    {
        create_cow(
            env,
            path,
            &CreateOptions { format: options.format, ..CreateOptions::over(base) },
        )?;
    }
    let mut opener = Opener::new(env, options, path);
    let top = opener.top()?;
    let mut header = top.header()?;
    if !options.read_only {
        check_writable(&header).map_err(OpenError::header(path))?;
    }
    let below = opener.below(path, &header, base)?;
    let geometry = *header.geometry();
    let bitmap = top.bitmap(&geometry)?;
    let read_live = load_live(env, &top, &header, &bitmap);
    let live_is_valid = read_live.map_err(OpenError::io(path, "read the live bitmap"))?;
    top.check_data(&geometry, &bitmap)?;

    let mut cow = None;
    if !options.read_only {
        if let (Some(base), Some(nearest)) = (base, below.first()) {
            header = adopt_base(env, &top, header, base, &nearest.opened)?;
        }
        cow = Some(make_writable(env, &top, header, live_is_valid)?);
    }
    fold(top, below, geometry, bitmap, cow)
}

/// Joins the files of a chain.
fn fold<F>(
    top: Opened<F>,
    below: Vec<Lower<F>>,
    geometry: Geometry,
    bitmap: Bitmap,
    cow: Option<WritableCow<F>>,
) -> Result<Chain<F>, OpenError> {
    let frozen = below.iter().filter_map(|lower| match &lower.content {
        Content::Raw => None,
        Content::Cow(geometry, bitmap) => Some(LowerLayer { geometry, bitmap }),
    });
    let frozen: Vec<_> = frozen.collect();
    let base = below.last().filter(|lower| matches!(lower.content, Content::Raw));
    let map = LayerMap::new(&geometry, bitmap, &frozen, base.map(|base| base.opened.stat.size));
    let map = map.map_err(|_| OpenError::TooDeep { top: top.path.clone() })?;
    let below = below.into_iter().map(|lower| lower.opened.into_layer());
    let layers = std::iter::once(top.into_layer()).chain(below).collect();
    let (data_offset, size) = (geometry.data_offset(), geometry.virtual_size());
    Ok(Chain { layers, map, data_offset, size, cow })
}

/// Opens the base named on the command line; where the header leads elsewhere it gets the new path, as with UML.
fn adopt_base<E: Env>(
    env: &E,
    top: &Opened<E::File>,
    header: Header,
    base: &Path,
    found: &Opened<E::File>,
) -> Result<Header, OpenError> {
    let Some(reference) = reference(&header) else { return Ok(header) };
    let stored = resolve(env, &top.path, &reference.stored)?;
    let same = env.open(&stored, Access::Read).and_then(|file| file.stat());
    if same.is_ok_and(|stat| stat.id == found.stat.id) {
        return Ok(header);
    }
    let path = env.absolute(base).map_err(OpenError::io(base, "resolve"))?;
    set_backing_path(&top.file, &header, &path, found.stat.mtime).map_err(|err| match err {
        UpdateError::Header(source) => OpenError::Header { path: top.path.clone(), source },
        UpdateError::Io(source) => OpenError::io(&top.path, "write the header")(source),
    })
}
