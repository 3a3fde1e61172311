//! A disk with a volatile write cache, and the power cut.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use blk_bench::driver::queue::SECTOR_SIZE;
use blk_bench::load::rng::Rng;

use crate::flushed::program::{chance, index, pick};

/// Sectors of a page of the host's page cache.
const PAGE_SECTORS: u64 = 8;

/// What of the cache reaches the disk in a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survives {
    /// All: only the host's memory is lost.
    All,
    /// Nothing.
    Nothing,
    /// What was written before some moment; the write at that moment is torn.
    Prefix,
    /// Some writes, whole or torn.
    Writes,
    /// Any aligned 4 KiB of any write.
    Pages,
    /// Any sector of any write.
    Sectors,
}

impl Survives {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::All, Self::Nothing, Self::Prefix, Self::Writes, Self::Pages, Self::Sectors];
}

/// A write that is in the cache.
struct Cached {
    sector: u64,
    data: Vec<u8>,
}

impl Cached {
    fn sectors(&self) -> impl Iterator<Item = (u64, &[u8])> {
        (self.sector..).zip(self.data.chunks_exact(SECTOR_SIZE))
    }
}

/// The content that sectors had before a flush.
type Undo = Vec<(u64, [u8; SECTOR_SIZE])>;

/// The disk. Only access to its image can fail; then the test cannot continue.
pub struct VolatileDisk {
    image: File,
    len: u64,
    cache: Vec<Cached>,
    /// Where in the cache the newest content of a sector is.
    newest: HashMap<u64, usize>,
    /// A lie: this many of the last flushes are undone by the cut.
    pub flushes_taken_back: usize,
    undo: VecDeque<Undo>,
    /// Writes that were ever made.
    pub writes: u64,
    /// Flushes that were ever made.
    pub flushes: u64,
}

impl VolatileDisk {
    /// A disk whose durable content is `image`.
    ///
    /// # Errors
    /// The length of the image cannot be asked for.
    pub fn new(image: File) -> io::Result<Self> {
        Ok(Self {
            len: image.metadata()?.len(),
            image,
            cache: vec![],
            newest: HashMap::new(),
            flushes_taken_back: 0,
            undo: VecDeque::new(),
            writes: 0,
            flushes: 0,
        })
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Reads whole sectors, the cache included.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn read(&self, sector: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.image.read_exact_at(buffer, sector * SECTOR_SIZE as u64)?;
        for (sector, buffer) in (sector..).zip(buffer.chunks_exact_mut(SECTOR_SIZE)) {
            if let Some(&at) = self.newest.get(&sector) {
                let cached = &self.cache[at];
                let start = index(sector - cached.sector) * SECTOR_SIZE;
                buffer.copy_from_slice(&cached.data[start..start + SECTOR_SIZE]);
            }
        }
        Ok(())
    }

    /// Writes whole sectors into the cache.
    pub fn write(&mut self, sector: u64, data: Vec<u8>) {
        self.writes += 1;
        let sectors = (data.len() / SECTOR_SIZE) as u64;
        self.newest.extend((sector..sector + sectors).map(|sector| (sector, self.cache.len())));
        self.cache.push(Cached { sector, data });
    }

    /// Makes the cache durable.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.flushes += 1;
        self.remember_for_the_lie()?;
        for cached in self.cache.drain(..) {
            self.image.write_all_at(&cached.data, cached.sector * SECTOR_SIZE as u64)?;
        }
        self.newest.clear();
        Ok(())
    }

    fn remember_for_the_lie(&mut self) -> io::Result<()> {
        if self.flushes_taken_back == 0 {
            return Ok(());
        }
        let mut undo = Undo::new();
        for &sector in self.newest.keys() {
            let mut content = [0; SECTOR_SIZE];
            self.image.read_exact_at(&mut content, sector * SECTOR_SIZE as u64)?;
            undo.push((sector, content));
        }
        self.undo.push_back(undo);
        if self.undo.len() > self.flushes_taken_back {
            self.undo.pop_front();
        }
        Ok(())
    }

    /// The power goes: gives how many sectors were not flushed, and how many writes of sectors
    /// survive.
    ///
    /// # Errors
    /// The image cannot be written.
    pub fn cut(&mut self, survives: Survives, rng: &mut Rng) -> io::Result<(u64, u64)> {
        let not_flushed = self.newest.len() as u64;
        self.newest.clear();
        let cache = std::mem::take(&mut self.cache);
        let mut kept = 0;
        for (write, lives) in cache.iter().zip(survivors(survives, &cache, rng)) {
            for ((sector, data), _) in write.sectors().zip(lives).filter(|(_, lives)| *lives) {
                self.image.write_all_at(data, sector * SECTOR_SIZE as u64)?;
                kept += 1;
            }
        }
        for (sector, content) in self.undo.drain(..).rev().flatten() {
            self.image.write_all_at(&content, sector * SECTOR_SIZE as u64)?;
        }
        Ok((not_flushed, kept))
    }
}

/// For each write in the cache and each of its sectors, whether it survives.
fn survivors(survives: Survives, cache: &[Cached], rng: &mut Rng) -> Vec<Vec<bool>> {
    let last = rng.below(cache.len() as u64 + 1);
    let percent = 10 + rng.below(81);
    let torn_percent = pick(rng, &[0, 30, 100]);
    let of_write = |(at, write): (u64, &Cached)| {
        let count = write.data.len() / SECTOR_SIZE;
        let all = |lives| vec![lives; count];
        match survives {
            Survives::All => all(true),
            Survives::Nothing => all(false),
            Survives::Prefix if at == last => {
                let part = index(rng.below(count as u64 + 1));
                (0..count).map(|sector| sector < part).collect()
            }
            Survives::Prefix => all(at < last),
            Survives::Writes if !chance(rng, percent) => all(false),
            Survives::Writes if !chance(rng, torn_percent) => all(true),
            Survives::Writes => (0..count).map(|_| chance(rng, 50)).collect(),
            Survives::Pages => whole_pages(write.sector, count, || chance(rng, percent)),
            Survives::Sectors => (0..count).map(|_| chance(rng, percent)).collect(),
        }
    };
    (0..).zip(cache).map(of_write).collect()
}

fn whole_pages(start: u64, count: usize, mut draw: impl FnMut() -> bool) -> Vec<bool> {
    let mut page = None;
    let mut lives = false;
    let of_sector = |sector: u64| {
        if page != Some(sector / PAGE_SECTORS) {
            page = Some(sector / PAGE_SECTORS);
            lives = draw();
        }
        lives
    };
    (start..).take(count).map(of_sector).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTORS: u64 = 64;

    fn disk() -> VolatileDisk {
        let image = tempfile::tempfile().expect("a file");
        image.set_len(SECTORS * SECTOR_SIZE as u64).expect("a length");
        VolatileDisk::new(image).expect("a disk")
    }

    fn filled(sectors: usize, byte: u8) -> Vec<u8> {
        vec![byte; sectors * SECTOR_SIZE]
    }

    fn bytes(disk: &VolatileDisk) -> Vec<u8> {
        let mut content = filled(index(SECTORS), 0xff);
        disk.read(0, &mut content).expect("a read");
        content.chunks_exact(SECTOR_SIZE).map(|sector| sector[0]).collect()
    }

    /// Sectors 0 to 9 are 1 and flushed; 2 to 5 and then 4 to 12 are rewritten.
    fn half_flushed() -> VolatileDisk {
        let mut disk = disk();
        disk.write(0, filled(10, 1));
        disk.flush().expect("a flush");
        disk.write(2, filled(4, 2));
        disk.write(4, filled(9, 3));
        disk
    }

    #[test]
    fn reads_show_the_newest_content_flushed_or_not() {
        assert_eq!(bytes(&half_flushed())[..14], [1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0]);
    }

    #[test]
    fn a_cut_leaves_all_or_nothing_of_the_cache_if_told_so() {
        let mut disk = half_flushed();
        let before = bytes(&disk);
        assert_eq!(disk.cut(Survives::All, &mut Rng::new(1)).unwrap(), (11, 13));
        assert_eq!(bytes(&disk), before);
        let mut disk = half_flushed();
        assert_eq!(disk.cut(Survives::Nothing, &mut Rng::new(1)).unwrap(), (11, 0));
        assert_eq!(bytes(&disk)[..12], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
    }

    #[test]
    fn whatever_survives_each_sector_is_as_flushed_or_as_a_write_since_left_it() {
        let may_be: [&[u8]; 13] = [
            &[1],
            &[1],
            &[1, 2],
            &[1, 2],
            &[1, 2, 3],
            &[1, 2, 3],
            &[1, 3],
            &[1, 3],
            &[1, 3],
            &[1, 3],
            &[0, 3],
            &[0, 3],
            &[0, 3],
        ];
        for survives in Survives::ALL {
            let mut states = std::collections::BTreeSet::new();
            for seed in 0..200 {
                let mut disk = half_flushed();
                disk.cut(survives, &mut Rng::new(seed)).unwrap();
                let found = bytes(&disk);
                let allowed = found.iter().zip(may_be).all(|(byte, may)| may.contains(byte));
                assert!(allowed, "{survives:?} seed {seed}: {found:?}");
                states.insert(found);
            }
            let fixed = matches!(survives, Survives::All | Survives::Nothing);
            assert!(fixed == (states.len() == 1) && (fixed || states.len() > 3), "{survives:?}");
        }
    }

    #[test]
    fn pages_are_not_torn() {
        let mut draws = [true, false, true].into_iter();
        let lives = whole_pages(6, 12, || draws.next().unwrap());
        let expected =
            [true, true, false, false, false, false, false, false, false, false, true, true];
        assert_eq!(lives, expected);
    }

    #[test]
    fn a_disk_that_lies_takes_its_last_flushes_back() {
        let mut disk = disk();
        disk.flushes_taken_back = 2;
        for byte in 1..=4 {
            disk.write(0, filled(1, byte));
            disk.flush().expect("a flush");
        }
        disk.cut(Survives::All, &mut Rng::new(1)).unwrap();
        assert_eq!(bytes(&disk)[0], 2);
    }
}
