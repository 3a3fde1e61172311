//! Gives up what a daemon that serves does not need.
//!
//! Capabilities and `no_new_privs` belong to a thread and are passed on to those that it starts, so
//! all this is done before there is a second thread.

use std::io;

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet, securebits};
use nix::sys::prctl::{set_dumpable, set_no_new_privs};
use nix::sys::resource::{Resource, setrlimit};

use crate::process::users::{Account, failed};

/// What it takes to use files of another user as root: to open and remove them, to ask for their
/// pages in the page cache (mincore(2)), and for leases on them.
pub const FOR_FOREIGN_FILES: &[Capability] =
    &[Capability::CAP_DAC_OVERRIDE, Capability::CAP_FOWNER, Capability::CAP_LEASE];
/// What it takes to have a lease on a base of another user.
pub const FOR_FOREIGN_BASES: &[Capability] = &[Capability::CAP_LEASE];

/// Becomes the user of `account`, and gives up, for this program and for all that it starts:
///
/// - all capabilities but those in `keep` that there are;
/// - that a program which is started from here gets rights by its file (set-user-id, capabilities).
pub fn drop(account: Option<Account>, keep: &[Capability]) -> io::Result<()> {
    keep_only(account, keep)?;
    set_no_new_privs()?;
    // A change of user may have undone it.
    hide()
}

/// Keeps other processes of the same user from attaching to this one, and from reading its memory
/// and descriptors; and the kernel from dumping core. All this could show the guest's data. A new
/// program loses this protection with execve(2).
pub fn hide() -> io::Result<()> {
    set_dumpable(false)?;
    Ok(setrlimit(Resource::RLIMIT_CORE, 0, 0)?)
}

fn keep_only(account: Option<Account>, keep: &[Capability]) -> io::Result<()> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let keep: CapsHashSet = keep.iter().copied().filter(|one| permitted.contains(one)).collect();
    // Who may not do this has nothing that the set would limit, but for root's programs: theirs are
    // limited by `no_new_privs`.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(failed)? {
        let bounding = caps::read(None, CapSet::Bounding).map_err(failed)?;
        for &one in bounding.difference(&keep) {
            caps::drop(None, CapSet::Bounding, one).map_err(failed)?;
        }
    }
    if let Some(account) = account {
        securebits::set_keepcaps(true).map_err(failed)?;
        account.become_it()?;
        securebits::set_keepcaps(false).map_err(failed)?;
    }
    // The last one makes the next program have them, whoever its user is.
    let sets = [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable, CapSet::Ambient];
    sets.into_iter().try_for_each(|set| limit(set, &keep)).map_err(failed)
}

/// Service managers forbid capset(2) where there are no capabilities, so it is called only if it
/// changes something.
fn limit(set: CapSet, keep: &CapsHashSet) -> Result<(), CapsError> {
    if caps::read(None, set)? == *keep { Ok(()) } else { caps::set(None, set, keep) }
}
