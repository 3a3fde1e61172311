//! The marker beside a COW file that its merge into a file below has begun: `<COW>.merging`.
//!
//! A merge in place changes its target, so that this no longer matches the header above it: a
//! base's mtime, a layer's generation. The marker records that this is the reason, so that an
//! interrupted merge can be run again. It exists from before the first change until nothing is left
//! to do, and is void once the header matches the changed file.

use std::io;
use std::path::{Path, PathBuf};

use cow_format::ByteOffset;
use cow_format::identity::BackingIdentity;
use zerocopy::little_endian::{I64, U32, U64};
use zerocopy::{FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::OpError;
use crate::storage::{Access, Env, FileStat, Storage};

const MAGIC: [u8; 8] = *b"COWMERGE";
const VERSION: u32 = 1;
/// Nanoseconds of an unknown time.
const UNKNOWN: u32 = u32::MAX;

/// The marker, little-endian.
#[derive(Clone, Copy, FromZeros, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawNote {
    magic: [u8; 8],
    version: U32,
    /// CRC32C of everything after it.
    crc: U32,
    cow_ino: U64,
    /// The merge target: its inode number and creation time. Device numbers change from boot to
    /// boot.
    target_ino: U64,
    target_born_secs: I64,
    target_born_nanos: U32,
    /// The kind of identity in the header above: 0 size and whole seconds, 1 size and exact mtime,
    /// 2 a layer.
    identity: U32,
    /// Size in bytes, or the layer's content generation.
    size: U64,
    mtime_secs: I64,
    mtime_nanos: U32,
    reserved: U32,
    uuid: [u8; 16],
}

const RAW_LEN: usize = 88;
const _: () = assert!(size_of::<RawNote>() == RAW_LEN);
/// The checksum covers what follows it.
const CRC_END: usize = 16;

/// The marker of a merge of one COW file. It is uniquely determined by the target and its identity
/// in the header above, so a marker is valid if it is equal.
pub(crate) struct MergeMarker {
    path: PathBuf,
    bytes: [u8; RAW_LEN],
}

impl MergeMarker {
    /// The marker for the COW file at `cow` (without symbolic links) over a target with the
    /// identity `stored`.
    pub(crate) fn new(
        cow: &Path,
        cow_stat: &FileStat,
        target: &FileStat,
        stored: &BackingIdentity,
    ) -> Self {
        let mut raw = RawNote::new_zeroed();
        (raw.magic, raw.version) = (MAGIC, VERSION.into());
        raw.cow_ino = cow_stat.id.ino.into();
        raw.target_ino = target.id.ino.into();
        let born = target.born.map_or((0, UNKNOWN), |born| (born.secs(), born.nanos()));
        (raw.target_born_secs, raw.target_born_nanos) = (born.0.into(), born.1.into());
        match *stored {
            BackingIdentity::ImageSeconds { size, mtime_secs } => {
                (raw.size, raw.mtime_secs) = (size.into(), i64::from(mtime_secs).into());
            }
            BackingIdentity::Image { size, mtime, .. } => {
                (raw.identity, raw.size) = (1.into(), size.into());
                (raw.mtime_secs, raw.mtime_nanos) = (mtime.secs().into(), mtime.nanos().into());
            }
            BackingIdentity::Layer { uuid, content_generation } => {
                (raw.identity, raw.size) = (2.into(), content_generation.into());
                raw.uuid = uuid.into_bytes();
            }
        }
        raw.crc = crc32c::crc32c(&raw.as_bytes()[CRC_END..]).into();
        let mut bytes = [0; RAW_LEN];
        bytes.copy_from_slice(raw.as_bytes());
        MergeMarker { path: marker_path(cow), bytes }
    }

    /// Whether exactly this marker exists beside the COW file.
    pub(crate) fn exists<E: Env>(&self, env: &E) -> io::Result<bool> {
        let file = match env.open(&self.path, Access::Read) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(err) => return Err(err),
        };
        let mut found = [0; RAW_LEN];
        let n = file.read_at(&mut found, ByteOffset::new(0))?;
        Ok(n == RAW_LEN && found == self.bytes)
    }

    /// Writes the marker, durably, replacing any other: those are void. It gets its name in one
    /// step, so that a killed process never leaves a partial one.
    pub(crate) fn write<E: Env>(&self, env: &E) -> Result<(), OpError> {
        if self.exists(env).map_err(OpError::io(&self.path, "read"))? {
            return env
                .sync_parent(&self.path)
                .map_err(OpError::io(&self.path, "sync the directory of"));
        }
        self.remove(env)?;
        let new = crate::image::Unpublished::create(env, &self.path)?;
        let written = new.file().write_all_at(&self.bytes, ByteOffset::new(0));
        written.map_err(OpError::write(&self.path, 0))?;
        Ok(new.publish(false)?)
    }

    /// Removes any marker, durably.
    pub(crate) fn remove<E: Env>(&self, env: &E) -> Result<(), OpError> {
        match env.remove(&self.path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
            removed => removed.map_err(OpError::io(&self.path, "remove"))?,
        }
        env.sync_parent(&self.path).map_err(OpError::io(&self.path, "sync the directory of"))
    }
}

/// The path of the marker of the COW file at `cow` (without symbolic links).
pub(crate) fn marker_path(cow: &Path) -> PathBuf {
    let mut path = cow.as_os_str().to_owned();
    path.push(".merging");
    PathBuf::from(path)
}
