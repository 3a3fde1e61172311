//! Who is at the other end of a socket, and who is let in.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::geteuid;

use crate::process::users::{self, UserError};

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

/// Supplementary groups of the process that connected (`SO_PEERGROUPS`).
fn groups(socket: &impl AsFd) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 32];
    loop {
        let mut len = libc::socklen_t::try_from(size_of_val(&groups[..])).unwrap_or(0);
        // SAFETY: `groups` is valid for writes of `len` bytes, and `len` for a write.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let found = usize::try_from(len).unwrap_or(0) / size_of::<libc::gid_t>();
        match Errno::result(result) {
            // Then `len` says how many there are.
            Err(Errno::ERANGE) if found > groups.len() => groups.resize(found, 0),
            Err(e) => return Err(e.into()),
            Ok(_) => {
                groups.truncate(found);
                return Ok(groups);
            }
        }
    }
}

/// The frontends that are let in: all that can connect, or those of certain users and groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// `--allow-uid`.
    pub uids: Vec<u32>,
    /// `--allow-gid`.
    pub gids: Vec<u32>,
}

impl Admission {
    /// By the names on the command line.
    pub fn find(users: &[String], groups: &[String]) -> Result<Self, UserError> {
        let uids = users.iter().map(|name| users::uid("--allow-uid", name));
        let gids = groups.iter().map(|name| users::gid("--allow-gid", name));
        Ok(Admission {
            uids: uids.collect::<Result<_, _>>()?,
            gids: gids.collect::<Result<_, _>>()?,
        })
    }

    /// Whether not everyone is let in.
    pub fn is_selective(&self) -> bool {
        !(self.uids.is_empty() && self.gids.is_empty())
    }

    /// Whether this peer is let in, by its user, its group or one of its supplementary groups.
    pub fn admits(&self, peer: Peer, socket: &impl AsFd) -> io::Result<bool> {
        if !self.is_selective() || self.uids.contains(&peer.uid) || self.gids.contains(&peer.gid) {
            return Ok(true);
        }
        Ok(!self.gids.is_empty() && groups(socket)?.iter().any(|gid| self.gids.contains(gid)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use nix::unistd::{getegid, getgroups};

    use super::*;

    #[test]
    fn this_process_is_known_by_its_user_and_all_its_groups() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!((peer.uid, peer.gid), (geteuid().as_raw(), getegid().as_raw()));
        assert!(peer.is_root_or_own());
        let groups = groups(&ours).unwrap();
        let own: Vec<u32> = getgroups().unwrap().iter().map(|gid| gid.as_raw()).collect();
        assert_eq!(groups, own);
        let admits = |uids: &[u32], gids: &[u32]| {
            let admission = Admission { uids: uids.to_vec(), gids: gids.to_vec() };
            admission.admits(peer, &ours).unwrap()
        };
        let nobody = 12_345_678;
        assert!(admits(&[], &[]) && admits(&[nobody, peer.uid], &[]) && admits(&[], &[peer.gid]));
        assert!(admits(&[nobody], &[peer.gid]));
        assert!(
            !admits(&[nobody], &[]) && !admits(&[], &[nobody]) && !admits(&[nobody], &[nobody])
        );
        groups.into_iter().for_each(|gid| assert!(admits(&[nobody], &[gid])));
    }
}
