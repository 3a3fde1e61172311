//! Disks on real files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block_io::image::{CreateOptions, create_cow};
use block_io::storage::file::Host;
use block_io::{CowFormat, Disk, DiskOptions, ImageError};
use cow_format::{Extent, Sector, SectorCount, SectorRange};

const FORMATS: [CowFormat; 2] = [CowFormat::Uml, CowFormat::Native];

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn options(format: CowFormat) -> DiskOptions {
    DiskOptions { format, lock_wait: Duration::ZERO, ..DiskOptions::default() }
}

fn read_only(format: CowFormat) -> DiskOptions {
    DiskOptions { read_only: true, ..options(format) }
}

fn sectors(disk: &Disk, range: SectorRange) -> Vec<u8> {
    let mut buf = vec![0xaa; usize::try_from(range.len_bytes()).unwrap()];
    disk.read(range, &mut buf).unwrap();
    buf
}

/// A directory with `base`, 1000 sectors of which each holds its number, and a name for a COW file.
struct Place {
    dir: tempfile::TempDir,
    base: PathBuf,
    cow: PathBuf,
}

impl Place {
    fn new() -> Self {
        Self::with_base(&(0..1000u32).flat_map(|n| n.to_le_bytes().repeat(128)).collect::<Vec<_>>())
    }

    fn with_base(content: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        fs::write(&base, content).unwrap();
        Place { base, cow: dir.path().join("cow"), dir }
    }

    fn open(&self, format: CowFormat) -> Disk {
        Disk::open_cow(&self.cow, Some(&self.base), &options(format)).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> =
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn a_cow_file_is_made_over_its_base_and_keeps_what_is_written() {
    for format in FORMATS {
        let place = Place::new();
        let before = fs::read(&place.base).unwrap();
        let disk = place.open(format);
        assert_eq!(disk.capacity(), SectorCount::new(1000));
        assert_eq!(sectors(&disk, range(0, 1000)), before);
        disk.write(range(10, 3), &[7; 1536]).unwrap();
        disk.discard(range(20, 1)).unwrap();
        disk.write_zeroes(range(21, 1)).unwrap();
        let mut expected = before.clone();
        expected[10 * 512..13 * 512].fill(7);
        expected[20 * 512..22 * 512].fill(0);
        assert_eq!(sectors(&disk, range(0, 1000)), expected);
        disk.close().unwrap();
        assert!(disk.write(range(0, 1), &[0; 512]).is_err());
        drop(disk);
        assert_eq!(place.names(), ["base", "cow"]);
        // By its header alone, and without leave to write.
        for options in [options(format), read_only(format)] {
            let disk = Disk::open_cow(&place.cow, None, &options).unwrap();
            assert_eq!(sectors(&disk, range(0, 1000)), expected);
            disk.close().unwrap();
        }
        assert_eq!(fs::read(&place.base).unwrap(), before);
    }
}

#[test]
fn acknowledged_writes_outlive_the_process() {
    for format in FORMATS {
        let place = Place::new();
        let disk = place.open(format);
        disk.write(range(999, 1), &[9; 512]).unwrap();
        drop(disk);
        for options in [read_only(format), options(format)] {
            let disk = Disk::open_cow(&place.cow, None, &options).unwrap();
            assert_eq!(sectors(&disk, range(999, 1)), [9; 512]);
        }
        let disk = Disk::open_cow(&place.cow, None, &options(format)).unwrap();
        disk.close().unwrap();
        drop(disk);
        assert_eq!(place.names(), ["base", "cow"]);
        let disk = Disk::open_cow(&place.cow, None, &read_only(format)).unwrap();
        assert_eq!(sectors(&disk, range(999, 1)), [9; 512]);
    }
}

#[test]
fn a_second_writer_is_refused_and_readers_of_the_base_are_not() {
    for format in FORMATS {
        let place = Place::new();
        let disk = place.open(format);
        let err = Disk::open_cow(&place.cow, None, &options(format)).err().unwrap();
        assert!(matches!(err, ImageError::Locked { .. }), "{err}");
        assert!(err.to_string().contains(place.cow.to_str().unwrap()), "{err}");
        let err = Disk::open_raw(&place.base, &options(format)).err().unwrap();
        assert!(matches!(err, ImageError::Locked { .. }), "{err}");
        let other = place.dir.path().join("other");
        Disk::open_cow(&other, Some(&place.base), &options(format)).unwrap().close().unwrap();
        disk.close().unwrap();
    }
}

#[test]
fn another_path_to_the_same_base_is_adopted() {
    for format in FORMATS {
        for long in [false, true] {
            let place = Place::new();
            place.open(format).close().unwrap();
            let mut dir = place.dir.path().to_owned();
            if long {
                (0..4).for_each(|_| dir.push("d".repeat(200)));
            }
            fs::create_dir_all(&dir).unwrap();
            let moved = dir.join("moved");
            fs::rename(&place.base, &moved).unwrap();
            let err = Disk::open_cow(&place.cow, None, &options(format)).err().unwrap();
            assert!(matches!(err, ImageError::Backing { .. }), "{err}");
            let disk = Disk::open_cow(&place.cow, Some(&moved), &options(format)).unwrap();
            disk.write(range(0, 1), &[1; 512]).unwrap();
            disk.close().unwrap();
            drop(disk);
            let disk = Disk::open_cow(&place.cow, None, &options(format)).unwrap();
            assert_eq!(sectors(&disk, range(0, 1)), [1; 512]);
            assert_eq!(sectors(&disk, range(1, 1)), 1u32.to_le_bytes().repeat(128));
        }
    }
}

#[test]
fn wrong_bases_are_refused_and_nothing_changes() {
    for format in FORMATS {
        let place = Place::new();
        place.open(format).close().unwrap();
        let before = fs::read(&place.cow).unwrap();
        let refused = |base: &Path| {
            let err = Disk::open_cow(&place.cow, Some(base), &options(format)).err().unwrap();
            assert_eq!(fs::read(&place.cow).unwrap(), before, "{err}");
            err
        };
        assert!(matches!(refused(&place.cow), ImageError::Repeated { .. }));
        assert!(matches!(refused(place.dir.path()), ImageError::Kind { .. }));
        assert!(matches!(refused(Path::new("/nowhere")), ImageError::Backing { .. }));
        let shorter = place.dir.path().join("shorter");
        fs::write(&shorter, [0; 512]).unwrap();
        let err = refused(&shorter);
        assert!(
            matches!(err, ImageError::Identity { .. }) && err.to_string().contains("size"),
            "{err}"
        );
        let touched = fs::File::options().write(true).open(&place.base).unwrap();
        touched.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
        let err = refused(&place.base);
        assert!(
            err.to_string().contains("mtime") && err.to_string().contains("1000000000"),
            "{err}"
        );
    }
}

#[test]
fn a_file_that_cannot_be_made_leaves_nothing() {
    for format in FORMATS {
        let place = Place::new();
        let missing = place.dir.path().join("missing");
        Disk::open_cow(&place.cow, Some(&missing), &options(format)).err().unwrap();
        Disk::open_cow(&place.cow, Some(place.dir.path()), &options(format)).err().unwrap();
        assert_eq!(place.names(), ["base"]);
        let err = create_cow(&Host, &place.base, &CreateOptions::over(format, &place.base));
        assert!(err.unwrap_err().to_string().contains("exists"));
        assert_eq!(place.names(), ["base"]);
    }
}

#[test]
fn raw_images() {
    let place = Place::with_base(&[5; 1000]);
    let err = Disk::open_raw(&place.base, &options(CowFormat::Native)).err().unwrap();
    assert!(err.to_string().contains("1000"), "{err}");
    let disk = Disk::open_raw(&place.base, &read_only(CowFormat::Native)).unwrap();
    assert_eq!(disk.capacity(), SectorCount::new(2));
    let content = sectors(&disk, range(0, 2));
    assert!(content[..1000].iter().all(|b| *b == 5) && content[1000..] == [0; 24]);
    drop(disk);
    fs::write(&place.base, [5; 1024]).unwrap();
    let disk = Disk::open_raw(&place.base, &options(CowFormat::Native)).unwrap();
    disk.write(range(1, 1), &[6; 512]).unwrap();
    disk.close().unwrap();
    assert_eq!(fs::read(&place.base).unwrap(), [[5; 512], [6; 512]].concat());
}

/// As UML's driver leaves it when it discards the last sector of a disk of no whole number of
/// sectors.
#[test]
fn a_partial_last_sector_can_be_present_in_a_file_that_ends_with_the_disk() {
    use std::os::unix::fs::FileExt;
    let place = Place::with_base(&[5; 1000]);
    create_cow(&Host, &place.cow, &CreateOptions::over(CowFormat::Uml, &place.base)).unwrap();
    let len = fs::metadata(&place.cow).unwrap().len();
    let file = fs::File::options().write(true).open(&place.cow).unwrap();
    file.write_all_at(&[0b10], 8192).unwrap();
    file.write_all_at(&[6; 4], len - 4).unwrap();
    let mut expected = [[5; 512], [0; 512]].concat();
    expected[996..1000].fill(6);

    let disk = Disk::open_cow(&place.cow, None, &read_only(CowFormat::Uml)).unwrap();
    assert_eq!(sectors(&disk, range(0, 2)), expected);
    let last = disk.extents(range(1, 1)).unwrap().last();
    assert_eq!(last, Some(Extent::Zero { len: 24 }), "nobody reads past the end of a file");
    drop(disk);
    assert_eq!(fs::metadata(&place.cow).unwrap().len(), len);

    // Whoever may write finds room for the whole sector.
    let disk = Disk::open_cow(&place.cow, None, &options(CowFormat::Uml)).unwrap();
    assert_eq!(fs::metadata(&place.cow).unwrap().len(), len + 24);
    assert_eq!(disk.extents(range(1, 1)).unwrap().count(), 1);
    disk.write(range(1, 1), &[7; 512]).unwrap();
    assert_eq!(sectors(&disk, range(1, 1)), [7; 512]);
}
