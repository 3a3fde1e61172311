//! Creating files: a file appears under its name complete, or not at all.

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

/// Options for a new COW file.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The header.
    pub format: CowFormat,
    /// The backing file; a native COW file can have none.
    pub base: Option<BaseOptions>,
    /// The size of the disk in bytes; by default the base's. UML's is always the base's.
    pub size: Option<u64>,
    /// Whether to replace an existing file; otherwise that is an error.
    pub replace: bool,
    /// The size of a native file's journal area in bytes; 0 for none, `None` for the default.
    pub journal_len: Option<u64>,
    /// Who may do what with the file, as for chmod(2); `None`: only its owner may read and write.
    pub mode: Option<u32>,
}

/// The backing file of a new COW file.
#[derive(Clone, Debug)]
pub struct BaseOptions {
    /// Its path, relative to the working directory.
    pub path: PathBuf,
    /// Its format.
    pub format: BackingFormat,
    /// BLAKE3 digest of the file's content, to be stored for a later rebind. A UML header cannot
    /// store one.
    pub digest: Option<[u8; 32]>,
}

impl CreateOptions {
    /// A COW file over a raw image, under a name that must be free.
    pub fn over(format: CowFormat, base: &Path) -> Self {
        let base = BaseOptions { path: base.to_owned(), format: BackingFormat::Raw, digest: None };
        CreateOptions {
            format,
            base: Some(base),
            size: None,
            replace: false,
            journal_len: None,
            mode: None,
        }
    }
}

/// A new file in the directory of its final name. It is invisible until [`Unpublished::publish`].
/// Dropping it leaves nothing, nor does the death of the process (except on a file system without
/// nameless files, where a hidden temporary file is left).
pub(crate) struct Unpublished<E: Env> {
    env: E,
    path: PathBuf,
    file: E::File,
    /// Its temporary name, if it needs one.
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

    /// Makes the content durable, gives the file its name, and makes that durable. An existing file
    /// is replaced in one step, or is an error.
    pub(crate) fn publish(mut self, replace: bool) -> Result<(), ImageError> {
        self.file.sync().map_err(ImageError::io(&self.path, "sync"))?;
        let temporary = self.temporary.as_deref();
        let named = match replace {
            true => self.env.publish_over(&self.file, temporary, &self.path),
            false => self.env.publish(&self.file, temporary, &self.path),
        };
        named.map_err(ImageError::io(&self.path, "create"))?;
        self.temporary = None;
        // btrfs (Linux 6.1) syncs nothing of a file that has no name yet, so after a crash its log
        // of the directory would show an empty file.
        self.file.sync().map_err(ImageError::io(&self.path, "sync"))?;
        self.env
            .sync_parent(&self.path)
            .map_err(ImageError::io(&self.path, "sync the directory of"))
    }
}

impl<E: Env> Drop for Unpublished<E> {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // An error here would only hide the one that led here.
            _ = self.env.remove(temporary);
        }
    }
}

/// Creates the file `path`, which may exist only if `replace` is set, with the content that `fill`
/// writes. It appears under its name only when it is complete and durable, see `Unpublished`.
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

/// Creates the COW file `path`. It is sparse.
pub fn create_cow<E: Env>(env: &E, path: &Path, options: &CreateOptions) -> Result<(), ImageError> {
    let mut new = NewCow::new(env, path, options)?;
    create_file(env, path, options.replace, |file| new.write(file, path, options.mode))
}

/// The header of a COW file that is being created.
pub(crate) struct NewCow<F> {
    pub(crate) header: Header,
    /// Keeps the base locked meanwhile.
    _base: Option<Opened<F>>,
}

impl<F: Storage> NewCow<F> {
    /// Opens the backing file and builds the header.
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
    pub(crate) fn write(
        &mut self,
        file: &F,
        path: &Path,
        mode: Option<u32>,
    ) -> Result<(), ImageError> {
        if let Some(mode) = mode {
            file.set_mode(mode).map_err(ImageError::io(path, "set the permissions of"))?;
        }
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

/// A backing file and what was found out about it.
struct NewBase<'a, F> {
    options: &'a BaseOptions,
    stored: PathBuf,
    opened: &'a Opened<F>,
    header: Option<&'a Header>,
}

impl<F: Storage> NewBase<'_, F> {
    /// The size of its disk in bytes.
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

/// The reference to a backing file with the given `identity`, for a native header.
pub(crate) fn native_backing(
    stored: &Path,
    options: &BaseOptions,
    identity: BackingIdentity,
) -> Result<Backing, HeaderError> {
    Backing::new(stored.as_os_str().as_bytes(), options.format, identity, options.digest)
}

/// Initialises a new file: its length and both copies of the header, so that one bad block never
/// loses the header.
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
