//! Holes in a file, each looked up once.

use std::io;
use std::ops::Range;

use cow_format::ByteOffset;

use crate::storage::Storage;

/// Remembers the last stretch of data or hole that was looked up in one file.
#[derive(Clone, Debug, Default)]
pub struct Holes {
    known: Range<u64>,
    hole: bool,
}

impl Holes {
    /// How many of the `len` bytes from `at` in `file` are of one kind (at least one, if `len` is
    /// not 0), and whether they are a hole. Everything past the end of the file counts as a hole.
    pub fn stretch(&mut self, file: &impl Storage, at: u64, len: u64) -> io::Result<(u64, bool)> {
        if !self.known.contains(&at) {
            (self.known, self.hole) = match file.next_data(ByteOffset::new(at))? {
                None => (at..u64::MAX, true),
                Some(data) if data.start > at => (at..data.start, true),
                Some(data) => (at..data.end.max(at + 1), false),
            };
        }
        Ok((len.min(self.known.end - at), self.hole))
    }
}
