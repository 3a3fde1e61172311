//! Images on the simulated disk, changed as the input says, and then used. What a disk has
//! acknowledged is remembered, and must be there later.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use block_io::image::{BaseOptions, CreateOptions, create_cow, resize, snapshot};
use block_io::ops::{check, inspect, reset};
use block_io::storage::{Access, Env, Storage};
use block_io::testing::sim::{Choices, Sim, SimFile};
use block_io::{CowFormat, Disk, DiskError, DiskOptions};
use cow_format::header::BackingFormat;
use cow_format::{ByteOffset, HEADER_PREFIX_LEN, PAGE_SECTORS, SECTOR_SIZE, SectorRange};

use crate::{Input, range, seal_header};

/// The disk that is opened.
pub const COW: &str = "/cow";
/// The side file of a UML disk.
pub const LIVE: &str = "/cow.live";
const LOWER: &str = "/lower.cow";
/// The base that the vectors of cow-format name.
const BASE: &str = "/umlvec/base-1m.img";
/// What an input can change, by number.
const FILES: [&str; 4] = [COW, LIVE, LOWER, BASE];

/// Where a new native file has its bitmaps and its journal, in bytes.
const BITMAP: u64 = 8192;
const LIVE_BITMAP: u64 = BITMAP + CAPACITY;
const JOURNAL: u64 = LIVE_BITMAP + CAPACITY;
const CAPACITY: u64 = (16 << 30) / 4096;

/// Two pages of bitmap and a bit.
const DISK_LEN: u64 = (2 * PAGE_SECTORS + 9) * SECTOR_SIZE;
const OPERATIONS_MAX: usize = 32;

/// Systems with a disk in each state that a disk can be left in.
pub fn templates() -> &'static [Sim] {
    static TEMPLATES: OnceLock<Vec<Sim>> = OnceLock::new();
    TEMPLATES.get_or_init(|| {
        let ends: [fn(Sim, Disk<Sim>); 4] = [
            |_, disk| disk.close().unwrap(),
            |sim, disk| drop((disk, sim.process_death())),
            |sim, disk| drop((disk, sim.power_cut(&mut Choices::newest()))),
            |sim, disk| drop((disk, sim.power_cut(&mut Choices::oldest()))),
        ];
        let mut templates = Vec::new();
        for make in [native, native_over_base, native_over_native, uml] {
            for end in ends {
                let sim = Sim::new();
                make(&sim);
                let disk = Disk::open_cow_in(sim.clone(), Path::new(COW), None, &options(false));
                let disk = disk.unwrap();
                disk.write(range(3, 40), &[1; 40 * 512]).unwrap();
                disk.flush().unwrap();
                disk.write(range(PAGE_SECTORS - 1, 2), &[2; 1024]).unwrap();
                disk.flush().unwrap();
                disk.discard(range(30, 2)).unwrap();
                end(sim.clone(), disk);
                templates.push(sim);
            }
        }
        templates
    })
}

fn options(read_only: bool) -> DiskOptions {
    DiskOptions { read_only, lock_wait: Duration::ZERO, ..DiskOptions::default() }
}

fn create(sim: &Sim, path: &str, format: CowFormat, base: Option<(&str, BackingFormat)>) {
    let base = base.map(|(path, format)| BaseOptions { path: path.into(), format, digest: None });
    let size = base.is_none().then_some(DISK_LEN);
    let options =
        CreateOptions { format, base, size, replace: false, journal_len: None, mode: None };
    create_cow(sim, Path::new(path), &options).unwrap();
}

fn base(sim: &Sim) {
    let file = sim.create_new(Path::new(BASE)).unwrap();
    file.set_len(DISK_LEN).unwrap();
    file.write_all_at(&[0xba; 2048], ByteOffset::new(0)).unwrap();
    file.sync().unwrap();
    sim.sync_parent(Path::new(BASE)).unwrap();
}

fn native(sim: &Sim) {
    create(sim, COW, CowFormat::Native, None);
}

fn native_over_base(sim: &Sim) {
    base(sim);
    create(sim, COW, CowFormat::Native, Some((BASE, BackingFormat::Raw)));
}

fn native_over_native(sim: &Sim) {
    base(sim);
    create(sim, LOWER, CowFormat::Native, Some((BASE, BackingFormat::Raw)));
    let disk = Disk::open_cow_in(sim.clone(), Path::new(LOWER), None, &options(false)).unwrap();
    disk.write(range(1, 9), &[3; 9 * 512]).unwrap();
    disk.close().unwrap();
    drop(disk);
    snapshot(sim, Path::new(LOWER), Path::new(COW)).unwrap();
}

fn uml(sim: &Sim) {
    base(sim);
    create(sim, COW, CowFormat::Uml, Some((BASE, BackingFormat::Raw)));
}

/// Opens a file, or makes it.
pub fn file(sim: &Sim, path: &str) -> SimFile {
    let path = Path::new(path);
    sim.open(path, Access::ReadWrite).unwrap_or_else(|_| sim.create_new(path).unwrap())
}

/// Changes files, behind the back of everybody and durably.
///
/// Input: how many changes; of each, flags with the file and the kind of place in it, the place and
/// the bytes. The flags also say whether checksums are made right.
pub fn change_files(sim: &Sim, input: &mut Input) {
    for _ in 0..input.u8() % 16 {
        let flags = input.u8();
        let file = file(sim, FILES[usize::from(flags & 3)]);
        let at = match flags >> 2 & 7 {
            0 => u64::from(input.u16()) % 512,
            1 => 4096 + u64::from(input.u16()) % 512,
            2 => input.u16().into(),
            3 => BITMAP + u64::from(input.u16()),
            4 => LIVE_BITMAP + u64::from(input.u16()),
            5 => JOURNAL + u64::from(input.u16()),
            6 => input.u64() & (u64::MAX >> 2),
            _ => {
                file.set_len(input.u64() & (u64::MAX >> 2)).unwrap();
                continue;
            }
        };
        let bytes = match flags & 0x20 {
            0 => input.short(),
            _ => input.long(),
        };
        file.write_all_at(bytes, ByteOffset::new(at)).unwrap();
        if flags & 0x40 != 0 {
            seal(&file);
        }
        file.sync().unwrap();
    }
    for path in FILES {
        sim.sync_parent(Path::new(path)).unwrap();
    }
}

/// Makes the checksums right: of both copies of the header, and of the first record of the journal.
fn seal(file: &SimFile) {
    let mut header = [0; HEADER_PREFIX_LEN];
    file.read_zero_filled(&mut header, ByteOffset::new(0)).unwrap();
    header.chunks_exact_mut(HEADER_PREFIX_LEN / 2).for_each(seal_header);
    file.write_all_at(&header, ByteOffset::new(0)).unwrap();
    let mut record = vec![0; 64 << 10];
    file.read_zero_filled(&mut record, ByteOffset::new(JOURNAL)).unwrap();
    let len = usize::try_from(u32::from_le_bytes(record[12..16].try_into().unwrap())).unwrap();
    if (4096..=record.len()).contains(&len) && record.starts_with(b"COWJRNL\n") {
        record.truncate(len);
        record[8..12].fill(0);
        let crc = crc32c::crc32c(&record);
        let crc_at = ByteOffset::new(JOURNAL + 8);
        file.write_all_at(&crc.to_le_bytes(), crc_at).unwrap();
    }
}

/// Uses the disk on `sim` as the input says.
pub fn use_disk(sim: &Sim, input: &mut Input) {
    let mut user = User { sim, disk: None, written: BTreeMap::new() };
    user.open(input.u8() & 1 != 0);
    for _ in 0..OPERATIONS_MAX {
        if input.is_empty() {
            break;
        }
        user.operation(input);
    }
}

/// What a written sector is full of.
#[derive(Clone, Copy)]
struct Written {
    byte: u8,
    flushed: bool,
}

struct User<'a> {
    sim: &'a Sim,
    disk: Option<Disk<Sim>>,
    /// By sector, what was acknowledged.
    written: BTreeMap<u64, Written>,
}

impl User<'_> {
    fn open(&mut self, read_only: bool) {
        self.disk = None;
        match Disk::open_cow_in(self.sim.clone(), Path::new(COW), None, &options(read_only)) {
            Ok(disk) => self.disk = Some(disk),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }

    fn operation(&mut self, input: &mut Input) {
        let kind = input.u8();
        match kind % 16 {
            0 => self.open(false),
            1 => self.open(true),
            2..5 => self.read(input),
            5..8 => self.write(input, kind % 16),
            8 | 9 => self.flush(Disk::flush),
            10 => self.flush(Disk::close),
            11 => {
                self.disk = None;
                self.sim.process_death();
            }
            12 => {
                self.disk = None;
                self.sim.power_cut(&mut Choices::seeded(input.u8().into()));
                self.written.retain(|_, written| written.flushed);
            }
            13 => {
                if let Some(disk) = &self.disk {
                    disk.sweep(|| true);
                }
            }
            _ => self.tool(input),
        }
    }

    /// A range of the disk, mostly where something is.
    fn range(&self, input: &mut Input) -> Option<(&Disk<Sim>, SectorRange)> {
        let disk = self.disk.as_ref()?;
        let capacity = disk.capacity().get();
        let place = input.u8();
        let start = match place & 3 {
            0 => input.below(capacity),
            1 => u64::from(place >> 2),
            2 => PAGE_SECTORS - 32 + u64::from(place >> 2),
            _ => capacity.saturating_sub(u64::from(place >> 2)),
        };
        let start = start % capacity;
        let count = 1 + u64::from(input.u8() % 64);
        Some((disk, range(start, count.min(capacity - start))))
    }

    fn read(&self, input: &mut Input) {
        let Some((disk, range)) = self.range(input) else { return };
        let mut bytes = vec![0xaa; usize::try_from(range.len_bytes()).unwrap()];
        if disk.read(range, &mut bytes).is_err() {
            return;
        }
        for (sector, bytes) in (range.start().get()..).zip(bytes.chunks_exact(512)) {
            if let Some(written) = self.written.get(&sector) {
                assert!(bytes.iter().all(|byte| *byte == written.byte), "sector {sector} is lost");
            }
        }
    }

    fn write(&mut self, input: &mut Input, kind: u8) {
        let Some((disk, range)) = self.range(input) else { return };
        let byte = if kind == 5 { input.u8() } else { 0 };
        let result = match kind {
            5 => disk.write(range, &vec![byte; usize::try_from(range.len_bytes()).unwrap()]),
            6 => disk.discard(range),
            _ => disk.write_zeroes(range),
        };
        for sector in range.start().get()..range.end().get() {
            match result {
                Ok(()) => self.written.insert(sector, Written { byte, flushed: false }),
                Err(_) => self.written.remove(&sector),
            };
        }
    }

    /// A flush, or what includes one.
    fn flush(&mut self, flush: fn(&Disk<Sim>) -> Result<(), DiskError>) {
        let Some(disk) = &self.disk else { return };
        match flush(disk) {
            // Nothing is flushed then.
            Ok(()) if disk.read_only() => {}
            Ok(()) => self.written.values_mut().for_each(|written| written.flushed = true),
            Err(_) => self.written.clear(),
        }
    }

    /// What the tool does with a disk that is not open.
    fn tool(&mut self, input: &mut Input) {
        self.disk = None;
        let (sim, cow) = (self.sim, Path::new(COW));
        match input.u8() % 6 {
            0 => _ = check::check(sim, cow, false),
            1 => _ = check::check(sim, cow, true),
            2 => _ = inspect::inspect(sim, cow, None),
            3 => _ = snapshot(sim, cow, Path::new("/above.cow")),
            // Of these some may be done even if they fail.
            4 => {
                _ = resize(sim, cow, u64::from(input.u32()) * 512, input.u8() & 1 != 0);
                self.written.clear();
            }
            _ => {
                _ = reset(sim, cow);
                self.written.clear();
            }
        }
    }
}
