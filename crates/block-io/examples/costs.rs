//! What the bitmaps cost: a first write's bookkeeping, a rewrite's, a flush, and opening a disk of 1 TiB.
//!
//! `cargo run --release -p block-io --example costs [DIRECTORY]`

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use block_io::file::Host;
use block_io::image::{CreateOptions, create_cow};
use block_io::{CowFormat, Disk, DiskOptions};
use cow_format::{Sector, SectorCount, SectorRange};

/// Sectors in 4 KiB.
const PIECE: u64 = 8;

fn piece(index: u64) -> SectorRange {
    SectorRange::new(Sector::new(index * PIECE), SectorCount::new(PIECE)).expect("within a disk")
}

/// An order that is always the same.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 20
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed())
}

/// Resident memory in KiB.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).map_or(0, |pages: u64| pages * 4)
}

fn new_disk(dir: &Path, format: CowFormat, size: u64) -> PathBuf {
    let (base, cow) = (dir.join("base"), dir.join("cow"));
    _ = std::fs::remove_file(&cow);
    std::fs::File::create(&base).and_then(|base| base.set_len(size)).expect("base");
    create_cow(&Host, &cow, &CreateOptions::over(format, &base)).expect("COW file");
    cow
}

fn open(cow: &Path) -> Disk {
    Disk::open_cow(cow, None, &DiskOptions::default()).expect("open")
}

fn writes(dir: &Path, format: CowFormat) {
    const PIECES: u64 = 1 << 18;
    let disk = open(&new_disk(dir, format, PIECES * PIECE * 512));
    // An odd factor makes a permutation of all pieces, far from each other.
    let all = |disk: &Disk| {
        (0..PIECES).try_for_each(|n| {
            disk.begin_write(piece(n * 77_773 % PIECES)).written(&[piece(n * 77_773 % PIECES)])
        })
    };
    for name in ["first", "again"] {
        let (result, time) = timed(|| all(&disk));
        result.expect("written");
        println!(
            "{format:?}: 4 KiB written {name}: {:.3} µs",
            time.as_secs_f64() * 1e6 / PIECES as f64
        );
    }
    let (result, time) = timed(|| disk.flush());
    result.expect("flush");
    println!(
        "{format:?}: flush of {} bitmap pages: {:.1} ms",
        PIECES / 4096,
        time.as_secs_f64() * 1e3
    );
}

fn opening(dir: &Path, format: CowFormat) {
    const SIZE: u64 = 1 << 40;
    const PIECES: u64 = SIZE / 4096;
    for percent in [0, 1] {
        let cow = new_disk(dir, format, SIZE);
        let disk = open(&cow);
        let mut state = 7;
        for _ in 0..PIECES / 100 * percent {
            disk.begin_write(piece(random(&mut state) % PIECES))
                .written(&[piece(random(&mut state) % PIECES)])
                .expect("written");
        }
        disk.close().expect("close");
        drop(disk);
        let before = resident();
        let (disk, time) = timed(|| open(&cow));
        let memory = resident().saturating_sub(before);
        println!(
            "{format:?}: 1 TiB with {percent} % in scattered 4 KiB: opened in {:.1} ms, {memory} KiB",
            time.as_secs_f64() * 1e3
        );
        disk.close().expect("close");
    }
}

fn main() {
    let place = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = place.join(format!("block-io-costs-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("directory");
    for format in [CowFormat::Native, CowFormat::Uml] {
        writes(&dir, format);
        opening(&dir, format);
    }
    std::fs::remove_dir_all(&dir).expect("remove");
}
