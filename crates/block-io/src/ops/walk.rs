//! Reading a whole disk: where its bytes are, with the holes of its files treated as zeros.

use cow_format::{ByteOffset, Extent, LayerIndex, Sector, SectorRange};

use super::OpError;
use super::holes::Holes;
use crate::disk::Disk;
use crate::image::layer::Layer;
use crate::storage::{Env, FileId, Storage};

/// A disk that is read as a whole.
pub trait Image: Sync {
    /// Its reader.
    type Reader<'a>: Reader
    where
        Self: 'a;

    /// The size of the disk in bytes.
    fn size(&self) -> u64;

    /// A reader for one thread.
    fn reader(&self) -> Self::Reader<'_>;
}

/// Reads a disk and caches what it looks up: one for each thread.
pub trait Reader {
    /// The pieces that together are `range`, which may extend past the end of the disk: there are
    /// zeros.
    fn pieces(&mut self, range: SectorRange) -> Result<Vec<Piece>, OpError>;

    /// Reads the bytes of a piece, or part of it, that is in a file.
    fn read(&self, layer: LayerIndex, at: ByteOffset, buf: &mut [u8]) -> Result<(), OpError>;

    /// The file of `layer`, if that determines the bytes: two readers then read the same at the
    /// same offset.
    fn file(&self, layer: LayerIndex) -> Option<FileId>;
}

/// A piece of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its offset in the disk.
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
        /// Their offset in the file.
        at: ByteOffset,
    },
}

impl Piece {
    /// The piece without its first `len` bytes, if there is more.
    pub fn after(self, len: u64) -> Option<Self> {
        let beyond = |at: ByteOffset| ByteOffset::new(at.get() + len);
        let source = match self.source {
            Source::Zero => Source::Zero,
            Source::Data { layer, at } => Source::Data { layer, at: beyond(at) },
        };
        (self.len > len).then(|| Piece { at: beyond(self.at), len: self.len - len, source })
    }

    /// The part of the piece before byte `end` of the disk; possibly empty.
    pub fn before(self, end: u64) -> Self {
        Piece { len: self.len.min(end.saturating_sub(self.at.get())), ..self }
    }
}

impl<E: Env> Image for Disk<E> {
    type Reader<'a> = Walker<'a, E>;

    fn size(&self) -> u64 {
        self.size()
    }

    fn reader(&self) -> Walker<'_, E> {
        Walker::new(self)
    }
}

/// The reader of a [`Disk`].
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

    fn layer(&self, index: LayerIndex) -> &'a Layer<E::File> {
        &self.disk.layers()[index.get()]
    }

    /// How many of `len` bytes from `at` in a layer's file are of one kind, and whether they are a
    /// hole.
    fn stretch(&mut self, index: LayerIndex, at: u64, len: u64) -> Result<(u64, bool), OpError> {
        let layer = self.layer(index);
        let stretch = self.holes[index.get()].stretch(layer.file(), at, len);
        stretch.map_err(OpError::read(layer.path(), at))
    }
}

impl<E: Env> Reader for Walker<'_, E> {
    fn pieces(&mut self, range: SectorRange) -> Result<Vec<Piece>, OpError> {
        let mut pieces = Vec::new();
        let mut at = range.start_bytes();
        let mut push = |len, source| {
            if len > 0 {
                pieces.push(Piece { at, len, source });
                at = ByteOffset::new(at.get() + len);
            }
        };
        let inside = range.clipped_to(Sector::new(self.disk.capacity().get()));
        for extent in self.disk.extents(inside)? {
            let (layer, mut at, mut len) = match extent {
                Extent::Data { layer, at, len } => (layer, at, len),
                Extent::Zero { len } => {
                    push(len, Source::Zero);
                    continue;
                }
            };
            while len > 0 {
                let (part, hole) = self.stretch(layer, at.get(), len)?;
                push(part, if hole { Source::Zero } else { Source::Data { layer, at } });
                (at, len) = (ByteOffset::new(at.get() + part), len - part);
            }
        }
        push(range.len_bytes() - inside.len_bytes(), Source::Zero);
        Ok(pieces)
    }

    fn read(&self, layer: LayerIndex, at: ByteOffset, buf: &mut [u8]) -> Result<(), OpError> {
        let layer = self.layer(layer);
        layer.file().read_large_at(buf, at).map_err(OpError::read(layer.path(), at.get()))
    }

    fn file(&self, layer: LayerIndex) -> Option<FileId> {
        self.layer(layer).file().stat().ok().map(|stat| stat.id)
    }
}

/// A disk of zeros.
pub struct Zeros {
    /// In bytes.
    pub size: u64,
}

impl Image for Zeros {
    type Reader<'a> = ();

    fn size(&self) -> u64 {
        self.size
    }

    fn reader(&self) {}
}

impl Reader for () {
    fn pieces(&mut self, range: SectorRange) -> Result<Vec<Piece>, OpError> {
        let (at, len) = (range.start_bytes(), range.len_bytes());
        Ok(vec![Piece { at, len, source: Source::Zero }])
    }

    fn read(&self, _layer: LayerIndex, _at: ByteOffset, buf: &mut [u8]) -> Result<(), OpError> {
        buf.fill(0);
        Ok(())
    }

    fn file(&self, _layer: LayerIndex) -> Option<FileId> {
        None
    }
}
