//! Emptying a COW file: discards its content and frees its space.

use std::path::Path;

use cow_format::{ByteOffset, Header};

use super::{OpError, check};
use crate::image::DiskOptions;
use crate::image::bitmap::side_file;
use crate::image::chain::Opener;
use crate::image::opened::Opened;
use crate::image::write::header_io::{check_writable, mark_clean};
use crate::storage::{Env, FS_BLOCK, Storage};

/// Empties the COW file at `path`: the disk has the content of its base again. An interruption
/// leaves some of the content; run it again.
pub fn reset<E: Env>(env: &E, path: &Path) -> Result<(), OpError> {
    let cow = Opener::new(env, &DiskOptions::default(), path).top()?;
    let mut header = cow.header()?;
    check_writable(path, &header)?;
    // Marked clean first: then the live bitmap is void, and its bits are never used again.
    mark_clean(&cow.file, &mut header).map_err(|err| err.at(path))?;
    empty(env, &cow, &header)
}

/// Clears every bit and punches out all data of a COW file that is exclusively locked. The bits are
/// durably clear before the first data goes: no set bit ever refers to a hole. An interruption
/// leaves some of the bits.
pub(super) fn empty<E: Env>(
    env: &E,
    cow: &Opened<E::File>,
    header: &Header,
) -> Result<(), OpError> {
    let geometry = header.geometry();
    let path = &cow.path;
    let punch =
        |at: ByteOffset, len| cow.file.punch(at, len).map_err(OpError::write(path, at.get()));
    let sync = || cow.file.sync().map_err(OpError::io(path, "sync"));
    if let Header::Uml(_) = header {
        let real = env.canonical(path).map_err(OpError::io(path, "resolve"))?;
        match env.remove(&side_file::path_for(&real)) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(OpError::io(path, "remove the live bitmap of")(err));
            }
            _ => {}
        }
    }
    if let Some(live) = geometry.live_bitmap_offset() {
        // Although void, it must never have a bit that the durable one lacks: see the format,
        // section 6.
        punch(live, check::room(header))?;
        sync()?;
    }
    // Including the room for growth: bits past the end must not reappear when the disk grows.
    punch(geometry.bitmap_offset(), check::room(header))?;
    sync()?;
    // The last block in full, although the file may end within it.
    let end = cow.file.len().map_err(OpError::io(path, "stat"))?.next_multiple_of(FS_BLOCK);
    punch(geometry.data_offset(), end.saturating_sub(geometry.data_offset().get()))?;
    sync()
}
