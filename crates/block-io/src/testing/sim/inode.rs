//! A file of the simulated disk, and a change of names.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::Choices;
use crate::storage::SECTOR;
use crate::testing::sparse_bytes::{SectorBytes, SparseBytes, ZERO_SECTOR};

#[derive(Clone, Debug, Default)]
pub(super) struct Inode {
    /// What a running process sees.
    pub(super) current: SparseBytes,
    /// What is certainly on the disk.
    pub(super) durable: SparseBytes,
    /// Contents that sectors had since the last sync, oldest first.
    pub(super) pending: BTreeMap<u64, Vec<SectorBytes>>,
    /// Lengths since the last sync.
    pub(super) pending_lens: Vec<u64>,
    pub(super) mtime: i64,
    /// The number of failed writes to the disk, and how many of them were reported.
    pub(super) failures: u64,
    pub(super) told: u64,
    /// The next sync fails, and this decides what it leaves.
    pub(super) failing: Option<Choices>,
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
        // Data that could not be written was there before; from now on it is zeros on the disk as
        // well.
        let sector = SECTOR as u64;
        let end = at.saturating_add(len).min(self.current.len()) / sector;
        let inside = at.div_ceil(sector)..end.max(at.div_ceil(sector));
        for sector in self.durable.present(inside) {
            pending.entry(sector).or_insert_with(|| vec![ZERO_SECTOR]);
        }
        self.mtime = clock;
    }

    pub(super) fn set_len(&mut self, len: u64, clock: i64) {
        let pending = &mut self.pending;
        self.current.set_len(len, |sector, bytes| pending.entry(sector).or_default().push(bytes));
        self.pending_lens.push(len);
        self.mtime = clock;
    }

    pub(super) fn sync(&mut self) {
        self.durable.set_len(self.current.len(), |_, _| ());
        for (sector, _) in std::mem::take(&mut self.pending) {
            self.durable.set_sector(sector, self.current.sector(sector));
        }
        self.pending_lens.clear();
    }

    /// Writing it to the disk fails: each sector has any of its contents on the disk, and the page
    /// cache still shows the last, which it considers written.
    pub(super) fn fail_writeback(&mut self, choices: &mut Choices) {
        if !self.pending.is_empty() {
            self.failures += 1;
        }
        self.choose_pending(choices);
    }

    /// Calls [`Self::fail_writeback`], once, if the next sync of this file is set to fail.
    pub(super) fn fail_if_told_to(&mut self) -> bool {
        let Some(mut choices) = self.failing.take() else { return false };
        self.choose_pending(&mut choices);
        self.failures += 1;
        true
    }

    /// Evicts what is not dirty.
    pub(super) fn drop_cache(&mut self) {
        let all = 0..u64::MAX;
        let sectors: Vec<_> =
            self.current.present(all.clone()).chain(self.durable.present(all)).collect();
        for sector in sectors {
            if !self.pending.contains_key(&sector) {
                self.current.set_sector(sector, self.durable.sector(sector));
            }
        }
    }

    fn choose_pending(&mut self, choices: &mut Choices) {
        for (sector, newer) in std::mem::take(&mut self.pending) {
            let mut versions = vec![self.durable.sector(sector)];
            versions.extend(newer);
            versions.dedup();
            let chosen = versions[choices.choose(versions.len())];
            self.durable.set_sector(sector, chosen);
        }
    }

    /// The sectors of `len` bytes at `at` are durable.
    pub(super) fn sync_range(&mut self, at: u64, len: usize) {
        let end = at + len as u64;
        self.durable.set_len(self.durable.len().max(end), |_, _| ());
        for sector in at / SECTOR as u64..end.div_ceil(SECTOR as u64) {
            self.pending.remove(&sector);
            self.durable.set_sector(sector, self.current.sector(sector));
        }
    }

    /// What is left after a power cut, or without the page cache.
    pub(super) fn cut(&mut self, choices: &mut Choices) {
        self.choose_pending(choices);
        let mut lens = vec![self.durable.len()];
        lens.append(&mut self.pending_lens);
        lens.dedup();
        let len = lens[choices.choose(lens.len())];
        // Content past a length that did not survive is gone; it must not reappear when the length
        // grows again.
        self.durable.set_len(len, |_, _| ());
        self.current = self.durable.clone();
        (self.failures, self.told, self.failing) = (0, 0, None);
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
