//! Making files: whole under their name, or not there at all.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cow_format::ByteOffset;
use cow_format::header::UmlHeader;

use super::{CowFormat, OpenError};
use crate::storage::{Access, Env, FileKind, Storage};

/// What a new COW file is to be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The header.
    pub format: CowFormat,
    /// The backing file.
    pub base: Option<PathBuf>,
    /// The size of the disk in bytes; by default the base's.
    pub size: Option<u64>,
    /// Whether a file that has the name is replaced; otherwise that is an error.
    pub replace: bool,
}

impl CreateOptions {
    /// A native COW file over a raw image.
    pub fn over(base: &Path) -> Self {
        CreateOptions {
            format: CowFormat::Native,
            base: Some(base.to_owned()),
            size: None,
            replace: false,
        }
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
    pub(crate) fn create(env: &E, path: &Path) -> Result<Self, OpenError> {
        let (file, temporary) =
            env.create_unpublished(path).map_err(OpenError::io(path, "create"))?;
        Ok(Unpublished { env: env.clone(), path: path.to_owned(), file, temporary })
    }

    /// The file, open for reading and writing.
    pub(crate) fn file(&self) -> &E::File {
        &self.file
    }

    /// Makes the content durable, gives the file its name, and makes that durable. A file that has the name is
    /// replaced in one step, or an error.
    pub(crate) fn publish(mut self, replace: bool) -> Result<(), OpenError> {
        self.file.sync().map_err(OpenError::io(&self.path, "sync"))?;
        let temporary = self.temporary.as_deref();
        let named = match replace {
            true => self.env.publish_over(&self.file, temporary, &self.path),
            false => self.env.publish(&self.file, temporary, &self.path),
        };
        named.map_err(OpenError::io(&self.path, "create"))?;
        self.temporary = None;
        self.env.sync_parent(&self.path).map_err(OpenError::io(&self.path, "sync the directory of"))
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
/// name only when it is complete and durable, see [`Unpublished`].
pub fn create_file<E: Env>(
    env: &E,
    path: &Path,
    replace: bool,
    fill: impl FnOnce(&E::File) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let new = Unpublished::create(env, path)?;
    fill(new.file())?;
    new.publish(replace)
}

/// Makes the COW file `path`. It is sparse.
pub fn create_cow<E: Env>(env: &E, path: &Path, options: &CreateOptions) -> Result<(), OpenError> {
    let header = uml_header(env, path, options)?;
    let geometry = *header.geometry();
    let bytes = header.encode().map_err(OpenError::header(path))?;
    create_file(env, path, options.replace, |file| {
        let written = file.write_all_at(&bytes, ByteOffset::new(0));
        written
            .and_then(|()| file.set_len(geometry.full_len()))
            .map_err(OpenError::io(path, "write"))
    })
}

fn uml_header<E: Env>(
    env: &E,
    path: &Path,
    options: &CreateOptions,
) -> Result<UmlHeader, OpenError> {
    let base = options.base.as_deref().expect("todo");
    let backing =
        |source| OpenError::Backing { cow: path.to_owned(), path: base.to_owned(), source };
    let file = env.open(base, Access::Read).map_err(backing)?;
    let stat = file.stat().map_err(backing)?;
    if !matches!(stat.kind, FileKind::Regular | FileKind::BlockDevice) {
        let expected = "a regular file or a block device";
        return Err(OpenError::Kind { path: base.to_owned(), found: stat.kind, expected });
    }
    let absolute = env.absolute(base).map_err(OpenError::io(base, "resolve"))?;
    UmlHeader::create(absolute.as_os_str().as_bytes(), stat.size, stat.mtime)
        .map_err(OpenError::header(path))
}
