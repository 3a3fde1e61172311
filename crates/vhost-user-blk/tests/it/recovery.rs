//! The daemon is killed again and again, at any moment, under a load from several queues; a new one
//! goes on where it was.
//!
//! `RECOVERY_KILLS` kills happen (60 if it is not set), with the random numbers of `RECOVERY_SEED`.

use crate::common::soak::{End, Soak, from_env};

fn killed_under_load(args: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let kills = from_env("RECOVERY_KILLS").unwrap_or(60);
    let end = |soak: &mut Soak| End::Killed { after: soak.rng.below(400) };
    let mut now = End::Killed { after: 100 };
    let mut soak = Soak::new(directory.path(), args, &now);
    for _ in 0..kills {
        let next = end(&mut soak);
        soak.life(args, &now, &next);
        now = next;
    }
    assert!(soak.interrupted > kills, "the daemon was idle when it was killed");
    assert!(soak.out_of_order > 0, "nothing was answered out of order");
    soak.finish();
}

#[test]
fn a_killed_daemon_is_followed_by_one_that_finishes_its_work() {
    killed_under_load(&[]);
}

#[test]
fn nor_is_anything_lost_with_threads_for_io_uring() {
    killed_under_load(&["--io-engine=sync"]);
}

#[test]
fn nor_with_threads_that_write_directly() {
    killed_under_load(&["--io-engine=sync", "--cow-cache=direct", "--poll-us=0"]);
}

#[test]
fn a_killed_daemon_s_direct_writes_are_finished_as_well() {
    killed_under_load(&["--cow-cache=direct", "--poll-us=0"]);
}
