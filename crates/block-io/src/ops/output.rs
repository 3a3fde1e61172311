//! A file that appears under its name only when it is complete.

use std::io;
use std::path::{Path, PathBuf};

use super::OpError;
use crate::image::chain::wait_for_lock;
use crate::image::{DiskOptions, Unpublished};
use crate::storage::{Access, Env, FileKind, LockKind, Storage};

/// A new file that appears under its name only when it is complete and durable. Dropping it leaves
/// nothing.
pub struct Output<E: Env> {
    file: Unpublished<E>,
    replace: bool,
}

impl<E: Env> Output<E> {
    /// Creates the file that will be `target`. If that exists it must be a file that no process has
    /// open and that is none of `inputs`, and `replace` must be set; of a symbolic link, the file
    /// that it leads to is replaced.
    pub fn create(
        env: &E,
        target: &Path,
        replace: bool,
        inputs: &[&Path],
    ) -> Result<Self, OpError> {
        let target = check_target(env, target, replace, inputs)?;
        Ok(Output { file: Unpublished::create(env, &target)?, replace })
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &E::File {
        self.file.file()
    }

    /// Makes the content durable, gives the file its name, and makes that durable.
    pub fn place(self) -> Result<(), OpError> {
        Ok(self.file.publish(self.replace)?)
    }
}

/// Refuses a `target` that must not be written: see [`Output::create`]. Returns its path without
/// symbolic links.
pub fn check_target<E: Env>(
    env: &E,
    target: &Path,
    replace: bool,
    inputs: &[&Path],
) -> Result<PathBuf, OpError> {
    if target.file_name().is_none() {
        return Err(OpError::NotAFile { path: target.to_owned(), found: FileKind::Directory });
    }
    let old = match env.open(target, Access::Read) {
        Ok(old) => old,
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            // A dangling symbolic link is an existing name.
            let dangling = env.exists(target).map_err(OpError::io(target, "look for"))?;
            return if dangling {
                Err(OpError::Exists { path: target.to_owned() })
            } else {
                Ok(target.to_owned())
            };
        }
        Err(err) => return Err(OpError::io(target, "open")(err)),
    };
    let stat = old.stat().map_err(OpError::io(target, "stat"))?;
    for input in inputs {
        // A missing input is reported elsewhere.
        if env.id(input).is_ok_and(|id| id == stat.id) {
            return Err(OpError::SameFile { path: target.to_owned(), input: (*input).to_owned() });
        }
    }
    if stat.kind != FileKind::Regular {
        return Err(OpError::NotAFile { path: target.to_owned(), found: stat.kind });
    }
    if !replace {
        return Err(OpError::Exists { path: target.to_owned() });
    }
    drop(old);
    // A process that may replace it may open it for writing, which the lock that detects readers
    // requires.
    let old =
        env.open(target, Access::ReadWrite).map_err(OpError::io(target, "open for writing"))?;
    wait_for_lock(&old, target, LockKind::Exclusive, DiskOptions::default().lock_wait)
        .map_err(|source| OpError::InUse { path: target.to_owned(), source })?;
    env.canonical(target).map_err(OpError::io(target, "find"))
}
