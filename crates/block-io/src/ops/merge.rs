//! Copying a whole disk into one new file: a raw image, or an independent COW file.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use cow_format::{Bitmap, ByteOffset, Geometry, SECTOR_SIZE, Sector, SectorCount, SectorRange};

use super::compare::Pair;
use super::copy::{Share, copy, writers};
use super::walk::{Image, Piece, Source};
use super::zeroes::is_zero;
use super::{Copying, OpError, Output, parallel};
use crate::disk::Disk;
use crate::image::CreateOptions;
use crate::image::NewCow;
use crate::image::layer::Layer;
use crate::image::write::flush::flush;
use crate::storage::{Env, FS_BLOCK, Storage};

/// Writes the content of `disk`, including a partial last sector, to a raw image that gets the name
/// `out` when it is complete and durable. An existing file is replaced only if `replace` is set,
/// and never if it belongs to `disk`. Space is shared with the disk's files where possible.
pub fn merge_to<E: Env>(
    env: &E,
    disk: &Disk<E>,
    out: &Path,
    replace: bool,
    copying: Copying<'_>,
) -> Result<(), OpError> {
    let inputs: Vec<_> = disk.layers().iter().map(Layer::path).collect();
    let output = Output::create(env, out, replace, &inputs)?;
    let able = AtomicBool::new(true);
    let share = |piece: &Piece| match piece.source {
        Source::Data { layer, at } if able.load(Relaxed) => {
            let file = disk.layers()[layer.get()].file();
            let len = shareable(piece, at);
            if len == 0 {
                return Ok(0);
            }
            let shared = output.file().share_from(file, at, len, piece.at);
            let shared = shared.map_err(OpError::write(out, piece.at.get()))?;
            able.store(shared, Relaxed);
            Ok(if shared { len } else { 0 })
        }
        Source::Data { .. } | Source::Zero => Ok(0),
    };
    fill_raw(disk, &output, out, &share, copying)?;
    output.place()
}

/// How many bytes of a piece are worth sharing: whole blocks, if it is block-aligned in both files,
/// and long enough.
fn shareable(piece: &Piece, at: ByteOffset) -> u64 {
    let len = piece.len / FS_BLOCK * FS_BLOCK;
    let aligned = at.get().is_multiple_of(FS_BLOCK) && piece.at.get().is_multiple_of(FS_BLOCK);
    if aligned && len >= SHARE_MIN { len } else { 0 }
}

/// Fewer bytes are copied: each shared piece is an extent that the file system has to track.
const SHARE_MIN: u64 = 64 << 10;

/// [`merge_to`] for any image; `inputs` are its files.
pub fn convert_to_raw<E: Env>(
    env: &E,
    image: &impl Image,
    inputs: &[&Path],
    out: &Path,
    replace: bool,
    copying: Copying<'_>,
) -> Result<(), OpError> {
    let output = Output::create(env, out, replace, inputs)?;
    fill_raw(image, &output, out, &|_| Ok(0), copying)?;
    output.place()
}

fn fill_raw<E: Env>(
    image: &impl Image,
    output: &Output<E>,
    out: &Path,
    share: Share<'_>,
    copying: Copying<'_>,
) -> Result<(), OpError> {
    output.file().set_len(image.size()).map_err(OpError::io(out, "set the length"))?;
    let write = |at: u64, bytes: &[u8]| {
        let written = output.file().write_large_at(bytes, ByteOffset::new(at));
        written.map_err(OpError::write(out, at))
    };
    copy(image, &write, share, writers(output.file()), copying)
}

/// Creates a raw image of `size` zeros, which take no space.
pub fn create_raw<E: Env>(env: &E, path: &Path, size: u64, replace: bool) -> Result<(), OpError> {
    let output = Output::create(env, path, replace, &[])?;
    output.file().set_len(size).map_err(OpError::io(path, "set the length"))?;
    output.place()
}

/// Writes the content of `image` to a COW file that gets the name `out` when it is complete and
/// durable. Over a base, given by `options` and open as `base`, it holds only what differs from it.
pub fn convert_to_cow<E: Env>(
    env: &E,
    image: &impl Image,
    inputs: &[&Path],
    (out, options): (&Path, &CreateOptions),
    base: Option<&Disk<E>>,
    copying: Copying<'_>,
) -> Result<(), OpError> {
    let size = options.size.or(Some(image.size()));
    let new = CowWriter::create(env, out, &CreateOptions { size, ..options.clone() }, inputs)?;
    let Some(base) = base else {
        copy(
            image,
            &|at, bytes| new.write(at, bytes),
            &|_| Ok(0),
            writers(new.output.file()),
            copying,
        )?;
        return new.finish();
    };
    let work = |pair: &mut Pair<_, _>, range: SectorRange| {
        pair.differences(range, |at, bytes| match copying.detect_zeroes && is_zero(bytes) {
            // Only needed where the base has data.
            true => {
                new.zero(at, bytes.len() as u64);
                Ok(())
            }
            false => new.write(at, bytes),
        })?;
        (copying.progress)(range.len_bytes());
        Ok::<(), OpError>(())
    };
    let sectors = SectorCount::covering(new.size());
    parallel::for_each_piece(sectors, parallel::threads(), || Pair::new(image, base), work)?;
    new.finish()
}

/// A COW file that is being filled, from any number of threads, and that appears under its name
/// only when it is complete and durable. Dropping it leaves nothing.
pub struct CowWriter<E: Env> {
    output: Output<E>,
    path: PathBuf,
    geometry: Geometry,
    bitmap: Bitmap,
    /// Keeps the base locked.
    _new: NewCow<E::File>,
}

impl<E: Env> CowWriter<E> {
    /// Begins the file that will be `out`; see [`Output::create`] for `inputs`. The base need not
    /// be among them.
    pub fn create(
        env: &E,
        out: &Path,
        options: &CreateOptions,
        inputs: &[&Path],
    ) -> Result<Self, OpError> {
        let base = options.base.as_ref().map(|base| &*base.path);
        let inputs: Vec<_> = inputs.iter().copied().chain(base).collect();
        let output = Output::create(env, out, options.replace, &inputs)?;
        let mut new = NewCow::new(env, out, options)?;
        new.write(output.file(), out, options.mode)?;
        let geometry = *new.header.geometry();
        let bitmap = Bitmap::new(geometry.sectors());
        Ok(CowWriter { output, path: out.to_owned(), geometry, bitmap, _new: new })
    }

    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.geometry.virtual_size()
    }

    /// Writes whole sectors (the last one of the disk may be partial) at byte `at`, which is
    /// sector-aligned.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), OpError> {
        let place = self.geometry.data_offset().get() + at;
        let written = self.output.file().write_large_at(bytes, ByteOffset::new(place));
        written.map_err(OpError::write(&self.path, place))?;
        self.zero(at, bytes.len() as u64);
        Ok(())
    }

    /// Makes sectors that are not written read as zeros, whatever the base has there.
    pub fn zero(&self, at: u64, len: u64) {
        let (start, count) = (Sector::new(at / SECTOR_SIZE), SectorCount::covering(len));
        if let Some(range) = SectorRange::new(start, count) {
            self.bitmap.insert(range);
        }
    }

    /// Makes it durable and gives it its name.
    pub fn finish(self) -> Result<(), OpError> {
        let flushed = flush(self.output.file(), &self.bitmap, &self.geometry);
        flushed.map_err(|failure| failure.at(&self.path))?;
        self.output.place()
    }
}
