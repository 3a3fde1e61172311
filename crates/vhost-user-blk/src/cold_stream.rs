//! A reader that goes through a file which is not in the page cache.
//!
//! The kernel reads ahead of it, but only while it sees it go on: a copy from the
//! mapping of what has been read ahead would hide that, and the next page would
//! have to be waited for. So a stream that began cold stays with io_uring until it
//! gets to pages that are there for another reason.

use cow_format::LayerIndex;

/// A reader of fewer bytes at a time is not waited for: a guest that goes through a
/// file reads more, by its own readahead.
const LEN_MIN: u64 = 16 << 10;

/// Requests of a stream come a little out of order.
const GAP_MAX: u64 = 512 << 10;

/// No readahead gets so far: 128 KiB is the kernel's default, some MiB what hosts
/// set.
const AHEAD: u64 = 16 << 20;

/// The last cold stream of a queue.
#[derive(Debug, Default)]
pub struct ColdStream {
    /// The layer, and the byte of it that comes next.
    next: Option<(LayerIndex, u64)>,
}

impl ColdStream {
    /// A read of `at..end` was not wholly in the page cache.
    #[inline]
    pub fn missed(&mut self, layer: LayerIndex, at: u64, end: u64) {
        if end - at >= LEN_MIN {
            self.next = Some((layer, end));
        }
    }

    /// Whether `at..end` goes on with the stream; `is_resident` says it of a byte of
    /// the file, false past its end.
    #[inline]
    pub fn goes_on(
        &mut self,
        layer: LayerIndex,
        at: u64,
        end: u64,
        is_resident: impl FnOnce(u64) -> bool,
    ) -> bool {
        let Some((of, next)) = self.next else { return false };
        if of != layer || at.abs_diff(next) > GAP_MAX || end - at < LEN_MIN {
            return false;
        }
        let cold = !is_resident(end.saturating_add(AHEAD));
        self.next = cold.then_some((layer, next.max(end)));
        cold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_stays_cold_until_it_meets_what_was_there_before() {
        let (top, len) = (LayerIndex::TOP, LEN_MIN);
        let mut stream = ColdStream::default();
        assert!(!stream.goes_on(top, 0, len, |_| false), "nothing was missed yet");
        stream.missed(top, 0, len);
        assert!(stream.goes_on(top, 2 * len, 3 * len, |_| false));
        assert!(stream.goes_on(top, len, 2 * len, |_| false), "out of order");
        assert!(!stream.goes_on(top, 3 * len, 3 * len + 4096, |_| false), "a small one");
        let far = 3 * len + GAP_MAX + 512;
        assert!(!stream.goes_on(top, far, far + len, |_| false), "somewhere else");
        assert!(stream.goes_on(top, 3 * len, 4 * len, |_| false));
        assert!(!stream.goes_on(top, 4 * len, 5 * len, |byte| byte == 5 * len + AHEAD));
        assert!(!stream.goes_on(top, 5 * len, 6 * len, |_| false), "it is over");
    }
}
