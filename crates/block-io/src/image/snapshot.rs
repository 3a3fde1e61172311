//! Freezing a COW file and putting a new one on top of it.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cow_format::header::{Backing, BackingFormat, NativeHeader, NativeState};
use cow_format::identity::BackingIdentity;
use uuid::Uuid;

use super::chain::{Opener, path_to_store};
use super::create::{create_file, write_new_native};
use super::edit::{ChangeError, Edit, native_of};
use super::write::header_io::write_native_synced;
use super::{CowFormat, DiskOptions, ImageError};
use crate::storage::{Env, Storage};

/// Freezes the native COW file `cow` permanently and creates `new`, which must not exist, on top of
/// it. An interruption leaves `cow` unchanged, or frozen without `new`; calling this again then
/// creates `new`.
pub fn snapshot<E: Env>(env: &E, cow: &Path, new: &Path) -> Result<(), ChangeError> {
    if env.exists(new).map_err(ImageError::io(new, "look for"))? {
        Err(ImageError::io(new, "create")(io::ErrorKind::AlreadyExists.into()))?;
    }
    let mut edit = Edit::open(env, cow)?;
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    Opener::new(env, &options, new).room_above(cow, &edit.header)?;
    let frozen = native_of(&mut edit.header, cow, "be frozen")?.state() == NativeState::Frozen;
    if !frozen {
        edit.settle()?;
    }
    let native = native_of(&mut edit.header, cow, "be frozen")?;
    let mut header = header_above(env, new, cow, native)?;
    create_file(env, new, false, |file| {
        // Who could use the disk still can.
        let mode = edit.cow.stat.mode;
        file.set_mode(mode).map_err(ImageError::io(new, "set the permissions of"))?;
        write_new_native(file, new, &mut header)?;
        // Everything that can fail for the new file has succeeded before the old one is frozen.
        file.sync().map_err(ImageError::io(new, "sync"))?;
        if frozen {
            // Frozen by an interrupted call, perhaps before its sync.
            return edit.cow.file.sync().map_err(ImageError::io(cow, "sync"));
        }
        native.freeze();
        write_native_synced(&edit.cow.file, native).map_err(|err| err.at(cow))
    })?;
    Ok(())
}

/// The header of a new file on top of a layer.
fn header_above<E: Env>(
    env: &E,
    new: &Path,
    cow: &Path,
    layer: &NativeHeader,
) -> Result<NativeHeader, ImageError> {
    let path = path_to_store(env, new, cow, CowFormat::Native)?;
    let (uuid, content_generation) = (layer.uuid(), layer.content_generation());
    let identity = BackingIdentity::Layer { uuid, content_generation };
    Backing::new(path.as_os_str().as_bytes(), BackingFormat::Native, identity, None)
        .and_then(|backing| {
            NativeHeader::create(layer.geometry().virtual_size(), Uuid::new_v4(), Some(backing))
        })
        .map_err(ImageError::header(new))
}
