//! Native headers. Their checksums are made right, so that what is behind them is reached.
//!
//! Input: which copies are sealed; the file's length; the first copy up to its last byte that is
//! not zero, with its length in front; the rest is the second copy.

#![no_main]

use cow_format::header::{NativeHeader, NativeState};
use cow_format::{HEADER_PREFIX_LEN, Header};
use fuzz::{Input, check_places};
use libfuzzer_sys::fuzz_target;

const COPY_LEN: usize = HEADER_PREFIX_LEN / 2;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let (flags, file_len) = (input.u8(), input.u64());
    let copies = [input.long(), input.rest()];
    let mut prefix = [0; HEADER_PREFIX_LEN];
    for (index, (copy, bytes)) in prefix.chunks_exact_mut(COPY_LEN).zip(copies).enumerate() {
        let len = bytes.len().min(COPY_LEN);
        copy[..len].copy_from_slice(&bytes[..len]);
        if flags & (1 << index) != 0 {
            fuzz::seal_header(copy);
        }
    }
    match Header::check(&prefix, file_len) {
        Ok(header) => {
            check_places(header.geometry(), file_len);
            if let Header::Native(header) = header {
                check_rewritten(*header, &mut prefix, file_len);
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});

/// A header that is written again reads as what was written, through either copy.
fn check_rewritten(mut header: NativeHeader, prefix: &mut [u8], file_len: u64) {
    if header.state() == NativeState::Frozen || header.set_in_use(None).is_err() {
        return;
    }
    for _ in 0..2 {
        // The generation may have no successor.
        let Ok(write) = header.next_write() else { return };
        let at = usize::try_from(write.at.get()).unwrap();
        prefix[at..at + COPY_LEN].copy_from_slice(&*write.bytes);
        let Ok(Header::Native(read)) = Header::check(prefix, file_len) else {
            panic!("what was written cannot be read");
        };
        check_places(read.geometry(), file_len);
        assert_eq!(read.generation(), header.generation());
        assert_eq!(read.content_generation(), header.content_generation());
        assert_eq!((read.state(), read.backing()), (header.state(), header.backing()));
        assert_eq!(
            (read.journal(), read.journal_epoch()),
            (header.journal(), header.journal_epoch())
        );
    }
}
