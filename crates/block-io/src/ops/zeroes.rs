//! Finding zeros, so that they need no space.

/// Zeros are kept as holes in whole blocks of this many bytes: what file systems allocate.
pub const ZERO_BLOCK: usize = 4096;

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Eight words at a time, without a branch between them, is a loop that compilers make vectors of.
    let mut chunks = bytes.chunks_exact(64);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && bytes.chunks_exact(64).remainder().iter().all(|byte| *byte == 0)
}

/// Calls `found` with each run of `bytes` that is to be written: whole blocks of `ZERO_BLOCK`, counted from `at` in
/// the output, that are not all zeros. `found` gets the place in `bytes`.
pub fn for_each_nonzero<E>(
    bytes: &[u8],
    at: u64,
    mut found: impl FnMut(std::ops::Range<usize>) -> Result<(), E>,
) -> Result<(), E> {
    let mut start = None;
    let mut block = 0..first_block_len(at).min(bytes.len());
    while !block.is_empty() {
        match (is_zero(&bytes[block.clone()]), start) {
            (true, Some(from)) => {
                found(from..block.start)?;
                start = None;
            }
            (false, None) => start = Some(block.start),
            _ => {}
        }
        block = block.end..(block.end + ZERO_BLOCK).min(bytes.len());
    }
    match start {
        Some(from) => found(from..bytes.len()),
        None => Ok(()),
    }
}

/// Bytes from `at` to the next border of a block.
fn first_block_len(at: u64) -> usize {
    let into = usize::try_from(at % ZERO_BLOCK as u64).unwrap_or(0);
    ZERO_BLOCK - into
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nonzero(bytes: &[u8], at: u64) -> Vec<(usize, usize)> {
        let mut runs = Vec::new();
        for_each_nonzero(bytes, at, |run| {
            runs.push((run.start, run.end));
            Ok::<(), ()>(())
        })
        .unwrap();
        runs
    }

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for len in [0, 1, 63, 64, 65, 4096, 4097] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn runs_are_whole_blocks_of_the_output() {
        let mut bytes = vec![0; 5 * ZERO_BLOCK];
        assert_eq!(nonzero(&bytes, 0), []);
        bytes[ZERO_BLOCK] = 1;
        assert_eq!(nonzero(&bytes, 0), [(ZERO_BLOCK, 2 * ZERO_BLOCK)]);
        // 512 bytes into a block of the output: the first border is 3584 bytes on.
        assert_eq!(nonzero(&bytes, 512), [(ZERO_BLOCK - 512, 2 * ZERO_BLOCK - 512)]);
        bytes[2 * ZERO_BLOCK] = 1;
        bytes[5 * ZERO_BLOCK - 1] = 1;
        assert_eq!(
            nonzero(&bytes, 0),
            [(ZERO_BLOCK, 3 * ZERO_BLOCK), (4 * ZERO_BLOCK, 5 * ZERO_BLOCK)]
        );
        assert_eq!(nonzero(&bytes[..10], 0), []);
        assert_eq!(nonzero(&[1], 4095), [(0, 1)]);
    }
}
