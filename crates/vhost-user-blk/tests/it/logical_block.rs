//! A disk that is a block device with logical blocks of 4096 bytes: the guest is told, and a guest
//! (or firmware) that goes on with sectors of 512 bytes is served all the same.

use std::ops::Range;
use std::path::Path;

use crate::common::{Daemon, content, image, sector};
use testkit::frontend::{F_FLUSH, F_PROTOCOL_FEATURES, F_VERSION_1};
use testkit::loop_device::LoopDevice;
use testkit::memory::Memory;
use testkit::request::{IN, OUT};
use testkit::ring::{Ring, running};

const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// The device may give the space back.
const UNMAP: u32 = 1;

fn ask(ring: &mut Ring, memory: &Memory, kind: u32, sector: u64, data: &[u8]) {
    ring.submit(memory, kind, sector, data);
    ring.kick();
    assert_eq!(ring.wait::<0>(memory).0, 0, "request {kind} at {sector}");
}

fn segment(sectors: &Range<u64>, flags: u32) -> Vec<u8> {
    let count = u32::try_from(sectors.end - sectors.start).unwrap();
    [&sectors.start.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Serves `device`, which holds [`content`], and asks for what does not begin and end with a block.
fn serve(directory: &Path, device: &Path, cache: &str, block: u32) {
    let disk = format!("--blk-file={}", device.display());
    let daemon = Daemon::start(directory, [&disk, "--format=raw", cache]);
    let features = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH;
    let (mut frontend, memory, mut ring) = running(daemon.connect(), features);
    let told = frontend.get_config(20, 4).unwrap();
    assert_eq!(u32::from_le_bytes(told.try_into().unwrap()), block);

    let mut expected = content();
    let bytes = |sectors: Range<u64>| {
        let at = |sector| usize::try_from(sector * 512).unwrap();
        at(sectors.start)..at(sectors.end)
    };
    ask(&mut ring, &memory, OUT, 3, &[0xaa; 1024]);
    expected[bytes(3..5)].fill(0xaa);
    assert_eq!(ring.read_sector(&memory, 3), [0xaa; 512]);
    assert_eq!(ring.read_sector(&memory, 5), sector(5));
    for (flags, start) in [(0, 100), (UNMAP, 300)] {
        for sectors in [start + 3..start + 60, start + 81..start + 82, start + 103..start + 105] {
            ask(&mut ring, &memory, WRITE_ZEROES, 0, &segment(&sectors, flags));
            expected[bytes(sectors)].fill(0);
        }
    }
    // What is in whole blocks becomes zeros on this device; the edges stay.
    let discarded = 504..560;
    ask(&mut ring, &memory, DISCARD, 0, &segment(&(501..565), 0));
    if block == 512 {
        expected[bytes(501..565)].fill(0);
    }
    expected[bytes(discarded)].fill(0);
    ask(&mut ring, &memory, DISCARD, 0, &segment(&(601..603), 0));
    if block == 512 {
        expected[bytes(601..603)].fill(0);
    }
    ask(&mut ring, &memory, FLUSH, 0, &[]);
    for at in 0..expected.len() / 4096 {
        ring.submit(&memory, IN, at as u64 * 8, &[0; 4096]);
        ring.kick();
        let (status, found) = ring.wait::<4096>(&memory);
        assert!(status == 0 && found == expected[at * 4096..][..4096], "sectors from {}", at * 8);
    }
    drop(frontend);
    let log = daemon.terminate();
    assert!(!log.contains("I/O failed"), "{log}");
}

#[test]
fn sectors_of_512_bytes_are_served_on_blocks_of_4096() {
    for block in [512, 4096] {
        for cache in ["--cow-cache=buffered", "--cow-cache=direct"] {
            let directory = tempfile::tempdir().unwrap();
            let image = image(directory.path());
            let Some(device) = LoopDevice::new(&image, block) else { return };
            serve(directory.path(), device.path(), cache, block);
        }
    }
}
