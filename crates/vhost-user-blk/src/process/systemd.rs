//! Notifies the service manager (sd_notify(3): readiness, watchdog, the end), and takes the socket
//! that it may have opened (sd_listen_fds(3)). Without a service manager in the environment,
//! nothing happens.

use std::ffi::OsStr;
use std::os::fd::RawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::process::watchdog;

/// The first descriptor that is passed: SD_LISTEN_FDS_START.
pub const LISTEN_FDS_START: RawFd = 3;

static MANAGER: OnceLock<Manager> = OnceLock::new();

/// How to reach the manager.
#[derive(Debug)]
struct Manager {
    socket: UnixDatagram,
    address: SocketAddr,
    /// Pinged twice in the time after which the manager gives this process up.
    watchdog: Option<Watchdog>,
}

#[derive(Debug)]
struct Watchdog {
    interval: Duration,
    pinged: Mutex<Instant>,
}

/// Finds the manager in the environment. To be called once, before any notification. If the manager
/// cannot be reached, a warning is logged and the daemon serves all the same.
pub fn install() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let variable = |name| std::env::var(name).ok();
    let pid = variable("WATCHDOG_PID");
    let interval = watchdog_interval(pid.as_deref(), variable("WATCHDOG_USEC").as_deref());
    let watchdog =
        interval.map(|interval| Watchdog { interval, pinged: Mutex::new(Instant::now()) });
    match UnixDatagram::unbound().and_then(|socket| Ok((socket, address(&name)?))) {
        Ok((socket, address)) => _ = MANAGER.set(Manager { socket, address, watchdog }),
        Err(e) => log::warn!("NOTIFY_SOCKET={}: {e}", name.display()),
    }
}

/// A path, or an abstract name that begins with "@".
fn address(name: &OsStr) -> std::io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
        _ => SocketAddr::from_pathname(name),
    }
}

/// Half of the watchdog's timeout, if the manager watches this process.
fn watchdog_interval(pid: Option<&str>, usec: Option<&str>) -> Option<Duration> {
    let usec: u64 = usec?.parse().ok()?;
    let ours = pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    (ours && usec > 0).then(|| Duration::from_micros(usec / 2))
}

/// Notifies that frontends can connect.
pub fn ready() {
    notify("READY=1\nSTATUS=serving");
}

/// Notifies that the daemon is ending.
pub fn stopping() {
    notify("STOPPING=1");
}

/// Pings the watchdog if a ping is due, and returns the time until the next one. `None` if there is
/// no watchdog. No ping is sent while a thread is stuck: the main thread, which calls this, is only
/// a part of the daemon.
pub fn ping_watchdog() -> Option<Duration> {
    let watch = MANAGER.get()?.watchdog.as_ref()?;
    let mut pinged = watch.pinged.lock().unwrap_or_else(PoisonError::into_inner);
    if pinged.elapsed() >= watch.interval {
        *pinged = Instant::now();
        // A thread that takes less than the manager's whole timeout is only slow.
        if watchdog::all_make_progress(2 * watch.interval) {
            notify("WATCHDOG=1");
        }
    }
    Some(watch.interval.saturating_sub(pinged.elapsed()))
}

fn notify(what: &str) {
    if let Some(manager) = MANAGER.get()
        && let Err(e) = manager.socket.send_to_addr(what.as_bytes(), &manager.address)
    {
        log::warn!("cannot notify the service manager: {e}");
    }
}

/// The descriptors that the manager has opened for this process.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// The socket for frontends: the only one whose name is not one of the others.
    pub socket: Option<RawFd>,
    /// The top of the disk (`cow`), and what bypasses the page cache to it (`cow-direct`).
    pub cow: Option<RawFd>,
    pub cow_direct: Option<RawFd>,
    /// The files below it (`base`), nearest first.
    pub bases: Vec<RawFd>,
}

/// What the manager has passed (`LISTEN_FDS`, `LISTEN_FDNAMES`). A successor is run by the process
/// that it was passed to, or by a child of that.
pub fn passed(successor: bool) -> Passed {
    let variable = |name| std::env::var(name).ok();
    let pid = variable("LISTEN_PID").and_then(|pid| pid.parse::<u32>().ok());
    match pid {
        Some(pid) if successor || pid == std::process::id() => {
            Passed::of(variable("LISTEN_FDS").as_deref(), variable("LISTEN_FDNAMES").as_deref())
        }
        _ => Passed::default(),
    }
}

impl Passed {
    fn of(count: Option<&str>, names: Option<&str>) -> Self {
        let count = count.and_then(|count| count.parse::<RawFd>().ok()).unwrap_or(0);
        let names = names.unwrap_or_default().split(':').map(Some).chain(std::iter::repeat(None));
        let (mut passed, mut sockets) = (Passed::default(), Vec::new());
        for (fd, name) in (LISTEN_FDS_START..).zip(names).take(usize::try_from(count).unwrap_or(0))
        {
            match name {
                Some("cow") => passed.cow = Some(fd),
                Some("cow-direct") => passed.cow_direct = Some(fd),
                Some("base") => passed.bases.push(fd),
                _ => sockets.push(fd),
            }
        }
        if let [socket] = sockets[..] {
            passed.socket = Some(socket);
        }
        passed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_meant_for_this_process_counts() {
        let own = std::process::id().to_string();
        let half = Some(Duration::from_millis(10));
        assert_eq!(watchdog_interval(None, Some("20000")), half);
        assert_eq!(watchdog_interval(Some(&own), Some("20000")), half);
        for (pid, usec) in [(Some("1"), Some("20000")), (None, Some("0")), (None, Some("soon"))] {
            assert_eq!(watchdog_interval(pid, usec), None);
        }
    }

    #[test]
    fn what_is_passed_is_known_by_its_name() {
        let socket = |count, names| Passed::of(count, names).socket;
        assert_eq!(socket(Some("1"), None), Some(3));
        assert_eq!(socket(Some("1"), Some("vm1.socket")), Some(3));
        assert_eq!(socket(Some("2"), None), None);
        assert_eq!(socket(None, None), None);
        assert_eq!(socket(Some("-1"), None), None);
        let all = Passed::of(Some("6"), Some("vm1.socket:cow:cow-direct:base:base:base"));
        let expected =
            Passed { socket: Some(3), cow: Some(4), cow_direct: Some(5), bases: vec![6, 7, 8] };
        assert_eq!(all, expected);
        assert_eq!(Passed::of(Some("1"), Some("cow")).socket, None);
    }

    #[test]
    fn both_kinds_of_address() {
        let name = address(OsStr::new("@a/b")).unwrap();
        assert_eq!(name.as_abstract_name(), Some(b"a/b".as_slice()));
        let path = address(OsStr::new("/run/n")).unwrap();
        assert_eq!(path.as_pathname(), Some(std::path::Path::new("/run/n")));
    }
}
