//! The side file of a UML disk that was not closed.
//!
//! Input: whether its header is kept; changes of it, or all of it; its length; what is done with
//! the disk.

#![no_main]

use block_io::storage::Storage;
use cow_format::ByteOffset;
use fuzz::{Input, image};
use libfuzzer_sys::fuzz_target;

/// Bytes of the header, with the checksum of the rest at its end.
const HEADER_LEN: usize = 120;
const CRC_AT: usize = HEADER_LEN - 4;
/// Where the bits begin.
const BITMAP: u64 = 4096;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    // The UML disks come last; after them in order closed, died, and cut off twice.
    let templates = image::templates();
    let sim = templates[templates.len() - 3].fork();
    let file = image::file(&sim, image::LIVE);
    let flags = input.u8();
    let mut header = [0; HEADER_LEN];
    if flags & 1 != 0 {
        file.read_exact_at(&mut header, ByteOffset::new(0)).unwrap();
    }
    for _ in 0..flags >> 1 & 3 {
        let at = usize::from(input.u8()) % HEADER_LEN;
        let bytes = input.short();
        let len = bytes.len().min(HEADER_LEN - at);
        header[at..at + len].copy_from_slice(&bytes[..len]);
    }
    if flags & 8 != 0 {
        let crc = crc32c::crc32c(&header[..CRC_AT]);
        header[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    }
    file.write_all_at(&header, ByteOffset::new(0)).unwrap();
    for _ in 0..flags >> 4 & 3 {
        let at = BITMAP + u64::from(input.u16());
        file.write_all_at(input.short(), ByteOffset::new(at)).unwrap();
    }
    if flags & 0x40 != 0 {
        file.set_len(input.u64() & (u64::MAX >> 2)).unwrap();
    }
    drop(file);
    image::use_disk(&sim, &mut input);
});
