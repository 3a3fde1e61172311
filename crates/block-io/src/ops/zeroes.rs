//! Finding zeros, so that they take no space.

use std::ops::Range;

use crate::storage::{FS_BLOCK, ZEROS};

/// Zeros are kept as holes in whole blocks of this many bytes, [`FS_BLOCK`].
pub(crate) const ZERO_BLOCK: usize = 4096;
const _: () = assert!(ZERO_BLOCK as u64 == FS_BLOCK);

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // A comparison of slices is the C library's memcmp, which uses vector instructions.
    bytes.chunks(ZERO_BLOCK).all(|chunk| *chunk == ZEROS[..chunk.len()])
}

/// Calls `found` with each run of `bytes`, in order: its range in `bytes`, and whether it is all
/// zeros. Runs consist of whole blocks of [`ZERO_BLOCK`], counted from `at` in the output.
pub(super) fn for_each_run<E>(
    bytes: &[u8],
    at: u64,
    mut found: impl FnMut(Range<usize>, bool) -> Result<(), E>,
) -> Result<(), E> {
    let mut run = None;
    let mut block = 0..first_block_len(at).min(bytes.len());
    while !block.is_empty() {
        let zero = is_zero(&bytes[block.clone()]);
        run = match run {
            Some((start, same)) if same == zero => Some((start, same)),
            Some((start, other)) => {
                found(start..block.start, other)?;
                Some((block.start, zero))
            }
            None => Some((block.start, zero)),
        };
        block = block.end..(block.end + ZERO_BLOCK).min(bytes.len());
    }
    match run {
        Some((start, zero)) => found(start..bytes.len(), zero),
        None => Ok(()),
    }
}

/// Bytes from `at` to the next block boundary.
fn first_block_len(at: u64) -> usize {
    let into = usize::try_from(at % ZERO_BLOCK as u64).unwrap_or(0);
    ZERO_BLOCK - into
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nonzero(bytes: &[u8], at: u64) -> Vec<(usize, usize)> {
        let mut runs = Vec::new();
        let mut end = 0;
        for_each_run(bytes, at, |run, zero| {
            assert_eq!(run.start, end);
            end = run.end;
            if !zero {
                runs.push((run.start, run.end));
            }
            Ok::<(), ()>(())
        })
        .unwrap();
        assert_eq!(end, bytes.len());
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
        // 512 bytes into a block of the output: the first boundary is 3584 bytes on.
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
