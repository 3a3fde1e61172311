//! Going through a whole disk in steps.

use cow_format::{Sector, SectorCount, SectorRange};

/// Sectors examined at once (256 MiB): bounds the memory for their extents, up to 40 MiB if every
/// other sector is in another file, and lets progress be shown.
const STEP_SECTORS: u64 = 1 << 19;

/// The sectors of a disk in steps, in ascending order.
pub fn steps(disk: SectorCount) -> impl Iterator<Item = SectorRange> {
    let starts = std::iter::successors(Some(0), |start| Some(start + STEP_SECTORS));
    starts.take_while(move |start| *start < disk.get()).map_while(move |start| {
        let count = SectorCount::new(STEP_SECTORS.min(disk.get() - start));
        SectorRange::new(Sector::new(start), count)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_a_disk_are_all_of_it() {
        let sizes = |sectors| -> Vec<_> {
            let ranges = steps(SectorCount::new(sectors));
            ranges.map(|range| (range.start().get(), range.count().get())).collect()
        };
        assert_eq!(sizes(0), []);
        assert_eq!(sizes(5), [(0, 5)]);
        assert_eq!(sizes(STEP_SECTORS), [(0, STEP_SECTORS)]);
        assert_eq!(sizes(STEP_SECTORS + 1), [(0, STEP_SECTORS), (STEP_SECTORS, 1)]);
    }
}
