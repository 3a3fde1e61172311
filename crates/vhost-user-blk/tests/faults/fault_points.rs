//! The daemon dies at each step between the fetching of a request and its end, and while it takes
//! over from a dead one.

use crate::common::soak::{End, Soak, from_env};

/// In the order in which a request passes them.
const PLACES: [&str; 13] = [
    "resubmit",
    "fetch-counter",
    "fetch-mark",
    "data",
    "live-bit",
    "status",
    "used-element",
    "link-next",
    "link-head",
    "used-idx",
    "clear",
    "cleared",
    "used-idx-saved",
];

/// Reached only by a successor of a daemon that died between the publication of a batch and the
/// end of its account.
const RECOVERY: [&str; 2] = ["recover-clear", "recover-used-idx"];

#[test]
fn whatever_step_was_the_last() {
    let directory = tempfile::tempdir().unwrap();
    let fault = |place, nth| End::Fault { place, nth, or_after: 20_000 };
    let rounds = from_env("FAULT_ROUNDS").unwrap_or(1);
    let mut plan = Vec::new();
    for _ in 0..rounds {
        for nth in [1, 2, 5, 70] {
            // A daemon finds few requests to do again, and dies before it has done them all.
            let resubmit = fault("resubmit", nth.min(5));
            plan.extend([resubmit.clone(), resubmit]);
            plan.extend(PLACES[1..].iter().map(|place| fault(place, nth)));
        }
        for place in RECOVERY {
            plan.extend([fault("used-idx", 40), fault(place, 1)]);
        }
    }
    plan.push(End::Killed { after: 1000 });
    let mut soak = Soak::new(directory.path(), &[], &End::Killed { after: 0 });
    soak.life(&[], &End::Killed { after: 100 }, &plan[0]);
    for pair in plan.windows(2) {
        let there = soak.life(&[], &pair[0], &pair[1]);
        assert!(there, "{:?} was not reached", pair[0]);
    }
    println!("died {} times", plan.len() - 1);
    soak.finish();
}
