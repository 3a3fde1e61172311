//! A simulated disk that loses power, and processes that die.
//!
//! Fault model. *Power cut*: each 512-byte sector of each file has any content that it had since
//! the last completed [`Storage::sync`] of that file, or the synced one, independently of every
//! other sector (so writes survive or not in any combination and order, torn at 512 bytes); the
//! length is one that the file had since then, independently of the content; each change of names
//! since the last [`Env::sync_parent`] happened or did not. The boot id changes. *Loss of the page
//! cache* (the file system is shut down and mounted again): the same, but the boot id stays and the
//! witness changes. *Death of the process*: every completed operation survives; the one in progress
//! is done, not done, or, for a write, done up to a sector; locks are released. The boot id stays.
//! *Failed write to the disk*, in a sync or before it: each sector on the disk has any content
//! since the last sync; the page cache shows the last one and considers it written, until it is
//! evicted; each opening of the file gets the error once, at its next sync, and an opening made
//! after the error was reported never does.
//!
//! Every operation that changes something counts as a step, and a crash can be set at any of them.
//! Nothing is random by itself: [`Choices`] decides, from a seed or by enumeration.
//!
//! [`Storage::sync`]: crate::storage::Storage::sync
//! [`Env::sync_parent`]: crate::storage::Env::sync_parent

mod choices;
mod env;
mod file;
mod inode;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cow_format::ByteOffset;

use crate::storage::LockKind;
use env::absolute;
use inode::{Inode, NameChange};

pub use choices::Choices;
pub use file::SimFile;

/// The kind of crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashKind {
    /// The host loses power.
    PowerCut,
    /// The process dies. For a write in progress, `part` modulo the number of possible lengths
    /// determines how many sectors are done; for any other operation, whether it is done.
    ProcessDeath {
        /// See above.
        part: usize,
    },
}

/// An operation that is about to happen, as a hook sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// A read of this many bytes; not a step, since it changes nothing.
    Read {
        /// Its offset.
        at: ByteOffset,
        /// Its length in bytes.
        len: usize,
    },
    /// A write of this many bytes.
    Write {
        /// Its offset.
        at: ByteOffset,
        /// Its length in bytes.
        len: usize,
    },
    /// A write of this many bytes that is durable when it returns.
    WriteDurably {
        /// Its offset.
        at: ByteOffset,
        /// Its length in bytes.
        len: usize,
    },
    /// Punching a hole or zeroing.
    Zero,
    /// A change of length.
    SetLen,
    /// A sync of a file.
    Sync,
    /// A change of names, or the creation of a file.
    Name(&'a Path),
    /// A sync of a directory.
    SyncNames,
    /// A check for failed writes to the disk; not a step.
    CheckWriteback,
    /// Dropping the page cache; not a step.
    DropCache,
}

/// A hook's decision about an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It happens.
    Proceed,
    /// It reports success but does nothing.
    Skip,
    /// It fails with this error number.
    Fail(i32),
    /// A write goes to another offset.
    WriteAt(ByteOffset),
}

/// Called before every operation, with the inode number of its file (0 for names). It may block.
pub type Hook = Arc<dyn Fn(u64, Operation<'_>) -> Verdict + Send + Sync>;

impl CrashKind {
    /// Whether the operation in progress (not a write) happens, as far as a running system can see.
    fn does_it(self) -> bool {
        match self {
            CrashKind::PowerCut => true,
            CrashKind::ProcessDeath { part } => part % 2 == 1,
        }
    }
}

#[derive(Clone, Default)]
struct World {
    inodes: Vec<Inode>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    pending_names: Vec<NameChange>,
    /// All locks: inode, handle, kind.
    locks: Vec<(u64, u64, LockKind)>,
    next_handle: u64,
    boot: u64,
    /// Counts mounts of the file system: each has its own page cache.
    mounts: u64,
    /// Mounts cannot be told apart.
    no_witness: bool,
    /// Counts processes: handles of earlier ones are dead.
    life: u64,
    clock: i64,
    steps: u64,
    crash: Option<(u64, CrashKind)>,
    crashed: bool,
    /// The last step after which a process got the report of a failed write to the disk.
    told_at: Option<u64>,
    hook: Option<Hook>,
    lies_about_holes: bool,
}

/// What the operation in progress may still do.
enum Go {
    Fully,
    /// It is the last thing that happens, perhaps partially.
    ThenCrash(CrashKind),
}

impl World {
    /// Counts a step; an error once the process is dead.
    fn step(&mut self, life: u64) -> io::Result<Go> {
        self.alive(life)?;
        self.steps += 1;
        match self.crash {
            Some((step, kind)) if step == self.steps => {
                self.crashed = true;
                Ok(Go::ThenCrash(kind))
            }
            _ => Ok(Go::Fully),
        }
    }

    fn alive(&self, life: u64) -> io::Result<()> {
        if self.crashed || life != self.life { Err(crash_error()) } else { Ok(()) }
    }

    fn inode(&mut self, ino: u64) -> &mut Inode {
        let index = usize::try_from(ino).unwrap_or(0) - 1;
        &mut self.inodes[index]
    }

    fn change_names(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.pending_names.push(change);
    }

    fn end_process(&mut self) {
        if self.crashed {
            self.crashed = false;
            self.crash = None;
        }
        self.locks.clear();
        self.life += 1;
    }
}

/// The simulated system: clones share it.
#[derive(Clone, Default)]
pub struct Sim(Arc<Mutex<World>>);

impl Sim {
    /// An empty disk at its first boot.
    pub fn new() -> Self {
        Sim::default()
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An independent copy of the whole current system, except handles.
    pub fn fork(&self) -> Sim {
        Sim(Arc::new(Mutex::new(self.world().clone())))
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.world().steps
    }

    /// Makes the system crash at its `step`-th step (counted from 1 since creation).
    pub fn crash_at(&self, step: u64, kind: CrashKind) {
        self.world().crash = Some((step, kind));
    }

    /// Whether it has crashed.
    pub fn crashed(&self) -> bool {
        self.world().crashed
    }

    /// Calls `hook` for every operation from now on.
    pub fn set_hook(&self, hook: Option<Hook>) {
        self.world().hook = hook;
    }

    /// The power fails, now or at the crash that has happened: `choices` decides what is left; a
    /// new boot begins.
    pub fn power_cut(&self, choices: &mut Choices) {
        self.cache_loss(choices);
        self.world().boot += 1;
    }

    /// The page cache is lost, now or at the crash that has happened, and the process dies; the
    /// host stays up.
    pub fn cache_loss(&self, choices: &mut Choices) {
        let mut world = self.world();
        world.end_process();
        world.mounts += 1;
        for inode in &mut world.inodes {
            inode.cut(choices);
        }
        let World { pending_names, durable_names, names, .. } = &mut *world;
        for change in pending_names.drain(..) {
            if choices.choose(2) == 1 {
                change.apply(durable_names);
            }
        }
        names.clone_from(durable_names);
    }

    /// The process dies, now or at the crash that has happened; another may begin.
    pub fn process_death(&self) {
        self.world().end_process();
    }

    /// For the mutation that trusts the live bitmap of another boot: restores the previous boot id.
    pub fn forge_boot_id(&self) {
        self.world().boot -= 1;
        self.forge_witness();
    }

    /// For the mutation that trusts the boot id alone: restores the witness from before the last
    /// crash.
    pub fn forge_witness(&self) {
        self.world().mounts -= 1;
    }

    /// For the mutation that trusts no page cache: changes the witness.
    pub fn spoil_witness(&self) {
        self.world().mounts += 1;
    }

    /// From now on page caches cannot be told apart.
    pub fn hide_witness(&self) {
        self.world().no_witness = true;
    }

    /// The next sync of each file fails, once; `choices` decides what it leaves.
    pub fn fail_next_sync(&self, choices: Option<&Choices>) {
        for inode in &mut self.world().inodes {
            inode.failing = choices.cloned();
        }
    }

    /// The last step after which a process got the report of a failed write to the disk.
    pub fn told_at(&self) -> Option<u64> {
        self.world().told_at
    }

    /// Dirty data fails to get to the disk, unnoticed by any process so far.
    pub fn fail_writeback(&self, choices: &mut Choices) {
        for inode in &mut self.world().inodes {
            inode.fail_writeback(choices);
        }
    }

    /// The page cache evicts everything that it may.
    pub fn evict(&self) {
        self.world().inodes.iter_mut().for_each(Inode::drop_cache);
    }

    /// Moves a file to another name, durably and outside the fault model, as an administrator does.
    pub fn move_durably(&self, from: &Path, to: &Path) {
        let mut world = self.world();
        let World { names, durable_names, .. } = &mut *world;
        for names in [names, durable_names] {
            if let Some(ino) = names.remove(&absolute(from)) {
                names.insert(absolute(to), ino);
            }
        }
    }

    /// Gives a file a new mtime, durably and outside the fault model.
    pub fn touch(&self, path: &Path) {
        let mut world = self.world();
        world.clock += 1;
        let clock = world.clock;
        if let Some(ino) = world.names.get(&absolute(path)).copied() {
            world.inode(ino).mtime = clock;
        }
    }

    /// From now on the file system reports every file as one hole, and must not be trusted.
    pub fn lie_about_holes(&self) {
        self.world().lies_about_holes = true;
    }

    /// All names.
    pub fn names(&self) -> Vec<PathBuf> {
        self.world().names.keys().cloned().collect()
    }

    fn hooked(&self, ino: u64, operation: Operation<'_>) -> io::Result<Verdict> {
        let hook = self.world().hook.clone();
        match hook.map_or(Verdict::Proceed, |hook| hook(ino, operation)) {
            Verdict::Fail(errno) => Err(io::Error::from_raw_os_error(errno)),
            verdict => Ok(verdict),
        }
    }

    fn rename(&self, from: Option<&Path>, to: &Path, replace: bool) -> io::Result<()> {
        let from = from.map(absolute).ok_or(io::ErrorKind::NotFound)?;
        let to = absolute(to);
        self.name_step(&to.clone(), |world| {
            if !replace && world.names.contains_key(&to) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let ino = *world.names.get(&from).ok_or(io::ErrorKind::NotFound)?;
            world.change_names(NameChange::Rename { from, to, ino });
            Ok(())
        })
    }

    /// Performs one change of names, or crashes around it.
    fn name_step(
        &self,
        path: &Path,
        change: impl FnOnce(&mut World) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.hooked(0, Operation::Name(path))? == Verdict::Skip {
            return Ok(());
        }
        let mut world = self.world();
        let life = world.life;
        match world.step(life)? {
            Go::Fully => change(&mut world),
            Go::ThenCrash(kind) => {
                if kind.does_it() {
                    change(&mut world)?;
                }
                Err(crash_error())
            }
        }
    }
}

fn crash_error() -> io::Error {
    io::Error::other("the simulated system has crashed")
}
