//! One file of an open disk.

use std::path::{Path, PathBuf};

/// One file of an open disk.
#[derive(Debug)]
pub struct Layer<F> {
    pub(crate) file: F,
    pub(crate) path: PathBuf,
}

impl<F> Layer<F> {
    /// The open file. A real one has a buffered and perhaps a direct description, see
    /// [`crate::storage::file::File`].
    pub fn file(&self) -> &F {
        &self.file
    }

    /// The path under which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
