//! Opening a disk to read it, whatever holds it.

use std::path::Path;

use block_io::{Disk, DiskOptions, OpenError};
use clap::ValueEnum;
use cow_format::header::BackingFormat;

use crate::error::CowError;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FileFormat {
    /// The bytes of a disk and nothing else
    Raw,
    /// COW file of User Mode Linux
    Uml,
    /// COW file of this project
    Native,
}

impl From<FileFormat> for BackingFormat {
    fn from(format: FileFormat) -> Self {
        match format {
            FileFormat::Raw => BackingFormat::Raw,
            FileFormat::Uml => BackingFormat::Uml,
            FileFormat::Native => BackingFormat::Native,
        }
    }
}

/// Opens a disk for reading. A raw image must be said to be one: its first bytes are the guest's, who could make it look
/// like a COW file over any file of the host.
pub fn open(path: &Path, format: Option<FileFormat>) -> Result<Disk, CowError> {
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let disk = match format {
        Some(FileFormat::Raw) => Disk::open_raw(path, &options)?,
        Some(FileFormat::Uml | FileFormat::Native) | None => {
            Disk::open_cow(path, None, &options).map_err(|err| hint(path, err))?
        }
    };
    Ok(disk)
}

/// Says what to do where the file is perhaps a raw image.
fn hint(path: &Path, err: OpenError) -> CowError {
    match err {
        OpenError::Header { source: cow_format::HeaderError::NotCow { .. }, path: refused }
            if refused == path =>
        {
            CowError::NotCow(refused)
        }
        err => err.into(),
    }
}
