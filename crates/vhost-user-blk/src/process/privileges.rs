//! Gives up what a daemon that serves does not need.
//!
//! `no_new_privs` belongs to a thread and is passed on to those that it starts, so all this is done
//! before there is a second thread.

use std::io;

use nix::errno::Errno;
use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, setrlimit};

/// Gives it up, for this program and for all that it starts.
///
/// - No program that is started from here gets rights by its file (set-user-id, capabilities).
/// - No other process of the same user can attach to this one, or read its memory and descriptors;
///   and there is no core dump, which could hold the guest's data. A new program loses this
///   protection with execve(2), so a successor calls this too.
pub fn drop() -> io::Result<()> {
    let all = || -> Result<(), Errno> {
        set_no_new_privs()?;
        set_dumpable(false)?;
        setrlimit(Resource::RLIMIT_CORE, 0, 0)
    };
    Ok(all()?)
}
