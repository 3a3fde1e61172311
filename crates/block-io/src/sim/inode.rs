//! A file of the simulated disk, and a change of names.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::Choices;
use crate::mem::{SECTOR, SectorBytes, SparseBytes};

#[derive(Clone, Debug, Default)]
pub(super) struct Inode {
    /// What a running process sees.
    pub(super) current: SparseBytes,
    /// What is on the disk whatever happens.
    pub(super) durable: SparseBytes,
    /// Contents that sectors had since the last sync, oldest first.
    pub(super) pending: BTreeMap<u64, Vec<SectorBytes>>,
    /// Lengths since the last sync.
    pub(super) pending_lens: Vec<u64>,
    pub(super) mtime: i64,
}

impl Inode {
    pub(super) fn write(&mut self, buf: &[u8], at: u64, clock: i64) {
        let len = self.current.len();
        let pending = &mut self.pending;
        self.current.write(buf, at, |sector, bytes| pending.entry(sector).or_default().push(bytes));
        if self.current.len() != len {
            self.pending_lens.push(self.current.len());
        }
        self.mtime = clock;
    }

    pub(super) fn zero(&mut self, at: u64, len: u64, clock: i64) {
        let pending = &mut self.pending;
        self.current.zero(at, len, |sector, bytes| pending.entry(sector).or_default().push(bytes));
        self.mtime = clock;
    }

    pub(super) fn set_len(&mut self, len: u64, clock: i64) {
        let pending = &mut self.pending;
        self.current.set_len(len, |sector, bytes| pending.entry(sector).or_default().push(bytes));
        self.pending_lens.push(len);
        self.mtime = clock;
    }

    pub(super) fn sync(&mut self) {
        self.durable = self.current.clone();
        self.pending.clear();
        self.pending_lens.clear();
    }

    /// The sectors of `len` bytes at `at`, within the durable length, are durable.
    pub(super) fn sync_range(&mut self, at: u64, len: usize) {
        let end = at + len as u64;
        assert!(end <= self.durable.len(), "the length is not durable");
        for sector in at / SECTOR as u64..end.div_ceil(SECTOR as u64) {
            self.pending.remove(&sector);
            self.durable.set_sector(sector, self.current.sector(sector));
        }
    }

    /// What is left after a power cut.
    pub(super) fn cut(&mut self, choices: &mut Choices) {
        for (sector, newer) in std::mem::take(&mut self.pending) {
            let mut versions = vec![self.durable.sector(sector)];
            versions.extend(newer);
            versions.dedup();
            let chosen = versions[choices.choose(versions.len())];
            self.durable.set_sector(sector, chosen);
        }
        let mut lens = vec![self.durable.len()];
        lens.append(&mut self.pending_lens);
        lens.dedup();
        let len = lens[choices.choose(lens.len())];
        // Content past a length that did not survive is gone; it must not come back when the length grows again.
        self.durable.set_len(len, |_, _| ());
        self.current = self.durable.clone();
    }
}

#[derive(Clone, Debug)]
pub(super) enum NameChange {
    Set(PathBuf, u64),
    Remove(PathBuf),
    Rename { from: PathBuf, to: PathBuf, ino: u64 },
}

impl NameChange {
    pub(super) fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            NameChange::Set(path, ino) => _ = names.insert(path.clone(), *ino),
            NameChange::Remove(path) => _ = names.remove(path),
            NameChange::Rename { from, to, ino } => {
                names.remove(from);
                names.insert(to.clone(), *ino);
            }
        }
    }
}
