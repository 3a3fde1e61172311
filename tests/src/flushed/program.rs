//! The program of a seed, and the content of the sectors that it writes. The client plays it and
//! the model plays it again, so both generate the same operations.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use blk_bench::driver::queue::{Op, SECTOR_SIZE};
use blk_bench::load::rng::{Rng, mix};

/// Sectors of a new disk: 40 MiB, so that two pages of a native bitmap's 16 MiB have a border, and
/// half a page is left.
pub const DISK_SECTORS: u64 = 40 << 11;
/// Most bytes of a request.
pub const MAX_DATA: usize = 256 << 10;
/// Most requests in flight, in all queues.
pub const MAX_DEPTH: usize = 8;
/// Queues of the disk.
pub const QUEUES: u16 = 2;

/// Sectors covered by one page of a native bitmap (4 KiB, a bit for each sector).
const SECTORS_PER_BITMAP_PAGE: u64 = 4096 * 8;
/// First word of a stamped sector.
const MAGIC: u64 = 0x4445_4853_554c_4621;
/// The program that the base images count as.
pub const BASE_PROGRAM: u64 = 0;

/// Whether a draw of 100 falls below `percent`.
pub fn chance(rng: &mut Rng, percent: u64) -> bool {
    rng.below(100) < percent
}

/// One of these.
pub fn pick<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[index(rng.below(of.len() as u64))]
}

/// A sector's number as an index.
pub fn index(number: u64) -> usize {
    usize::try_from(number).expect("a 64-bit host")
}

/// Fills `sector` with what operation `op` of program `program` writes to sector `lba`; each byte
/// depends on all three.
pub fn stamp(sector: &mut [u8], lba: u64, program: u64, op: u64) {
    let head = [MAGIC, lba, program, op];
    let mut body = Rng::new(mix(lba ^ mix(program ^ mix(op))));
    for (at, word) in sector.chunks_exact_mut(8).enumerate() {
        let value = head.get(at).copied().unwrap_or_else(|| body.next_u64());
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// The content of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Zeros.
    Zero,
    /// The whole stamp of an operation on this sector.
    Data {
        /// Of this program.
        program: u64,
        /// Its number there.
        op: u64,
    },
    /// No whole stamp of this sector: torn, misplaced, or something else.
    Garbage {
        /// It begins like a stamp.
        stamped: bool,
        /// What would be its sector, program and operation.
        words: [u64; 3],
    },
}

/// Reads the stamp of sector `lba`.
pub fn look(sector: &[u8], lba: u64) -> Seen {
    if sector.iter().all(|&byte| byte == 0) {
        return Seen::Zero;
    }
    let word = |at: usize| {
        let bytes: [u8; 8] = sector[at * 8..at * 8 + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes)
    };
    let (program, op) = (word(2), word(3));
    let mut expected = [0; SECTOR_SIZE];
    stamp(&mut expected, lba, program, op);
    if sector == expected {
        Seen::Data { program, op }
    } else {
        Seen::Garbage { stamped: word(0) == MAGIC, words: [word(1), program, op] }
    }
}

/// The operation of [`BASE_PROGRAM`] whose stamp is in a sector of base image `number`: 0
/// everywhere in the first, and 1 in an eighth of the second.
pub fn base_op(number: usize, lba: u64) -> u64 {
    const RUN: u64 = 64;
    u64::from(number == 1 && (lba / RUN).is_multiple_of(8))
}

/// Writes base image `number`.
///
/// # Errors
/// The file cannot be written.
pub fn write_base(path: &Path, number: usize) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut sector = [0; SECTOR_SIZE];
    for lba in 0..DISK_SECTORS {
        stamp(&mut sector, lba, BASE_PROGRAM, base_op(number, lba));
        file.write_all(&sector)?;
    }
    file.flush()
}

/// One operation of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// A write, discard, write-zeroes or flush.
    pub op: Op,
    /// First sector.
    pub lba: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// It is submitted when everything before it is complete.
    pub drain: bool,
    /// Index of the queue.
    pub queue: u16,
}

impl Step {
    /// Whether both touch a sector.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.lba < other.lba + u64::from(other.sectors)
            && other.lba < self.lba + u64::from(self.sectors)
    }
}

/// The operations of a seed, without end.
#[derive(Debug)]
pub struct Program {
    rng: Rng,
    disk_sectors: u64,
    /// Requests in flight.
    pub depth: usize,
    /// Queues in use.
    pub queues: u16,
    /// Bytes of a descriptor.
    pub segment: usize,
    max_shift: u64,
    flush_every: u64,
    until_flush: u64,
    aligned_percent: u64,
    zeroing_percent: u64,
    hot_start: u64,
    hot_len: u64,
    hot_percent: u64,
    sequential: u64,
}

impl Program {
    /// Program `number` of `seed` on a disk of at least [`DISK_SECTORS`] sectors.
    pub fn new(seed: u64, number: u64, disk_sectors: u64) -> Self {
        let mut rng = Rng::new(mix(seed) ^ mix(number.wrapping_mul(77)));
        // The largest request, as a power of two of sectors, and the mean distance of flushes:
        // little and often is the journal's case, much and seldom that of flushes in place.
        let (max_shift, flush_every) = match rng.below(4) {
            0 => (4, 1 + rng.below(4)),
            1 => (9, 4 + rng.below(28)),
            2 => (6, 2 + rng.below(12)),
            _ => (9, 1 + rng.below(10)),
        };
        let hot_len = 1 << (8 + rng.below(6)); // 128 KiB to 4 MiB
        let borders = disk_sectors / SECTORS_PER_BITMAP_PAGE - 1;
        let hot_start = if chance(&mut rng, 50) {
            (1 + rng.below(borders)) * SECTORS_PER_BITMAP_PAGE - hot_len / 2
        } else {
            rng.below(disk_sectors - hot_len)
        };
        Self {
            depth: 1 + index(rng.below(MAX_DEPTH as u64)),
            queues: pick(&mut rng, &[1, QUEUES]),
            segment: pick(&mut rng, &[4096, 20_480, MAX_DATA]),
            max_shift,
            flush_every,
            until_flush: flush_every,
            aligned_percent: pick(&mut rng, &[0, 50, 90]),
            zeroing_percent: pick(&mut rng, &[0, 10, 25]),
            hot_start,
            hot_len,
            hot_percent: pick(&mut rng, &[30, 70, 95]),
            sequential: rng.below(disk_sectors),
            rng,
            disk_sectors,
        }
    }

    /// The number of a program of `seed` that flushes little and often, which is what a journal
    /// takes.
    pub fn of_small_flushes(seed: u64) -> u64 {
        let is_small = |program: &Self| program.max_shift == 4 && program.zeroing_percent == 0;
        (1..)
            .find(|&number| is_small(&Self::new(seed, number, DISK_SECTORS)))
            .expect("one of eight")
    }

    /// What kind of program it is.
    pub fn about(&self) -> String {
        format!(
            "depth {} queues {} segment {} up to {} B, a flush every {}, aligned {}%, zeroing {}%, {}% at {}+{}",
            self.depth,
            self.queues,
            self.segment,
            (SECTOR_SIZE as u64) << self.max_shift,
            self.flush_every,
            self.aligned_percent,
            self.zeroing_percent,
            self.hot_percent,
            self.hot_start,
            self.hot_len,
        )
    }

    /// The next operation.
    pub fn step(&mut self) -> Step {
        let queue = u16::try_from(self.rng.below(u64::from(self.queues))).expect("a few queues");
        if self.until_flush == 0 {
            self.until_flush = 1 + self.rng.below(2 * self.flush_every);
            let drain = chance(&mut self.rng, 40);
            return Step { op: Op::Flush, lba: 0, sectors: 0, drain, queue };
        }
        self.until_flush -= 1;
        let op = self.changing_op();
        let (lba, sectors) = self.range();
        Step { op, lba, sectors, drain: false, queue }
    }

    fn changing_op(&mut self) -> Op {
        if !chance(&mut self.rng, self.zeroing_percent) {
            return Op::Write;
        }
        let zeroing =
            [Op::Discard, Op::WriteZeroes { unmap: true }, Op::WriteZeroes { unmap: false }];
        pick(&mut self.rng, &zeroing)
    }

    fn range(&mut self) -> (u64, u32) {
        let rng = &mut self.rng;
        // Log-uniform, and then that or anything below it.
        let top = 1_u64 << rng.below(self.max_shift + 1);
        let mut sectors = if chance(rng, 50) { top } else { 1 + rng.below(top) };
        let mut lba = if chance(rng, self.hot_percent) {
            self.hot_start + rng.below(self.hot_len)
        } else if chance(rng, 30) {
            self.sequential
        } else {
            rng.below(self.disk_sectors)
        };
        if chance(rng, self.aligned_percent) {
            const PAGE: u64 = 8;
            lba -= lba % PAGE;
            sectors = sectors.next_multiple_of(PAGE);
        }
        lba = lba.min(self.disk_sectors - sectors);
        self.sequential = (lba + sectors) % self.disk_sectors;
        (lba, u32::try_from(sectors).expect("512 sectors at most"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_and_number_give_the_same_program() {
        let steps = |number| {
            let mut program = Program::new(7, number, DISK_SECTORS);
            (0..500).map(|_| program.step()).collect::<Vec<_>>()
        };
        assert_eq!(steps(1), steps(1));
        assert_ne!(steps(1), steps(2));
    }

    #[test]
    fn each_step_fits_the_disk_and_a_request_and_flushes_come() {
        for seed in 0..200 {
            let mut program = Program::new(seed, 3, DISK_SECTORS);
            assert!(program.depth <= MAX_DEPTH && program.queues <= QUEUES);
            let steps: Vec<_> = (0..500).map(|_| program.step()).collect();
            assert!(steps.iter().any(|step| step.op == Op::Flush), "seed {seed}");
            for step in steps {
                assert!(
                    step.lba + u64::from(step.sectors) <= DISK_SECTORS,
                    "seed {seed}: {step:?}"
                );
                assert!(step.sectors as usize * SECTOR_SIZE <= MAX_DATA, "seed {seed}: {step:?}");
                assert_eq!(step.sectors == 0, step.op == Op::Flush, "seed {seed}: {step:?}");
            }
        }
    }

    #[test]
    fn a_stamp_is_read_in_its_place_only_and_only_whole() {
        let mut sector = [0; SECTOR_SIZE];
        assert_eq!(look(&sector, 5), Seen::Zero);
        stamp(&mut sector, 5, 3, 9);
        assert_eq!(look(&sector, 5), Seen::Data { program: 3, op: 9 });
        assert_eq!(look(&sector, 6), Seen::Garbage { stamped: true, words: [5, 3, 9] });
        sector[SECTOR_SIZE - 1] ^= 1;
        assert_eq!(look(&sector, 5), Seen::Garbage { stamped: true, words: [5, 3, 9] });
    }
}
