//! Delta streams.
//!
//! Input: whether it is a stream as it is, or the parts of one. Those are put together with the
//! checksums and the digest that make it whole: the header; for each record its flags, its fields
//! and how many bytes of data follow.

#![no_main]

use cow::delta::{Reader, Record};
use cow_format::SECTOR_SIZE;
use fuzz::Input;
use libfuzzer_sys::fuzz_target;

const HEADER_LEN: usize = 112;
const RECORD_LEN: usize = 24;
/// Records, so that a target's input of some bytes does not become a stream of megabytes.
const RECORDS_MAX: usize = 16;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    match input.u8() & 1 {
        0 => read(input.rest()),
        _ => read(&stream(&mut input)),
    }
});

fn read(stream: &[u8]) {
    let mut reader = match Reader::new(stream) {
        Ok(reader) => reader,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let size = reader.header().virtual_size.next_multiple_of(SECTOR_SIZE);
    let mut done = 0;
    loop {
        let (at, len) = match reader.record() {
            Ok(Some(Record::Data { at, bytes })) => (at, bytes.len() as u64),
            Ok(Some(Record::Zero { at, len })) => (at, len),
            Ok(None) => break,
            Err(error) => return assert!(!error.to_string().is_empty()),
        };
        assert!(done <= at && at.checked_add(len).is_some_and(|end| end <= size));
        assert!(len > 0 && at.is_multiple_of(SECTOR_SIZE) && len.is_multiple_of(SECTOR_SIZE));
        done = at + len;
    }
}

fn stream(input: &mut Input) -> Vec<u8> {
    let mut header: [u8; HEADER_LEN] = input.array();
    header[..8].copy_from_slice(b"COWDELTA");
    let crc = crc32c::crc32c(&header[16..]);
    header[12..16].copy_from_slice(&crc.to_le_bytes());
    let mut plain = Vec::new();
    let (mut records, mut bytes) = (0_u64, 0_u64);
    while !input.is_empty() && records < RECORDS_MAX as u64 {
        let (kind, flags) = (input.u8() % 4, input.u8());
        // In sectors, or in bytes if that is odd.
        let unit = if flags & 1 == 0 { SECTOR_SIZE } else { 1 };
        let at = u64::from(input.u16()).wrapping_mul(unit);
        let len = match flags & 2 {
            0 => u64::from(input.u8()) * unit,
            _ => input.u64(),
        };
        let data = match kind {
            1 => vec![input.u8(); usize::try_from(len).unwrap().min(1 << 16)],
            _ => Vec::new(),
        };
        add(&mut plain, kind.into(), at, len, &data);
        records += 1;
        bytes = bytes.wrapping_add(len);
    }
    add(&mut plain, 0, records, bytes, &[]);
    let digest = blake3::Hasher::new().update(&header).update(&plain).finalize();
    plain.extend_from_slice(digest.as_bytes());
    [header.as_slice(), &zstd::encode_all(plain.as_slice(), 1).unwrap()].concat()
}

fn add(plain: &mut Vec<u8>, kind: u32, at: u64, len: u64, data: &[u8]) {
    let mut record = [0; RECORD_LEN];
    record[..4].copy_from_slice(&kind.to_le_bytes());
    record[8..16].copy_from_slice(&at.to_le_bytes());
    record[16..].copy_from_slice(&len.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&record), data);
    record[4..8].copy_from_slice(&crc.to_le_bytes());
    plain.extend_from_slice(&record);
    plain.extend_from_slice(data);
}
