#![doc = include_str!("../README.md")]
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
pub mod sample;
mod units;

pub use bitmap::{BITMAP_PAGE_LEN, Bitmap, PAGE_SECTORS, Run, Runs};
pub use flush::{AwaitSync, BitmapWrite, FLUSH_BATCH_PAGES, FlushPass, Next, WritePages};
pub use geometry::{DataTruncated, Geometry};
pub use header::{HEADER_PREFIX_LEN, Header, HeaderError};
pub use map::{CHAIN_LAYERS_MAX, ChainTooDeep, Extent, Extents, LayerIndex, LayerMap, PageFold};
pub use units::{ByteOffset, SECTOR_SIZE, Sector, SectorCount, SectorRange, VIRTUAL_SIZE_MAX};
