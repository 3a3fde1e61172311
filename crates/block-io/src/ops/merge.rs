//! A whole disk into one new file: a raw image, or a COW file of its own.

use std::path::Path;

use cow_format::{Bitmap, ByteOffset, SECTOR_SIZE, Sector, SectorCount, SectorRange};

use super::compare::Pair;
use super::copy::copy;
use super::walk::Image;
use super::{OpError, Output, Progress, parallel};
use crate::disk::{Disk, Layer};
use crate::image::CreateOptions;
use crate::image::NewCow;
use crate::image::flush::flush;
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
    convert_to_raw(env, disk, &inputs, out, replace, progress)
}

/// [`merge_to`] for any image; `inputs` are its files.
pub fn convert_to_raw<E: Env>(
    env: &E,
    image: &impl Image,
    inputs: &[&Path],
    out: &Path,
    replace: bool,
    progress: Progress<'_>,
) -> Result<(), OpError> {
    let output = Output::create(env, out, replace, inputs)?;
    output.file().set_len(image.size()).map_err(OpError::io(out, "set the length"))?;
    let write = |at: u64, bytes: &[u8]| {
        let written = output.file().write_all_at(bytes, ByteOffset::new(at));
        written.map_err(OpError::write(out, at))
    };
    copy(image, &write, parallel::threads(), progress)?;
    output.place()
}

/// Makes a raw image of `size` zeros, which take no space.
pub fn create_raw<E: Env>(env: &E, path: &Path, size: u64, replace: bool) -> Result<(), OpError> {
    let output = Output::create(env, path, replace, &[])?;
    output.file().set_len(size).map_err(OpError::io(path, "set the length"))?;
    output.place()
}

/// Writes the content of `image` to a COW file that gets the name `out` when it is complete and durable. Over a base, given
/// by `options` and open as `base`, it holds only what is different there.
pub fn convert_to_cow<E: Env>(
    env: &E,
    image: &impl Image,
    inputs: &[&Path],
    (out, options): (&Path, &CreateOptions),
    base: Option<&Disk<E>>,
    progress: Progress<'_>,
) -> Result<(), OpError> {
    let inputs: Vec<_> = inputs
        .iter()
        .copied()
        .chain(base.iter().flat_map(|base| base.layers()).map(Layer::path))
        .collect();
    let output = Output::create(env, out, options.replace, &inputs)?;
    let options = CreateOptions { size: options.size.or(Some(image.size())), ..options.clone() };
    let mut new = NewCow::new(env, out, &options)?;
    new.write(output.file(), out)?;
    let geometry = *new.header.geometry();
    let bitmap = Bitmap::new(geometry.sectors());
    let write = |at: u64, bytes: &[u8]| {
        let place = geometry.data_offset().get() + at;
        let written = output.file().write_all_at(bytes, ByteOffset::new(place));
        written.map_err(OpError::write(out, place))?;
        insert(&bitmap, at, bytes.len() as u64);
        Ok(())
    };
    match base {
        None => copy(image, &write, parallel::threads(), progress)?,
        Some(base) => {
            let sectors = SectorCount::covering(image.size().max(geometry.virtual_size()));
            let work = |pair: &mut Pair<_, _>, range: SectorRange| {
                pair.differences(range, |at, bytes| {
                    // Zeros where the base has something: the bit says so, the file has a hole.
                    match super::zeroes::is_zero(bytes) {
                        true => insert(&bitmap, at, bytes.len() as u64),
                        false => write(at, bytes)?,
                    }
                    Ok(())
                })?;
                progress(range.len_bytes());
                Ok::<(), OpError>(())
            };
            parallel::for_each_piece(
                sectors,
                parallel::threads(),
                || Pair::new(image, base),
                work,
            )?;
        }
    }
    flush(output.file(), &bitmap, &geometry).map_err(|failure| failure.at(out))?;
    output.place()
}

fn insert(bitmap: &Bitmap, at: u64, len: u64) {
    let (start, count) = (Sector::new(at / SECTOR_SIZE), SectorCount::covering(len));
    if let Some(range) = SectorRange::new(start, count) {
        bitmap.insert(range);
    }
}
