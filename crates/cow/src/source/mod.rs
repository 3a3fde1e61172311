//! Opening a disk of any format for reading.

pub mod format;
pub mod qcow2;
pub mod qcow2_header;

use std::path::Path;

use block_io::ops::OpError;
use block_io::ops::inspect::{Content, inspect};
use block_io::ops::walk::{Image, Piece, Reader, Walker};
use block_io::storage::FileId;
use block_io::{Disk, DiskOptions, Host, ImageError};
use cow_format::{ByteOffset, Header, HeaderError, LayerIndex, SectorRange};

use crate::error::CowError;
use crate::size::MaxSize;
use crate::source::format::FileFormat;
use crate::source::qcow2::{ImagoReader, Qcow2};
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
    Imago(ImagoReader<'a>),
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
            AnyImage::Qcow2(qcow2) => qcow2.reader(),
        }
    }
}

impl Reader for AnyReader<'_> {
    fn pieces(&mut self, range: SectorRange) -> Result<Vec<Piece>, OpError> {
        match self {
            AnyReader::Disk(walker) => walker.pieces(range),
            AnyReader::Imago(imago) => imago.pieces(range),
        }
    }

    fn read(&self, layer: LayerIndex, at: ByteOffset, buf: &mut [u8]) -> Result<(), OpError> {
        match self {
            AnyReader::Disk(walker) => walker.read(layer, at, buf),
            AnyReader::Imago(imago) => imago.read(layer, at, buf),
        }
    }

    fn file(&self, layer: LayerIndex) -> Option<FileId> {
        match self {
            AnyReader::Disk(walker) => walker.file(layer),
            AnyReader::Imago(imago) => imago.file(layer),
        }
    }
}

/// How a disk is opened.
#[derive(Clone, Copy)]
pub struct Opening<'a> {
    /// The largest disk that is opened.
    pub max_size: MaxSize,
    /// Temporary files are made in the directory of this file.
    pub scratch: &'a Path,
    pub ui: Ui,
}

/// Opens a disk for reading. A raw image must be named as such: its first bytes belong to the
/// guest, which could make it look like an overlay over any file of the host.
pub fn open(
    path: &Path,
    format: Option<FileFormat>,
    opening: Opening<'_>,
) -> Result<AnyImage, CowError> {
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    let image = match format {
        Some(FileFormat::Raw) => AnyImage::Disk(Disk::open_raw(path, &options)?.into()),
        Some(FileFormat::Qcow2) => AnyImage::Qcow2(Qcow2::open(path, opening)?),
        said @ (Some(FileFormat::Uml | FileFormat::Native) | None) => {
            let disk = Disk::open_cow(path, None, &options).map_err(|err| hint(path, err))?;
            said.map_or(Ok(()), |said| check_kind(path, said))?;
            AnyImage::Disk(disk.into())
        }
    };
    opening.max_size.check(path, image.size())?;
    Ok(image)
}

/// Opens a disk that is only looked at, of any size.
pub fn open_to_look(path: &Path, format: Option<FileFormat>, ui: Ui) -> Result<AnyImage, CowError> {
    let dir = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    let scratch = Path::new(&dir).join("cow");
    open(path, format, Opening { max_size: MaxSize::default(), scratch: &scratch, ui })
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
