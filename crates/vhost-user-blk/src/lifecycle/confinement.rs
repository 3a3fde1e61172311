//! How a daemon confines itself when all that it needs is open, and before its first thread starts.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use block_io::ops::signature::{Signature, signature_of};
use block_io::{Disk, Host};
use caps::Capability;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat, geteuid};

use crate::cli::{Format, Image, Options, Sandbox};
use crate::lifecycle::disk_slot::DiskSlot;
use crate::lifecycle::error::DaemonError;
use crate::lifecycle::upgrade::running_program;
use crate::process::privileges::{self, FOR_FOREIGN_BASES, FOR_FOREIGN_FILES};
use crate::process::sandbox::{self, Places};
use crate::process::socket::{Endpoint, directory_of};
use crate::process::users::Account;

/// The user that the daemon becomes, if it is to become another. Its new files belong to that user
/// from now on.
pub fn account(options: &Options) -> Result<Option<Account>, DaemonError> {
    let Some(user) = &options.user else { return Ok(None) };
    let account = Account::find(user, options.group.as_deref())?;
    account.own_new_files().map_err(DaemonError::system("become the user of --user"))?;
    Ok(Some(account))
}

/// Confines the daemon, which serves `slot`. `disk` is the open one; `None` if it is opened later.
/// `inside`: another program of this process has entered the sandbox, which is for good.
///
/// # Errors
/// What the system refuses; or the disk, if it is opened later and the user may not do that.
pub fn enter(
    options: &Options,
    account: Option<Account>,
    slot: &DiskSlot,
    disk: Option<&Disk>,
    inside: bool,
) -> Result<(), DaemonError> {
    match (options.sandbox, account) {
        (Sandbox::On | Sandbox::Log, _) => privileges::drop(account, kept(options, account, disk)),
        (Sandbox::Off, Some(account)) => account.become_it(),
        (Sandbox::Off, None) => Ok(()),
    }
    .map_err(DaemonError::system("give up privileges"))?;
    // Descriptors are not opened again.
    if let (Some(user), Some(_)) = (&options.user, options.image.path()) {
        check_access(options, user, disk)?;
    }
    if !inside {
        sandbox::enter(options.sandbox, &places(options, slot))?;
    }
    Ok(())
}

/// What is opened, made and removed from now on.
fn places(options: &Options, slot: &DiskSlot) -> Places {
    let sockets = sockets(options).map(directory_of).collect();
    let programs = match options.control {
        Some(_) => running_program()
            .parent()
            .map(Path::to_owned)
            .into_iter()
            .chain(options.upgrade_dir.clone())
            .collect(),
        None => Vec::new(),
    };
    let Some(path) = options.image.path() else {
        // Descriptors are not opened again, and their names are not the operator's.
        return Places { sockets, programs, ..Places::default() };
    };
    let mut written = slot.files().to_vec();
    let read = written.split_off(written.len().min(usize::from(!options.read_only)));
    // Where the name leads is where its directory is.
    let directory = directory_of(&path.canonicalize().unwrap_or_else(|_| path.to_owned()));
    // A guest can write a header into a raw image.
    let is_uml = !matches!(options.image, Image::File { format: Some(Format::Raw), .. })
        && signature_of(&Host, path) == Some(Signature::Uml);
    let (synced, side_files) = match (options.read_only, is_uml) {
        (true, _) => (None, None),
        (false, false) => (Some(directory), None),
        (false, true) => (None, Some(directory)),
    };
    Places { read, written, synced, side_files, sockets, programs }
}

fn sockets(options: &Options) -> impl Iterator<Item = &Path> {
    let socket = match &options.endpoint {
        Endpoint::Path(path) => Some(path),
        Endpoint::Fd(_) => None,
    };
    socket.into_iter().chain(&options.control).map(PathBuf::as_path)
}

/// The capabilities without which the daemon could do less with its files than it is meant to.
fn kept(options: &Options, account: Option<Account>, disk: Option<&Disk>) -> &'static [Capability] {
    let uid = account.map_or(geteuid().as_raw(), |account| account.uid());
    let foreign = |path: &Path| fs::metadata(path).is_ok_and(|found| found.uid() != uid);
    let files = files(options, disk);
    // Those below a disk that is opened later are not known.
    let foreign_base = disk.is_none() || files.iter().skip(1).any(|file| foreign(file));
    let mut removed = files.first().copied().into_iter().chain(sockets(options));
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
