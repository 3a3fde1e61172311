//! The bitmap of a COW file: pages from the file, new bits and flushes, beside a list of ranges.
//!
//! Input: the size of the disk, then operations.

#![no_main]

use cow_format::header::NativeHeader;
use cow_format::{
    AwaitSync, BITMAP_PAGE_LEN, Bitmap, FlushPass, Geometry, Next, PAGE_SECTORS, Run, SECTOR_SIZE,
    Sector, SectorCount, SectorRange,
};
use fuzz::{Input, range};
use libfuzzer_sys::fuzz_target;

/// Two regions and a bit, so that every level of the bitmap has a border.
const SECTORS_MAX: u64 = 2 * 1024 * PAGE_SECTORS + 99;
const OPERATIONS_MAX: usize = 64;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    // Mostly small: a large one takes long.
    let sectors = match input.u8() {
        0..16 => 1 + position(&mut input, SECTORS_MAX),
        _ => 1 + input.below(4 * PAGE_SECTORS),
    };
    let header = NativeHeader::create(sectors * SECTOR_SIZE, uuid::Uuid::nil(), None).unwrap();
    let mut bitmap =
        Under { bitmap: Bitmap::unknown(SectorCount::new(sectors)), model: Model::default() };
    let geometry = header.geometry();
    for _ in 0..OPERATIONS_MAX {
        if input.is_empty() {
            break;
        }
        bitmap.operation(geometry, &mut input);
    }
    // All that was never read is absent.
    bitmap.bitmap.set_known(0..bitmap.bitmap.pages());
    bitmap.check(geometry.all());
    bitmap.check_summary();
});

/// A number below `end`, mostly near a border of a page.
fn position(input: &mut Input, end: u64) -> u64 {
    let kind = input.u8();
    let near = (u64::from(kind >> 2) * 37 % end.div_ceil(PAGE_SECTORS)) * PAGE_SECTORS;
    let number = match kind & 3 {
        0 => input.below(end),
        1 => near.wrapping_sub(input.u8().into()),
        2 => near + u64::from(input.u8()),
        _ => near + u64::from(input.u16()),
    };
    number % end
}

struct Under {
    bitmap: Bitmap,
    model: Model,
}

impl Under {
    fn operation(&mut self, geometry: &Geometry, input: &mut Input) {
        let sectors = geometry.sectors().get();
        let kind = input.u8();
        let start = position(input, sectors);
        match kind % 5 {
            0 => {
                let range = range(start, input.u16().into());
                self.learn(range);
                let inside = range.clipped_to(Sector::new(sectors));
                assert_eq!(self.bitmap.insert(range), self.model.insert(inside));
                assert!(self.bitmap.contains(inside));
            }
            1 | 2 => self.load(start / PAGE_SECTORS, kind % 5 == 2, input),
            3 => {
                // Past the end too: all is absent there.
                let range = range(start, input.u32().into());
                self.learn(range);
                self.check(range);
            }
            _ => self.flush(geometry, input.u8()),
        }
    }

    /// Reads what is unknown of `range`, as if the file had nothing there.
    fn learn(&self, range: SectorRange) {
        while let Some(page) = self.bitmap.next_unknown(range) {
            assert!(!self.bitmap.is_known(page));
            // Whole regions at once, as where a file has no data.
            let pages = match page.is_multiple_of(1024) {
                true => page..page + 1024,
                false => page..page + 1,
            };
            self.bitmap.set_known(pages);
            assert!(self.bitmap.is_known(page));
        }
    }

    /// A page with some bytes anywhere in it, longer than a page perhaps.
    fn load(&mut self, page: u64, live: bool, input: &mut Input) {
        let at = usize::from(input.u16()) % (BITMAP_PAGE_LEN + 64);
        let bytes = [vec![0; at], input.short().to_vec()].concat();
        match live {
            true => self.bitmap.load_live(page, &bytes),
            false => self.bitmap.load_durable(page, &bytes),
        }
        self.bitmap.set_known(page..page + 1);
        let sectors = self.bitmap.sectors().get();
        for (index, byte) in bytes.iter().enumerate().take(BITMAP_PAGE_LEN).skip(at) {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                let sector = page * PAGE_SECTORS + index as u64 * 8 + bit;
                if sector < sectors {
                    self.model.insert(range(sector, 1));
                }
            }
        }
    }

    fn check(&self, range: SectorRange) {
        let runs: Vec<Run> = self.bitmap.runs(range).collect();
        assert_eq!(runs, self.model.runs(range));
        let whole = !range.is_empty() && runs.len() == 1 && runs[0].present;
        assert_eq!(self.bitmap.contains(range), whole || range.is_empty());
    }

    fn check_summary(&self) {
        let ranges = &self.model.ranges;
        let present = ranges.iter().map(|(start, end)| end - start).sum();
        assert_eq!(self.bitmap.present(), SectorCount::new(present));
        assert_eq!(
            self.bitmap.last_present().map(Sector::get),
            ranges.last().map(|(_, end)| end - 1)
        );
    }

    /// `failing` steps succeed, then one fails; what was not made durable must stay dirty.
    fn flush(&self, geometry: &Geometry, failing: u8) {
        let dirty = self.bitmap.dirty_pages();
        let mut pass: AwaitSync<'_> = FlushPass::begin(&self.bitmap, geometry);
        for _ in 0..failing {
            let writes = match pass.synced() {
                Next::Complete => {
                    assert_eq!(self.bitmap.dirty_pages(), 0);
                    return;
                }
                Next::Write(writes) => writes,
            };
            let end = geometry.bitmap_offset().get() + geometry.bitmap_len();
            for write in writes.writes() {
                assert!(write.at >= geometry.bitmap_offset());
                assert!(write.at.get() + write.bytes.len() as u64 <= end);
                assert!(write.bytes.iter().any(|byte| *byte != 0));
            }
            pass = writes.written();
        }
        drop(pass);
        assert!(self.bitmap.dirty_pages() <= dirty);
    }
}

/// Ranges of present sectors, in order, that do not touch: start and end.
#[derive(Default)]
struct Model {
    ranges: Vec<(u64, u64)>,
}

impl Model {
    /// Whether anything in it is new.
    fn insert(&mut self, range: SectorRange) -> bool {
        let (mut start, mut end) = (range.start().get(), range.end().get());
        if start == end {
            return false;
        }
        let ranges = &mut self.ranges;
        let first = ranges.partition_point(|(_, other_end)| *other_end < start);
        let last = ranges.partition_point(|(other_start, _)| *other_start <= end);
        if let Some((other_start, other_end)) = ranges[first..last].first() {
            if *other_start <= start && end <= *other_end {
                return false;
            }
            start = start.min(*other_start);
            end = end.max(ranges[last - 1].1);
        }
        ranges.splice(first..last, [(start, end)]);
        true
    }

    fn runs(&self, range: SectorRange) -> Vec<Run> {
        let mut runs = Vec::new();
        let (mut pos, end) = (range.start().get(), range.end().get());
        let mut add = |to: u64, present| {
            let to = to.min(end);
            if pos < to {
                runs.push(Run { range: fuzz::range(pos, to - pos), present });
                pos = to;
            }
        };
        for (start, end) in &self.ranges {
            add(*start, false);
            add(*end, true);
        }
        add(end, false);
        runs
    }
}
