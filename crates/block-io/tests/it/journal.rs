//! The journal on real files: what a power cut left in it, and its space.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use block_io::image::resize;
use block_io::ops::check::{Checked, check};
use block_io::storage::Storage;
use block_io::storage::file::Host;
use block_io::{Disk, DiskOptions, ImageError};
use cow_format::check::Finding;
use cow_format::{ByteOffset, Sector, SectorCount, SectorRange};

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn options() -> DiskOptions {
    DiskOptions { lock_wait: Duration::ZERO, ..DiskOptions::default() }
}

/// The golden file with a journal, as of a host that has been booted since.
fn journalled() -> (tempfile::TempDir, PathBuf) {
    let golden =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../cow-format/tests/golden/v1-journal.cow.zst");
    let mut decoder =
        ruzstd::decoding::StreamingDecoder::new(std::fs::File::open(golden).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cow");
    let mut bytes = Vec::new();
    decoder.read_to_end(&mut bytes).unwrap();
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    // Sparse, as it was.
    for (n, block) in (0..).zip(bytes.chunks(4096)) {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, n * 4096).unwrap();
        }
    }
    (dir, path)
}

#[test]
fn a_journal_of_another_boot_is_put_in_place_by_who_may_write() {
    let (_dir, path) = journalled();
    let reading = DiskOptions { read_only: true, ..options() };
    let err = Disk::open_cow(&path, None, &reading).err().unwrap();
    assert!(matches!(err, ImageError::Journal { .. }), "{err}");
    let found = check(&Host, &path, false).unwrap();
    assert!(matches!(found[..], [Checked { finding: Finding::Journal, repaired: false }]));
    let disk = Disk::open_cow(&path, None, &options()).unwrap();
    let text = |sector| {
        let mut bytes = [0; 512];
        disk.read(range(sector, 1), &mut bytes).unwrap();
        String::from_utf8(bytes[..5].to_vec()).unwrap()
    };
    assert_eq!([3, 9, 10].map(text), ["newer", "two..", "two.."]);
    // Neither the torn record nor what the live bitmap says of that boot.
    assert_eq!([1, 5, 6].map(text), ["\0\0\0\0\0"; 3]);
    assert_eq!(text(0), "G0000");
    disk.close().unwrap();
    drop(disk);
    assert!(check(&Host, &path, false).unwrap().is_empty());
}

#[test]
fn a_journal_is_put_in_place_before_the_file_is_changed_as_a_whole() {
    let (_dir, path) = journalled();
    resize(&Host, &path, 2 << 20, false).unwrap();
    let disk = Disk::open_cow(&path, None, &options()).unwrap();
    assert!(disk.is_present(range(9, 2)).unwrap());
    assert!(!disk.is_present(range(5, 2)).unwrap());
}

/// A read-only opener need not refuse an empty journal.
#[test]
fn an_empty_journal_hinders_nobody() {
    let (_dir, path) = journalled();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    // The first record: what comes after one that does not count does not count either.
    file.write_all_at(&[0; 4096], 8192 + (8 << 20)).unwrap();
    let reading = DiskOptions { read_only: true, ..options() };
    let disk = Disk::open_cow(&path, None, &reading).unwrap();
    assert!(disk.is_present(range(0, 1)).unwrap() && !disk.is_present(range(9, 1)).unwrap());
    drop(disk);
    let found = check(&Host, &path, false).unwrap();
    assert!(!found.iter().any(|checked| checked.finding == Finding::Journal), "{found:?}");
}

#[test]
fn a_closed_file_keeps_no_space_for_its_journal() {
    let (_dir, path) = journalled();
    let disk = Disk::open_cow(&path, None, &options()).unwrap();
    let data = |at: u64| {
        let file = disk.layers()[0].file();
        file.next_data(ByteOffset::new(at)).unwrap().map(|data| data.start)
    };
    let area = 8192 + (8 << 20);
    for n in 0..4 {
        disk.write(range(n, 1), &[7; 512]).unwrap();
        disk.flush().unwrap();
    }
    assert_eq!(data(area), Some(area), "the journal is in use");
    disk.close().unwrap();
    assert!(data(area) >= Some(9 << 20));
}
