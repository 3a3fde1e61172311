//! Updating a COW file's reference after its backing file was copied, moved or touched.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cow_format::Header;
use cow_format::header::Backing;
use cow_format::identity::{ActualIdentity, BackingIdentity};

use super::chain::{Opener, path_to_store, reference};
use super::edit::ChangeError;
use super::identity::{identity_of, verify};
use super::opened::Opened;
use super::write::header_io::{set_backing_path, write_native_synced};
use super::{CowFormat, DiskOptions, ImageError};
use crate::storage::{Env, Storage};

/// The evidence for a rebind when size or mtime differ.
pub enum Proof<'a, F> {
    /// The BLAKE3 digest of the new base's content, which this function computes, must equal the
    /// one in the header.
    Digest(&'a mut dyn FnMut(&F) -> io::Result<[u8; 32]>),
    /// The caller's assurance.
    Trust,
}

/// Makes `base` (by default the file in the header) the backing file in the header of `cow`, if the
/// content is the same. The header keeps its digest. A layer is identified by its UUID and needs no
/// proof; a different size is never accepted. `cow` may be frozen. An interruption leaves the old
/// or the new reference (in a UML header with very long paths perhaps one to a file that does not
/// exist).
pub fn rebind<E: Env>(
    env: &E,
    cow: &Path,
    base: Option<&Path>,
    proof: Proof<'_, E::File>,
) -> Result<(), ChangeError> {
    let options = DiskOptions::default();
    let mut opener = Opener::new(env, &options, cow);
    let top = opener.top()?;
    let mut header = top.header()?;
    let Some(reference) = reference(&header) else {
        return Err(ChangeError::NoBase(cow.to_owned()));
    };
    let opened = match base {
        Some(base) => opener.backing(cow, base)?,
        None => opener.referred(cow, &reference.stored)?,
    };
    let path = opened.path.clone();
    let found = opened.header_as(reference.format, cow)?;
    if verify(&reference.identity, &opened, found.as_ref())?.is_err() {
        same_kind(&reference.identity, &opened.identity(found.as_ref()), cow, &path)?;
        prove(&header, &opened, proof, cow)?;
    }
    write(env, &top, &mut header, &path, (&opened, found.as_ref()))?;
    Ok(())
}

/// Refuses a base that no proof can make acceptable.
fn same_kind(
    stored: &BackingIdentity,
    found: &ActualIdentity,
    cow: &Path,
    base: &Path,
) -> Result<(), ChangeError> {
    let (cow, base) = (cow.to_owned(), base.to_owned());
    match *stored {
        BackingIdentity::Layer { .. } => Err(ChangeError::OtherLayer { cow, base }),
        BackingIdentity::Image { size, .. } | BackingIdentity::ImageSeconds { size, .. }
            if size != found.size =>
        {
            Err(ChangeError::OtherSize { cow, base, found: found.size, expected: size })
        }
        _ => Ok(()),
    }
}

fn prove<F: Storage>(
    header: &Header,
    base: &Opened<F>,
    proof: Proof<'_, F>,
    cow: &Path,
) -> Result<(), ChangeError> {
    let Proof::Digest(take) = proof else { return Ok(()) };
    let names = || (cow.to_owned(), base.path.clone());
    let stored = match header {
        Header::Native(native) => native.backing().and_then(Backing::digest),
        Header::Uml(_) => None,
    };
    let Some(stored) = stored else {
        let (cow, base) = names();
        return Err(ChangeError::NoDigest { cow, base });
    };
    let digest = take(&base.file).map_err(ImageError::io(&base.path, "read"))?;
    // It is locked, but not every program respects locks.
    let now = base.file.stat().map_err(ImageError::io(&base.path, "stat"))?;
    if (now.size, now.mtime) != (base.stat.size, base.stat.mtime) {
        return Err(ChangeError::Moving { base: base.path.clone() });
    }
    if digest != *stored {
        let (cow, base) = names();
        return Err(ChangeError::OtherContent { cow, base });
    }
    Ok(())
}

fn write<E: Env>(
    env: &E,
    top: &Opened<E::File>,
    header: &mut Header,
    base: &Path,
    (found, found_header): (&Opened<E::File>, Option<&Header>),
) -> Result<(), ImageError> {
    let format = CowFormat::of(header);
    let path = path_to_store(env, &top.path, base, format)?;
    let path = path.as_os_str().as_bytes();
    let written = match header {
        Header::Uml(_) => set_backing_path(&top.file, header, path, found.stat.mtime),
        Header::Native(native) => {
            let Some(old) = native.backing() else { return Ok(()) };
            let identity = identity_of(found, found_header)?;
            let new = Backing::new(path, old.format(), identity, old.digest().copied());
            native.set_backing(Some(new.map_err(ImageError::header(&top.path))?));
            write_native_synced(&top.file, native)
        }
    };
    written.map_err(|err| err.at(&top.path))
}
