//! Opening a disk of any format for reading.

pub mod format;
pub mod qcow2;

use std::path::Path;

use block_io::ops::OpError;
use block_io::ops::inspect::{Content, inspect};
use block_io::ops::walk::{Image, Piece, Reader, Walker};
use block_io::storage::FileId;
use block_io::{Disk, DiskOptions, Host, ImageError};
use cow_format::{ByteOffset, Header, HeaderError, LayerIndex, SectorRange};

use crate::error::CowError;
use crate::source::format::FileFormat;
use crate::source::qcow2::{Qcow2, Refused, open_with_qemu_img};
use crate::ui::Ui;

/// An open disk.
pub enum AnyImage {
    /// Raw, UML or native.
    Disk(Box<Disk>),
    /// qcow2.
    Qcow2(Qcow2),
}

/// The reader of an [`AnyImage`].
pub enum AnyReader<'a> {
    Disk(Walker<'a, Host>),
    Qcow2(&'a Qcow2),
}

impl Image for AnyImage {
    type Reader<'a> = AnyReader<'a>;

    fn size(&self) -> u64 {
        match self {
            AnyImage::Disk(disk) => disk.size(),
            AnyImage::Qcow2(qcow2) => qcow2.size(),
        }
    }

    fn reader(&self) -> AnyReader<'_> {
        match self {
            AnyImage::Disk(disk) => AnyReader::Disk(disk.reader()),
            AnyImage::Qcow2(qcow2) => AnyReader::Qcow2(qcow2),
        }
    }
}

impl Reader for AnyReader<'_> {
    fn pieces(&mut self, range: SectorRange) -> Result<Vec<Piece>, OpError> {
        match self {
            AnyReader::Disk(walker) => walker.pieces(range),
            AnyReader::Qcow2(qcow2) => qcow2.pieces(range),
        }
    }

    fn read(&self, layer: LayerIndex, at: ByteOffset, buf: &mut [u8]) -> Result<(), OpError> {
        match self {
            AnyReader::Disk(walker) => walker.read(layer, at, buf),
            AnyReader::Qcow2(qcow2) => qcow2.read(layer, at, buf),
        }
    }

    fn file(&self, layer: LayerIndex) -> Option<FileId> {
        match self {
            AnyReader::Disk(walker) => walker.file(layer),
            AnyReader::Qcow2(qcow2) => qcow2.file(layer),
        }
    }
}

/// Opens a disk for reading. A raw image must be named as such: its first bytes belong to the
/// guest, which could make it look like an overlay over any file of the host.
pub fn open(path: &Path, format: Option<FileFormat>, ui: Ui) -> Result<AnyImage, CowError> {
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    Ok(match format {
        Some(FileFormat::Raw) => AnyImage::Disk(Disk::open_raw(path, &options)?.into()),
        Some(FileFormat::Qcow2) => open_qcow2(path, ui)?,
        said @ (Some(FileFormat::Uml | FileFormat::Native) | None) => {
            let disk = Disk::open_cow(path, None, &options).map_err(|err| hint(path, err))?;
            said.map_or(Ok(()), |said| check_kind(path, said))?;
            AnyImage::Disk(disk.into())
        }
    })
}

/// Refuses a COW file of the other kind.
fn check_kind(path: &Path, said: FileFormat) -> Result<(), CowError> {
    let found = inspect(&Host, path, None)?;
    let Some(Content::Cow(cow)) = found.files.first().map(|top| &top.content) else {
        return Ok(());
    };
    let is = match &cow.header {
        Header::Uml(_) => FileFormat::Uml,
        Header::Native(_) => FileFormat::Native,
    };
    if is == said {
        return Ok(());
    }
    Err(CowError::OtherFormat { path: path.to_owned(), is })
}

fn open_qcow2(path: &Path, ui: Ui) -> Result<AnyImage, CowError> {
    match Qcow2::open(path) {
        Ok(image) => Ok(AnyImage::Qcow2(image)),
        // qemu-img would not open it either.
        Err(Refused::InUse(err)) => Err(err.into()),
        Err(Refused::Encrypted(path)) => Err(CowError::Encrypted(path)),
        Err(Refused::ByImago(refused)) => {
            Ok(AnyImage::Disk(open_with_qemu_img(path, &refused, ui)?.into()))
        }
    }
}

/// Adds what to do if the file may be a raw image.
fn hint(path: &Path, err: ImageError) -> CowError {
    match err {
        ImageError::Header { source: HeaderError::NotCow { .. }, path: refused }
            if refused == path =>
        {
            CowError::NotCow(refused)
        }
        err => err.into(),
    }
}
