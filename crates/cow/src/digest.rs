//! BLAKE3 of a whole file: reads ahead while all cores hash.

use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use block_io::image::ChangeError;
use block_io::ops::{Holes, OpError, Progress};
use block_io::storage::{Access, Env, LockKind, Storage};
use block_io::{Host, ImageError};
use cow_format::ByteOffset;

use crate::error::CowError;
use crate::ui::Ui;

/// Bytes that are read and hashed at once: enough for every core's share to be worth a thread.
const PIECE: usize = 8 << 20;
/// Pieces under way: one being hashed, one read, one between.
const PIECES: usize = 3;

/// BLAKE3 of the file at `path`, which is locked against writers meanwhile.
pub fn digest_of(path: &Path, ui: Ui) -> Result<[u8; 32], CowError> {
    let file = Host.open(path, Access::Read).map_err(OpError::io(path, "open"))?;
    file.try_lock(LockKind::Shared)
        .map_err(|source| ImageError::Locked { path: path.to_owned(), source })?;
    let before = file.stat().map_err(OpError::io(path, "stat"))?;
    let progress = ui.progress("digest", before.size);
    let found = digest(&file, &|bytes| progress.add(bytes)).map_err(OpError::io(path, "read"))?;
    // Not every program honours locks.
    let after = file.stat().map_err(OpError::io(path, "stat"))?;
    if (before.size, before.mtime) != (after.size, after.mtime) {
        return Err(CowError::Change(ChangeError::Moving { base: path.to_owned() }));
    }
    Ok(found)
}

/// BLAKE3 of the whole content of `file`.
pub fn digest(file: &impl Storage, progress: Progress<'_>) -> io::Result<[u8; 32]> {
    let len = file.len()?;
    let (filled_sender, filled) = sync_channel(PIECES);
    let (empty_sender, empty) = sync_channel(PIECES);
    for _ in 0..PIECES {
        // There is room for as many.
        _ = empty_sender.send(Vec::new());
    }
    let mut hasher = blake3::Hasher::new();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || read_all(file, len, &empty, &filled_sender));
        // Ends when the reader does.
        for piece in filled {
            hasher.update_rayon(&piece);
            progress(piece.len() as u64);
            // The reader may be done.
            _ = empty_sender.send(piece);
        }
        reader.join().unwrap_or_else(|_| Err(io::Error::other("the reading thread panicked")))
    })?;
    Ok(*hasher.finalize().as_bytes())
}

fn read_all(
    file: &impl Storage,
    len: u64,
    empty: &Receiver<Vec<u8>>,
    filled: &SyncSender<Vec<u8>>,
) -> io::Result<()> {
    let mut holes = Holes::default();
    let mut at = 0;
    while at < len {
        // The other side is gone only if it panicked.
        let Ok(mut piece) = empty.recv() else { return Ok(()) };
        let (alike, hole) = holes.stretch(file, at, len - at)?;
        let n = usize::try_from(alike).map_or(PIECE, |alike| alike.min(PIECE));
        piece.clear();
        piece.resize(n, 0);
        if !hole {
            file.read_exact_at(&mut piece, ByteOffset::new(at))?;
        }
        at += n as u64;
        if filled.send(piece).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn it_is_that_of_all_bytes_holes_included() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut bytes = vec![0; 2 * PIECE + 12345];
        bytes[5..700].fill(1);
        *bytes.last_mut().unwrap() = 2;
        std::fs::write(&path, &bytes).unwrap();
        let file = Host.open(&path, Access::ReadWrite).unwrap();
        file.punch(ByteOffset::new(8192), PIECE as u64 + 4096).unwrap();
        let done = AtomicU64::new(0);
        let found = digest(&file, &|n| _ = done.fetch_add(n, Ordering::Relaxed)).unwrap();
        assert_eq!(found, *blake3::hash(&bytes).as_bytes());
        assert_eq!(done.into_inner(), bytes.len() as u64);
        file.set_len(0).unwrap();
        assert_eq!(digest(&file, &|_| ()).unwrap(), *blake3::hash(b"").as_bytes());
    }
}
