//! Real power cuts (`system_tests::powercut`): no sector that was flushed is lost, whatever of the
//! rest reaches the disk.
//!
//!     cargo test -p system-tests --test guests powercut -- --nocapture
//!
//! - `POWERCUTS=300`: hundreds of cuts;
//! - `POWERCUT_LIES=all`: every wrong host must be found;
//! - `POWERCUT_SEED=7`: the kinds of cuts of that run.
//!
//! A seed repeats the programs and the kinds of cuts. At which instant one falls depends on the
//! machine.

use std::env;
use std::fs::OpenOptions;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use blk_bench::load::rng::Rng;
use system_tests::flushed::ClientLog;
use system_tests::flushed::program::pick;
use system_tests::powercut::{
    FileSystem, Host, Lie, Series, Server, Survives, Variant, VolatileDisk, wait_until,
};
use system_tests::{Kernel, Running, TestDir, available, require};

/// The number of cuts if the environment does not set it.
const CUTS: u32 = 6;
/// Cuts of one disk.
const CUTS_OF_A_DISK: u32 = 3;
/// Cuts in which a lie must be found.
const CUTS_OF_A_LIE: u32 = 6;

/// For a boot of the host up to what is waited for, under TCG on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

const CLIENT: &str = env!("CARGO_BIN_EXE_flush-client");
/// Where a failure's files are kept.
const KEPT: &str = env!("CARGO_TARGET_TMPDIR");

/// Ok if the host can be booted here, else why not.
fn can_run() -> Result<(), String> {
    Kernel::Qemu.available()?;
    available(&["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"])
}

/// The seed of the run: random, and printed, unless the environment gives it.
fn run_seed() -> u64 {
    let random = || {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock");
        u64::from(since.subsec_micros()) + since.as_secs() % 4000 * 1_000_000
    };
    let seed = env::var("POWERCUT_SEED").ok().map(|seed| seed.parse().expect("a number"));
    let seed = seed.unwrap_or_else(random);
    println!("POWERCUT_SEED={seed}");
    seed
}

#[test]
fn a_power_cut_loses_nothing_that_was_flushed() {
    require!(can_run());
    let asked = env::var("POWERCUTS").map(|cuts| cuts.parse().expect("a number"));
    let mut cuts: u32 = asked.unwrap_or(CUTS);
    let seed = run_seed();
    let variants = Variant::all();
    let mut failures = vec![];
    for number in 0.. {
        if cuts == 0 {
            break;
        }
        let of_disk = cuts.min(CUTS_OF_A_DISK);
        cuts -= of_disk;
        let at = usize::try_from((seed + number) % variants.len() as u64).expect("few variants");
        let mut series = Series::new(variants[at], seed + number, None, Path::new(CLIENT));
        for boot in 0..=of_disk {
            let report = if boot < of_disk { series.cut() } else { series.finish() };
            println!("{}", report.text);
            if !report.violations.is_empty() {
                let place = series.keep(Path::new(KEPT));
                let violations = report.violations.join("\n  ");
                let failure =
                    format!("{}\n  {violations}\n  kept in {}", report.text, place.display());
                println!("VIOLATION {failure}");
                failures.push(failure);
                break;
            }
        }
    }
    assert!(failures.is_empty(), "{} (seed {seed}):\n{}", failures.len(), failures.join("\n"));
}

/// Files that `cow` makes one after the other, until the power goes: each is whole or missing, and
/// those that it reported as done are there.
fn what_cow_has_made_is_whole(file_system: FileSystem) {
    require!(can_run());
    let seed = run_seed();
    let mut rng = Rng::new(seed);
    let (dir, variant) = (TestDir::new(), Variant { file_system, uml: false, direct: false });
    let image = dir.path("disk");
    let host = Host::new(&dir, &image, variant, None, Path::new(CLIENT));
    let file = OpenOptions::new().read(true).write(true).open(&image).expect("the disk's image");
    let disk = VolatileDisk::new(file).expect("a disk");
    let server = Server::start(&dir.path("nbd"), disk, seed).expect("a server");
    let drive = format!("driver=nbd,server.type=unix,server.path={}", server.socket().display());
    let mount = format!("mount_disk {} /dev/vda ''\n", file_system.name());
    let make = format!(
        "{mount}cow create --quiet -b /mnt/base0 /mnt/new-0.cow
         cow merge --quiet /mnt/new-0.cow /mnt/new-image
         tell made new-0.cow; tell made new-image
         i=0; while :; do
             cow snapshot --quiet /mnt/new-$i.cow /mnt/new-$((i + 1)).cow || fail snapshot
             i=$((i + 1)); tell made new-$i.cow
             cow create --quiet -b /mnt/base0 /mnt/new-other-$i.cow || fail create
             tell made new-other-$i.cow
         done"
    );
    let mut guest = host.boot(&dir, "make", &drive, &make);
    let client_log = |name: &str| ClientLog::read(&dir.path(&format!("{name}.told")));
    let begun = wait_until(PATIENCE, || client_log("make").has("made") || guest.has_ended());
    assert!(
        begun && client_log("make").has("made"),
        "{:?}\n{}",
        client_log("make").lines,
        guest.output()
    );
    server.freeze_after(1 + rng.below(60), PATIENCE);
    let made = client_log("make");
    guest.kill();
    println!("{}: {}", file_system.name(), server.cut(pick(&mut rng, &Survives::ALL), seed));
    let names = made.lines.iter().filter_map(|line| line.strip_prefix("made "));
    let exist = names.map(|name| format!("status {name} test -s /mnt/{name}\n"));
    let look = format!(
        "{mount}{}for file in /mnt/new-*; do case $file in
             *.cow) status $file cow check $file;;
             *) status $file cmp $file /mnt/base0;;
         esac; done",
        exist.collect::<String>()
    );
    let guest = host.boot(&dir, "look", &drive, &look);
    let seen = finish(guest, &|| client_log("look"));
    let wrong: Vec<_> = seen.statuses.iter().filter(|(_, status)| *status != 0).collect();
    assert!(wrong.is_empty(), "{} (seed {seed}): {wrong:?}", file_system.name());
}

/// Waits for the end of a host's script, and returns its report.
fn finish(mut guest: Running, client_log: &dyn Fn() -> ClientLog) -> ClientLog {
    wait_until(PATIENCE, || client_log().has("over") || guest.has_ended());
    let client_log = client_log();
    assert!(client_log.has("over"), "{:?}\n{}", client_log.lines, guest.output());
    client_log
}

#[test]
fn what_cow_makes_on_ext4_is_whole_or_not_there_after_a_power_cut() {
    what_cow_has_made_is_whole(FileSystem::Ext4);
}

#[test]
fn what_cow_makes_on_xfs_is_whole_or_not_there_after_a_power_cut() {
    what_cow_has_made_is_whole(FileSystem::Xfs);
}

#[test]
fn what_cow_makes_on_btrfs_is_whole_or_not_there_after_a_power_cut() {
    what_cow_has_made_is_whole(FileSystem::Btrfs);
}

/// Whether a host that is wrong is found out within some cuts.
fn is_found(lie: Lie, variant: Variant, seed: u64) -> bool {
    let mut series = Series::new(variant, seed, Some(lie), Path::new(CLIENT));
    for boot in 0..=CUTS_OF_A_LIE {
        let report = if boot < CUTS_OF_A_LIE { series.cut() } else { series.finish() };
        println!("{}", report.text);
        // A host that does not even boot again proves nothing.
        if let Some(found) = report.violations.iter().find(|text| text.starts_with("sector ")) {
            println!("  found {lie:?}: {found}");
            return true;
        }
    }
    false
}

#[test]
fn hosts_that_lie_are_found() {
    require!(can_run());
    let all = env::var("POWERCUT_LIES").is_ok_and(|lies| lies == "all");
    let lies: &[Lie] = if all { &Lie::ALL } else { &[Lie::FlushesNotSent, Lie::NoDurableWrite] };
    let seed = run_seed();
    for &lie in lies {
        let variant = Variant {
            file_system: FileSystem::Ext4,
            // Of the syncs of UML's format each counts; only the native one has durable writes.
            uml: matches!(lie, Lie::FlushesNotSent | Lie::HalfOfSyncs),
            direct: lie == Lie::NoSync,
        };
        assert!(is_found(lie, variant, seed), "{lie:?} (seed {seed}) was not found");
    }
}
