//! Whether what a predecessor left in the page cache can be trusted, and the recovery if it cannot.
//!
//! What was acknowledged and not flushed is only in the page cache. It is valid as long as the page
//! cache is certainly still the same, and the kernel has not failed to write any of it. Otherwise
//! the file is treated as after a power cut: the live bitmap is void, and the journal is replayed
//! (`docs/architecture.md`, "Durability").

use std::io;
use std::path::Path;

use cow_format::header::{BootId, NativeHeader, NativeState, PageCache};
use cow_format::journal::Records;
use cow_format::{ByteOffset, Header};
use uuid::Uuid;

use super::ImageError;
use super::bitmap::side_file::{self, RawSideHeader, make_void};
use super::opened::Opened;
use super::write::header_io::UpdateError;
use super::write::journal::{read_journal, replay};
use crate::shown::Shown;
use crate::storage::{Access, Env, FileKind, FileStat, Storage};

/// How the live bitmap of a file in use is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    /// By the page cache recorded with it.
    Witness,
    /// The predecessor's description is still open, so the page cache is its own.
    Held,
    /// It is void.
    Nothing,
}

/// The page cache that holds `file`; `None` if the system reports no boot id.
pub(crate) fn page_cache<E: Env>(env: &E, file: &E::File) -> Result<Option<PageCache>, ImageError> {
    let boot = env.boot_id().map_err(ImageError::io("/proc/sys/kernel/random/boot_id", "read"))?;
    let boot = BootId::new(Uuid::from_bytes(boot.0));
    Ok(boot.map(|boot| PageCache { boot, witness: env.cache_witness(file) }))
}

/// Whether the live bitmap of a native file is valid.
pub(crate) fn live_counts<E: Env>(
    env: &E,
    file: &E::File,
    native: &NativeHeader,
    trust: Trust,
) -> Result<bool, ImageError> {
    let Some((live, here)) = native.live().zip(page_cache(env, file)?) else { return Ok(false) };
    Ok(match trust {
        Trust::Witness => live.is(&here),
        Trust::Held => live.boot == here.boot,
        Trust::Nothing => false,
    })
}

/// Whether the journal may have flushed sectors that are not in their final place. If the live
/// bitmap is valid there are none: the page cache has everything.
pub(crate) fn needs_replay<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    native: &NativeHeader,
    trust: Trust,
) -> Result<bool, ImageError> {
    let Some((area, epoch)) = native.journal().zip(native.journal_epoch()) else {
        return Ok(false);
    };
    if live_counts(env, &cow.file, native, trust)? {
        return Ok(false);
    }
    let journal = read_journal(cow, area)?;
    Ok(Records::new(&journal, epoch, native.geometry().sectors()).next().is_some())
}

/// The side file of the UML COW file `cow`, if its live bitmap is valid.
pub(crate) fn valid_side_file<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    header: &Header,
    trust: Trust,
    access: Access,
) -> Result<Option<E::File>, ImageError> {
    if trust == Trust::Nothing {
        return Ok(None);
    }
    let found = find_side_file(env, cow, header, trust, access)?;
    Ok(found.and_then(|(file, valid)| valid.then_some(file)))
}

/// The side file, if there is one, and whether its live bitmap is valid.
fn find_side_file<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    header: &Header,
    trust: Trust,
    access: Access,
) -> Result<Option<(E::File, bool)>, ImageError> {
    let io = |action| ImageError::io(&cow.path, action);
    if !cow.by_name {
        let what = "be used by its descriptor alone, since there is a file beside it";
        return Err(ImageError::UmlCannot { path: cow.path.clone(), what });
    }
    let path = side_file::path_for(&env.canonical(&cow.path).map_err(io("resolve"))?);
    let file = match env.open_itself(&path, access) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) if err.raw_os_error() == Some(libc::ELOOP) => {
            return Err(ImageError::ForeignSideFile { path, why: "is a symbolic link" });
        }
        Err(err) => return Err(ImageError::io(path, "open")(err)),
    };
    let side = file.stat().map_err(ImageError::io(&path, "stat"))?;
    if let Some(why) = is_foreign(env, &side, &cow.stat) {
        return Err(ImageError::ForeignSideFile { path, why });
    }
    let valid = || -> io::Result<bool> {
        let mut found = RawSideHeader::buffer();
        file.read_zero_filled(&mut found, ByteOffset::new(0))?;
        let witness = match trust {
            Trust::Held => RawSideHeader::witness_in(&found),
            Trust::Witness | Trust::Nothing => env.cache_witness(&cow.file),
        };
        let expected =
            RawSideHeader::new(env.boot_id()?, witness, &cow.file.stat()?, header.geometry());
        Ok(found == *expected.bytes() && (witness.is_some() || trust == Trust::Held))
    };
    let valid = valid().map_err(io("read the live bitmap"))?;
    Ok(Some((file, valid)))
}

/// Why a side file may have been put in place by somebody else, who wants this process to write
/// into another file or to believe bits that no daemon has set.
fn is_foreign<E: Env>(env: &E, side: &FileStat, cow: &FileStat) -> Option<&'static str> {
    const ROOT: u32 = 0;
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    if side.kind != FileKind::Regular {
        return Some("is not a regular file");
    }
    if side.links != 1 {
        return Some("has another name as well (a hard link)");
    }
    if ![cow.owner, ROOT].contains(&side.owner) && !env.is_user(side.owner) {
        return Some("belongs neither to the COW file's owner nor to this user");
    }
    (side.mode & !cow.mode & WRITABLE_BY_OTHERS != 0)
        .then_some("can be written by users who cannot write the COW file")
}

/// For a file under its exclusive lock, before its bitmaps are read: decides whether what a
/// predecessor left in the page cache is valid. If not, the file is brought durably to its last
/// flushed state. Can be interrupted, and then starts over.
pub(crate) fn recover<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    header: &mut Header,
) -> Result<Trust, ImageError> {
    let believed = match header {
        Header::Native(native) => believe_native(env, cow, native)?,
        Header::Uml(_) => believe_uml(env, cow, header)?,
    };
    if believed {
        return Ok(Trust::Witness);
    }
    // Dirty pages are newer than what was flushed, and just as valid, so write them back. Then drop
    // the cache, so that only what is on the disk is read.
    cow.file.sync().map_err(ImageError::io(&cow.path, "sync"))?;
    cow.file.drop_cache().map_err(ImageError::io(&cow.path, "drop the page cache of"))?;
    *header = cow.header()?;
    replay(cow, header)?;
    Ok(Trust::Nothing)
}

/// Whether a native file is closed, or its live bitmap is valid. If neither, makes sure that later
/// openers come to the same conclusion.
fn believe_native<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    native: &mut NativeHeader,
) -> Result<bool, ImageError> {
    let NativeState::InUse { live } = native.state() else { return Ok(true) };
    let written = cow.file.check_writeback();
    let both = live.zip(page_cache(env, &cow.file)?);
    let same_boot = both.is_some_and(|(live, here)| live.boot == here.boot);
    match (both.is_some_and(|(live, here)| live.is(&here)), written) {
        (true, Ok(())) => return Ok(true),
        (true, Err(err)) => log_not_written(&cow.path, &err),
        (false, _) if same_boot => log_doubtful(&cow.path),
        (false, _) => {}
    }
    let write = match live {
        // No later opener can trust it.
        Some(_) if !same_boot => return Ok(false),
        Some(_) => {
            native.make_live_void();
            native.next_write()
        }
        // The void state may be only in the page cache, while the other copy says that the live
        // bitmap is valid.
        None => native.write_again(),
    };
    let write = write.map_err(|err| UpdateError::from(err).at(&cow.path))?;
    let written = cow.file.write_durably(&write.bytes[..], write.at);
    written.map_err(ImageError::io(&cow.path, "write the header of"))?;
    Ok(false)
}

/// The same for a UML file. A closed one has no side file.
fn believe_uml<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    header: &Header,
) -> Result<bool, ImageError> {
    let io = |action| ImageError::io(&cow.path, action);
    let found = find_side_file(env, cow, header, Trust::Witness, Access::ReadWrite)?;
    let Some((file, valid)) = found else { return Ok(true) };
    // Check both, even if the result no longer matters: the next sync must report only new errors.
    let written = (cow.file.check_writeback(), file.check_writeback());
    if !valid {
        return Ok(false);
    }
    match written.0.and(written.1) {
        Ok(()) => Ok(true),
        Err(err) => {
            log_not_written(&cow.path, &err);
            make_void(&file).map_err(io("make the live bitmap void"))?;
            Ok(false)
        }
    }
}

fn log_not_written(path: &Path, err: &io::Error) {
    log::error!(
        "{}: the system could not write all of it to the disk ({err}); flushed data is intact, but \
         some later writes may be lost",
        path.shown()
    );
}

fn log_doubtful(path: &Path) {
    log::warn!(
        "{}: was not closed, and its page cache may have been lost since (the file system was mounted \
         again, or this cannot be determined); flushed data is intact, but some later writes may be \
         lost",
        path.shown()
    );
}
