//! Reading a whole disk: where its bytes stand, with the holes of its files seen as zeros.

use cow_format::{ByteOffset, Extent, LayerIndex, SectorRange};

use super::OpError;
use super::holes::Holes;
use crate::disk::Disk;
use crate::storage::{Env, Storage};

/// A piece of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins in the disk.
    pub at: ByteOffset,
    /// Its length in bytes.
    pub len: u64,
    /// Where its bytes are.
    pub source: Source,
}

/// Where the bytes of a piece are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: they are zeros.
    Zero,
    /// In a file.
    Data {
        /// The file.
        layer: LayerIndex,
        /// Where they begin in the file.
        at: ByteOffset,
    },
}

/// Walks over a disk, and keeps what it learned about holes: one for each thread.
pub struct Walker<'a, E: Env> {
    disk: &'a Disk<E>,
    /// For each layer.
    holes: Vec<Holes>,
}

impl<'a, E: Env> Walker<'a, E> {
    /// A walker over `disk`.
    pub fn new(disk: &'a Disk<E>) -> Self {
        Walker { disk, holes: vec![Holes::default(); disk.layers().len()] }
    }

    /// The pieces that together are `range`.
    pub fn pieces(&mut self, range: SectorRange) -> Result<Vec<Piece>, OpError> {
        let mut pieces = Vec::new();
        let mut at = range.start_bytes();
        let mut push = |len, source| {
            pieces.push(Piece { at, len, source });
            at = ByteOffset::new(at.get() + len);
        };
        for extent in self.disk.extents(range) {
            let (layer, mut at, mut len) = match extent {
                Extent::Data { layer, at, len } => (layer, at, len),
                Extent::Zero { len } => {
                    push(len, Source::Zero);
                    continue;
                }
            };
            while len > 0 {
                let (part, hole) = self.stretch(layer, at, len)?;
                push(part, if hole { Source::Zero } else { Source::Data { layer, at } });
                (at, len) = (ByteOffset::new(at.get() + part), len - part);
            }
        }
        Ok(pieces)
    }

    /// How many of `len` bytes from `at` in a layer's file are alike, and whether they are a hole.
    fn stretch(
        &mut self,
        layer: LayerIndex,
        at: ByteOffset,
        len: u64,
    ) -> Result<(u64, bool), OpError> {
        let (holes, layer) = (&mut self.holes[layer.get()], &self.disk.layers()[layer.get()]);
        holes.stretch(layer.file(), at.get(), len).map_err(OpError::read(layer.path(), at.get()))
    }

    /// Reads the bytes of a piece, or of a part of it, that is in a file.
    pub fn read(&self, layer: LayerIndex, at: ByteOffset, buf: &mut [u8]) -> Result<(), OpError> {
        let layer = &self.disk.layers()[layer.get()];
        layer.file().read_exact_at(buf, at).map_err(OpError::read(layer.path(), at.get()))
    }
}
