//! Reads without a system call: what is in the page cache is copied from a
//! mapping of the file straight into guest memory.
//!
//! A page that is not in the page cache must not be touched: the fault would
//! hold up the whole queue. So each queue keeps a small table of what mincore(2)
//! said a short time ago. A page that was evicted since then costs one fault, no
//! more; a page that came in since then is read through io_uring once more.
//!
//! A mapped file can be truncated, or its disk can fail. Touching the page then raises SIGBUS,
//! whose handler ([`crate::guest_memory::sigbus`]) poisons the mapping. That is checked after each
//! copy. A poisoned mapping is never used again, and reads through io_uring report the error.

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use block_io::{Disk, fault_injection};
use cow_format::{ByteOffset, LayerIndex};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{AccessFlags, geteuid};

use crate::datapath::cold_stream::{ColdFile, ColdStreams};
use crate::datapath::layer_files::cached_file;
use crate::guest_memory::PAGE_SIZE;
use crate::guest_memory::memory::Memory;
use crate::guest_memory::sigbus::Registration;

#[expect(clippy::cast_possible_truncation)]
const PAGE: usize = PAGE_SIZE as usize;

/// Pages that one call of mincore asks about. It costs about a microsecond where
/// they are not mapped yet.
const GROUP_PAGES: usize = 64;

/// Pages that the first call in a group asks about, if no more are wanted: the
/// layers of a chain have many places that are read only now and then, and such
/// a call costs a third.
const FIRST_PAGES: usize = 8;

/// Groups of a window, which ages as a whole: 2 MiB of a file.
const GROUPS: usize = 8;
const WINDOW_PAGES: usize = GROUP_PAGES * GROUPS;

/// Windows that a queue remembers: 8 GiB of files, in 576 KiB of memory once all
/// are in use. Two share two places; the third finds out which is needed least.
const WINDOWS: usize = 4096;

/// How long an answer of mincore counts. Asking four times a second about each
/// GiB in use is about one percent of a core.
const FRESH_NS: u64 = 250_000_000;

/// The longest read that is copied: some 200 microseconds, in which the queue does
/// nothing else. Up to there it is up to twice as fast as the kernel's copy.
pub(crate) const READ_MAX: u64 = 4 << 20;

/// The layers of a disk, mapped; shared by its queues.
pub(crate) struct Mappings {
    layers: Vec<Option<Mapping>>,
    /// Some queue has copied from them lately.
    used: AtomicBool,
}

impl Mappings {
    /// Maps every layer that is read through the page cache and whose residency the kernel reports.
    /// A layer that cannot be mapped is read through io_uring.
    pub(crate) fn new(disk: &Disk) -> Self {
        let map = |layer| cached_file(layer).and_then(Mapping::new);
        let layers = disk.layers().iter().map(map).collect();
        Self { layers, used: AtomicBool::new(false) }
    }

    /// Releases the mapped pages if no queue has used any since the last call: they count as the
    /// daemon's memory. The page cache stays as it is. True if they were released.
    pub(crate) fn forget_unused(&self) -> bool {
        if self.used.swap(false, Ordering::Relaxed) {
            return false;
        }
        for mapping in self.layers.iter().flatten() {
            // SAFETY: a shared mapping of a file: its pages come back from the
            // file when they are touched again.
            _ = unsafe { madvise(mapping.map.start, mapping.map.len, MmapAdvise::MADV_DONTNEED) };
        }
        true
    }
}

struct Mapping {
    // First, so that the handler forgets the mapping before it goes.
    registration: Registration,
    map: Map,
    cold: ColdFile,
}

/// A read-only mapping of whole pages.
struct Map {
    start: NonNull<libc::c_void>,
    /// In bytes.
    len: usize,
}

// SAFETY: the mapping is read-only and belongs to no thread.
unsafe impl Send for Map {}
// SAFETY: as above; all access is by copying out.
unsafe impl Sync for Map {}

impl Map {
    fn new(fd: BorrowedFd<'_>, len: NonZeroUsize) -> nix::Result<Self> {
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let start = unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, fd, 0) }?;
        // The guest's reads have no order that reading ahead could follow; it
        // would only evict what others need. Not to have this is no error.
        // SAFETY: an advice about the mapping just made.
        _ = unsafe { madvise(start, len.get(), MmapAdvise::MADV_RANDOM) };
        Ok(Self { start, len: len.get() })
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: made in `new`; a copy borrows it, so no copy is in progress.
        _ = unsafe { munmap(self.start, self.len) };
    }
}

impl Mapping {
    fn new(fd: BorrowedFd<'_>) -> Option<Self> {
        let stat = fstat(fd).ok()?;
        let regular = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG;
        let len = NonZeroUsize::new(usize::try_from(stat.st_size).ok()?.next_multiple_of(PAGE))?;
        if !regular || !residency_is_told(fd, stat.st_uid) {
            return None;
        }
        let map = Map::new(fd, len).ok()?;
        // SAFETY: the mapping is of a file, whole pages, and outlives the
        // registration; what it holds is looked at only by copying it out, and
        // believed only while the mapping is not poisoned.
        match unsafe { Registration::new(map.start.as_ptr().cast(), map.len, PAGE) } {
            Ok(registration) => {
                let cold = ColdFile::new(stat.st_dev, map.len as u64);
                Some(Self { registration, map, cold })
            }
            Err(e) => {
                log::warn!("a layer is not mapped: {e}");
                None
            }
        }
    }

    /// Which of `pages` pages from `page` on, at most a group, are in the page
    /// cache, one bit for each.
    fn residency(&self, page: u64, pages: usize) -> u64 {
        let first = usize::try_from(page).unwrap_or(usize::MAX).saturating_mul(PAGE);
        let pages = (self.map.len.saturating_sub(first) / PAGE).min(pages);
        let mut answer = [0u8; GROUP_PAGES];
        // SAFETY: `pages` whole pages of the mapping, of which the answer has a
        // byte each.
        let status = unsafe {
            let start = self.map.start.as_ptr().byte_add(first.min(self.map.len));
            libc::mincore(start, pages * PAGE, answer.as_mut_ptr())
        };
        if status != 0 {
            return 0;
        }
        let bits = answer[..pages].iter().zip(0..).map(|(byte, bit)| u64::from(byte & 1) << bit);
        bits.sum()
    }
}

/// Whether mincore(2) answers truthfully. To a process that could not write the file it reports
/// every page as resident, so as not to reveal what others read.
fn residency_is_told(fd: BorrowedFd<'_>, owner: u32) -> bool {
    let euid = geteuid();
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    euid.is_root()
        || euid.as_raw() == owner
        || nix::unistd::access(path.as_str(), AccessFlags::W_OK).is_ok()
}

/// What is known of a window: its tag (layer and number; 0 for none), since when,
/// and for each group the pages that were asked about and those of them that are
/// in the page cache. Plain numbers, so that a new table is untouched zero pages.
type Window = [u64; 2 + 2 * GROUPS];

/// Bytes of a layer that were in the page cache a short time ago.
pub(crate) struct ResidentRange<'a> {
    /// Has all of them.
    mapping: &'a Mapping,
    /// The first one, in bytes from the start of the mapping.
    start: usize,
    /// How many.
    len: usize,
}

/// One queue's view of the mappings.
pub(crate) struct Resident<'a> {
    mappings: &'a Mappings,
    windows: Vec<Window>,
    epoch: Instant,
    /// Nanoseconds since `epoch`.
    now: u64,
    /// Something was copied since [`Self::rested`].
    used: bool,
    streams: ColdStreams,
}

impl<'a> Resident<'a> {
    /// A view that knows nothing yet.
    pub(crate) fn new(mappings: &'a Mappings) -> Self {
        let windows = if mappings.layers.iter().any(Option::is_some) { WINDOWS } else { 0 };
        Self {
            mappings,
            windows: vec![[0; 2 + 2 * GROUPS]; windows],
            epoch: Instant::now(),
            now: 0,
            used: false,
            streams: ColdStreams::default(),
        }
    }

    /// Looks at the clock: what is known ages.
    pub(crate) fn tick(&mut self) {
        self.now = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
    }

    /// To be called before the queue sleeps: whether it has used the mappings
    /// since the last time, so that [`Mappings::forget_unused`] should be called
    /// after a while.
    pub(crate) fn rested(&mut self) -> bool {
        let used = std::mem::take(&mut self.used);
        // Looked at first: a store would take the cache line from other queues.
        if used && !self.mappings.used.load(Ordering::Relaxed) {
            self.mappings.used.store(true, Ordering::Relaxed);
        }
        used
    }

    /// The next byte of a layer that is to be read so that the kernel reads ahead of a
    /// cold stream, if there is one; what it is does not matter.
    #[inline]
    pub(crate) fn ahead(&mut self) -> Option<(LayerIndex, ByteOffset)> {
        self.streams.ahead().map(|(layer, at)| (layer, ByteOffset::new(at)))
    }

    /// Whether all of `len` bytes of `layer` at `at` are in the page cache.
    pub(crate) fn holds(&mut self, layer: LayerIndex, at: ByteOffset, len: u64) -> bool {
        let mappings = self.mappings;
        let Some(Some(mapping)) = mappings.layers.get(layer.get()) else { return false };
        let Some(end) = at.get().checked_add(len) else { return false };
        end <= mapping.cold.len && self.is_resident(mapping, layer, at.get(), end)
    }

    /// The `len` bytes of `layer` at `at`, to be copied, if all of them are in the page cache. None
    /// also if the file cannot be read in this way, or if a copy would hide a cold stream from the
    /// kernel.
    #[inline]
    pub(crate) fn find(
        &mut self,
        layer: LayerIndex,
        at: ByteOffset,
        len: u64,
    ) -> Option<ResidentRange<'a>> {
        let mappings = self.mappings;
        let mapping = mappings.layers.get(layer.get())?.as_ref()?;
        let end = at.get().checked_add(len)?;
        if end > mapping.cold.len || mapping.registration.poisoned() {
            return None;
        }
        let is_resident = |byte| mapping.residency(byte / PAGE as u64, 1) != 0;
        if self.streams.goes_on(layer, (at.get(), end), &mapping.cold, is_resident) {
            return None;
        }
        if !self.is_resident(mapping, layer, at.get(), end) {
            self.streams.missed(layer, at.get(), end);
            return None;
        }
        // Less than the mapping's length, which is a usize.
        #[expect(clippy::cast_possible_truncation)]
        Some(ResidentRange { mapping, start: at.get() as usize, len: len as usize })
    }

    /// Copies `range` to `buffers`, as much as they hold. False if the file has been truncated; the
    /// buffers' content is then undefined.
    #[inline]
    pub(crate) fn copy(
        &mut self,
        range: &ResidentRange<'a>,
        memory: &Memory,
        buffers: &[libc::iovec],
    ) -> bool {
        let ResidentRange { mapping, start: mut from, len: mut left } = *range;
        for buffer in buffers {
            if fault_injection::one_in(3) {
                return false;
            }
            let len = buffer.iov_len.min(left);
            // SAFETY: the range is inside of the mapping, and `left` bytes of it follow at `from`.
            let source = unsafe { mapping.map.start.as_ptr().cast::<u8>().add(from).cast_const() };
            // SAFETY: `len` is at most `left`.
            if !unsafe { memory.copy_to_host(buffer.iov_base.cast(), source, len) } {
                return false;
            }
            (from, left) = (from + len, left - len);
        }
        self.used = true;
        !mapping.registration.poisoned()
    }

    /// Whether the pages of `at..end` were in the page cache a short time ago.
    fn is_resident(&mut self, mapping: &Mapping, layer: LayerIndex, at: u64, end: u64) -> bool {
        let (first, last) = (at / PAGE as u64, (end - 1) / PAGE as u64);
        let few = last - first < FIRST_PAGES as u64;
        (first..=last).all(|page| self.is_page_resident(mapping, layer, page, few))
    }

    /// `few`: the first question need not be about the whole group.
    #[inline]
    fn is_page_resident(
        &mut self,
        mapping: &Mapping,
        layer: LayerIndex,
        page: u64,
        few: bool,
    ) -> bool {
        let number = page / WINDOW_PAGES as u64;
        // No two windows share a tag: files are far shorter than 2^56 windows.
        let Some(window) = self.window(number << 8 | (layer.get() as u64 + 1)) else {
            return false;
        };
        let (group, bit) = (page / GROUP_PAGES as u64 % GROUPS as u64, page % GROUP_PAGES as u64);
        // Less than GROUPS.
        #[expect(clippy::cast_possible_truncation)]
        let [asked, resident] = &mut window[2..].as_chunks_mut().0[group as usize];
        if *asked >> bit & 1 == 0 {
            if few && *asked == 0 {
                let from = bit / FIRST_PAGES as u64 * FIRST_PAGES as u64;
                *asked = ((1 << FIRST_PAGES) - 1) << from;
                *resident = mapping.residency(page - bit + from, FIRST_PAGES) << from;
            } else {
                *asked = u64::MAX;
                *resident = mapping.residency(page - bit, GROUP_PAGES);
            }
        }
        *resident >> bit & 1 != 0
    }

    /// The window of this tag, maybe one of which nothing is known yet.
    #[inline]
    fn window(&mut self, tag: u64) -> Option<&mut Window> {
        // Fibonacci hashing: neither layers nor windows in step share places.
        let hash = tag.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - (WINDOWS / 2).ilog2());
        let now = self.now;
        let pairs = self.windows.as_chunks_mut::<2>().0;
        let pair = pairs.get_mut(usize::try_from(hash).ok()?)?;
        let fresh = |window: &Window| now - window[1] < FRESH_NS;
        let place = match pair.iter().position(|window| window[0] == tag) {
            Some(place) if fresh(&pair[place]) => return Some(&mut pair[place]),
            Some(place) => place,
            // A place in a layer that is read once must not cost what is known of a
            // whole window of the base.
            None => {
                let asked = |window: &Window| -> u32 {
                    window[2..].iter().step_by(2).map(|asked| asked.count_ones()).sum()
                };
                let worth = |window: &Window| (fresh(window), asked(window));
                usize::from(worth(&pair[1]) < worth(&pair[0]))
            }
        };
        pair[place] = [0; 2 + 2 * GROUPS];
        (pair[place][0], pair[place][1]) = (tag, now);
        Some(&mut pair[place])
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use block_io::{CachePolicy, DiskOptions};
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

    use super::*;
    use crate::guest_memory::memory::GuestAddress;

    const LEN: usize = 64 * PAGE;

    struct Fixture {
        disk: Disk,
        file: File,
        content: Vec<u8>,
        _directory: tempfile::TempDir,
    }

    fn fixture(cow_cache: CachePolicy) -> Fixture {
        // Not in /tmp, which may be in memory: nothing leaves the cache there.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = directory.path().join("image");
        let content: Vec<u8> = (0..LEN).map(|i| u8::try_from(i / 7 % 251).unwrap()).collect();
        std::fs::write(&path, &content).unwrap();
        let disk =
            Disk::open_raw(&path, &DiskOptions { cow_cache, ..DiskOptions::default() }).unwrap();
        let file = File::options().write(true).read(true).open(&path).unwrap();
        file.sync_all().unwrap();
        Fixture { disk, file, content, _directory: directory }
    }

    fn buffers(memory: &Memory, len: u64) -> Vec<libc::iovec> {
        let mut all = Vec::new();
        for (at, len) in [(0, len / 2), (1 << 20, len - len / 2)] {
            let mut each = |host: *mut u8, len| {
                all.push(libc::iovec { iov_base: host.cast(), iov_len: len });
            };
            memory.host_ranges(GuestAddress(at), len, &mut each).unwrap();
        }
        all
    }

    fn copy(resident: &mut Resident<'_>, at: u64, len: u64) -> Option<Vec<u8>> {
        let memory = Memory::anonymous(&[(0, LEN), (1 << 20, LEN)]);
        let buffers = buffers(&memory, len);
        let range = resident.find(LayerIndex::TOP, ByteOffset::new(at), len)?;
        resident.copy(&range, &memory, &buffers).then(|| {
            let mut found = vec![0; usize::try_from(len).unwrap()];
            let (head, tail) = found.split_at_mut(buffers[0].iov_len);
            memory.read(GuestAddress(0), head).unwrap();
            memory.read(GuestAddress(1 << 20), tail).unwrap();
            found
        })
    }

    fn evict(file: &File) {
        posix_fadvise(file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }

    #[test]
    fn what_is_in_the_page_cache_is_copied() {
        let f = fixture(CachePolicy::Buffered);
        f.file.read_exact_at(&mut vec![0; LEN], 0).unwrap();
        let mappings = Mappings::new(&f.disk);
        let mut resident = Resident::new(&mappings);
        for (at, len) in [(0, 512), (4096, 4096), (512, 16384), (LEN as u64 - 512, 512)] {
            let expected = &f.content[usize::try_from(at).unwrap()..][..len];
            assert_eq!(copy(&mut resident, at, len as u64).as_deref(), Some(expected), "at {at}");
        }
        assert_eq!(copy(&mut resident, LEN as u64 - 512, 1024), None, "past the end");
        // Twice unused means that the pages are let go of; they are read again.
        assert!(resident.rested() && !resident.rested());
        assert!(!mappings.forget_unused() && mappings.forget_unused());
        assert_eq!(copy(&mut resident, 0, 512).as_deref(), Some(&f.content[..512]));
    }

    #[test]
    fn a_later_write_is_seen() {
        let f = fixture(CachePolicy::Buffered);
        f.file.read_exact_at(&mut vec![0; LEN], 0).unwrap();
        let mappings = Mappings::new(&f.disk);
        let mut resident = Resident::new(&mappings);
        copy(&mut resident, 0, 4096).unwrap();
        f.file.write_all_at(&[0xee; 512], 512).unwrap();
        assert_eq!(copy(&mut resident, 512, 512), Some(vec![0xee; 512]));
    }

    #[test]
    fn what_is_not_in_the_page_cache_is_not_touched() {
        let f = fixture(CachePolicy::Buffered);
        let mappings = Mappings::new(&f.disk);
        let mut resident = Resident::new(&mappings);
        evict(&f.file);
        assert_eq!(copy(&mut resident, 0, 4096), None);
        // It stays so until the answer is too old; nothing was read meanwhile.
        f.file.read_exact_at(&mut vec![0; LEN], 0).unwrap();
        assert_eq!(copy(&mut resident, 0, 4096), None);
        resident.now += FRESH_NS;
        assert_eq!(copy(&mut resident, 0, 4096).as_deref(), Some(&f.content[..4096]));
    }

    #[test]
    fn every_page_is_answered_for_itself_however_it_is_asked_for() {
        let f = fixture(CachePolicy::Buffered);
        evict(&f.file);
        posix_fadvise(f.file.as_fd(), 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).unwrap();
        for page in [0, 1, 2, 7, 9, 16, 17, 18, 19, 20, 21, 22, 23, 24, 40, 63] {
            f.file.read_exact_at(&mut [0; 1], page * PAGE as u64).unwrap();
        }
        let mappings = Mappings::new(&f.disk);
        let mapping = mappings.layers[0].as_ref().unwrap();
        let truth = mapping.residency(0, GROUP_PAGES);
        assert!(truth != 0 && truth != u64::MAX, "{truth:#x}");
        for start in 0..64 {
            for (first, len) in [(start, 1), (start, 2), (start, 9), (63 - start, 1)] {
                // The first question of this view is about `start`, the second about another place.
                let mut resident = Resident::new(&mappings);
                resident.tick();
                for (page, len) in [(start, 1), (first, len), (64 - len, len)] {
                    let end = 64.min(page + len);
                    let expected = (page..end).all(|page| truth >> page & 1 != 0);
                    let (from, to) = (page * PAGE as u64, end * PAGE as u64);
                    let found = resident.is_resident(mapping, LayerIndex::TOP, from, to);
                    assert_eq!(found, expected, "pages {page}..{end} after {start}");
                }
            }
        }
    }

    #[test]
    fn a_place_that_is_read_once_does_not_cost_a_window_in_use() {
        let f = fixture(CachePolicy::Buffered);
        let mappings = Mappings::new(&f.disk);
        let mut resident = Resident::new(&mappings);
        resident.now = FRESH_NS;
        let place = |tag: u64| tag.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - 11);
        assert_eq!(WINDOWS / 2, 1 << 11);
        let mut tags = (1..).filter(|tag| place(*tag) == place(1));
        let used = tags.next().unwrap();
        resident.window(used).unwrap()[2..].fill(u64::MAX);
        for tag in tags.take(5) {
            let window = resident.window(tag).unwrap();
            assert_eq!((window[0], window[2]), (tag, 0));
            window[2] = 0xff;
            assert_eq!(resident.window(tag).unwrap()[2], 0xff);
        }
        assert_eq!(resident.window(used).unwrap()[2], u64::MAX);
        // What is too old is worth nothing.
        resident.now += FRESH_NS;
        assert_eq!(resident.window(used).unwrap()[2], 0);
    }

    #[test]
    fn a_file_cut_short_is_noticed_and_the_process_lives() {
        let f = fixture(CachePolicy::Buffered);
        f.file.read_exact_at(&mut vec![0; LEN], 0).unwrap();
        let mappings = Mappings::new(&f.disk);
        let mut resident = Resident::new(&mappings);
        copy(&mut resident, 0, 4096).unwrap();
        copy(&mut resident, 8192, 4096).unwrap();
        f.file.set_len(4096).unwrap();
        assert_eq!(copy(&mut resident, 8192, 4096), None);
        // Not even what is still there: who knows what became of it.
        assert_eq!(copy(&mut resident, 0, 4096), None);
    }

    #[test]
    fn a_layer_in_direct_mode_is_left_alone() {
        let f = fixture(CachePolicy::Direct);
        f.file.read_exact_at(&mut vec![0; LEN], 0).unwrap();
        let mappings = Mappings::new(&f.disk);
        assert_eq!(copy(&mut Resident::new(&mappings), 0, 4096), None);
    }
}
