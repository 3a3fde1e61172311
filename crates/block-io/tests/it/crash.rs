//! Power cuts, losses of the page cache under a host that lives on, and deaths of the process at
//! every step of random programs, and again during recovery, on the simulated disk
//! (docs/architecture.md, "Durability"). The rules:
//!
//! - after a power cut, a loss of the page cache, and a failed sync each sector has its last
//!   flushed content or that of
//!   any later write;
//! - after the death of the process each sector has the content of the last acknowledged write to
//!   it, or of a write
//!   that was under way.
//!
//! The mutations at the end are faults that these tests must find.

use crate::crashing::{Fault, Harness, Op, Program};
use block_io::CowFormat;

/// Programs of each kind; some 20 seconds of CPU. `CRASH_SEEDS=200 cargo test -p block-io --release
/// --test crash` digs deeper.
fn seeds() -> std::ops::Range<u64> {
    0..std::env::var("CRASH_SEEDS").map_or(6, |seeds| seeds.parse().expect("CRASH_SEEDS: a number"))
}

const FORMATS: [CowFormat; 2] = [CowFormat::Uml, CowFormat::Native];

#[test]
fn no_crash_loses_what_was_promised() {
    for format in FORMATS {
        for seed in seeds() {
            let program = Program::random(seed, 14);
            let harness = Harness::new(format, None);
            if let Err(violation) = harness.crash_everywhere(&program, seed) {
                panic!("{format:?}, seed {seed}: {violation}\nprogram: {program:?}");
            }
        }
    }
}

/// Where no page cache can be told from another, what was flushed counts, whatever happens.
#[test]
fn no_crash_loses_what_was_flushed_where_nothing_tells_of_the_page_cache() {
    for format in FORMATS {
        for seed in seeds().step_by(3) {
            let program = Program::flushing(seed, 10);
            let harness = Harness::without_witness(format);
            if let Err(violation) = harness.crash_everywhere(&program, seed) {
                panic!("{format:?}, seed {seed}: {violation}\nprogram: {program:?}");
            }
        }
    }
}

/// The same of programs in which nearly every flush goes into the journal.
#[test]
fn no_crash_loses_what_stands_in_the_journal() {
    for seed in seeds() {
        let program = Program::flushing(seed, 16);
        let harness = Harness::new(CowFormat::Native, None);
        if let Err(violation) = harness.crash_everywhere(&program, seed) {
            panic!("seed {seed}: {violation}\nprogram: {program:?}");
        }
    }
}

#[test]
fn small_programs_survive_every_outcome_of_every_crash() {
    let write = |start, count| Op::Write { start, count };
    let programs = [
        vec![write(0, 1), Op::Flush],
        vec![write(0, 1), Op::Flush, write(0, 1), write(1, 1), Op::Flush],
        vec![write(8, 2), Op::Discard { start: 8, count: 1 }, Op::Flush, write(8, 1)],
        vec![write(3, 1), Op::Die, write(4, 1), Op::Flush],
        vec![Op::Flush, write(3, 1), Op::Flush, write(3, 1), Op::Flush, write(3, 1)],
        vec![Op::WriteZeroes { start: 5, count: 1 }, Op::Reopen, write(5, 1), Op::Reopen],
        vec![write(0, 1), Op::Rebind, write(1, 1)],
        vec![write(0, 1), Op::Snapshot, write(0, 1), Op::Flush],
        vec![write(0, 1), Op::Flush, write(0, 1), write(1, 1), Op::FailSync, write(0, 1)],
        vec![write(0, 1), Op::Flush, write(0, 1), Op::FailWriteback, Op::Flush],
        vec![Op::Resize { sectors: 69_998 }, Op::Resize { sectors: 70_004 }, write(69_999, 1)],
    ];
    for format in FORMATS {
        for ops in &programs {
            let program = Program(ops.clone());
            let harness = Harness::new(format, None);
            if let Err(violation) = harness.crash_exhaustively(&program) {
                panic!("{format:?}: {violation}\nprogram: {program:?}");
            }
        }
    }
}

/// Programs that are tried until one shows a fault: mostly the first few.
const MUTATION_SEEDS: std::ops::Range<u64> = 0..60;

fn assert_found(fault: Fault, formats: &[CowFormat]) {
    for &format in formats {
        let harness = Harness::new(format, Some(fault));
        let found = MUTATION_SEEDS
            .clone()
            .find_map(|seed| harness.crash_everywhere(&Program::random(seed, 14), seed).err());
        assert!(found.is_some(), "{format:?}: {fault:?} was not found");
    }
}

#[test]
fn finds_that_the_first_sync_is_left_out() {
    assert_found(Fault::FirstSyncLeftOut, &FORMATS);
}

#[test]
fn finds_that_the_bitmap_is_written_before_the_data() {
    assert_found(Fault::BitmapBeforeData, &FORMATS);
}

#[test]
fn finds_that_the_live_bit_is_set_after_the_acknowledgement() {
    assert_found(Fault::LiveBitAfterAck, &FORMATS);
}

#[test]
fn finds_that_a_live_bitmap_of_another_boot_is_believed() {
    assert_found(Fault::OtherBootBelieved, &FORMATS);
}

fn assert_found_in_journal(fault: Fault) {
    assert_found_by_flushing(fault, CowFormat::Native);
}

fn assert_found_by_flushing(fault: Fault, format: CowFormat) {
    let harness = Harness::new(format, Some(fault));
    let crash = |seed| harness.crash_everywhere(&Program::flushing(seed, 16), seed).err();
    let found = MUTATION_SEEDS.clone().find_map(crash);
    assert!(found.is_some(), "{format:?}: {fault:?} was not found");
}

#[test]
fn finds_that_a_record_is_left_out() {
    assert_found_in_journal(Fault::RecordLeftOut);
}

#[test]
fn finds_that_the_journal_is_not_begun_anew() {
    assert_found_in_journal(Fault::JournalNotBegunAnew);
}

#[test]
fn finds_that_the_page_cache_of_another_mount_is_believed() {
    assert_found(Fault::OtherCacheBelieved, &FORMATS);
    assert_found_in_journal(Fault::OtherCacheBelieved);
}

#[test]
fn finds_that_the_journal_is_put_over_newer_writes() {
    assert_found_in_journal(Fault::JournalOverNewerWrites);
}

#[test]
fn finds_that_a_failed_sync_is_forgotten() {
    assert_found(Fault::FailedSyncForgotten, &FORMATS);
}

#[test]
fn finds_that_nobody_asks_whether_writing_has_failed() {
    assert_found(Fault::FailedWritebackUnseen, &FORMATS);
}

#[test]
fn finds_that_a_page_cache_is_kept_that_is_void() {
    FORMATS.iter().for_each(|format| assert_found_by_flushing(Fault::CacheKept, *format));
}

#[test]
fn finds_that_the_header_is_updated_in_place() {
    assert_found(Fault::HeaderInPlace, &[CowFormat::Native]);
}
