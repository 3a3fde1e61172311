//! The formats of copy-on-write files and the layering. No I/O.
//!
//! - [`header`]: what a file says about itself, UML or native; hostile bytes in, checked types out
//! - [`Geometry`]: where bitmap and data stand
//! - [`Bitmap`]: which sectors are present
//! - [`LayerMap`]: which layer of a chain a range comes from
//! - [`FlushPass`]: in what order things become durable
//! - [`journal`]: a shorter way for a flush of little
//! - [`identity`]: whether a backing file is the one that the header means
//! - [`check`]: whether a file is sound
#![forbid(unsafe_code)]

mod bitmap;
pub mod check;
mod flush;
mod fold;
mod geometry;
pub mod header;
pub mod identity;
pub mod journal;
mod map;
mod units;

pub use bitmap::{BITMAP_PAGE, Bitmap, PAGE_SECTORS, Run, Runs};
pub use flush::{AwaitSync, BitmapWrite, FLUSH_BATCH_PAGES, FlushPass, Next, WritePages};
pub use geometry::{DataTruncated, Geometry};
pub use header::{HEADER_PREFIX_LEN, Header, HeaderError};
pub use map::{CHAIN_LAYERS_MAX, ChainTooDeep, Extent, Extents, LayerIndex, LayerMap, PageFold};
pub use units::{ByteOffset, SECTOR_SIZE, Sector, SectorCount, SectorRange, VIRTUAL_SIZE_MAX};
