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
}

impl CreateOptions {
    /// A native COW file over a raw image.
    pub fn over(base: &Path) -> Self {
        CreateOptions { format: CowFormat::Native, base: Some(base.to_owned()), size: None }
    }
}

/// Makes the file `path`, which must not exist, out of what `fill` writes: it appears under its name only when it is
/// complete and durable. After an error, or the death of the process, nothing is left (on a file system without
/// nameless files, a hidden temporary one after the death).
pub fn create_file<E: Env>(
    env: &E,
    path: &Path,
    fill: impl FnOnce(&E::File) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let (file, temporary) = env.create_unpublished(path).map_err(OpenError::io(path, "create"))?;
    let done = fill(&file).and_then(|()| {
        file.sync().map_err(OpenError::io(path, "sync"))?;
        env.publish(&file, temporary.as_deref(), path).map_err(OpenError::io(path, "create"))
    });
    if done.is_err()
        && let Some(temporary) = temporary
    {
        // What it says is less than what it hides: the error above.
        _ = env.remove(&temporary);
    }
    done?;
    env.sync_parent(path).map_err(OpenError::io(path, "sync the directory of"))
}

/// Makes the COW file `path`, which must not exist. It is sparse.
pub fn create_cow<E: Env>(env: &E, path: &Path, options: &CreateOptions) -> Result<(), OpenError> {
    let header = uml_header(env, path, options)?;
    let geometry = *header.geometry();
    let bytes = header.encode().map_err(OpenError::header(path))?;
    create_file(env, path, |file| {
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
