//! Who is at the other end of a socket.

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;

/// The process that connected (`SO_PEERCRED`), as it was then. Of a socketpair(2) it is the process
/// that made the pair, whoever has the other end now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    uid: u32,
    gid: u32,
    /// 0 if it is not visible from here.
    pid: i32,
}

impl Peer {
    /// The process at the other end of a connected unix socket.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let found = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Peer { uid: found.uid(), gid: found.gid(), pid: found.pid() })
    }

    /// Whether it is root's, or of the daemon's own user.
    pub fn is_root_or_own(&self) -> bool {
        self.uid == 0 || self.uid == geteuid().as_raw()
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "user {}, group {}, process {}", self.uid, self.gid, self.pid)
    }
}
