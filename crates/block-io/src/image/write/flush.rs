//! One flush of a COW file: drives cow-format's `FlushPass` over a file.

use std::io;
use std::path::Path;

use cow_format::{Bitmap, FlushPass, Geometry, Next};

use crate::image::ImageError;
use crate::storage::Storage;

/// What stopped a flush.
#[derive(Debug)]
pub(crate) enum FlushFailure {
    /// A sync failed: the state on the disk is unknown from now on, and no later sync proves
    /// anything.
    Sync(io::Error),
    /// A write of the bitmap failed: its pages are dirty again and can be written later.
    Write(io::Error),
}

impl FlushFailure {
    /// The error of the file at `path`.
    pub(crate) fn at(self, path: &Path) -> ImageError {
        match self {
            FlushFailure::Sync(err) => ImageError::io(path, "sync")(err),
            FlushFailure::Write(err) => ImageError::io(path, "write the bitmap of")(err),
        }
    }
}

/// Makes everything durable that was written and inserted into `bitmap` before the call.
pub(crate) fn flush(
    file: &impl Storage,
    bitmap: &Bitmap,
    geometry: &Geometry,
) -> Result<(), FlushFailure> {
    let mut pass = FlushPass::begin(bitmap, geometry);
    loop {
        file.sync().map_err(FlushFailure::Sync)?;
        let Next::Write(pages) = pass.synced() else { return Ok(()) };
        for write in pages.writes() {
            file.write_all_at(write.bytes, write.at).map_err(FlushFailure::Write)?;
        }
        pass = pages.written();
    }
}
