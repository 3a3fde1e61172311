//! Plain blocking reads and writes on a [`Disk`], for the tool and for tests. The daemon does its
//! own I/O.

use cow_format::{ByteOffset, Extent, SectorRange};

use crate::disk::Disk;
use crate::image::DiskError;
use crate::storage::{Env, Storage};

impl<E: Env> Disk<E> {
    /// Reads `range`, which is within the capacity, into `buf`, which has its length.
    pub fn read(&self, range: SectorRange, buf: &mut [u8]) -> Result<(), DiskError> {
        assert_eq!(range.len_bytes(), buf.len() as u64);
        let mut rest = buf;
        for extent in self.extents(range)? {
            let (Extent::Data { len, .. } | Extent::Zero { len }) = extent;
            // An extent is a part of the range, whose length is that of a slice.
            let (piece, tail) = rest.split_at_mut(usize::try_from(len).unwrap_or(usize::MAX));
            rest = tail;
            match extent {
                Extent::Zero { .. } => piece.fill(0),
                Extent::Data { layer, at, .. } => {
                    let layer = &self.layers()[layer.get()];
                    let read = layer.file.read_zero_filled(piece, at);
                    read.map_err(|source| DiskError::Io {
                        path: layer.path.clone(),
                        action: "read",
                        source,
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Writes `data`, which has the length of `range`, there. Durable after [`Disk::flush`].
    pub fn write(&self, range: SectorRange, data: &[u8]) -> Result<(), DiskError> {
        assert_eq!(range.len_bytes(), data.len() as u64);
        self.change(range, "write", |file, at| file.write_all_at(data, at))
    }

    /// Makes `range` read as zeros and frees its space.
    pub fn discard(&self, range: SectorRange) -> Result<(), DiskError> {
        self.change(range, "punch a hole", |file, at| file.punch(at, range.len_bytes()))
    }

    /// Makes `range` read as zeros and keeps its space.
    pub fn write_zeroes(&self, range: SectorRange) -> Result<(), DiskError> {
        self.change(range, "write zeros", |file, at| {
            file.zero_keep_allocated(at, range.len_bytes())
        })
    }

    fn change(
        &self,
        range: SectorRange,
        action: &'static str,
        change: impl FnOnce(&E::File, ByteOffset) -> std::io::Result<()>,
    ) -> Result<(), DiskError> {
        self.check_writable()?;
        let writing = self.begin_write(range);
        let top = &self.layers()[0];
        let changed = change(&top.file, self.write_at(range));
        changed.map_err(|source| DiskError::Io { path: top.path.clone(), action, source })?;
        writing.written(&[range])
    }
}
