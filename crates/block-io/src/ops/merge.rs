//! Merging a COW file and what it stands over into one raw image.

use std::path::Path;

use cow_format::ByteOffset;

use super::copy::{Target, copy};
use super::{OpError, Output, Progress, parallel};
use crate::disk::{Disk, Layer};
use crate::storage::{Env, Storage};

/// Writes the content of `disk`, its last partial sector included, to a raw image that gets the name `out` when it is
/// complete and durable. A file that has the name is replaced only if `replace` says so, and never if it is a file of
/// `disk`.
pub fn merge_to<E: Env>(
    env: &E,
    disk: &Disk<E>,
    out: &Path,
    replace: bool,
    progress: Progress<'_>,
) -> Result<(), OpError> {
    let inputs: Vec<_> = disk.layers().iter().map(Layer::path).collect();
    let output = Output::create(env, out, replace, &inputs)?;
    let len = disk.size();
    output.file().set_len(len).map_err(OpError::io(out, "set the length"))?;
    let target = Target { file: output.file(), path: out, at: ByteOffset::new(0) };
    copy(disk, len, &target, parallel::threads(), progress)?;
    output.place()
}

/// Makes a raw image of `size` zeros, which take no space.
pub fn create_raw<E: Env>(env: &E, path: &Path, size: u64, replace: bool) -> Result<(), OpError> {
    let output = Output::create(env, path, replace, &[])?;
    output.file().set_len(size).map_err(OpError::io(path, "set the length"))?;
    output.place()
}
