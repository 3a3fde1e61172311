//! A block device that has logical blocks of 4096 bytes.

use std::fs;

use block_io::storage::file::{Host, whole_blocks};
use block_io::storage::{Access, Env, Storage};
use block_io::{Disk, DiskOptions};
use cow_format::ByteOffset;
use testkit::loop_device::LoopDevice;

const LEN: usize = 1 << 20;

#[test]
fn a_part_of_a_block_is_zeroed_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let mut expected = vec![7; LEN];
    fs::write(&image, &expected).unwrap();
    let Some(device) = LoopDevice::new(&image, 4096) else { return };
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    assert_eq!(Disk::open_raw(device.path(), &options).unwrap().logical_block(), 4096);
    assert_eq!(Disk::open_raw(&image, &options).unwrap().logical_block(), 512);
    let file = Host.open(device.path(), Access::ReadWrite).unwrap();
    for (at, len) in [(512, 512), (8192 + 512, 40_000), (81_920, 8192), (102_400, 9000)] {
        file.punch(ByteOffset::new(at), len).unwrap();
        file.zero_keep_allocated(ByteOffset::new((LEN as u64) / 2 + at), len).unwrap();
        let (at, len) = (usize::try_from(at).unwrap(), usize::try_from(len).unwrap());
        for start in [at, LEN / 2 + at] {
            expected[start..start + len].fill(0);
        }
        let mut found = vec![1; LEN];
        file.read_exact_at(&mut found, ByteOffset::new(0)).unwrap();
        assert!(found == expected, "{at} {len}");
    }
    file.sync().unwrap();
}

#[test]
fn whole_blocks_are_inside() {
    let blocks = |at, len, block| {
        let found = whole_blocks(ByteOffset::new(at), len, block);
        (found.start, found.end)
    };
    assert_eq!(blocks(512, 1024, 512), (512, 1536));
    assert_eq!(blocks(4096, 4096, 4096), (4096, 8192));
    assert_eq!(blocks(4097, 8192, 4096), (8192, 12288));
    // None: all of it is edge.
    assert_eq!(blocks(512, 512, 4096), (1024, 1024));
    assert_eq!(blocks(4000, 4000, 4096), (8000, 8000));
    assert_eq!(blocks(8, 0, 4096), (8, 8));
}
