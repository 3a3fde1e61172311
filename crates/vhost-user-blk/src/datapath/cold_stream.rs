//! Readers that go through a file which is not in the page cache.
//!
//! The kernel reads ahead of such a reader, but only while it sees it go on, and
//! only when the reader has come to what was read ahead the last time: the disk
//! then waits for the reader as often as the reader for the disk. So two things are
//! done for a stream once it is recognised:
//!
//! - Its larger reads stay with io_uring until they get to pages that are there for
//!   another reason. A copy from the mapping would hide from the kernel that the
//!   reader goes on.
//! - A byte here and there is read well ahead of the reader ([`ColdStreams::ahead`]):
//!   the kernel takes that for the reader and starts its next reading ahead
//!   earlier, in the same large pieces. To ask for the pages outright
//!   (POSIX_FADV_WILLNEED) brings them in one by one, and was a third slower than
//!   doing nothing.

use cow_format::LayerIndex;

/// A read of fewer bytes is copied from the mapping where it can be, stream or not:
/// at this size a system call costs more than the copy.
const LEN_MIN: u64 = 16 << 10;

/// Requests of a stream come a little out of order, and the layers of a chain have
/// gaps.
const GAP_MAX: u64 = 512 << 10;

/// What was read in a row before anything is read ahead: random reads do not follow
/// one another for so long.
const RUN_MIN: u64 = 256 << 10;

/// How far ahead of its reader a stream is touched, and never further than it has
/// come: what is lost when it ends, or what other files lose in the page cache, is no
/// more than that and what the kernel itself reads ahead. At 2 GB/s it is 4 ms, in
/// which a disk or its host may be busy with something else.
const AHEAD_MAX: u64 = 8 << 20;

/// One touch in so many bytes: the kernel's default readahead, so that each piece that
/// it reads ahead is noticed.
const STEP: u64 = 128 << 10;

/// No reading ahead gets so far, that of the kernel included: 128 KiB is its default,
/// some MiB what hosts set.
const BEYOND: u64 = 32 << 20;

/// What is assumed where the kernel does not say how far it reads ahead: its default.
const READAHEAD: u64 = 128 << 10;

/// Streams of a queue: a few readers at once, or one and the layers of a chain, with
/// the random reads between two of theirs.
const STREAMS: usize = 8;

/// Reads that belong to no stream, one after the other, until all streams are taken
/// to have ended.
const STRANGERS_MAX: u32 = 4096;

/// What counts about a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ColdFile {
    /// Its length in bytes, rounded up to pages.
    pub(crate) len: u64,
    /// How far the kernel reads ahead in it, in bytes.
    pub(crate) readahead: u64,
}

impl ColdFile {
    /// A file on device `dev` (as of `st_dev`). A host may set for each of its devices
    /// how far the kernel reads ahead.
    pub(crate) fn new(dev: u64, len: u64) -> Self {
        let (major, minor) = (libc::major(dev), libc::minor(dev));
        let readahead = [
            format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"),
            // A partition.
            format!("/sys/dev/block/{major}:{minor}/../queue/read_ahead_kb"),
        ];
        let told = |path: &String| -> Option<u64> {
            std::fs::read_to_string(path).ok()?.trim_end().parse().ok()
        };
        let readahead = readahead.iter().find_map(told);
        Self { len, readahead: readahead.map_or(READAHEAD, |kib| kib.saturating_mul(1024)) }
    }
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    layer: LayerIndex,
    /// The byte of the layer that comes next.
    next: u64,
    /// What was read since it began, not counting its first read.
    run: u64,
    /// Up to where it was touched.
    touched: u64,
    /// Up to where it should be touched.
    target: u64,
}

impl Stream {
    fn continues(&self, layer: LayerIndex, at: u64) -> bool {
        self.layer == layer && at.abs_diff(self.next) <= GAP_MAX
    }

    /// A read of `at..end`.
    fn advance(&mut self, at: u64, end: u64, file: &ColdFile) {
        if end <= self.next {
            return;
        }
        self.run = self.run.saturating_add(end - at);
        self.next = end;
        self.touched = self.touched.max(end.div_ceil(STEP).saturating_mul(STEP));
        // A larger read is one operation of the disk, touches would cut it up.
        if self.run >= RUN_MIN && end - at <= file.readahead {
            self.target = end.saturating_add(self.run.min(AHEAD_MAX)).min(file.len);
        }
    }
}

/// The cold streams of a queue.
#[derive(Debug, Default)]
pub(crate) struct ColdStreams {
    /// The one that went on last is the first.
    streams: [Option<Stream>; STREAMS],
    /// There may be one.
    live: bool,
    strangers: u32,
}

impl ColdStreams {
    /// A read of `at..end` was not wholly in the page cache.
    #[inline]
    pub(crate) fn missed(&mut self, layer: LayerIndex, at: u64, end: u64) {
        if self.find(layer, at).is_none() {
            self.begin(Stream { layer, next: end, run: 0, touched: 0, target: 0 });
        }
    }

    /// Takes the place of one that never went on, or else of the one that did not
    /// for the longest time.
    fn begin(&mut self, stream: Stream) {
        let idle = |it: &Option<Stream>| it.is_none_or(|stream| stream.run == 0);
        let place = self.streams.iter().rposition(idle).unwrap_or(STREAMS - 1);
        self.streams[place] = Some(stream);
        self.streams[..=place].rotate_right(1);
        self.live = true;
    }

    fn find(&self, layer: LayerIndex, at: u64) -> Option<usize> {
        self.streams.iter().position(|it| it.is_some_and(|it| it.continues(layer, at)))
    }

    /// Whether `at..end` of `file` is to be read through io_uring, since
    /// it goes on with a stream; `is_resident` says whether a byte of the file is in
    /// the page cache, false past its end.
    #[inline]
    pub(crate) fn goes_on(
        &mut self,
        layer: LayerIndex,
        (at, end): (u64, u64),
        file: &ColdFile,
        is_resident: impl FnOnce(u64) -> bool,
    ) -> bool {
        self.live && self.follow(layer, (at, end), file, is_resident)
    }

    fn follow(
        &mut self,
        layer: LayerIndex,
        (at, end): (u64, u64),
        file: &ColdFile,
        is_resident: impl FnOnce(u64) -> bool,
    ) -> bool {
        let Some(place) = self.find(layer, at) else {
            self.strangers += 1;
            if self.strangers > STRANGERS_MAX {
                *self = Self::default();
            }
            return false;
        };
        self.strangers = 0;
        self.streams[..=place].rotate_right(1);
        let Some(stream) = &mut self.streams[0] else { return false };
        stream.advance(at, end, file);
        if end - at < LEN_MIN {
            return false;
        }
        let cold = !is_resident(end.saturating_add(BEYOND));
        if !cold {
            self.streams[0] = None;
        }
        cold
    }

    /// The next byte to be touched for the stream that went on last, if there is one.
    #[inline]
    pub(crate) fn ahead(&mut self) -> Option<(LayerIndex, u64)> {
        let stream = self.streams[0].as_mut()?;
        let at = stream.touched;
        if at >= stream.target {
            return None;
        }
        stream.touched = at.saturating_add(STEP);
        Some((stream.layer, at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOP: LayerIndex = LayerIndex::TOP;
    const LEN: u64 = 1 << 30;
    const FILE: ColdFile = ColdFile { len: LEN, readahead: READAHEAD };
    const READ: u64 = 128 << 10;

    /// A read that goes on, with nothing in the page cache; whether it is left to io_uring.
    fn read(streams: &mut ColdStreams, at: u64, len: u64) -> bool {
        let is_left = streams.goes_on(TOP, (at, at + len), &FILE, |_| false);
        if !is_left {
            streams.missed(TOP, at, at + len);
        }
        is_left
    }

    fn touches(streams: &mut ColdStreams) -> Vec<u64> {
        std::iter::from_fn(|| streams.ahead()).map(|(_, at)| at).collect()
    }

    #[test]
    fn a_stream_stays_cold_until_it_meets_what_was_there_before() {
        let len = LEN_MIN;
        let mut streams = ColdStreams::default();
        let goes_on = |streams: &mut ColdStreams, at, len| {
            streams.goes_on(TOP, (at, at + len), &FILE, |_| false)
        };
        assert!(!goes_on(&mut streams, 0, len), "nothing was missed yet");
        streams.missed(TOP, 0, len);
        assert!(goes_on(&mut streams, 2 * len, len));
        assert!(goes_on(&mut streams, len, len), "out of order");
        assert!(!goes_on(&mut streams, 3 * len, 4096), "a small one");
        let far = 3 * len + 4096 + GAP_MAX + 512;
        assert!(!goes_on(&mut streams, far, len), "somewhere else");
        assert!(goes_on(&mut streams, 3 * len, len));
        let met = |byte| byte == 5 * len + BEYOND;
        assert!(!streams.goes_on(TOP, (4 * len, 5 * len), &FILE, met));
        assert!(!goes_on(&mut streams, 5 * len, len), "it is over");
    }

    #[test]
    fn a_stream_is_touched_ahead_as_far_as_it_has_come_and_no_further_than_the_limit() {
        let mut streams = ColdStreams::default();
        let (mut touched, mut last) = (0, 0);
        for at in (0..(32 << 20) / READ).map(|number| number * READ) {
            read(&mut streams, at, READ);
            let end = at + READ;
            for touch in touches(&mut streams) {
                assert!(touch.is_multiple_of(STEP) && touch >= end, "{touch} at {at}");
                assert!(last == 0 || touch == last + STEP, "{touch} after {last}");
                assert!(touch < end + end.min(AHEAD_MAX), "{touch} at {at}");
                (touched, last) = (touched + 1, touch);
            }
        }
        assert_eq!(last + STEP, (32 << 20) + AHEAD_MAX);
        assert!(touched > 300);
    }

    #[test]
    fn neither_the_end_of_the_file_nor_of_the_numbers_is_passed() {
        let mut streams = ColdStreams::default();
        for at in (1..=32).rev().map(|left| LEN - left * READ) {
            read(&mut streams, at, READ);
            assert!(touches(&mut streams).iter().all(|touch| *touch < LEN));
        }
        let mut streams = ColdStreams::default();
        let near = u64::MAX - (2 << 20);
        streams.missed(TOP, near, near + (1 << 20));
        let end = u64::MAX - READ;
        let endless = ColdFile { len: u64::MAX, readahead: u64::MAX };
        assert!(streams.goes_on(TOP, (near + (1 << 20), end), &endless, |_| false));
        touches(&mut streams);
    }

    #[test]
    fn reads_longer_than_the_readahead_are_left_alone() {
        for (readahead, some) in [(READAHEAD, false), (8 << 20, true)] {
            let file = ColdFile { readahead, ..FILE };
            let mut streams = ColdStreams::default();
            streams.missed(TOP, 0, 1 << 20);
            for mib in 1..32 {
                assert!(streams.goes_on(TOP, (mib << 20, (mib + 1) << 20), &file, |_| false));
                assert_eq!(!touches(&mut streams).is_empty(), some, "{mib}");
            }
        }
    }

    #[test]
    fn the_kernel_says_how_far_it_reads_ahead() {
        use std::os::linux::fs::MetadataExt;

        assert_eq!(ColdFile::new(u64::MAX, 7).readahead, READAHEAD);
        // The source directory's file system has a device, which may have no readahead.
        let dev = std::fs::metadata(env!("CARGO_MANIFEST_DIR")).unwrap().st_dev();
        assert!(ColdFile::new(dev, 7).readahead.is_multiple_of(1024));
    }

    #[test]
    fn random_reads_touch_nothing() {
        for len in [4096, 64 << 10] {
            let mut streams = ColdStreams::default();
            for number in 0..10_000u64 {
                let at = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (LEN / len) * len;
                read(&mut streams, at, len);
                assert!(touches(&mut streams).is_empty(), "read {number} of {len} bytes");
            }
        }
        // All over the same small place, neither.
        let mut streams = ColdStreams::default();
        read(&mut streams, 256 << 10, 4096);
        for number in 0..10_000u64 {
            let at = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 63 * 4096;
            read(&mut streams, at, 4096);
            assert!(touches(&mut streams).is_empty());
        }
    }

    #[test]
    fn streams_side_by_side_and_random_reads_among_them_all_go_on() {
        let mut streams = ColdStreams::default();
        let mut touched = [0; 2];
        for step in 0..64u64 {
            for (reader, start) in [0, 512 << 20].into_iter().enumerate() {
                assert!(read(&mut streams, start + step * READ, READ) || step == 0, "{step}");
                touched[reader] += touches(&mut streams).len();
                for stranger in 0..2 {
                    read(&mut streams, (64 << 20) + (2 * step + stranger) * (1 << 20), 4096);
                    assert!(touches(&mut streams).is_empty());
                }
            }
        }
        assert!(touched.iter().all(|touches| *touches > 60), "{touched:?}");
    }

    #[test]
    fn a_stream_of_small_reads_is_touched_and_copied() {
        let mut streams = ColdStreams::default();
        let mut touched = 0;
        for at in (0..4 << 20).step_by(4096) {
            assert!(!read(&mut streams, at, 4096));
            touched += touches(&mut streams).len();
        }
        assert!(touched > 50, "{touched}");
    }

    #[test]
    fn a_stream_that_stops_is_forgotten() {
        let mut streams = ColdStreams::default();
        read(&mut streams, 0, READ);
        assert!(read(&mut streams, READ, READ));
        for number in 0..=u64::from(STRANGERS_MAX) {
            assert!(!streams.goes_on(TOP, (LEN / 2 + number, LEN), &FILE, |_| true));
        }
        assert!(!streams.live);
        assert!(!read(&mut streams, 2 * READ, READ));
    }
}
