//! Workers with fault injection (`block_io::fault_injection`): their I/O is begun and completed in
//! any order, comes up short and fails. After each answer every sector of the request is compared
//! with a model.
//!
//! One thread takes the turns of all workers, so that a seed plays a failure again: `TEST_SEED=n`.

use std::path::Path;

use block_io::image::{CreateOptions, create_cow, snapshot};
use block_io::{CachePolicy, CowFormat, DiskOptions, Host, fault_injection};
use cow_format::{Sector, SectorCount};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use testkit::request::segment;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::guest::{DATA, Desc, Guest};
use crate::guest_memory::memory::GuestAddress;

/// More than one bitmap page speaks of (32768), and no whole number of them.
const SECTORS: u64 = 33_003;
const LANES: usize = 3;
const QUEUE_SIZE: u16 = 64;
/// Requests in flight in one lane; each has four descriptors and [`SLOT_LEN`] bytes of memory.
const SLOTS: u16 = 12;
const SLOT_LEN: u64 = 0x1_2000;
/// Longest request: neither a prompt write nor one piece of guest memory, which has a border.
const LEN_MAX: u64 = 130;
/// Turns in which nobody is answered.
const PATIENCE: u32 = 2_000_000;

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn bytes_of(range: SectorRange) -> std::ops::Range<usize> {
    let start = usize::try_from(range.start_bytes().get()).unwrap();
    start..start + usize::try_from(range.len_bytes()).unwrap()
}

/// What the disk must hold, and which sectors are being written.
struct Model {
    content: Vec<u8>,
    busy: Vec<bool>,
    /// Requests that succeeded and that failed, by type.
    answers: [[u64; 2]; 16],
}

impl Model {
    fn sectors(range: SectorRange) -> std::ops::Range<usize> {
        let start = usize::try_from(range.start().get()).unwrap();
        start..start + usize::try_from(range.count().get()).unwrap()
    }

    fn is_free(&self, range: SectorRange) -> bool {
        !self.busy[Self::sectors(range)].contains(&true)
    }

    /// A request that was to put `new` into `range` is answered. One that failed may have changed
    /// some of it, but nothing that was not in the top before. So may a discard.
    fn settle(&mut self, disk: &Disk, range: SectorRange, new: &[u8], ok: bool) {
        let mut found = vec![0; new.len()];
        disk.read(range, &mut found).unwrap();
        let old = &mut self.content[bytes_of(range)];
        if ok {
            assert!(found == new, "{range:?}: not what was written");
        }
        let sectors = found.chunks(512).zip(old.chunks(512)).zip(new.chunks(512));
        for (number, ((found, old), new)) in (range.start().get()..).zip(sectors) {
            let present = disk.is_present(self::range(number, 1)).unwrap();
            let is_old = found == old;
            let is_some = found.iter().zip(old.iter().zip(new)).all(|(f, (o, n))| f == o || f == n);
            assert!(ok || is_old || present && is_some, "sector {number}: neither old nor new");
        }
        old.copy_from_slice(&found);
        self.busy[Self::sectors(range)].fill(false);
    }
}

/// What was asked for.
struct Sent {
    kind: u32,
    ranges: Vec<SectorRange>,
    data: Vec<u8>,
}

struct Lane<'a> {
    worker: Worker<'a, SplitQueue>,
    guest: Guest,
    slots: Vec<Option<Sent>>,
    /// `used.idx` as far as the answers were looked at.
    seen: u16,
}

impl Lane<'_> {
    fn is_idle(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    fn turn(&mut self, disk: &Disk, model: &mut Model) {
        if self.worker.committing.iter().any(Option::is_some) {
            // So that the number of turns is the seed's, as far as may be.
            let event = self.worker.shared.committer.event(self.worker.start.queue);
            let mut fds = [nix::poll::PollFd::new(event, nix::poll::PollFlags::POLLIN)];
            nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE).unwrap();
        }
        self.worker.turn();
        assert!(self.worker.is_open(), "the ring was given up");
        while self.seen != self.guest.used_idx() {
            let (head, len) = self.guest.used(self.seen);
            self.seen = self.seen.wrapping_add(1);
            assert!(head.is_multiple_of(4), "no head: {head}");
            let slot = usize::try_from(head / 4).unwrap();
            let sent = self.slots[slot].take().expect("a head that was answered twice");
            fault_injection::without(|| self.check(disk, model, slot as u64, &sent, len));
        }
    }

    fn check(&self, disk: &Disk, model: &mut Model, slot: u64, sent: &Sent, len: u32) {
        let at = DATA + slot * SLOT_LEN;
        let [status] = self.guest.read(at + 16);
        assert!(status <= 1, "status {status}");
        let ok = status == 0;
        model.answers[sent.kind as usize][usize::from(!ok)] += 1;
        if sent.kind == VIRTIO_BLK_T_IN {
            let read = u32::try_from(sent.data.len()).unwrap();
            assert_eq!(len, if ok { read + 1 } else { 0 });
            if ok {
                let mut found = vec![0; sent.data.len()];
                self.guest.memory.read(GuestAddress(at + 512), &mut found).unwrap();
                assert!(found == model.content[bytes_of(sent.ranges[0])], "{:?}", sent.ranges);
            }
            return model.busy[Model::sectors(sent.ranges[0])].fill(false);
        }
        assert_eq!(len, 1);
        for range in &sent.ranges {
            let zeros = vec![0; usize::try_from(range.len_bytes()).unwrap()];
            let new = if sent.kind == VIRTIO_BLK_T_OUT { &sent.data } else { &zeros };
            model.settle(disk, *range, new, ok && sent.kind != VIRTIO_BLK_T_DISCARD);
        }
    }

    /// Sends something about sectors that no request in flight is about.
    fn send(&mut self, random: &mut impl FnMut(u64) -> u64, model: &mut Model) {
        let Some(slot) = self.slots.iter().position(Option::is_none) else { return };
        let kinds = [
            VIRTIO_BLK_T_IN,
            VIRTIO_BLK_T_IN,
            VIRTIO_BLK_T_OUT,
            VIRTIO_BLK_T_OUT,
            VIRTIO_BLK_T_DISCARD,
            VIRTIO_BLK_T_WRITE_ZEROES,
            VIRTIO_BLK_T_FLUSH,
        ];
        // A flush takes longer than all others.
        let kinds = if random(8) == 0 { &kinds[..] } else { &kinds[..6] };
        let kind = kinds[usize::try_from(random(kinds.len() as u64)).unwrap()];
        let edge = [0, 32_768, SECTORS, random(SECTORS)][usize::try_from(random(4)).unwrap()];
        let longest = [4, 16, LEN_MAX][usize::try_from(random(3)).unwrap()];
        let start = (edge + random(200)).saturating_sub(200).min(SECTORS - 1);
        let range = range(start, 1 + random(longest.min(SECTORS - start)));
        if !model.is_free(range) {
            return;
        }
        let ranges = if kind == VIRTIO_BLK_T_FLUSH { vec![] } else { vec![range] };
        let mut data = Vec::new();
        match kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => {
                data = (0..range.len_bytes()).map(|_| 0).collect();
                let stamp = random(1 << 40).to_le_bytes();
                data.chunks_mut(8).for_each(|word| word.copy_from_slice(&stamp));
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let may_unmap = kind == VIRTIO_BLK_T_WRITE_ZEROES;
                let flags = if may_unmap { u32::try_from(random(2)).unwrap() } else { 0 };
                let count = u32::try_from(range.count().get()).unwrap();
                data.extend(segment(range.start().get(), count, flags));
            }
            _ => {}
        }
        ranges.iter().for_each(|range| model.busy[Model::sectors(*range)].fill(true));
        self.offer(slot, kind, range.start().get(), &data, random(data.len() as u64 / 8 + 1) * 8);
        self.slots[slot] = Some(Sent { kind, ranges, data });
    }

    /// Header, status and data of a slot, the data in two pieces.
    fn offer(&mut self, slot: usize, kind: u32, sector: u64, data: &[u8], cut: u64) {
        let at = DATA + slot as u64 * SLOT_LEN;
        self.guest.write(at, &header_of(kind, sector));
        self.guest.write(at + 16, &[0xff]);
        self.guest.write(at + 512, data);
        let pieces = [(at + 512, cut), (at + 512 + cut, data.len() as u64 - cut)];
        let pieces = pieces.into_iter().filter(|(_, len)| *len > 0);
        let mut chain = vec![Desc::buffer(at, 16, false)];
        chain.extend(pieces.map(|(address, bytes)| {
            Desc::buffer(address, u32::try_from(bytes).unwrap(), kind == VIRTIO_BLK_T_IN)
        }));
        chain.push(Desc::buffer(at + 16, 1, true));
        let head = u16::try_from(slot * 4).unwrap();
        self.guest.set_chain(head, chain);
        self.guest.offer(head);
    }
}

/// One kind of disk.
#[derive(Clone, Copy, Debug)]
struct Setting {
    format: CowFormat,
    cow_cache: CachePolicy,
    base_cache: CachePolicy,
    write_through: bool,
    engine: IoEngine,
    steps: u32,
}

const NATIVE: Setting = Setting {
    format: CowFormat::Native,
    cow_cache: CachePolicy::Buffered,
    base_cache: CachePolicy::Buffered,
    write_through: false,
    engine: IoEngine::IoUring,
    steps: 1200,
};

/// A sparse base, a COW file over it with something in it, and, if the format can, one more over
/// that. Also what the whole holds.
fn image(directory: &Path, setting: Setting) -> (std::path::PathBuf, Vec<u8>) {
    use std::os::unix::fs::FileExt;
    let (base, lower, top) =
        (directory.join("base"), directory.join("lower"), directory.join("top"));
    let file = std::fs::File::create(&base).unwrap();
    file.set_len(SECTORS * 512).unwrap();
    let mut content = vec![0; usize::try_from(SECTORS * 512).unwrap()];
    for (start, count) in [(3, 500), (32_600, 150), (32_900, 103)] {
        let place = &mut content[bytes_of(range(start, count))];
        place
            .iter_mut()
            .enumerate()
            .for_each(|(i, byte)| *byte = 1 + u8::try_from(i % 200).unwrap());
        file.write_all_at(place, start * 512).unwrap();
    }
    // What is not written back stays in the page cache.
    file.sync_all().unwrap();
    create_cow(&Host, &lower, &CreateOptions::over(setting.format, &base)).unwrap();
    let disk = Disk::open_cow(&lower, None, &DiskOptions::default()).unwrap();
    for (start, count) in [(100, 17), (32_760, 20), (SECTORS - 9, 9)] {
        let place = &mut content[bytes_of(range(start, count))];
        place.fill(0xee);
        disk.write(range(start, count), place).unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    if setting.format == CowFormat::Uml {
        return (lower, content);
    }
    snapshot(&Host, &lower, &top).unwrap();
    (top, content)
}

/// What the requests of one seed came to.
fn play(setting: Setting, seed: u64) -> [[u64; 2]; 16] {
    println!("TEST_SEED={seed} {setting:?}");
    // Not in /tmp, which may be in memory and knows no direct I/O.
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let (path, content) = image(directory.path(), setting);
    let Setting { cow_cache, base_cache, .. } = setting;
    let options = DiskOptions { cow_cache, base_cache, ..DiskOptions::default() };
    let disk = Arc::new(Disk::open_cow(&path, None, &options).unwrap());
    let shared = shared(&disk, LANES);
    let write_through = Arc::new(AtomicBool::new(setting.write_through));
    let end = DATA + u64::from(SLOTS) * SLOT_LEN;
    let guests = || (0..LANES).map(|_| Guest::with_end(QUEUE_SIZE, 0, end));
    let guests: Vec<_> = guests().collect();
    let starts: Vec<_> =
        guests.iter().enumerate().map(|(at, guest)| start(at, guest, &write_through)).collect();
    let (stop, pulse) = (EventFd::new(0).unwrap(), Pulse::waiting());
    let mut model = Model {
        content,
        busy: vec![false; usize::try_from(SECTORS).unwrap()],
        answers: Default::default(),
    };
    let mut state = seed;
    let mut random = move |limit: u64| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) % limit
    };
    {
        // Most requests have one window, or most have several.
        let unit = 4096 << random(6);
        let window =
            Window { bytes: unit, parts: usize::try_from(1 + random(4)).unwrap(), allocated: unit };
        let mut urings: Vec<_> = starts.iter().map(|_| uring(setting.engine)).collect();
        let lane = |((guest, start), uring)| {
            let queue = split_queue(start, None).unwrap();
            let mut worker = Worker::new(start, queue, &shared, &stop, &pulse, uring).unwrap();
            worker.window = window;
            Lane { worker, guest, slots: (0..SLOTS).map(|_| None).collect(), seen: 0 }
        };
        let lanes = guests.into_iter().zip(&starts).zip(urings.iter_mut().map(Option::as_mut));
        let mut lanes: Vec<_> = lanes.map(lane).collect();
        fault_injection::begin(seed);
        for _ in 0..setting.steps {
            let lane = &mut lanes[usize::try_from(random(LANES as u64)).unwrap()];
            match random(3) {
                _ if random(60) == 0 => evict(&disk),
                0 => lane.turn(&disk, &mut model),
                _ => lane.send(&mut random, &mut model),
            }
        }
        let mut turns = 0;
        while !lanes.iter().all(Lane::is_idle) {
            lanes.iter_mut().for_each(|lane| lane.turn(&disk, &mut model));
            turns += 1;
            assert!(turns < PATIENCE, "a request is never answered");
        }
        fault_injection::end();
    }
    let answers = model.answers;
    drop(shared);
    reopened(disk, &path, &options, &model.content);
    answers
}

/// Takes what can be taken out of the page cache, as when memory is short: what a queue believes to
/// be there is not, and streams begin cold.
fn evict(disk: &Disk) {
    for layer in disk.layers() {
        let all = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        posix_fadvise(layer.file().buffered(), 0, 0, all).unwrap();
    }
}

/// The process dies, and another one finds everything; also after a clean end.
fn reopened(disk: Arc<Disk>, path: &Path, options: &DiskOptions, content: &[u8]) {
    disk.layers().iter().for_each(|layer| layer.file().unlock().unwrap());
    drop(disk);
    for _ in 0..2 {
        let disk = Disk::open_cow(path, None, options).unwrap();
        let mut found = vec![0; content.len()];
        disk.read(range(0, SECTORS), &mut found).unwrap();
        let odd = found.chunks(512).zip(content.chunks(512)).position(|(f, c)| f != c);
        assert_eq!(odd, None, "a sector that changed when the disk was opened again");
        disk.close().unwrap();
    }
}

fn play_all(setting: Setting, seeds: std::ops::Range<u64>) {
    if let Err(why) = setting.engine.probe() {
        println!("skipped: no {} here: {why}", setting.engine);
        return;
    }
    let given = std::env::var("TEST_SEED").ok().map(|text| text.parse().expect("TEST_SEED"));
    let seeds = given.map_or(seeds, |seed| seed..seed + 1);
    let mut answers = [[0; 2]; 16];
    for seed in seeds.clone() {
        for (all, these) in answers.iter_mut().flatten().zip(play(setting, seed).iter().flatten()) {
            *all += these;
        }
    }
    // Of everything that can fail some did, and most did not.
    let kinds =
        [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES];
    for kind in kinds {
        let [succeeded, failed] = answers[kind as usize];
        assert!(succeeded > failed && failed > 0, "type {kind}: {succeeded} and {failed} failed");
    }
    println!("succeeded and failed: {answers:?}");
}

#[test]
fn native() {
    play_all(NATIVE, 0..12);
}

#[test]
fn native_direct() {
    let direct = CachePolicy::Direct;
    play_all(Setting { cow_cache: direct, base_cache: direct, ..NATIVE }, 100..108);
}

#[test]
fn native_over_a_direct_base() {
    play_all(Setting { base_cache: CachePolicy::Direct, ..NATIVE }, 200..204);
}

#[test]
fn uml() {
    play_all(Setting { format: CowFormat::Uml, ..NATIVE }, 300..308);
}

#[test]
fn write_through() {
    play_all(Setting { write_through: true, steps: 400, ..NATIVE }, 400..404);
}

const SYNC: Setting = Setting { engine: IoEngine::Sync, ..NATIVE };

#[test]
fn sync() {
    play_all(SYNC, 500..512);
}

#[test]
fn sync_direct() {
    let direct = CachePolicy::Direct;
    play_all(Setting { cow_cache: direct, base_cache: direct, ..SYNC }, 600..608);
}

#[test]
fn sync_uml_write_through() {
    let setting = Setting { format: CowFormat::Uml, write_through: true, steps: 400, ..SYNC };
    play_all(setting, 700..704);
}
