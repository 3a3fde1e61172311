//! A simulated disk that loses power, and processes that die.
//!
//! Fault model. *Power cut*: of each 512-byte sector of each file any content since the last completed
//! [`Storage::sync`] of that file may be there, or the synced one, independently of every other sector (so writes
//! survive or not in any combination and order, torn at 512 bytes); the length is one that the file had since then,
//! independently of the content; each change of names since the last [`Env::sync_parent`] happened or did not. The boot id
//! changes. *Death of the process*: every completed operation survives; the one under way is done, not done, or, for a
//! write, done up to a sector; locks fall. The boot id stays.
//!
//! Every operation that changes something counts as a step, and a crash can be set at any of them.
//! Nothing here is random by itself: [`Choices`] decides, from a seed or by enumeration.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cow_format::ByteOffset;
use cow_format::identity::Timestamp;

use crate::mem::{SECTOR, SectorBytes, SparseBytes};
use crate::storage::{
    Access, BootId, Env, FileId, FileKind, FileStat, LockError, LockKind, Storage,
};

/// Decides what survives.
#[derive(Clone, Debug)]
pub struct Choices(Source);

#[derive(Clone, Debug)]
enum Source {
    Seeded(u64),
    Oldest,
    Newest,
    /// What was chosen so far, each with the number of options, and the place in it.
    Enumerated {
        path: Vec<(usize, usize)>,
        at: usize,
    },
}

impl Choices {
    /// Choices from a seed.
    pub fn seeded(seed: u64) -> Self {
        Choices(Source::Seeded(seed))
    }

    /// Nothing survives that need not.
    pub fn oldest() -> Self {
        Choices(Source::Oldest)
    }

    /// Everything survives.
    pub fn newest() -> Self {
        Choices(Source::Newest)
    }

    /// The first of all combinations; [`Choices::advance`] goes to the next.
    pub fn enumerated() -> Self {
        Choices(Source::Enumerated { path: Vec::new(), at: 0 })
    }

    /// One of `0..options`, older states first; `options` is at least 1.
    pub fn choose(&mut self, options: usize) -> usize {
        match &mut self.0 {
            Source::Seeded(state) => {
                let limit = options as u64;
                usize::try_from(split_mix(state) % limit).unwrap_or(0)
            }
            Source::Oldest => 0,
            Source::Newest => options - 1,
            Source::Enumerated { path, at } => {
                if *at == path.len() {
                    path.push((0, options));
                }
                *at += 1;
                path[*at - 1].0
            }
        }
    }

    /// Goes to the next combination of an enumeration; false when that was the last one.
    pub fn advance(&mut self) -> bool {
        let Source::Enumerated { path, at } = &mut self.0 else { return false };
        *at = 0;
        while let Some((chosen, options)) = path.pop() {
            if chosen + 1 < options {
                path.push((chosen + 1, options));
                return true;
            }
        }
        false
    }
}

/// SplitMix64: a small generator whose sequence is the same for ever.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashKind {
    /// The host loses power.
    PowerCut,
    /// The process dies. Of a write under way `part` modulo its possible lengths decides how many sectors are done; of
    /// anything else, whether.
    ProcessDeath {
        /// See above.
        part: usize,
    },
}

/// An operation that is about to happen, as a hook sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation<'a> {
    /// A write of so many bytes.
    Write {
        /// Where.
        at: ByteOffset,
        /// How many bytes.
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
}

/// What a hook makes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It happens.
    Proceed,
    /// It reports success and does nothing.
    Skip,
    /// It fails with this error number.
    Fail(i32),
    /// A write that goes to another place.
    WriteAt(ByteOffset),
}

/// Sees every operation before it happens, with the inode number of its file (0 for names). It may block.
pub type Hook = Arc<dyn Fn(u64, Operation<'_>) -> Verdict + Send + Sync>;

#[derive(Clone, Debug, Default)]
struct Inode {
    /// What a running process sees.
    current: SparseBytes,
    /// What is on the disk whatever happens.
    durable: SparseBytes,
    /// Contents that sectors had since the last sync, oldest first.
    pending: BTreeMap<u64, Vec<SectorBytes>>,
    /// Lengths since the last sync.
    pending_lens: Vec<u64>,
    mtime: i64,
}

#[derive(Clone, Debug)]
enum NameChange {
    Set(PathBuf, u64),
    Remove(PathBuf),
    Rename { from: PathBuf, to: PathBuf, ino: u64 },
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
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

#[derive(Clone, Default)]
struct World {
    inodes: Vec<Inode>,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    pending_names: Vec<NameChange>,
    /// Who holds which lock: inode, handle, kind.
    locks: Vec<(u64, u64, LockKind)>,
    next_handle: u64,
    boot: u64,
    /// Counts processes: handles of an earlier one are dead.
    life: u64,
    clock: i64,
    steps: u64,
    crash: Option<(u64, CrashKind)>,
    crashed: bool,
    hook: Option<Hook>,
}

/// What the operation under way may still do.
enum Go {
    Fully,
    /// It is the last thing that happens, and maybe not all of it.
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
}

impl Inode {
    fn write(&mut self, buf: &[u8], at: u64, clock: i64) {
        let len = self.current.len();
        let pending = &mut self.pending;
        self.current.write(buf, at, |sector, bytes| pending.entry(sector).or_default().push(bytes));
        if self.current.len() != len {
            self.pending_lens.push(self.current.len());
        }
        self.mtime = clock;
    }

    fn zero(&mut self, at: u64, len: u64, clock: i64) {
        let pending = &mut self.pending;
        self.current.zero(at, len, |sector, bytes| pending.entry(sector).or_default().push(bytes));
        self.mtime = clock;
    }

    fn set_len(&mut self, len: u64, clock: i64) {
        let pending = &mut self.pending;
        self.current.set_len(len, |sector, bytes| pending.entry(sector).or_default().push(bytes));
        self.pending_lens.push(len);
        self.mtime = clock;
    }

    fn sync(&mut self) {
        self.durable = self.current.clone();
        self.pending.clear();
        self.pending_lens.clear();
    }

    /// What is left after a power cut.
    fn cut(&mut self, choices: &mut Choices) {
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

    /// An independent copy of the whole system as it is now, handles excepted.
    pub fn fork(&self) -> Sim {
        Sim(Arc::new(Mutex::new(self.world().clone())))
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.world().steps
    }

    /// Lets the system crash at its `step`-th step (counted from 1 since the beginning of the world).
    pub fn crash_at(&self, step: u64, kind: CrashKind) {
        self.world().crash = Some((step, kind));
    }

    /// Whether it has crashed.
    pub fn crashed(&self) -> bool {
        self.world().crashed
    }

    /// Shows `hook` every operation from now on.
    pub fn set_hook(&self, hook: Option<Hook>) {
        self.world().hook = hook;
    }

    /// The power goes, now or at the crash that has happened: `choices` decides what is left; a new boot begins.
    pub fn power_cut(&self, choices: &mut Choices) {
        let mut world = self.world();
        world.end_process();
        world.boot += 1;
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

    /// For the mutation that believes the live bitmap of another boot: goes back to the boot before.
    pub fn forge_boot_id(&self) {
        self.world().boot -= 1;
    }

    /// Moves a file to another name, durably and outside the fault model: as an administrator does on a calm day.
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

    /// Every name there is.
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

    /// Does one change of names, or crashes round it.
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

impl World {
    fn end_process(&mut self) {
        if self.crashed {
            self.crashed = false;
            self.crash = None;
        }
        self.locks.clear();
        self.life += 1;
    }
}

impl CrashKind {
    /// Whether the operation under way (not a write) happens as far as a running system could see.
    fn does_it(self) -> bool {
        match self {
            CrashKind::PowerCut => true,
            CrashKind::ProcessDeath { part } => part % 2 == 1,
        }
    }
}

fn crash_error() -> io::Error {
    io::Error::other("the simulated system has crashed")
}

/// An open file of a [`Sim`].
pub struct SimFile {
    sim: Sim,
    ino: u64,
    handle: u64,
    life: u64,
    access: Access,
}

impl SimFile {
    fn new(sim: &Sim, world: &mut World, ino: u64, access: Access) -> Self {
        world.next_handle += 1;
        SimFile { sim: sim.clone(), ino, handle: world.next_handle, life: world.life, access }
    }

    /// The inode number, as hooks see it.
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// Does one change of the file, or crashes round it. `change` gets what may be done of it.
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

impl Storage for SimFile {
    fn read_at(&self, buf: &mut [u8], at: ByteOffset) -> io::Result<usize> {
        let mut world = self.sim.world();
        world.alive(self.life)?;
        Ok(world.inode(self.ino).current.read(buf, at.get()))
    }

    fn write_all_at(&self, buf: &[u8], at: ByteOffset) -> io::Result<()> {
        self.step(Operation::Write { at, len: buf.len() }, |inode, clock, verdict, crash| {
            let at = if let Verdict::WriteAt(other) = verdict { other } else { at };
            let done = match crash {
                Some(CrashKind::ProcessDeath { part }) => {
                    part % (buf.len().div_ceil(SECTOR) + 1) * SECTOR
                }
                Some(CrashKind::PowerCut) | None => buf.len(),
            };
            inode.write(&buf[..done.min(buf.len())], at.get(), clock);
        })
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
            // A sync that the power cut interrupts may have done any part: that is what pending writes may do anyway.
            if crash.is_none() {
                inode.sync();
            }
        })
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

    fn next_data(&self, from: ByteOffset) -> io::Result<Option<Range<u64>>> {
        let mut world = self.sim.world();
        world.alive(self.life)?;
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
            born: None,
            allocated: (inode.current.sectors_present() * SECTOR) as u64,
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

impl Env for Sim {
    type File = SimFile;

    fn open(&self, path: &Path, access: Access) -> io::Result<SimFile> {
        let mut world = self.world();
        world.alive(world.life)?;
        let ino = *world.names.get(&absolute(path)).ok_or(io::ErrorKind::NotFound)?;
        Ok(SimFile::new(self, &mut world, ino, access))
    }

    fn with_direct(&self, file: SimFile, _access: Access) -> io::Result<SimFile> {
        Ok(file)
    }

    fn create_new(&self, path: &Path) -> io::Result<SimFile> {
        let path = absolute(path);
        let mut ino = 0;
        self.name_step(&path, |world| {
            if world.names.contains_key(&path) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            world.inodes.push(Inode::default());
            ino = world.inodes.len() as u64;
            world.change_names(NameChange::Set(path.clone(), ino));
            Ok(())
        })?;
        let mut world = self.world();
        Ok(SimFile::new(self, &mut world, ino, Access::ReadWrite))
    }

    fn create_unpublished(&self, near: &Path) -> io::Result<(SimFile, Option<PathBuf>)> {
        let mut name = near.as_os_str().to_owned();
        name.push(format!(".{}.new", self.steps()));
        Ok((self.create_new(Path::new(&name))?, Some(name.into())))
    }

    fn publish(&self, _file: &SimFile, temporary: Option<&Path>, to: &Path) -> io::Result<()> {
        self.rename(temporary, to, false)
    }

    fn publish_over(&self, _file: &SimFile, temporary: Option<&Path>, to: &Path) -> io::Result<()> {
        self.rename(temporary, to, true)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let path = absolute(path);
        self.name_step(&path.clone(), |world| {
            if !world.names.contains_key(&path) {
                return Err(io::ErrorKind::NotFound.into());
            }
            world.change_names(NameChange::Remove(path));
            Ok(())
        })
    }

    fn sync_parent(&self, _path: &Path) -> io::Result<()> {
        if self.hooked(0, Operation::SyncNames)? == Verdict::Skip {
            return Ok(());
        }
        let mut world = self.world();
        let life = world.life;
        match world.step(life)? {
            Go::Fully => {
                world.durable_names = world.names.clone();
                world.pending_names.clear();
                Ok(())
            }
            _ => Err(crash_error()),
        }
    }

    fn canonical(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(absolute(path))
    }

    fn absolute(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(absolute(path))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let world = self.world();
        world.alive(world.life)?;
        Ok(world.names.contains_key(&absolute(path)))
    }

    fn boot_id(&self) -> io::Result<BootId> {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.world().boot.to_le_bytes());
        id[8] = 1; // never all zeros
        Ok(BootId(id))
    }
}

/// `path` from the root on, without `.` and `..`; there are no symbolic links here.
fn absolute(path: &Path) -> PathBuf {
    let mut absolute = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => absolute.push(name),
            Component::ParentDir => _ = absolute.pop(),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    absolute
}
