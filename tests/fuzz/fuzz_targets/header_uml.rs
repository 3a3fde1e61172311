//! UML headers, and anything else that is not sealed with a checksum.
//!
//! Input: the file's length, then its first bytes.

#![no_main]

use cow_format::header::UmlHeader;
use cow_format::identity::Timestamp;
use cow_format::{HEADER_PREFIX_LEN, Header};
use fuzz::{Input, check_places};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let file_len = input.u64();
    let prefix = input.bytes(HEADER_PREFIX_LEN);
    match Header::check(prefix, file_len) {
        Ok(header) => {
            check_places(header.geometry(), file_len);
            if let Header::Uml(header) = header {
                check_rewritten(&header, prefix, file_len);
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

/// A header that is written again with another backing file differs in nothing else.
fn check_rewritten(header: &UmlHeader, prefix: &[u8], file_len: u64) {
    let path = b"/another/base.img";
    let Ok(renewed) = header.with_backing(path, Timestamp::new(7, 0).unwrap()) else {
        panic!("a valid path and time were refused");
    };
    let Ok(encoded) = renewed.encode() else {
        assert!(header.is_read_only());
        return;
    };
    let mut rewritten = prefix.to_vec();
    rewritten[..encoded.len()].copy_from_slice(&encoded);
    assert_eq!(Header::check(&rewritten, file_len), Ok(Header::Uml(renewed.clone())));
    assert_eq!(renewed.geometry(), header.geometry());
    assert_eq!((renewed.version(), renewed.backing_path()), (header.version(), &path[..]));
}
