//! Open files of the simulated disk.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use cow_format::ByteOffset;
use cow_format::identity::Timestamp;

use super::inode::Inode;
use super::{CrashKind, Go, Operation, Sim, Verdict, World, crash_error};
use crate::storage::SECTOR;
use crate::storage::{
    Access, FILE_BLOCK, FileId, FileKind, FileStat, LockError, LockKind, Storage,
};

/// An open file of a [`Sim`].
pub struct SimFile {
    sim: Sim,
    ino: u64,
    handle: u64,
    life: u64,
    access: Access,
    /// The number of failed writes to the disk that it has reported.
    told: AtomicU64,
}

impl SimFile {
    pub(super) fn new(sim: &Sim, world: &mut World, ino: u64, access: Access) -> Self {
        world.next_handle += 1;
        let (handle, life) = (world.next_handle, world.life);
        let told = AtomicU64::new(world.inode(ino).told);
        SimFile { sim: sim.clone(), ino, handle, life, access, told }
    }

    /// The inode number, as passed to hooks.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Fails once after each failed write to the disk.
    fn tell(&self) -> io::Result<()> {
        let mut world = self.sim.world();
        let inode = world.inode(self.ino);
        inode.told = inode.failures;
        if self.told.swap(inode.failures, Ordering::Relaxed) == inode.failures {
            return Ok(());
        }
        world.told_at = Some(world.steps);
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    /// Performs one change of the file, or crashes around it. `change` gets what may be done of it.
    fn step(
        &self,
        operation: Operation<'_>,
        change: impl FnOnce(&mut Inode, i64, Verdict, Option<CrashKind>),
    ) -> io::Result<()> {
        let verdict = self.sim.hooked(self.ino, operation)?;
        if self.access == Access::Read && operation != Operation::Sync {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        let mut world = self.sim.world();
        let go = world.step(self.life)?;
        if verdict == Verdict::Skip && !matches!(go, Go::ThenCrash(_)) {
            return Ok(());
        }
        world.clock += 1;
        let clock = world.clock;
        let inode = world.inode(self.ino);
        match go {
            Go::Fully => change(inode, clock, verdict, None),
            Go::ThenCrash(kind) => {
                if verdict != Verdict::Skip {
                    change(inode, clock, verdict, Some(kind));
                }
                return Err(crash_error());
            }
        }
        Ok(())
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut world = self.sim.world();
        let handle = self.handle;
        world.locks.retain(|(_, holder, _)| *holder != handle);
    }
}

/// How many bytes of a write are done.
fn done(buf: &[u8], crash: Option<CrashKind>) -> usize {
    match crash {
        Some(CrashKind::ProcessDeath { part }) => {
            (part % (buf.len().div_ceil(SECTOR) + 1) * SECTOR).min(buf.len())
        }
        Some(CrashKind::PowerCut) | None => buf.len(),
    }
}

impl Storage for SimFile {
    fn read_at(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<usize> {
        self.sim.hooked(self.ino, Operation::Read { at, len: buf.len() })?;
        let mut world = self.sim.world();
        world.alive(self.life)?;
        Ok(world.inode(self.ino).current.read(buf, at.get()))
    }

    fn write_all_at(&self, buf: &[u8], at: ByteOffset) -> io::Result<()> {
        self.step(Operation::Write { at, len: buf.len() }, |inode, clock, verdict, crash| {
            let at = if let Verdict::WriteAt(other) = verdict { other } else { at };
            inode.write(&buf[..done(buf, crash)], at.get(), clock);
        })
    }

    fn write_durably(&self, buf: &[u8], at: ByteOffset) -> io::Result<()> {
        self.step(Operation::WriteDurably { at, len: buf.len() }, |inode, clock, _, crash| {
            inode.write(&buf[..done(buf, crash)], at.get(), clock);
            if crash.is_none() && !inode.fail_if_told_to() {
                inode.sync_range(at.get(), buf.len());
            }
        })?;
        self.tell()
    }

    fn check_writeback(&self) -> io::Result<()> {
        match self.sim.hooked(self.ino, Operation::CheckWriteback)? {
            Verdict::Skip => Ok(()),
            _ => self.tell(),
        }
    }

    fn drop_cache(&self) -> io::Result<()> {
        if self.sim.hooked(self.ino, Operation::DropCache)? != Verdict::Skip {
            let mut world = self.sim.world();
            world.alive(self.life)?;
            world.inode(self.ino).drop_cache();
        }
        Ok(())
    }

    fn punch(&self, at: ByteOffset, len: u64) -> io::Result<()> {
        self.step(Operation::Zero, |inode, clock, _, crash| {
            if crash.is_none_or(CrashKind::does_it) {
                inode.zero(at.get(), len, clock);
            }
        })
    }

    fn zero_keep_allocated(&self, at: ByteOffset, len: u64) -> io::Result<()> {
        self.punch(at, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.step(Operation::Sync, |inode, _, _, crash| {
            // A sync interrupted by a power cut may have done any part: pending writes may do that
            // anyway.
            if crash.is_none() && !inode.fail_if_told_to() {
                inode.sync();
            }
        })?;
        self.tell()
    }

    fn stamp(&self, mtime: Timestamp) -> io::Result<()> {
        self.step(Operation::Sync, |inode, _, _, crash| {
            inode.mtime = mtime.secs();
            if crash.is_none() {
                inode.sync();
            }
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.step(Operation::SetLen, |inode, clock, _, crash| {
            if crash.is_none_or(CrashKind::does_it) {
                inode.set_len(len, clock);
            }
        })
    }

    fn set_mode(&self, _mode: u32) -> io::Result<()> {
        Ok(())
    }

    fn knows_holes(&self) -> bool {
        !self.sim.world().lies_about_holes
    }

    fn seek_data(&self, from: ByteOffset) -> io::Result<Option<Range<u64>>> {
        let mut world = self.sim.world();
        world.alive(self.life)?;
        if world.lies_about_holes {
            return Ok(None);
        }
        Ok(world.inode(self.ino).current.next_data(from.get()))
    }

    fn stat(&self) -> io::Result<FileStat> {
        let mut world = self.sim.world();
        world.alive(self.life)?;
        let ino = self.ino;
        let inode = world.inode(ino);
        Ok(FileStat {
            id: FileId { dev: 1, ino },
            kind: FileKind::Regular,
            size: inode.current.len(),
            mtime: Timestamp::new(inode.mtime, 0).ok_or(io::ErrorKind::InvalidData)?,
            // No inode number is reused, so one time is enough for all.
            born: Timestamp::new(0, 0),
            allocated: (inode.current.sectors_present() * SECTOR) as u64,
            logical_block: FILE_BLOCK,
            owner: 0,
            links: 1,
            mode: 0o600,
        })
    }

    fn try_lock(&self, kind: LockKind) -> Result<(), LockError> {
        let mut world = self.sim.world();
        world.alive(self.life)?;
        let (ino, handle) = (self.ino, self.handle);
        let conflict = world.locks.iter().any(|(locked, holder, held)| {
            *locked == ino
                && *holder != handle
                && (kind == LockKind::Exclusive || *held == LockKind::Exclusive)
        });
        if conflict {
            return Err(LockError::Held { pid: None });
        }
        world.locks.retain(|(locked, holder, _)| (*locked, *holder) != (ino, handle));
        world.locks.push((ino, handle, kind));
        Ok(())
    }
}
