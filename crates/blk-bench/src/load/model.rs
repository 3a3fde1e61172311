//! What each sector must hold, by the writes that were acknowledged.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::driver::queue::SECTOR_SIZE;
use crate::error::Error;
use crate::load::region::Region;
use crate::load::stamp::{Stamp, describe};

/// Sectors in a lazily allocated part of a model.
const CHUNK: usize = 4096;
/// Bytes that are compared or written at a time when the expected image is made.
const COPY_LEN: usize = 1 << 20;

/// What is known of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What the disk held before the run.
    Base,
    /// Zeros.
    Zeros,
    /// Unknown: a write to it failed, or it was discarded on a device that does not define the
    /// result.
    Unknown,
    /// The stamp of this write of its owner.
    Write(u32),
}

/// Most writes per queue: the sequence numbers above have other meanings.
pub const MAX_SEQUENCE: u32 = u32::MAX - 2;

impl Content {
    fn encode(self) -> u32 {
        match self {
            Self::Base => 0,
            Self::Unknown => u32::MAX - 1,
            Self::Zeros => u32::MAX,
            Self::Write(sequence) => sequence,
        }
    }

    fn decode(code: u32) -> Self {
        match code {
            0 => Self::Base,
            c if c == u32::MAX - 1 => Self::Unknown,
            u32::MAX => Self::Zeros,
            sequence => Self::Write(sequence),
        }
    }
}

/// The content of the sectors that one queue owns. Four bytes for each sector of a part that was
/// written to.
#[derive(Debug)]
pub struct Model {
    queue: u16,
    region: Region,
    chunks: Vec<Option<Box<[u32; CHUNK]>>>,
}

impl Model {
    /// Everything as it was before.
    pub fn new(region: Region, queue: u16) -> Self {
        let sectors = region.owned(queue) * u64::from(region.granule);
        let chunks =
            usize::try_from(sectors.div_ceil(CHUNK as u64)).expect("fewer than memory has bytes");
        Self { queue, region, chunks: vec![None; chunks] }
    }

    fn place(&self, sector: u64) -> (usize, usize) {
        let (owner, nth) = self.region.owner(sector);
        assert_eq!(owner, self.queue, "sector {sector} belongs to another queue");
        let nth = usize::try_from(nth).expect("as in new");
        (nth / CHUNK, nth % CHUNK)
    }

    /// What a sector that the queue owns must hold.
    pub fn get(&self, sector: u64) -> Content {
        let (chunk, within) = self.place(sector);
        Content::decode(self.chunks[chunk].as_ref().map_or(0, |codes| codes[within]))
    }

    /// Notes new content of sectors that the queue owns.
    pub fn set(&mut self, sector: u64, count: u32, content: Content) {
        for sector in sector..sector + u64::from(count) {
            let (chunk, within) = self.place(sector);
            self.chunks[chunk].get_or_insert_with(|| Box::new([0; CHUNK]))[within] =
                content.encode();
        }
    }
}

/// The content of the disk before the run: a raw image, and zeros after its end.
#[derive(Debug)]
pub struct Base {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Base {
    /// Opens a raw image (`/dev/null` for a disk of zeros).
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file =
            File::open(path).map_err(Error::io(format!("open the base {}", path.display())))?;
        let len = file.metadata().map_err(Error::io(format!("stat {}", path.display())))?.len();
        Ok(Self { path: path.to_owned(), file, len })
    }

    /// Reads at a byte offset; zeros after the end.
    ///
    /// # Errors
    /// As pread(2).
    pub fn read(&self, data: &mut [u8], offset: u64) -> Result<(), Error> {
        let inside =
            usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(data.len());
        let (image, rest) = data.split_at_mut(inside);
        rest.fill(0);
        self.file
            .read_exact_at(image, offset)
            .map_err(Error::io(format!("read the base {} at {offset}", self.path.display())))
    }
}

/// The first sector that does not hold what it must.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("sector {sector} (byte {}): found {found}; expected {expected}", sector * SECTOR_SIZE as u64)]
pub struct Mismatch {
    /// The sector.
    pub sector: u64,
    /// Its content according to the device.
    pub found: String,
    /// What it must hold.
    pub expected: String,
}

/// What both the checks during the run and the read-back afterwards need.
#[derive(Debug)]
pub struct Expectation {
    /// The content before the run; without it, sectors that were not written are not checked.
    pub base: Option<Base>,
    /// Goes into every stamp.
    pub seed: u64,
}

impl Expectation {
    /// Fills `data` with the expected content of a sector; false if it is unknown.
    ///
    /// # Errors
    /// The base cannot be read.
    pub fn fill(
        &self,
        sector: u64,
        owner: u16,
        content: Content,
        data: &mut [u8],
    ) -> Result<bool, Error> {
        match content {
            Content::Unknown => return Ok(false),
            Content::Zeros => data.fill(0),
            Content::Write(sequence) => {
                Stamp { sector, sequence, queue: u32::from(owner), seed: self.seed }.write(data);
            }
            Content::Base => match &self.base {
                Some(base) => base.read(data, sector * SECTOR_SIZE as u64)?,
                None => return Ok(false),
            },
        }
        Ok(true)
    }

    /// Compares sectors that were read with their expected content. `lookup` returns owner and
    /// content of a sector. Returns the number of sectors with unknown content.
    ///
    /// # Errors
    /// The base cannot be read.
    pub fn check(
        &self,
        first: u64,
        data: &[u8],
        lookup: impl Fn(u64) -> (u16, Content),
    ) -> Result<Result<u32, Mismatch>, Error> {
        let mut unknown = 0;
        for (sector, found) in (first..).zip(data.chunks_exact(SECTOR_SIZE)) {
            let (owner, content) = lookup(sector);
            let mut expected = [0; SECTOR_SIZE];
            if !self.fill(sector, owner, content, &mut expected)? {
                unknown += 1;
            } else if found != expected {
                let mut text = describe(&expected);
                if content == Content::Base {
                    text = format!("the base, {text}");
                }
                return Ok(Err(Mismatch { sector, found: describe(found), expected: text }));
            }
        }
        Ok(Ok(unknown))
    }
}

/// The models of all queues after a run: the content of the whole disk.
#[derive(Debug)]
pub struct Expected {
    /// The sectors that the run could touch.
    pub region: Region,
    /// One for each queue.
    pub models: Vec<Model>,
    /// Base and seed.
    pub expectation: Expectation,
}

impl Expected {
    /// Owner and content of a sector; outside the region it is the base's.
    pub fn lookup(&self, sector: u64) -> (u16, Content) {
        if !self.region.contains(sector) {
            return (0, Content::Base);
        }
        let owner = self.region.owner(sector).0;
        (owner, self.models[usize::from(owner)].get(sector))
    }

    /// Writes the whole disk as it must be to a new file, `capacity` sectors long, zeros sparse.
    ///
    /// # Errors
    /// Reading the base or writing the file failed; or the content of a sector is unknown.
    pub fn write_image(&self, path: &Path, capacity: u64) -> Result<(), Error> {
        let what = || format!("write the expected image {}", path.display());
        let file = File::create(path).map_err(Error::io(what()))?;
        file.set_len(capacity * SECTOR_SIZE as u64).map_err(Error::io(what()))?;
        let mut buffer = vec![0; COPY_LEN];
        let per_copy = (COPY_LEN / SECTOR_SIZE) as u64;
        let mut at = 0;
        while at < capacity {
            let count = per_copy.min(capacity - at);
            let len = usize::try_from(count).expect("at most per_copy") * SECTOR_SIZE;
            for (sector, data) in (at..).zip(buffer[..len].chunks_exact_mut(SECTOR_SIZE)) {
                let (owner, content) = self.lookup(sector);
                if !self.expectation.fill(sector, owner, content, data)? {
                    let why = format!("the content of sector {sector} is not known ({content:?})");
                    return Err(Error::io::<io::Error>(what())(io::Error::other(why)));
                }
            }
            write_sparse(&file, &buffer[..len], at * SECTOR_SIZE as u64)
                .map_err(Error::io(what()))?;
            at += count;
        }
        Ok(())
    }
}

fn write_sparse(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    const PAGE: usize = 4096;
    for (page, bytes) in data.chunks(PAGE).enumerate() {
        if bytes.iter().any(|&byte| byte != 0) {
            file.write_all_at(bytes, offset + (page * PAGE) as u64)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: Region = Region { start: 8, granule: 8, granules: 4, queues: 2 };

    fn expected(base: &Path) -> Expected {
        let models = (0..2).map(|queue| Model::new(REGION, queue)).collect();
        let expectation = Expectation { base: Some(Base::open(base).unwrap()), seed: 9 };
        Expected { region: REGION, models, expectation }
    }

    #[test]
    fn the_image_is_the_base_with_the_writes_on_top() {
        let dir = tempfile::tempdir().unwrap();
        let (base, out) = (dir.path().join("base"), dir.path().join("out"));
        std::fs::write(&base, vec![7; 20 * SECTOR_SIZE + 100]).unwrap();
        let mut expected = expected(&base);
        expected.models[1].set(17, 2, Content::Write(5));
        expected.models[0].set(8, 1, Content::Zeros);
        expected.write_image(&out, 44).unwrap();
        let image = std::fs::read(&out).unwrap();
        assert_eq!(image.len(), 44 * SECTOR_SIZE);
        let sector = |n: usize| &image[n * SECTOR_SIZE..(n + 1) * SECTOR_SIZE];
        assert!(sector(7).iter().all(|&byte| byte == 7));
        assert!(sector(8).iter().all(|&byte| byte == 0));
        assert_eq!(describe(sector(18)), "write 5 of queue 1 to sector 18, seed 0x9");
        assert!(sector(20)[..100].iter().all(|&byte| byte == 7));
        assert!(sector(20)[100..].iter().all(|&byte| byte == 0));
        assert!(image[21 * SECTOR_SIZE..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn unknown_content_is_counted_in_checks_and_refused_in_images() {
        let dir = tempfile::tempdir().unwrap();
        let mut expected = expected(Path::new("/dev/null"));
        expected.models[0].set(9, 1, Content::Unknown);
        let data = vec![0; 2 * SECTOR_SIZE];
        let checked = expected.expectation.check(8, &data, |sector| expected.lookup(sector));
        assert_eq!(checked.unwrap(), Ok(1));
        let error = expected.write_image(&dir.path().join("out"), 44).unwrap_err();
        assert!(error.to_string().contains("expected image"), "{error}");
    }

    #[test]
    fn a_lost_a_stale_and_a_misplaced_write_are_told_apart() {
        let mut expected = expected(Path::new("/dev/null"));
        expected.models[0].set(8, 1, Content::Write(2));
        let mismatch = |data: &[u8]| {
            expected
                .expectation
                .check(8, data, |sector| expected.lookup(sector))
                .unwrap()
                .unwrap_err()
        };
        let mut data = [0; SECTOR_SIZE];
        assert_eq!(mismatch(&data).found, "zeros");
        Stamp { sector: 8, sequence: 1, queue: 0, seed: 9 }.write(&mut data);
        assert_eq!(mismatch(&data).found, "write 1 of queue 0 to sector 8, seed 0x9");
        assert_eq!(mismatch(&data).expected, "write 2 of queue 0 to sector 8, seed 0x9");
        Stamp { sector: 9, sequence: 2, queue: 0, seed: 9 }.write(&mut data);
        assert_eq!(mismatch(&data).found, "write 2 of queue 0 to sector 9, seed 0x9");
    }
}
