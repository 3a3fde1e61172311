//! The daemon is killed again and again, at any moment, under a frontend that keeps no account of
//! what is in flight (it does not negotiate INFLIGHT_SHMFD). What then holds, and what does not,
//! stands in docs/guide/frontends.md, "When the daemon dies".
//!
//! `RECOVERY_KILLS` kills happen (40 if it is not set), with the random numbers of `RECOVERY_SEED`.

use crate::common::soak::untracked::{Guest, Losses};
use crate::common::soak::{DEPTH, End, Soak, from_env};

/// A daemon gives so many answers at most before it is killed.
const ANSWERS_MAX: u64 = 400;

fn kills() -> u64 {
    from_env("RECOVERY_KILLS").unwrap_or(40)
}

fn killed_without_an_account(args: &[&str], depth: u16, guest: Guest) -> Losses {
    let directory = tempfile::tempdir().unwrap();
    let first = End::Killed { after: 0 };
    let mut soak = Soak::with_depth(directory.path(), args, &first, false, depth);
    let mut losses = Losses::default();
    for _ in 0..kills() {
        let answers = soak.rng.below(ANSWERS_MAX);
        soak.untracked_life(args, answers, guest, &mut losses);
    }
    assert!(soak.interrupted > 0, "the daemon was idle when it was killed");
    assert_eq!(soak.out_of_order > 0, depth > 1, "of the order of the answers");
    let counts = (soak.interrupted, soak.completed, soak.out_of_order);
    println!(
        "{} kills; {} requests were interrupted, {} answered, {} out of order; {losses:?}",
        kills(),
        counts.0,
        counts.1,
        counts.2
    );
    soak.finish();
    losses
}

const DIRECT: [&str; 2] = ["--cow-cache=direct", "--poll-us=0"];

/// Every write that was acknowledged is there, flushed or not, and each sector of one that was not
/// is as before or as after it.
#[test]
fn a_guest_that_is_started_again_finds_what_was_acknowledged() {
    killed_without_an_account(&[], DEPTH, Guest::StartedAgain);
}

#[test]
fn a_guest_that_is_started_again_finds_its_direct_writes() {
    killed_without_an_account(&DIRECT, DEPTH, Guest::StartedAgain);
}

/// One request at a time cannot be overtaken: a frontend that goes on behind the last answer loses
/// and repeats nothing.
#[test]
fn a_guest_that_waits_for_each_answer_can_go_on() {
    let losses = killed_without_an_account(&[], 1, Guest::GoesOn);
    assert_eq!((losses.never, losses.twice, losses.undone), (0, 0, 0));
}

/// With several, the entries of the ring behind the last answer are not those of the requests
/// without one: for each that was overtaken another is answered twice. This is what the account is
/// for.
#[test]
fn a_guest_under_load_cannot_go_on() {
    let losses = killed_without_an_account(&DIRECT, DEPTH, Guest::GoesOn);
    assert_eq!(losses.never, losses.twice);
    assert!(losses.never > 0, "no request was overtaken when the daemon was killed");
}
