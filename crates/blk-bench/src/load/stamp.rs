//! The content written to a sector, from which a read can identify the write.
//!
//! | offset | length | |
//! |---|---|---|
//! | 0 | 8 | `BLKBENCH` |
//! | 8 | 8 | sector number |
//! | 16 | 4 | sequence number of the write in its queue |
//! | 20 | 4 | queue |
//! | 24 | 8 | seed of the run |
//! | 32 | 472 | words that follow from the fields above |
//! | 504 | 4 | 0 |
//! | 508 | 4 | CRC-32C of everything before |
//!
//! Numbers are little-endian. Every byte follows from the four fields, so a comparison with a stamp
//! made again is exact.

use std::fmt;

use crate::driver::queue::SECTOR_SIZE;
use crate::load::rng::mix;

const MAGIC: [u8; 8] = *b"BLKBENCH";
const FILL_AT: usize = 32;
const FILL_END: usize = 504;
const CRC_AT: usize = 508;

/// The fields of a stamped sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Where it was written.
    pub sector: u64,
    /// Which write of its queue.
    pub sequence: u32,
    /// Which queue wrote it.
    pub queue: u32,
    /// Which run wrote it.
    pub seed: u64,
}

impl Stamp {
    /// Fills a sector. `data` is 512 bytes long.
    pub fn write(&self, data: &mut [u8]) {
        assert_eq!(data.len(), SECTOR_SIZE);
        data[..8].copy_from_slice(&MAGIC);
        data[8..16].copy_from_slice(&self.sector.to_le_bytes());
        data[16..20].copy_from_slice(&self.sequence.to_le_bytes());
        data[20..24].copy_from_slice(&self.queue.to_le_bytes());
        data[24..32].copy_from_slice(&self.seed.to_le_bytes());
        let mut word = mix(self.sector
            ^ mix(u64::from(self.sequence) << 32 | u64::from(self.queue))
            ^ self.seed);
        for chunk in data[FILL_AT..FILL_END].chunks_exact_mut(8) {
            word = word.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(1);
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        data[FILL_END..CRC_AT].fill(0);
        let crc = crc32c::crc32c(&data[..CRC_AT]);
        data[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    }

    /// Fills consecutive sectors, this one's first.
    pub fn write_sectors(&self, data: &mut [u8]) {
        let mut stamp = *self;
        for sector in data.chunks_exact_mut(SECTOR_SIZE) {
            stamp.write(sector);
            stamp.sector += 1;
        }
    }

    fn parse(data: &[u8]) -> Option<(Self, bool)> {
        if data.len() != SECTOR_SIZE || data[..8] != MAGIC {
            return None;
        }
        let u32_at = |at: usize| data[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let u64_at = |at: usize| data[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let stamp = Self {
            sector: u64_at(8)?,
            sequence: u32_at(16)?,
            queue: u32_at(20)?,
            seed: u64_at(24)?,
        };
        Some((stamp, u32_at(CRC_AT)? == crc32c::crc32c(&data[..CRC_AT])))
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sector, sequence, queue, seed } = self;
        write!(f, "write {sequence} of queue {queue} to sector {sector}, seed {seed:#x}")
    }
}

/// Describes the content of a sector.
pub fn describe(data: &[u8]) -> String {
    match Stamp::parse(data) {
        Some((stamp, true)) => stamp.to_string(),
        Some((stamp, false)) => format!("{stamp}, but torn or damaged (checksum)"),
        None if data.iter().all(|&byte| byte == 0) => "zeros".into(),
        None => {
            let head: String = data.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
            format!("no stamp: {head}… (crc32c {:08x})", crc32c::crc32c(data))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { sector: 17, sequence: 3, queue: 1, seed: 42 };

    #[test]
    fn a_stamp_is_read_back_and_any_flipped_bit_is_seen() {
        let mut data = [0; SECTOR_SIZE];
        STAMP.write(&mut data);
        assert_eq!(Stamp::parse(&data), Some((STAMP, true)));
        for at in 8..SECTOR_SIZE {
            data[at] ^= 0x10;
            assert!(!Stamp::parse(&data).unwrap().1, "byte {at}");
            data[at] ^= 0x10;
        }
    }

    #[test]
    fn consecutive_sectors_carry_their_own_numbers() {
        let mut data = [0; 2 * SECTOR_SIZE];
        STAMP.write_sectors(&mut data);
        let second = Stamp { sector: 18, ..STAMP };
        assert_eq!(Stamp::parse(&data[SECTOR_SIZE..]), Some((second, true)));
    }

    #[test]
    fn descriptions_name_what_matters() {
        let mut data = [0; SECTOR_SIZE];
        assert_eq!(describe(&data), "zeros");
        STAMP.write(&mut data);
        assert_eq!(describe(&data), "write 3 of queue 1 to sector 17, seed 0x2a");
        data[100] ^= 1;
        assert!(describe(&data).contains("torn or damaged"));
        data[0] = 0;
        assert!(describe(&data).starts_with("no stamp: 004c4b42"));
    }
}
