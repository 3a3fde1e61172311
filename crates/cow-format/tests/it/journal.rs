//! Records of the journal: only complete records count.

use cow_format::journal::{Epoch, RANGES_MAX, RECORD_BLOCK_LEN, Records, record_len, seal};
use cow_format::{Sector, SectorCount, SectorRange};
use proptest::prelude::*;

const DISK: SectorCount = SectorCount::new(1000);

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn epoch(n: u8) -> Epoch {
    Epoch::from_bytes([n; 16]).unwrap()
}

fn record(epoch: Epoch, sequence: u64, ranges: &[SectorRange], fill: u8) -> Vec<u8> {
    let mut record = vec![0; record_len(ranges).unwrap()];
    let data: u64 = ranges.iter().map(|range| range.len_bytes()).sum();
    record[RECORD_BLOCK_LEN..][..usize::try_from(data).unwrap()].fill(fill);
    seal(&mut record, epoch, sequence, ranges);
    record
}

/// The pieces and their places, in the order in which they are to be written.
fn read(journal: &[u8], epoch: Epoch) -> Vec<(SectorRange, u8)> {
    let pieces = Records::new(journal, epoch, DISK).flat_map(Result::unwrap);
    let checked = pieces.map(|(range, data)| {
        assert_eq!(data.len() as u64, range.len_bytes());
        assert!(data.iter().all(|byte| *byte == data[0]));
        (range, data[0])
    });
    checked.collect()
}

fn three() -> (Vec<u8>, Vec<(SectorRange, u8)>) {
    let ranges = [vec![range(3, 1)], vec![range(0, 8), range(900, 100)], vec![range(3, 9)]];
    let mut journal = Vec::new();
    let mut expected = Vec::new();
    for (n, ranges) in (0u8..).zip(&ranges) {
        journal.extend(record(epoch(1), n.into(), ranges, n + 1));
        expected.extend(ranges.iter().map(|range| (*range, n + 1)));
    }
    (journal, expected)
}

#[test]
fn records_are_read_in_their_order_up_to_the_first_that_is_not_whole() {
    let (mut journal, expected) = three();
    assert_eq!(read(&journal, epoch(1)), expected);
    assert_eq!(read(&journal, epoch(2)), []);
    journal.extend([0; 3 * RECORD_BLOCK_LEN]);
    assert_eq!(read(&journal, epoch(1)), expected);
    // Any byte of the second.
    for at in [
        2 * RECORD_BLOCK_LEN,
        2 * RECORD_BLOCK_LEN + 9,
        2 * RECORD_BLOCK_LEN + 35,
        3 * RECORD_BLOCK_LEN,
        3 * RECORD_BLOCK_LEN + 54_000,
    ] {
        let mut torn = journal.clone();
        torn[at] ^= 0x40;
        assert_eq!(read(&torn, epoch(1)), expected[..1], "byte {at}");
    }
    for cut in [0, 100, RECORD_BLOCK_LEN, 2 * RECORD_BLOCK_LEN - 1] {
        assert_eq!(read(&journal[..cut], epoch(1)), []);
    }
    assert_eq!(read(&journal[..3 * RECORD_BLOCK_LEN], epoch(1)), expected[..1]);
    assert_eq!(read(&journal[2 * RECORD_BLOCK_LEN..], epoch(1)), [], "it begins with the second");
}

#[test]
fn a_guest_cannot_write_a_record() {
    // The data of a record of the epoch looks like the record that would follow, as a guest that
    // has seen an older epoch could forge it; the record that really follows is torn.
    let forged = record(epoch(1), 1, &[range(7, 1)], 9);
    let mut journal = record(epoch(2), 0, &[range(0, 16)], 1);
    journal.extend(&forged);
    assert_eq!(read(&journal, epoch(2)), [(range(0, 16), 1)]);
}

#[test]
fn whole_records_that_no_writer_makes_are_refused() {
    let whole = |ranges: &[(u64, u32)], count: u32| {
        let mut bytes = record(epoch(1), 0, &[range(0, 1)], 1);
        bytes[40..44].copy_from_slice(&count.to_le_bytes());
        for (n, (sector, sectors)) in ranges.iter().enumerate() {
            let at = 48 + 16 * n;
            bytes[at..at + 8].copy_from_slice(&sector.to_le_bytes());
            bytes[at + 8..at + 12].copy_from_slice(&sectors.to_le_bytes());
        }
        bytes[8..12].fill(0);
        let crc = crc32c::crc32c(&bytes);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        Records::new(&bytes, epoch(1), DISK).next().unwrap().map(|pieces| pieces.len())
    };
    assert_eq!(whole(&[(0, 8)], 1), Ok(1));
    assert_eq!(whole(&[(0, 4), (4, 4)], 2), Ok(2));
    for (ranges, count, what) in [
        (vec![(0, 0)], 1, "outside"),
        (vec![(999, 2)], 1, "outside"),
        (vec![(u64::MAX, 1)], 1, "outside"),
        (vec![(0, u32::MAX)], 1, "outside"),
        (vec![(0, 9)], 1, "too short"),
        (vec![(0, 8), (8, 1)], 2, "too short"),
        (vec![], 254, "too many"),
        (vec![], u32::MAX, "too many"),
    ] {
        let error = whole(&ranges, count).unwrap_err();
        assert!(error.to_string().contains(what), "{ranges:?}, {count}: {error}");
    }
}

#[test]
fn lengths() {
    assert_eq!(record_len(&[]), None);
    assert_eq!(record_len(&[range(0, 1)]), Some(2 * RECORD_BLOCK_LEN));
    assert_eq!(record_len(&[range(0, 8), range(9, 1)]), Some(3 * RECORD_BLOCK_LEN));
    assert_eq!(
        record_len(&[range(0, 1); RANGES_MAX]),
        Some(RECORD_BLOCK_LEN + 32 * RECORD_BLOCK_LEN)
    );
    assert_eq!(record_len(&[range(0, 1); RANGES_MAX + 1]), None);
    assert_eq!(record_len(&[range(0, 1 << 50)]), None);
}

proptest! {
    #[test]
    fn no_bytes_are_too_strange(pokes in prop::collection::vec((0usize..80_000, any::<u64>()), 1..20)) {
        let (mut journal, expected) = three();
        for (at, value) in pokes {
            let at = at % (journal.len() - 8);
            journal[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let found: Vec<_> = Records::new(&journal, epoch(1), DISK).flatten().flatten().collect();
        prop_assert!(found.len() <= expected.len());
    }
}
