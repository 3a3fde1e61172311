//! A file system that calls data a hole (OpenZFS did, some FUSE programs do) and is not to be
//! believed: nothing that was written may be taken for zeros or for absent because of it.

use std::path::Path;

use block_io::image::{CreateOptions, create_cow};
use block_io::ops::check::check;
use block_io::ops::{Copying, Holes, merge_to};
use block_io::storage::{Access, Env, Storage};
use block_io::testing::sim::Sim;
use block_io::{CowFormat, Disk, DiskOptions};
use cow_format::{ByteOffset, Sector, SectorCount, SectorRange};

const SECTORS: u64 = 100;
const LEN: usize = 100 * 512;
const COPYING: Copying<'static> = Copying { detect_zeroes: true, progress: &|_| () };

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn open(sim: &Sim, read_only: bool) -> Disk<Sim> {
    let options = DiskOptions { read_only, ..DiskOptions::default() };
    Disk::open_cow_in(sim.clone(), Path::new("/cow"), None, &options).unwrap()
}

fn content(disk: &Disk<Sim>) -> Vec<u8> {
    let mut bytes = vec![0xaa; LEN];
    disk.read(range(0, SECTORS), &mut bytes).unwrap();
    bytes
}

/// A COW file over a base full of 0xbb; both lie about their holes.
fn liar(format: CowFormat) -> Sim {
    let sim = Sim::new();
    sim.lie_about_holes();
    let base = sim.create_new(Path::new("/base")).unwrap();
    base.write_all_at(&[0xbb; LEN], ByteOffset::new(0)).unwrap();
    base.sync().unwrap();
    create_cow(&sim, Path::new("/cow"), &CreateOptions::over(format, Path::new("/base"))).unwrap();
    sim
}

#[test]
fn a_disk_on_it_keeps_what_was_written() {
    for format in [CowFormat::Uml, CowFormat::Native] {
        let sim = liar(format);
        let mut expected = vec![0xbb; LEN];
        // One writer closes the disk; of the next one only the live bitmap knows.
        for (round, sector) in [(1, 10), (2, 70)] {
            let disk = open(&sim, false);
            disk.write(range(sector, 2), &[round; 1024]).unwrap();
            let at = usize::try_from(sector).unwrap() * 512;
            expected[at..at + 1024].fill(round);
            assert!(content(&disk) == expected, "{format:?} {round}: while it is open");
            match round {
                1 => disk.close().unwrap(),
                _ => sim.process_death(),
            }
            drop(disk);
            assert!(content(&open(&sim, true)) == expected, "{format:?} {round}: opened again");
        }
        let disk = open(&sim, false);
        disk.close().unwrap();
        drop(disk);
        // Copied: no byte of it is skipped.
        let disk = open(&sim, true);
        merge_to(&sim, &disk, Path::new("/out"), false, COPYING).unwrap();
        let out = sim.open(Path::new("/out"), Access::Read).unwrap();
        let mut bytes = vec![0; LEN];
        out.read_exact_at(&mut bytes, ByteOffset::new(0)).unwrap();
        assert!(bytes == expected, "{format:?}: merged");
        drop(disk);
        // All looks allocated, which says nothing.
        let found = check(&sim, Path::new("/cow"), false).unwrap();
        assert!(found.is_empty(), "{format:?}: {found:?}");
    }
}

#[test]
fn a_file_on_it_is_data_up_to_its_end() {
    let sim = liar(CowFormat::Native);
    let base = sim.open(Path::new("/base"), Access::Read).unwrap();
    assert_eq!(base.seek_data(ByteOffset::new(0)).unwrap(), None, "it lies");
    assert_eq!(base.next_data(ByteOffset::new(0)).unwrap(), Some(0..LEN as u64));
    assert_eq!(base.next_data(ByteOffset::new(700)).unwrap(), Some(700..LEN as u64));
    assert_eq!(base.next_data(ByteOffset::new(LEN as u64)).unwrap(), None);
    let stretch = Holes::default().stretch(&base, 0, LEN as u64).unwrap();
    assert_eq!(stretch, (LEN as u64, false));
}
