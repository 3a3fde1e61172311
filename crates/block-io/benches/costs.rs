//! What the bitmaps cost: a first write's bookkeeping, a rewrite's, a flush, and opening a large
//! disk.
//!
//! `cargo bench -p block-io --bench costs [-- DIRECTORY]`; without cargo's `--bench`, as
//! `cargo test` runs it, each case is only tried, on small disks.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use block_io::image::{CreateOptions, create_cow};
use block_io::storage::file::Host;
use block_io::{CowFormat, Disk, DiskOptions};
use cow_format::{Sector, SectorCount, SectorRange};

/// Sectors in 4 KiB.
const PIECE: u64 = 8;

/// How large the disks are.
struct Scale {
    /// Pieces that are written one by one.
    pieces: u64,
    /// Bytes of the disk that is opened.
    opened: u64,
}

const MEASURED: Scale = Scale { pieces: 1 << 18, opened: 1 << 40 };
const TRIED: Scale = Scale { pieces: 1 << 12, opened: 1 << 30 };

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

fn writes(dir: &Path, format: CowFormat, pieces: u64) {
    let disk = open(&new_disk(dir, format, pieces * PIECE * 512));
    // An odd factor makes a permutation of all pieces, far from each other.
    let all = |disk: &Disk| {
        (0..pieces).try_for_each(|n| {
            disk.begin_write(piece(n * 77_773 % pieces)).written(&[piece(n * 77_773 % pieces)])
        })
    };
    for name in ["first", "again"] {
        let (result, time) = timed(|| all(&disk));
        result.expect("written");
        println!(
            "{format:?}: 4 KiB written {name}: {:.3} µs",
            time.as_secs_f64() * 1e6 / pieces as f64
        );
    }
    let (result, time) = timed(|| disk.flush());
    result.expect("flush");
    println!(
        "{format:?}: flush of {} bitmap pages: {:.1} ms",
        pieces / 4096,
        time.as_secs_f64() * 1e3
    );
}

fn opening(dir: &Path, format: CowFormat, size: u64) {
    let pieces = size / 4096;
    for percent in [0, 1] {
        let cow = new_disk(dir, format, size);
        let disk = open(&cow);
        let mut state = 7;
        for _ in 0..pieces / 100 * percent {
            disk.begin_write(piece(random(&mut state) % pieces))
                .written(&[piece(random(&mut state) % pieces)])
                .expect("written");
        }
        disk.close().expect("close");
        drop(disk);
        let before = resident();
        let (disk, time) = timed(|| open(&cow));
        let memory = resident().saturating_sub(before);
        println!(
            "{format:?}: {} GiB, {percent} % in scattered 4 KiB: opened in {:.1} ms, {memory} KiB",
            size >> 30,
            time.as_secs_f64() * 1e3
        );
        disk.close().expect("close");
    }
}

fn main() {
    let scale = if std::env::args().any(|arg| arg == "--bench") { MEASURED } else { TRIED };
    let place = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let place = place.map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = place.join(format!("block-io-costs-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("directory");
    for format in [CowFormat::Native, CowFormat::Uml] {
        writes(&dir, format, scale.pieces);
        opening(&dir, format, scale.opened);
    }
    std::fs::remove_dir_all(&dir).expect("remove");
}
