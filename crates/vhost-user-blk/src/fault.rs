//! Places at which a test kills the daemon, with the feature `fault-points`; without it, nothing.

/// Says that the place called `name` was reached. With the feature: if the environment variable
/// `VHOST_USER_BLK_FAULT` is `NAME:N`, the Nth time that NAME is reached is the end of the process,
/// by SIGKILL.
#[cfg(all(feature = "fault-points", not(test)))]
pub fn reached(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static PLAN: OnceLock<Option<(String, AtomicU64)>> = OnceLock::new();
    let plan = PLAN.get_or_init(|| {
        let plan = std::env::var("VHOST_USER_BLK_FAULT").ok()?;
        let (name, times) = plan.split_once(':')?;
        Some((name.to_owned(), AtomicU64::new(times.parse().ok()?)))
    });
    if let Some((planned, times)) = plan
        && planned == name
        && times.fetch_sub(1, Ordering::SeqCst) == 1
    {
        // SAFETY: no memory is involved. Nothing runs after it, not even another thread's next
        // instruction for long, which is what a crash is like.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        loop {
            std::thread::park();
        }
    }
}

/// As above; without the feature it is nothing.
#[cfg(not(any(feature = "fault-points", test)))]
#[inline(always)]
pub fn reached(_name: &str) {}

/// In unit tests a crash is a panic, of the thread that called [`crash_after`].
#[cfg(test)]
pub fn reached(_name: &str) {
    use crash::{Crash, LEFT};
    let Some(left) = LEFT.get() else { return };
    LEFT.set(left.checked_sub(1));
    if left == 0 {
        std::panic::resume_unwind(Box::new(Crash));
    }
}

#[cfg(test)]
pub(crate) mod crash {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    pub(super) struct Crash;

    thread_local! {
        pub(super) static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    /// Runs `work` until it has gone past `places` places. `None`: it did not get to its end.
    pub(crate) fn crash_after<T>(places: u32, work: impl FnOnce() -> T) -> Option<T> {
        LEFT.set(Some(places));
        let result = catch_unwind(AssertUnwindSafe(work));
        LEFT.set(None);
        match result {
            Ok(value) => Some(value),
            Err(panic) if panic.is::<Crash>() => None,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
