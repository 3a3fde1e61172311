//! Space of writes that a crash of the host has left without a bit comes back while the disk is in
//! use.

use std::path::Path;
use std::time::Duration;

use block_io::image::{CreateOptions, create_cow};
use block_io::storage::{Env, Storage};
use block_io::testing::sim::{Choices, Operation, Sim};
use block_io::{CowFormat, Disk, DiskOptions};
use cow_format::{ByteOffset, Sector, SectorCount, SectorRange};

const BASE: &str = "/base";
const COW: &str = "/cow";
/// Sectors of the disk: 64 blocks.
const SECTORS: u64 = 512;
const BLOCK_SECTORS: u64 = 8;

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn bytes(sectors: u64) -> usize {
    usize::try_from(sectors * 512).unwrap()
}

fn open(sim: &Sim) -> Disk<Sim> {
    let options = DiskOptions { lock_wait: Duration::ZERO, ..DiskOptions::default() };
    Disk::open_cow_in(sim.clone(), Path::new(COW), None, &options).unwrap()
}

/// Block 1 was flushed, half of block 3 as well; all others were written and not flushed before the
/// power went.
fn after_power_cut(format: CowFormat) -> Sim {
    let sim = Sim::new();
    let base = sim.create_new(Path::new(BASE)).unwrap();
    base.write_all_at(&vec![0xbb; bytes(SECTORS)], ByteOffset::new(0)).unwrap();
    base.sync().unwrap();
    sim.sync_parent(Path::new(BASE)).unwrap();
    create_cow(&sim, Path::new(COW), &CreateOptions::over(format, Path::new(BASE))).unwrap();
    let disk = open(&sim);
    assert!(!disk.is_leaky());
    disk.write(range(BLOCK_SECTORS, BLOCK_SECTORS), &[1; 4096]).unwrap();
    disk.write(range(3 * BLOCK_SECTORS, 4), &[1; 2048]).unwrap();
    disk.flush().unwrap();
    disk.write(range(0, BLOCK_SECTORS), &[2; 4096]).unwrap();
    let rest = vec![2; bytes(SECTORS - 4 * BLOCK_SECTORS)];
    disk.write(range(2 * BLOCK_SECTORS, BLOCK_SECTORS), &[2; 4096]).unwrap();
    disk.write(range(4 * BLOCK_SECTORS, SECTORS - 4 * BLOCK_SECTORS), &rest).unwrap();
    drop(disk);
    sim.power_cut(&mut Choices::newest());
    sim
}

fn first_byte(disk: &Disk<Sim>, sector: u64) -> u8 {
    let mut bytes = [0; 512];
    disk.read(range(sector, 1), &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

fn data_blocks(disk: &Disk<Sim>) -> Vec<u64> {
    let file = disk.layers()[0].file();
    let start = disk.write_at(range(0, 1)).get();
    let has_data = |block: &u64| {
        let at = start + block * 4096;
        file.next_data(ByteOffset::new(at)).unwrap().is_some_and(|data| data.start < at + 4096)
    };
    (0..SECTORS / BLOCK_SECTORS).filter(has_data).collect()
}

#[test]
fn what_no_bit_speaks_of_is_given_back() {
    for format in [CowFormat::Native, CowFormat::Uml] {
        let sim = after_power_cut(format);
        let disk = open(&sim);
        assert!(disk.is_leaky() && data_blocks(&disk).len() == 64);
        disk.sweep(|| true);
        // UML: making the file takes the last block.
        let last = if format == CowFormat::Uml { vec![63] } else { vec![] };
        assert_eq!(data_blocks(&disk), [vec![1, 3], last].concat());
        let found = [0, 8, 15, 16, 24, 27, 28, 511].map(|sector| first_byte(&disk, sector));
        assert_eq!(found, [0xbb, 1, 1, 0xbb, 1, 1, 0xbb, 0xbb], "{format:?}");
    }
}

#[test]
fn a_sweep_stops_when_it_is_told_to_or_the_disk_is_closed() {
    let sim = after_power_cut(CowFormat::Native);
    let disk = open(&sim);
    disk.sweep(|| false);
    assert_eq!(data_blocks(&disk).len(), 64);
    disk.close().unwrap();
    disk.sweep(|| true);
    assert_eq!(data_blocks(&disk).len(), 64);
}

/// A write that comes at any moment of the sweep keeps its data.
#[test]
fn no_write_is_swept_away() {
    for round in 0..64u64 {
        let sim = after_power_cut(CowFormat::Native);
        let disk = open(&sim);
        let shared = &disk;
        std::thread::scope(|scope| {
            let writer = |offset: u64| {
                move || {
                    for n in 0..SECTORS / BLOCK_SECTORS / 2 {
                        let block = (round + 2 * n + offset) % (SECTORS / BLOCK_SECTORS);
                        let tag = u8::try_from(block + 10).unwrap();
                        shared.write(range(block * BLOCK_SECTORS, 1), &[tag; 512]).unwrap();
                        std::thread::yield_now();
                    }
                }
            };
            scope.spawn(writer(0));
            scope.spawn(writer(1));
            disk.sweep(|| true);
        });
        for block in 0..SECTORS / BLOCK_SECTORS {
            let tag = u8::try_from(block + 10).unwrap();
            assert_eq!(
                first_byte(&disk, block * BLOCK_SECTORS),
                tag,
                "round {round}, block {block}"
            );
        }
    }
}

/// While a hole is being punched, and once it has been decided to, a write of the same blocks
/// waits.
#[test]
fn a_write_waits_for_the_hole_under_it() {
    let sim = after_power_cut(CowFormat::Native);
    let disk = std::sync::Arc::new(open(&sim));
    let (begun, has_begun) = std::sync::mpsc::channel();
    let theirs = std::sync::Arc::clone(&disk);
    let writer = std::thread::spawn(move || {
        has_begun.recv().unwrap();
        theirs.write(range(0, 1), &[9; 512]).unwrap();
    });
    sim.set_hook(Some(std::sync::Arc::new(move |_, operation| {
        if operation == Operation::Zero {
            // It may or may not come in between: then its data would be gone.
            _ = begun.send(());
            (0..100).for_each(|_| std::thread::yield_now());
        }
        block_io::testing::sim::Verdict::Proceed
    })));
    disk.sweep(|| true);
    writer.join().unwrap();
    assert_eq!(first_byte(&disk, 0), 9);
}
