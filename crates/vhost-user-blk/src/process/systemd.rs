//! What the service manager is told (sd_notify(3): readiness, watchdog, the end), and the socket it
//! may have opened (sd_listen_fds(3)). Without it in the environment all of this is nothing.

use std::ffi::{OsStr, OsString};
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

/// The manager's side.
#[derive(Debug)]
struct Manager {
    socket: UnixDatagram,
    address: SocketAddr,
    /// To be told twice in the time after which it gives this process up.
    watchdog: Option<Watchdog>,
}

#[derive(Debug)]
struct Watchdog {
    interval: Duration,
    told: Mutex<Instant>,
}

/// Looks up in the environment whether there is a manager. To be called once, before anything is
/// said. One that cannot be reached is a warning: the service is not the worse for it.
pub fn install() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let variable = |name| std::env::var(name).ok();
    let pid = variable("WATCHDOG_PID");
    let interval = watchdog_interval(pid.as_deref(), variable("WATCHDOG_USEC").as_deref());
    let watchdog = interval.map(|interval| Watchdog { interval, told: Mutex::new(Instant::now()) });
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

/// Half of the time after which the manager gives up, if it watches this process.
fn watchdog_interval(pid: Option<&str>, usec: Option<&str>) -> Option<Duration> {
    let usec: u64 = usec?.parse().ok()?;
    let ours = pid.is_none_or(|pid| pid.parse() == Ok(std::process::id()));
    (ours && usec > 0).then(|| Duration::from_micros(usec / 2))
}

/// Frontends can connect and will be served.
pub fn ready() {
    tell("READY=1\nSTATUS=serving");
}

/// A signal has asked for the end.
pub fn stopping() {
    tell("STOPPING=1");
}

/// Tells the watchdog that the daemon is alive, if it is time for that; gives the time until it is
/// again. `None` if nobody asks. It says nothing while a thread is stuck: the caller alone, the main
/// thread, is not the daemon.
pub fn alive() -> Option<Duration> {
    let watch = MANAGER.get()?.watchdog.as_ref()?;
    let mut told = watch.told.lock().unwrap_or_else(PoisonError::into_inner);
    if told.elapsed() >= watch.interval {
        *told = Instant::now();
        // A thread that takes less than the manager's own time is only slow.
        if watchdog::all_get_on(2 * watch.interval) {
            tell("WATCHDOG=1");
        }
    }
    Some(watch.interval.saturating_sub(told.elapsed()))
}

fn tell(what: &str) {
    if let Some(manager) = MANAGER.get()
        && let Err(e) = manager.socket.send_to_addr(what.as_bytes(), &manager.address)
    {
        log::warn!("cannot tell the service manager: {e}");
    }
}

/// The socket that the manager has opened for this process (`LISTEN_FDS`); only one is of use.
pub fn listen_fd() -> Option<RawFd> {
    let variable = |name| std::env::var_os(name);
    passed(variable("LISTEN_PID"), variable("LISTEN_FDS"))
}

fn passed(pid: Option<OsString>, fds: Option<OsString>) -> Option<RawFd> {
    let number = |text: Option<OsString>| text?.to_str()?.parse::<u32>().ok();
    let ours = number(pid) == Some(std::process::id());
    (ours && number(fds) == Some(1)).then_some(LISTEN_FDS_START)
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
        let passed = |pid: &str, fds: &str| passed(Some(pid.into()), Some(fds.into()));
        assert_eq!(passed(&own, "1"), Some(3));
        assert_eq!(passed(&own, "2"), None);
        assert_eq!(passed("1", "1"), None);
        assert_eq!(super::passed(None, Some("1".into())), None);
    }

    #[test]
    fn both_kinds_of_address() {
        let name = address(OsStr::new("@a/b")).unwrap();
        assert_eq!(name.as_abstract_name(), Some(b"a/b".as_slice()));
        let path = address(OsStr::new("/run/n")).unwrap();
        assert_eq!(path.as_pathname(), Some(std::path::Path::new("/run/n")));
    }
}
