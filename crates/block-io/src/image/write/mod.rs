//! What is written to a COW file besides data: its header, its journal, and the bitmap in a flush.

pub(crate) mod flush;
pub(crate) mod header_io;
pub(crate) mod journal;
pub(crate) mod writable;
pub(crate) mod write_tracker;
