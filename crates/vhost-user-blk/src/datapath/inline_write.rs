//! Small writes into the page cache, done by the worker itself.
//!
//! io_uring leaves every buffered write to a kernel thread. That thread takes as long for it, costs
//! two context switches on an idle queue, and competes with the worker for the inode's lock, since
//! each first write of a sector sets a bit in the same file. The price of writing here is that the
//! queue waits whenever the kernel makes a writer wait, for example because too much memory is
//! dirty. So after a write that took long, the next ones go through io_uring for a while.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use block_io::fault_injection;
use cow_format::ByteOffset;

/// The longest write that is done here: with a whole batch of them the reads that
/// came with it wait for some 100 microseconds.
const LEN_MAX: usize = 32 << 10;

/// A write that took longer than this was held up: copying takes a few microseconds, a context
/// switch to another thread and back takes tens.
const HELD_UP: Duration = Duration::from_micros(500);

/// For how many times the duration of a held up write the next writes go through io_uring: the
/// queue waits for a few percent of the time at most.
const CAUTION: u32 = 20;

/// The inline writes of one queue.
#[derive(Debug, Default)]
pub(crate) struct InlineWrites {
    cautious_until: Option<Instant>,
}

impl InlineWrites {
    /// Writes `buffers`, in order, to `fd` at byte `at`, if that is likely to be quick. False if
    /// not all was written: then the caller writes all of it through the ring, which reports the
    /// error if there is one.
    ///
    /// # Safety
    /// The buffers are memory that stays mapped during the call; no reference to
    /// them exists.
    pub(crate) unsafe fn write(
        &mut self,
        fd: BorrowedFd<'_>,
        at: ByteOffset,
        buffers: &[libc::iovec],
    ) -> bool {
        let len: usize = buffers.iter().map(|buffer| buffer.iov_len).sum();
        let buffers = fault_injection::shortened(buffers);
        let (Ok(count), Ok(at)) = (i32::try_from(buffers.len()), i64::try_from(at.get())) else {
            return false;
        };
        if len > LEN_MAX {
            return false;
        }
        let begun = Instant::now();
        if self.cautious_until.is_some_and(|until| begun < until) {
            return false;
        }
        // SAFETY: the caller vouches for the buffers; the kernel only reads them.
        let written = unsafe { libc::pwritev64(fd.as_raw_fd(), buffers.as_ptr(), count, at) };
        let took = begun.elapsed();
        self.cautious_until = (took > HELD_UP).then(|| begun + took * CAUTION);
        usize::try_from(written) == Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn write(inline: &mut InlineWrites, file: &std::fs::File, bytes: &[u8]) -> bool {
        let iovec = |part: &[u8]| libc::iovec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: part.len(),
        };
        let (head, tail) = bytes.split_at(bytes.len() / 3);
        // SAFETY: the slices live, and are only read.
        unsafe { inline.write(file.as_fd(), ByteOffset::new(512), &[iovec(head), iovec(tail)]) }
    }

    #[test]
    fn small_writes_are_done_and_others_left() {
        let file = tempfile::tempfile().unwrap();
        let mut inline = InlineWrites::default();
        assert!(write(&mut inline, &file, &[7; 1536]));
        assert_eq!(file.metadata().unwrap().len(), 2048);
        inline.cautious_until = None;
        assert!(!write(&mut inline, &file, &[7; LEN_MAX + 1]), "too long");
        assert!(
            !write(&mut inline, &std::fs::File::open("/dev/null").unwrap(), &[7; 512]),
            "failed"
        );
        inline.cautious_until = Some(Instant::now() + Duration::from_secs(3600));
        assert!(!write(&mut inline, &file, &[7; 512]), "after one that was held up");
        assert_eq!(file.metadata().unwrap().len(), 2048);
    }
}
