//! How a daemon confines itself when all that it needs is open, and before its first thread starts.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use block_io::Disk;
use caps::Capability;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat, geteuid};

use crate::cli::{Image, Options, Sandbox};
use crate::lifecycle::error::DaemonError;
use crate::process::privileges::{self, FOR_FOREIGN_BASES, FOR_FOREIGN_FILES};
use crate::process::socket::Endpoint;
use crate::process::users::Account;

/// The user that the daemon becomes, if it is to become another. Its new files belong to that user
/// from now on.
pub fn account(options: &Options) -> Result<Option<Account>, DaemonError> {
    let Some(user) = &options.user else { return Ok(None) };
    let account = Account::find(user, options.group.as_deref())?;
    account.own_new_files().map_err(DaemonError::system("become the user of --user"))?;
    Ok(Some(account))
}

/// Confines the daemon. `disk` is the open one; `None` if it is opened later.
///
/// # Errors
/// What the system refuses; or the disk, if it is opened later and the user may not do that.
pub fn enter(
    options: &Options,
    account: Option<Account>,
    disk: Option<&Disk>,
) -> Result<(), DaemonError> {
    match (options.sandbox, account) {
        (Sandbox::On, _) => privileges::drop(account, kept(options, account, disk)),
        (Sandbox::Off, Some(account)) => account.become_it(),
        (Sandbox::Off, None) => Ok(()),
    }
    .map_err(DaemonError::system("give up privileges"))?;
    match (&options.user, &options.image) {
        // Descriptors are not opened again.
        (None, _) | (Some(_), Image::Fds(_)) => Ok(()),
        (Some(user), _) => check_access(options, user, disk),
    }
}

/// The capabilities without which the daemon could do less with its files than it is meant to.
fn kept(options: &Options, account: Option<Account>, disk: Option<&Disk>) -> &'static [Capability] {
    let uid = account.map_or(geteuid().as_raw(), |account| account.uid());
    let foreign = |path: &Path| fs::metadata(path).is_ok_and(|found| found.uid() != uid);
    let files = files(options, disk);
    // Those below a disk that is opened later are not known.
    let foreign_base = disk.is_none() || files.iter().skip(1).any(|file| foreign(file));
    let socket = match &options.endpoint {
        Endpoint::Path(path) => Some(path),
        Endpoint::Fd(_) => None,
    };
    let sockets = socket.into_iter().chain(&options.control).map(PathBuf::as_path);
    let mut removed = files.first().copied().into_iter().chain(sockets);
    if uid == 0 && (foreign_base || removed.any(|file| file.parent().is_some_and(foreign))) {
        FOR_FOREIGN_FILES
    } else if foreign_base {
        FOR_FOREIGN_BASES
    } else {
        &[]
    }
}

/// The files of the disk, as far as they are known; the top first.
fn files<'a>(options: &'a Options, disk: Option<&'a Disk>) -> Vec<&'a Path> {
    match (disk, &options.image) {
        (Some(disk), _) => disk.layers().iter().map(|layer| layer.path()).collect(),
        (None, Image::File { path, .. }) => vec![path],
        (None, Image::Cow { cow, below, .. }) => {
            std::iter::once(cow).chain(below).map(PathBuf::as_path).collect()
        }
        (None, Image::Fds(_)) => Vec::new(),
    }
}

/// The files are opened again by an upgrade, and by a migration that comes back.
fn check_access(options: &Options, user: &str, disk: Option<&Disk>) -> Result<(), DaemonError> {
    let mut wanted = AccessFlags::R_OK | AccessFlags::W_OK;
    wanted.set(AccessFlags::W_OK, !options.read_only);
    for path in files(options, disk) {
        let access = faccessat(AT_FDCWD, path, wanted, AtFlags::AT_EACCESS);
        wanted = AccessFlags::R_OK;
        let Err(e) = access else { continue };
        let (user, path) = (user.to_owned(), path.to_owned());
        let error = DaemonError::NotForUser { user, path, source: e.into() };
        if disk.is_none() {
            return Err(error);
        }
        log::warn!("{error}, or the daemon can neither be upgraded nor take its guest back");
    }
    Ok(())
}
