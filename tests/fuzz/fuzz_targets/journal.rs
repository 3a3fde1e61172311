//! The records of a journal.
//!
//! Input: the size of the disk in sectors, then records: flags; the first block up to its last byte
//! that is not zero; how many blocks of data. Flags: the fields that every record must have right
//! are made right, and so is its checksum.

#![no_main]

use cow_format::journal::{Epoch, RANGES_MAX, RECORD_BLOCK_LEN, Records, record_len, seal};
use cow_format::{Sector, SectorCount, SectorRange};
use fuzz::Input;
use libfuzzer_sys::fuzz_target;

const EPOCH: [u8; 16] = *b"an epoch to test";
const CRC: std::ops::Range<usize> = 8..12;
const RECORDS_MAX: u64 = 4;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let disk = SectorCount::new(input.u32().into());
    let mut journal = Vec::new();
    let mut sequence = 0;
    while !input.is_empty() && sequence < RECORDS_MAX {
        add_record(&mut journal, sequence, &mut input);
        sequence += 1;
    }
    let epoch = Epoch::from_bytes(EPOCH).unwrap();
    let mut taken = 0;
    for pieces in Records::new(&journal, epoch, disk) {
        match pieces {
            Ok(pieces) => {
                assert!(pieces.len() <= RANGES_MAX);
                for (range, bytes) in &pieces {
                    assert!(!range.is_empty() && range.end().get() <= disk.get());
                    assert_eq!(bytes.len() as u64, range.len_bytes());
                    taken += bytes.len();
                }
                check_written_again(&pieces, epoch, disk);
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    assert!(taken <= journal.len());
});

fn add_record(journal: &mut Vec<u8>, sequence: u64, input: &mut Input) {
    let flags = input.u8();
    let head = input.long();
    let blocks = usize::from(input.u8() % 4);
    let mut record = vec![input.u8(); (1 + blocks) * RECORD_BLOCK_LEN];
    record[..RECORD_BLOCK_LEN].fill(0);
    let len = head.len().min(RECORD_BLOCK_LEN);
    record[..len].copy_from_slice(&head[..len]);
    if flags & 1 != 0 {
        record[..8].copy_from_slice(b"COWJRNL\n");
        let len = u32::try_from(record.len()).unwrap();
        record[12..16].copy_from_slice(&len.to_le_bytes());
        record[16..32].copy_from_slice(&EPOCH);
        record[32..40].copy_from_slice(&sequence.to_le_bytes());
    }
    if flags & 2 != 0 {
        record[CRC].fill(0);
        let crc = crc32c::crc32c(&record);
        record[CRC].copy_from_slice(&crc.to_le_bytes());
    }
    // A record can be cut short, as a torn write leaves it.
    record.truncate(record.len().saturating_sub(usize::from(flags >> 2) * 97));
    journal.extend(record);
}

/// What was read is read again from a record that is made of it.
fn check_written_again(pieces: &[(SectorRange, &[u8])], epoch: Epoch, disk: SectorCount) {
    let ranges: Vec<_> = pieces.iter().map(|(range, _)| *range).collect();
    let Some(len) = record_len(&ranges) else {
        assert!(ranges.is_empty());
        return;
    };
    let mut record = vec![0; len];
    let mut at = RECORD_BLOCK_LEN;
    for (_, bytes) in pieces {
        record[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    }
    seal(&mut record, epoch, 0, &ranges);
    let again: Vec<_> = Records::new(&record, epoch, disk).collect();
    assert_eq!(again, [Ok(pieces.to_vec())]);
    let past = Sector::new(disk.get());
    assert!(ranges.iter().all(|range| range.clipped_to(past) == *range));
}
