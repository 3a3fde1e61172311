//! Making files: whole under their name, or not there at all.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use std::time::Duration;

use cow_format::header::{Backing, BackingFormat, NativeHeader, UmlHeader};
use cow_format::identity::BackingIdentity;
use cow_format::{ByteOffset, Header, HeaderError};
use uuid::Uuid;

use super::chain::{Opener, path_to_store};
use super::identity::identity_of;
use super::opened::Opened;
use super::{CowFormat, DiskOptions, ImageError};
use crate::storage::{Env, Storage};

/// What a new COW file is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The header.
    pub format: CowFormat,
    /// The backing file; a native COW file can be without.
    pub base: Option<BaseOptions>,
    /// The size of the disk in bytes; by default the base's. UML's is always the base's.
    pub size: Option<u64>,
    /// Whether a file that has the name is replaced; otherwise that is an error.
    pub replace: bool,
    /// Room for the journal of a native file, in bytes; 0 for none, `None` for what is good.
    pub journal_len: Option<u64>,
}

/// The backing file of a new COW file.
#[derive(Clone, Debug)]
pub struct BaseOptions {
    /// Its path, from the working directory.
    pub path: PathBuf,
    /// What it is.
    pub format: BackingFormat,
    /// BLAKE3 of the file's content, to be kept for a later rebind. A UML header cannot.
    pub digest: Option<[u8; 32]>,
}

impl CreateOptions {
    /// A COW file over a raw image, under a name that is free.
    pub fn over(format: CowFormat, base: &Path) -> Self {
        let base = BaseOptions { path: base.to_owned(), format: BackingFormat::Raw, digest: None };
        CreateOptions { format, base: Some(base), size: None, replace: false, journal_len: None }
    }
}

/// A new file in the directory of the name that it will have. Nobody finds it before [`Unpublished::publish`]; dropping it
/// leaves nothing, nor does the death of the process (on a file system without nameless files, that leaves a hidden
/// temporary one).
pub(crate) struct Unpublished<E: Env> {
    env: E,
    path: PathBuf,
    file: E::File,
    /// The name that it has for now, if it needs one.
    temporary: Option<PathBuf>,
}

impl<E: Env> Unpublished<E> {
    /// Creates the file that will be `path`.
    pub(crate) fn create(env: &E, path: &Path) -> Result<Self, ImageError> {
        let (file, temporary) =
            env.create_unpublished(path).map_err(ImageError::io(path, "create"))?;
        Ok(Unpublished { env: env.clone(), path: path.to_owned(), file, temporary })
    }

    /// The file, open for reading and writing.
    pub(crate) fn file(&self) -> &E::File {
        &self.file
    }

    /// Makes the content durable, gives the file its name, and makes that durable. A file that has the name is
    /// replaced in one step, or an error.
    pub(crate) fn publish(mut self, replace: bool) -> Result<(), ImageError> {
        self.file.sync().map_err(ImageError::io(&self.path, "sync"))?;
        let temporary = self.temporary.as_deref();
        let named = match replace {
            true => self.env.publish_over(&self.file, temporary, &self.path),
            false => self.env.publish(&self.file, temporary, &self.path),
        };
        named.map_err(ImageError::io(&self.path, "create"))?;
        self.temporary = None;
        // btrfs (Linux 6.1) syncs nothing of a file that has no name yet, and its log of the directory
        // then names an empty file.
        self.file.sync().map_err(ImageError::io(&self.path, "sync"))?;
        self.env
            .sync_parent(&self.path)
            .map_err(ImageError::io(&self.path, "sync the directory of"))
    }
}

impl<E: Env> Drop for Unpublished<E> {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // What it says is less than what it hides: the error that led here.
            _ = self.env.remove(temporary);
        }
    }
}

/// Makes the file `path`, which may exist only if `replace` says so, out of what `fill` writes: it appears under its
/// name only when it is complete and durable, see `Unpublished`.
pub(crate) fn create_file<E: Env>(
    env: &E,
    path: &Path,
    replace: bool,
    fill: impl FnOnce(&E::File) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let new = Unpublished::create(env, path)?;
    fill(new.file())?;
    new.publish(replace)
}

/// Makes the COW file `path`. It is sparse.
pub fn create_cow<E: Env>(env: &E, path: &Path, options: &CreateOptions) -> Result<(), ImageError> {
    let mut new = NewCow::new(env, path, options)?;
    create_file(env, path, options.replace, |file| new.write(file, path))
}

/// The header of a COW file that is going to be.
pub(crate) struct NewCow<F> {
    pub(crate) header: Header,
    /// Nobody writes it meanwhile.
    _base: Option<Opened<F>>,
}

impl<F: Storage> NewCow<F> {
    /// Opens the backing file and makes the header.
    pub(crate) fn new<E: Env<File = F>>(
        env: &E,
        path: &Path,
        options: &CreateOptions,
    ) -> Result<Self, ImageError> {
        let lock =
            DiskOptions { read_only: true, lock_wait: Duration::ZERO, ..DiskOptions::default() };
        let mut opener = Opener::new(env, &lock, path);
        let Some(base) = &options.base else {
            return Ok(NewCow { header: new_header::<F>(path, options, None)?, _base: None });
        };
        let (opened, header) = opener.new_base(&base.path, base.format, path)?;
        let found = NewBase {
            options: base,
            stored: path_to_store(env, path, &base.path, options.format)?,
            opened: &opened,
            header: header.as_ref(),
        };
        let header = new_header(path, options, Some(found))?;
        Ok(NewCow { header, _base: Some(opened) })
    }

    /// Fills the new file, which has no content yet.
    pub(crate) fn write(&mut self, file: &F, path: &Path) -> Result<(), ImageError> {
        match &mut self.header {
            Header::Native(native) => write_new_native(file, path, native),
            Header::Uml(uml) => {
                let bytes = uml.encode().map_err(ImageError::header(path))?;
                let written = file.write_all_at(&bytes, ByteOffset::new(0));
                written
                    .and_then(|()| file.set_len(uml.geometry().full_len()))
                    .map_err(ImageError::io(path, "write"))
            }
        }
    }
}

/// A backing file as it was found.
struct NewBase<'a, F> {
    options: &'a BaseOptions,
    stored: PathBuf,
    opened: &'a Opened<F>,
    header: Option<&'a Header>,
}

impl<F: Storage> NewBase<'_, F> {
    /// Bytes of disk.
    fn size(&self) -> u64 {
        self.opened.disk_size(self.header)
    }
}

fn new_header<F: Storage>(
    path: &Path,
    options: &CreateOptions,
    base: Option<NewBase<'_, F>>,
) -> Result<Header, ImageError> {
    match options.format {
        CowFormat::Uml => new_uml_header(path, options, base).map(Header::Uml),
        CowFormat::Native => {
            new_native_header(path, options, base).map(|header| Header::Native(Box::new(header)))
        }
    }
}

fn new_uml_header<F: Storage>(
    path: &Path,
    options: &CreateOptions,
    base: Option<NewBase<'_, F>>,
) -> Result<UmlHeader, ImageError> {
    let unable = |what| ImageError::UmlCannot { path: path.to_owned(), what };
    let base = base.ok_or_else(|| unable("be without a backing file"))?;
    if base.options.format != BackingFormat::Raw {
        return Err(unable("be over anything but a raw image"));
    }
    if base.options.digest.is_some() {
        return Err(unable("hold a digest"));
    }
    if options.size.is_some_and(|size| size != base.size()) {
        return Err(unable("be of another size than its backing file"));
    }
    let stored = base.stored.as_os_str().as_bytes();
    let mtime = base.opened.stat.mtime;
    UmlHeader::create(stored, base.size(), mtime).map_err(ImageError::header(path))
}

fn new_native_header<F: Storage>(
    path: &Path,
    options: &CreateOptions,
    base: Option<NewBase<'_, F>>,
) -> Result<NativeHeader, ImageError> {
    let size = options
        .size
        .or(base.as_ref().map(NewBase::size))
        .ok_or_else(|| ImageError::NoSize { path: path.to_owned() })?;
    let backing = match base {
        Some(base) => {
            let identity = identity_of(base.opened, base.header)?;
            Some(native_backing(&base.stored, base.options, identity))
        }
        None => None,
    };
    backing
        .transpose()
        .and_then(|backing| {
            NativeHeader::create_with_journal(size, Uuid::new_v4(), backing, options.journal_len)
        })
        .map_err(ImageError::header(path))
}

/// How a native header refers to a backing file that is known as `identity`.
pub(crate) fn native_backing(
    stored: &Path,
    options: &BaseOptions,
    identity: BackingIdentity,
) -> Result<Backing, HeaderError> {
    Backing::new(stored.as_os_str().as_bytes(), options.format, identity, options.digest)
}

/// Fills a new file: its length and both copies of the header, so that one broken block never costs it.
pub(crate) fn write_new_native(
    file: &impl Storage,
    path: &Path,
    header: &mut NativeHeader,
) -> Result<(), ImageError> {
    file.set_len(header.geometry().full_len()).map_err(ImageError::io(path, "write"))?;
    for _ in 0..2 {
        let write = header.next_write().map_err(ImageError::header(path))?;
        file.write_all_at(&write.bytes[..], write.at).map_err(ImageError::io(path, "write"))?;
    }
    Ok(())
}
