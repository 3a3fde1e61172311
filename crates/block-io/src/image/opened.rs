//! One file of a chain, open and locked: its header and its identity.

use std::io;
use std::path::{Path, PathBuf};

use cow_format::header::BackingFormat;
use cow_format::identity::ActualIdentity;
use cow_format::{ByteOffset, Geometry, HEADER_PREFIX_LEN, Header, Sector};

use super::ImageError;
use crate::storage::{FileKind, FileStat, Storage};

/// An opened and locked file of a chain.
pub(crate) struct Opened<F> {
    pub(crate) file: F,
    pub(crate) path: PathBuf,
    pub(crate) stat: FileStat,
    /// It was opened by its path, so there can be files beside it.
    pub(crate) by_name: bool,
}

impl<F: Storage> Opened<F> {
    /// Reads and checks the header of a COW file, which must be a regular file.
    pub(crate) fn header(&self) -> Result<Header, ImageError> {
        if self.stat.kind != FileKind::Regular {
            let path = self.path.clone();
            return Err(ImageError::Kind {
                path,
                found: self.stat.kind,
                expected: "a regular file for a COW file",
            });
        }
        let prefix = self.prefix().map_err(ImageError::io(&self.path, "read the header"))?;
        Header::check(&prefix, self.stat.size).map_err(ImageError::header(&self.path))
    }

    fn prefix(&self) -> io::Result<Vec<u8>> {
        let mut prefix = vec![0; HEADER_PREFIX_LEN];
        let n = self.file.read_at(&mut prefix, ByteOffset::new(0))?;
        prefix.truncate(n);
        Ok(prefix)
    }

    /// The header, if the format has one and the file is of that format.
    pub(crate) fn header_as(
        &self,
        format: BackingFormat,
        cow: &Path,
    ) -> Result<Option<Header>, ImageError> {
        let wrong = |found| ImageError::Format {
            cow: cow.to_owned(),
            path: self.path.clone(),
            found,
            expected: format,
        };
        match format {
            BackingFormat::Raw => Ok(None),
            BackingFormat::Qcow2 => Err(wrong("not a format that this program reads")),
            BackingFormat::Uml | BackingFormat::Native => match self.header()? {
                Header::Uml(_) if format == BackingFormat::Native => Err(wrong("a UML COW file")),
                Header::Native(_) if format == BackingFormat::Uml => {
                    Err(wrong("a native COW file"))
                }
                header => Ok(Some(header)),
            },
        }
    }

    /// The file's actual identity.
    pub(crate) fn identity(&self, header: Option<&Header>) -> ActualIdentity {
        let layer = match header {
            Some(Header::Native(native)) => Some((native.uuid(), native.content_generation())),
            _ => None,
        };
        self.stat.identity(layer)
    }

    /// The size in bytes of the disk that it holds.
    pub(crate) fn disk_size(&self, header: Option<&Header>) -> u64 {
        header.map_or(self.stat.size, |header| header.geometry().virtual_size())
    }

    /// Refuses a file that lacks the data of the last present sector.
    pub(crate) fn check_data(
        &self,
        geometry: &Geometry,
        last: Option<Sector>,
    ) -> Result<(), ImageError> {
        let checked = geometry.check_last(last, self.stat.size);
        checked.map_err(|source| ImageError::Data { path: self.path.clone(), source })
    }
}

impl<F> Opened<F> {
    /// How many bytes of disk the file can hold, going by its length.
    pub(crate) fn disk_bytes(&self, geometry: &Geometry) -> u64 {
        self.stat.size.saturating_sub(geometry.data_offset().get())
    }
}
