//! Real power cuts (`system_tests::powercut`): no sector that was flushed is lost, whatever of the rest reaches the disk.
//!
//!     POWERCUTS=300 cargo test -p system-tests --test powercut -- --nocapture      # hundreds of cuts
//!     POWERCUT_LIES=all cargo test -p system-tests --test powercut -- --nocapture  # every wrong host must be found
//!     POWERCUT_SEED=7 ...                                                          # the kinds of cuts of that run
//!
//! A seed repeats the programs and the kinds of cuts. At which instant one falls depends on the machine.

use std::env;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use system_tests::powercut::{FileSystem, Lie, Series, Variant};
use system_tests::{Kernel, available, require};

/// Cuts where the environment does not say how many.
const CUTS: u32 = 6;
/// Cuts of one disk.
const CUTS_OF_A_DISK: u32 = 3;
/// Cuts in which a lie must be found.
const CUTS_OF_A_LIE: u32 = 6;

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
