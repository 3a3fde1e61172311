//! Names, boots and locks of the simulated system.

use std::io;
use std::path::{Component, Path, PathBuf};

use cow_format::header::CacheWitness;

use super::file::SimFile;
use super::inode::{Inode, NameChange};
use super::{Go, Operation, Sim, Verdict, crash_error};
use crate::storage::{Access, BootId, Env, FileId, Storage};

impl Env for Sim {
    type File = SimFile;

    fn open(&self, path: &Path, access: Access) -> io::Result<SimFile> {
        let mut world = self.world();
        world.alive(world.life)?;
        let ino = *world.names.get(&absolute(path)).ok_or(io::ErrorKind::NotFound)?;
        Ok(SimFile::new(self, &mut world, ino, access))
    }

    fn open_beneath(&self, dir: &Path, path: &Path, access: Access) -> io::Result<SimFile> {
        self.open(&dir.join(path), access)
    }

    fn link_beneath(&self, _dir: &Path, _path: &Path) -> io::Result<PathBuf> {
        Err(io::ErrorKind::InvalidInput.into())
    }

    fn open_itself(&self, path: &Path, access: Access) -> io::Result<SimFile> {
        self.open(path, access)
    }

    fn id(&self, path: &Path) -> io::Result<FileId> {
        self.open(path, Access::Read)?.stat().map(|stat| stat.id)
    }

    fn backing_dirs(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    fn is_user(&self, uid: u32) -> bool {
        uid == 0
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

    fn cache_witness(&self, _file: &SimFile) -> Option<CacheWitness> {
        let world = self.world();
        (!world.no_witness).then_some(CacheWitness::Superblock(world.mounts))
    }

    fn boot_id(&self) -> io::Result<BootId> {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.world().boot.to_le_bytes());
        id[8] = 1; // never all zeros
        Ok(BootId(id))
    }
}

/// `path` from the root on, without `.` and `..`; there are no symbolic links here.
pub(super) fn absolute(path: &Path) -> PathBuf {
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
