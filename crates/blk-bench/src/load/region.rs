//! Which sectors a run touches, and which queue owns which of them.
//!
//! The region is cut into granules as long as the largest request, dealt out to the queues in turn.
//! Neighbouring granules belong to different queues, so that their writes meet in the same bitmap
//! words and pages of the backend, while each sector has one writer and the model of its content
//! stays exact.

/// A run of sectors, cut into granules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First sector.
    pub start: u64,
    /// Sectors in a granule.
    pub granule: u32,
    /// Number of granules; a rest that is shorter than a granule stays unused.
    pub granules: u64,
    /// Number of queues that share it.
    pub queues: u16,
}

impl Region {
    /// Sectors in use.
    pub fn sectors(&self) -> u64 {
        self.granules * u64::from(self.granule)
    }

    /// First sector after it.
    pub fn end(&self) -> u64 {
        self.start + self.sectors()
    }

    /// Number of granules that `queue` owns.
    pub fn owned(&self, queue: u16) -> u64 {
        let (queue, queues) = (u64::from(queue), u64::from(self.queues));
        (self.granules + queues - 1 - queue) / queues
    }

    /// First sector of a granule.
    pub fn granule_start(&self, granule: u64) -> u64 {
        self.start + granule * u64::from(self.granule)
    }

    /// First sector of the `nth` granule of `queue`.
    pub fn owned_start(&self, queue: u16, nth: u64) -> u64 {
        self.granule_start(nth * u64::from(self.queues) + u64::from(queue))
    }

    /// The owner of a sector of the region, and the sector's number among those of its owner.
    pub fn owner(&self, sector: u64) -> (u16, u64) {
        let offset = sector - self.start;
        let (granule, within) =
            (offset / u64::from(self.granule), offset % u64::from(self.granule));
        let queues = u64::from(self.queues);
        let owner = u16::try_from(granule % queues).expect("less than queues");
        (owner, granule / queues * u64::from(self.granule) + within)
    }

    /// Whether it holds the sector.
    pub fn contains(&self, sector: u64) -> bool {
        (self.start..self.end()).contains(&sector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_are_dealt_out_in_turn() {
        let region = Region { start: 100, granule: 8, granules: 7, queues: 3 };
        assert_eq!((0..3).map(|queue| region.owned(queue)).collect::<Vec<_>>(), [3, 2, 2]);
        assert_eq!(region.owner(100), (0, 0));
        assert_eq!(region.owner(109), (1, 1));
        assert_eq!(region.owner(100 + 24 + 3), (0, 8 + 3));
        assert_eq!(region.owned_start(1, 1), 100 + 4 * 8);
        for sector in region.start..region.end() {
            let (owner, nth) = region.owner(sector);
            assert_eq!(region.owned_start(owner, nth / 8) + nth % 8, sector);
        }
    }
}
