//! The holes of a sparse base, so that reading one asks no file at all.
//!
//! Without this the kernel would put a page of zeros into its cache for each
//! page of a hole that a guest reads. A base never changes while a disk uses it, so
//! its holes stay what they were at the opening.

use std::ops::Range;

use block_io::Disk;
use block_io::storage::Storage;
use cow_format::{ByteOffset, LayerIndex};

/// Stretches of data that are looked for at the opening: about a microsecond
/// each where the file system has its tables in memory. What comes after them is
/// read like data.
const STRETCHES_MAX: usize = 1024;

/// Where the last layer of a disk has holes.
#[derive(Debug)]
pub(crate) struct Holes {
    layer: usize,
    /// In bytes of the file, ascending.
    ranges: Vec<Range<u64>>,
}

impl Holes {
    /// Looks for the holes of the last layer, unless this disk writes to it.
    pub(crate) fn new(disk: &Disk) -> Self {
        let layer = disk.layers().len().saturating_sub(1);
        let ranges = match disk.layers().get(layer) {
            Some(last) if layer > 0 || disk.read_only() => find(last.file()),
            _ => Vec::new(),
        };
        Self { layer, ranges }
    }

    /// Whether `len` bytes of `layer` at `at` are in one hole.
    pub(crate) fn cover(&self, layer: LayerIndex, at: ByteOffset, len: u64) -> bool {
        let after = self.ranges.partition_point(|hole| hole.start <= at.get());
        let hole = after.checked_sub(1).and_then(|before| self.ranges.get(before));
        layer.get() == self.layer
            && hole.is_some_and(|hole| hole.end.saturating_sub(at.get()) >= len)
    }
}

/// The holes before, between and after the first stretches of data. None for a file system that
/// does not report them.
fn find(file: &impl Storage) -> Vec<Range<u64>> {
    let Ok(len) = file.len() else { return Vec::new() };
    let (mut ranges, mut at) = (Vec::new(), 0);
    for _ in 0..STRETCHES_MAX {
        let Ok(data) = file.next_data(ByteOffset::new(at)) else { break };
        let data = data.unwrap_or(len..len);
        if at < data.start {
            ranges.push(at..data.start);
        }
        at = data.end;
        if at >= len {
            break;
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use block_io::DiskOptions;

    use super::*;

    /// 4 MiB with 64 KiB of data in the middle, and a hole at the end.
    fn image() -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        image.as_file().set_len(4 << 20).unwrap();
        image.as_file().write_all_at(&[1; 64 << 10], 1 << 20).unwrap();
        image
    }

    fn holes(image: &tempfile::NamedTempFile, read_only: bool) -> Holes {
        let options = DiskOptions { read_only, ..DiskOptions::default() };
        Holes::new(&Disk::open_raw(image.path(), &options).unwrap())
    }

    fn cover(holes: &Holes, at: u64, len: u64) -> bool {
        holes.cover(LayerIndex::TOP, ByteOffset::new(at), len)
    }

    #[test]
    fn a_read_is_covered_only_if_all_of_it_is_in_one_hole() {
        const DATA: u64 = 1 << 20;
        const AFTER: u64 = DATA + (64 << 10);
        let holes = holes(&image(), true);
        assert!(cover(&holes, 0, DATA) && cover(&holes, 4096, 512) && cover(&holes, AFTER, 512));
        assert!(!cover(&holes, 0, DATA + 512) && !cover(&holes, DATA, 512));
        assert!(!cover(&holes, AFTER - 512, 1024), "the end of the data");
        assert!(cover(&holes, (4 << 20) - 512, 512) && !cover(&holes, (4 << 20) - 512, 1024));
        assert!(!cover(&holes, 0, u64::MAX) && !cover(&holes, u64::MAX, 512));
        let other = Holes { layer: 1, ..holes };
        assert!(!cover(&other, 0, 512), "another layer");
    }

    #[test]
    fn a_file_that_is_written_has_no_lasting_holes() {
        assert!(!cover(&holes(&image(), false), 0, 512));
    }

    #[test]
    fn the_search_comes_to_an_end() {
        let image = image();
        let file = File::options().write(true).open(image.path()).unwrap();
        // Data in every other block, more often than is looked for.
        for block in 0..STRETCHES_MAX as u64 * 2 {
            file.write_all_at(&[1; 512], (4 << 20) + block * 8192).unwrap();
        }
        let holes = holes(&image, true);
        assert!(cover(&holes, 4096, 4096));
        assert!(holes.ranges.len() <= STRETCHES_MAX);
    }
}
