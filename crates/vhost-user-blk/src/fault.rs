//! Places at which a test kills or stops the daemon, with the feature `fault-points`. Without the
//! feature they do nothing.

use block_io::ring::Ring;

/// Marks the place called `name`. If the environment variable `VHOST_USER_BLK_FAULT` is `NAME:N`,
/// the process kills itself with SIGKILL when it reaches NAME for the Nth time. If it is
/// `NAME:N:FILE`, the thread waits there until FILE exists.
#[cfg(all(feature = "fault-points", not(test)))]
pub fn reached(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Plan {
        name: String,
        times: AtomicU64,
        until: Option<String>,
    }

    static PLAN: OnceLock<Option<Plan>> = OnceLock::new();
    let plan = PLAN.get_or_init(|| {
        let plan = std::env::var("VHOST_USER_BLK_FAULT").ok()?;
        let mut parts = plan.splitn(3, ':');
        let (name, times) = (parts.next()?.to_owned(), parts.next()?.parse().ok()?);
        Some(Plan { name, times: AtomicU64::new(times), until: parts.next().map(str::to_owned) })
    });
    if let Some(plan) = plan
        && plan.name == name
        && plan.times.fetch_sub(1, Ordering::SeqCst) == 1
    {
        match &plan.until {
            None => die(),
            Some(file) => wait_for(file),
        }
    }
}

#[cfg(all(feature = "fault-points", not(test)))]
fn die() -> ! {
    // SAFETY: no memory is involved. Nothing runs after it, not even another thread's next
    // instruction for long, which is what a crash is like.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    loop {
        std::thread::park();
    }
}

#[cfg(all(feature = "fault-points", not(test)))]
fn wait_for(file: &str) {
    log::warn!("at a fault point, waiting for {file}");
    while !std::path::Path::new(file).exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// If the environment variable `VHOST_USER_BLK_TRY_OPERATIONS` is set, logs which of the operation
/// numbers the kernel does not refuse to the ring's io_uring with EACCES: on a registered file, on
/// one that is not registered, and which registrations.
#[cfg(all(feature = "fault-points", not(test)))]
pub fn try_operations<R>(ring: &mut Ring<'_, R>) {
    const FIXED_FILE: u8 = 1;
    /// No place and no descriptor has this number.
    const NO_FILE: i32 = 1 << 20;
    if std::env::var_os("VHOST_USER_BLK_TRY_OPERATIONS").is_none() {
        return;
    }
    let Some(uring) = ring.uring() else { return };
    let refused = -libc::EACCES;
    let mut open = |flags| {
        let all = 0..=u8::MAX;
        all.filter(|&code| uring.attempt(code, flags, NO_FILE).is_ok_and(|it| it != refused))
            .collect::<Vec<_>>()
    };
    let (fixed, others) = (open(FIXED_FILE), open(0));
    let open = |code: &u32| {
        uring.attempt_register(*code).map_or_else(|e| e.raw_os_error(), |()| None)
            != Some(libc::EACCES)
    };
    let registrations: Vec<_> = (0..=u32::from(u8::MAX)).filter(open).collect();
    log::warn!("not refused: {fixed:?} {others:?} {registrations:?}");
}

/// Without the feature it does nothing.
#[cfg(any(not(feature = "fault-points"), test))]
#[inline(always)]
pub fn try_operations<R>(_ring: &mut Ring<'_, R>) {}

/// Makes the system call that a test plants here, in the place of code that was taken over.
/// `VHOST_USER_BLK_CALL` is the name of the thread, the number of the call (or `panic` or `abort`),
/// and its arguments, separated by spaces. An argument is a number, or `=` and a text, which is
/// passed by address.
#[cfg(feature = "fault-points")]
pub fn foreign_code() {
    let Ok(plan) = std::env::var("VHOST_USER_BLK_CALL") else { return };
    let mut words = plan.split(' ');
    if words.next() != std::thread::current().name() {
        return;
    }
    match words.clone().next() {
        Some("panic") => panic!("a planted panic"),
        Some("abort") => std::process::abort(),
        _ => {}
    }
    let texts: Vec<_> = words.map(|word| format!("{word}\0")).collect();
    let value = |text: &String| match text.strip_prefix('=') {
        Some(text) => text.as_ptr().expose_provenance(),
        None => text.trim_end_matches('\0').parse::<isize>().map_or(0, isize::cast_unsigned),
    };
    let mut words = texts.iter().map(value).chain(std::iter::repeat(0));
    let [call, a, b, c, d, e, f] = std::array::from_fn(|_| words.next().unwrap_or(0));
    let number = libc::c_long::try_from(call).unwrap_or(-1);
    // SAFETY: none. The test asks for a call that is refused; if it is not, the test fails.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    log::warn!("system call {call} returned {result}: {}", std::io::Error::last_os_error());
}

/// Without the feature it does nothing.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn foreign_code() {}

/// Without the feature it does nothing.
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
