//! The bitmaps of a COW file, durable and live: finding and reading them, and setting bits in the
//! live one.

pub(crate) mod demand_load;
pub(crate) mod live;
pub(crate) mod pages;
pub(crate) mod side_file;
pub(crate) mod source;
