use block_io::file::Host;
use block_io::image::*;
use block_io::*;
use cow_format::*;
use std::path::Path;
use std::time::Instant;
fn r(s: u64, c: u64) -> SectorRange {
    SectorRange::new(Sector::new(s), SectorCount::new(c)).unwrap()
}
fn rss() -> u64 {
    std::fs::read_to_string("/proc/self/statm")
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        * 4
}
fn main() {
    let dir = Path::new("/root/wt/measure");
    let _ = std::fs::remove_dir_all(dir);
    std::fs::create_dir_all(dir).unwrap();
    let base = dir.join("base");
    std::fs::File::create(&base).unwrap().set_len(4 << 30).unwrap();
    for format in [CowFormat::Native, CowFormat::Uml] {
        let cow = dir.join(format!("{format:?}"));
        create_cow(&Host, &cow, &CreateOptions::over(format, &base)).unwrap();
        let disk = Disk::open_cow(&cow, None, &DiskOptions::default()).unwrap();
        let n = 1u64 << 18;
        let mut x = 1u64;
        let mut order: Vec<u64> = (0..n).collect();
        for i in (1..n as usize).rev() {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            order.swap(i, (x >> 33) as usize % (i + 1));
        }
        let t = Instant::now();
        for b in &order {
            disk.written(r(b * 8, 8)).unwrap();
        }
        println!(
            "{format:?}: random first written(4k): {:.2} us each",
            t.elapsed().as_secs_f64() * 1e6 / n as f64
        );
        let t = Instant::now();
        for b in &order {
            disk.written(r(b * 8, 8)).unwrap();
        }
        println!(
            "{format:?}: rewritten: {:.3} us each",
            t.elapsed().as_secs_f64() * 1e6 / n as f64
        );
        let t = Instant::now();
        disk.flush().unwrap();
        println!(
            "{format:?}: flush of {} pages: {:.2} ms",
            n * 8 / 32768,
            t.elapsed().as_secs_f64() * 1e3
        );
        drop(disk);
        let cow = dir.join(format!("{format:?}2"));
        create_cow(&Host, &cow, &CreateOptions::over(format, &base)).unwrap();
        let disk = Disk::open_cow(&cow, None, &DiskOptions::default()).unwrap();
        let t = Instant::now();
        let mut v = Vec::new();
        for b in order.chunks(32) {
            v.clear();
            v.extend(b.iter().map(|b| r(b * 8, 8)));
            v.sort_unstable_by_key(|r| r.start());
            disk.written_batch(&v).unwrap();
        }
        println!(
            "{format:?}: random batches of 32: {:.2} us each",
            t.elapsed().as_secs_f64() * 1e6 / n as f64
        );
        drop(disk);
        let cow = dir.join(format!("{format:?}3"));
        create_cow(&Host, &cow, &CreateOptions::over(format, &base)).unwrap();
        let disk = Disk::open_cow(&cow, None, &DiskOptions::default()).unwrap();
        let t = Instant::now();
        for b in 0..n {
            disk.written(r(b * 8, 8)).unwrap();
        }
        println!(
            "{format:?}: sequential: {:.2} us each",
            t.elapsed().as_secs_f64() * 1e6 / n as f64
        );
        disk.close().unwrap();
    }
    // 1 TiB, 1 % in scattered 4 KiB
    let big = dir.join("big");
    std::fs::File::create(dir.join("bigbase")).unwrap().set_len(1 << 40).unwrap();
    for format in [CowFormat::Native, CowFormat::Uml] {
        let _ = std::fs::remove_file(&big);
        create_cow(&Host, &big, &CreateOptions::over(format, &dir.join("bigbase"))).unwrap();
        for (name, pieces) in [
            ("empty", 0u64),
            ("1 GiB in clusters of 1 MiB", 1),
            ("0.1 % scattered", 268435),
            ("1 % scattered", 2684354),
        ] {
            let disk = Disk::open_cow(&big, None, &DiskOptions::default()).unwrap();
            let mut x = 7u64;
            let mut v = Vec::new();
            if pieces == 1 {
                for i in 0..1024u64 {
                    v.push(r(i * 2048 * 977 % (1 << 31), 2048));
                }
            } else {
                for _ in 0..pieces {
                    x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    v.push(r((x >> 20) % (1 << 28) * 8, 8));
                }
            }
            v.sort_unstable_by_key(|r| r.start());
            disk.written_batch(&v).unwrap();
            disk.close().unwrap();
            drop(disk);
            drop(v);
            let before = rss();
            let t = Instant::now();
            let disk = Disk::open_cow(&big, None, &DiskOptions::default()).unwrap();
            println!(
                "{format:?}: 1 TiB, {name}: open {:.1} ms, RSS +{} KiB",
                t.elapsed().as_secs_f64() * 1e3,
                rss() - before
            );
            disk.close().unwrap();
        }
    }
    std::fs::remove_dir_all(dir).unwrap();
}
