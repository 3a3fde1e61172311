//! Which files a chain may be opened from. The author of a header can write any path into it, so
//! what a header names is opened only as the user allows: where the user has named the chain, in
//! the directory of a file that the user has named, or in one that is allowed by name.

use std::collections::VecDeque;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::chain::{real_dir, resolve};
use super::{ImageError, Outside};
use crate::storage::{Access, Env};

/// Most symbolic links that lead from one directory to another: more are no one's intention.
const LINKS_MAX: usize = 8;

/// Finds the files below the top, one after the other.
pub(crate) struct References<F> {
    /// Named by the user, nearest first: these replace the paths in the headers.
    named: VecDeque<Below<F>>,
    follow: Follow,
}

/// What else a header may name.
enum Follow {
    /// What is beside these files, which the user has named, and in the allowed directories.
    Beside(Vec<PathBuf>),
    /// What is in the allowed directories: the user has named the chain.
    Allowed,
    /// Nothing: the user has opened the chain.
    Nothing,
}

/// A file below the top.
pub(crate) enum Below<F> {
    /// Opened by this path.
    Named(PathBuf),
    /// Open already; the path is for messages.
    Open(F, PathBuf),
}

impl<F> References<F> {
    /// For the chain below `top`.
    pub(crate) fn new(top: &Path) -> Self {
        References { named: VecDeque::new(), follow: Follow::Beside(vec![top.to_owned()]) }
    }

    /// For a chain that the user has named, or opened if the top is not open `by_name`. If nothing
    /// is named `below` the top, nothing was.
    pub(crate) fn of_user(
        top: &Path,
        by_name: bool,
        below: impl IntoIterator<Item = Below<F>>,
    ) -> Self {
        let named: VecDeque<_> = below.into_iter().collect();
        match (by_name, named.is_empty()) {
            (true, true) => Self::new(top),
            (true, false) => References { named, follow: Follow::Allowed },
            (false, _) => References { named, follow: Follow::Nothing },
        }
    }

    /// The user has named the next file.
    pub(crate) fn name_next(&mut self, path: &Path) {
        self.named.push_front(Below::Named(path.to_owned()));
    }

    /// The user has named `file` as well.
    pub(crate) fn also_beside(&mut self, file: &Path) {
        if let Follow::Beside(files) = &mut self.follow {
            files.push(file.to_owned());
        }
    }

    /// The path of the next file, for which the header of `cow` has the path `stored`.
    pub(crate) fn path<E: Env<File = F>>(
        &self,
        env: &E,
        cow: &Path,
        stored: &Path,
    ) -> Result<PathBuf, ImageError> {
        match self.named.front() {
            Some(Below::Named(path) | Below::Open(_, path)) => Ok(path.clone()),
            // Its COW file may have no place here.
            None if matches!(self.follow, Follow::Nothing) => Ok(stored.to_owned()),
            None => resolve(env, cow, stored),
        }
    }

    /// Opens the file for which the header of `cow` has the path `stored`: the file, its path, and
    /// whether it was opened by that.
    pub(crate) fn open<E: Env<File = F>>(
        &mut self,
        env: &E,
        cow: &Path,
        stored: &Path,
        access: Access,
    ) -> Result<(F, PathBuf, bool), ImageError> {
        let (opened, path) = match self.named.pop_front() {
            Some(Below::Open(file, path)) => return Ok((file, path, false)),
            Some(Below::Named(path)) => (env.open(&path, access), path),
            None => {
                let path = self.path(env, cow, stored)?;
                (self.open_allowed(env, cow, &path, access)?, path)
            }
        };
        match opened {
            Ok(file) => Ok((file, path, true)),
            Err(source) => Err(ImageError::Backing { cow: cow.to_owned(), path, source }),
        }
    }

    /// [`open_within`] the directories for a path from the header of `cow`.
    fn open_allowed<E: Env<File = F>>(
        &self,
        env: &E,
        cow: &Path,
        path: &Path,
        access: Access,
    ) -> Result<io::Result<F>, ImageError> {
        let dirs = self.dirs(env)?;
        open_within(env, &dirs, path, access).map_err(|why| {
            let why = match (why, &self.follow) {
                (Outside::Elsewhere, Follow::Allowed | Follow::Nothing) => Outside::NotNamed,
                (why, _) => why,
            };
            ImageError::NotAllowed { cow: cow.to_owned(), path: path.to_owned(), why, dirs }
        })
    }

    /// The directories, under each name that a header may have for them.
    fn dirs<E: Env>(&self, env: &E) -> Result<Vec<PathBuf>, ImageError> {
        let (mut dirs, beside) = match &self.follow {
            Follow::Beside(files) => (env.backing_dirs(), files.as_slice()),
            Follow::Allowed => (env.backing_dirs(), &[][..]),
            Follow::Nothing => (Vec::new(), &[][..]),
        };
        for file in beside {
            let absolute = env.absolute(file).map_err(ImageError::io(file, "resolve"))?;
            let as_named = absolute.parent().unwrap_or(Path::new("/")).to_owned();
            for dir in [real_dir(env, file)?, as_named] {
                if !dirs.contains(&dir) {
                    dirs.push(dir);
                }
            }
        }
        Ok(dirs)
    }

    /// Refuses names that the chain, which ends with the file at `last`, has no place for.
    pub(crate) fn check_all_used(&mut self, last: &Path) -> Result<(), ImageError> {
        match self.named.pop_front() {
            None => Ok(()),
            Some(Below::Named(base) | Below::Open(_, base)) => {
                Err(ImageError::NoBacking { path: last.to_owned(), base })
            }
        }
    }
}

/// Opens `path`, which is from a header and absolute, if it is in one of `dirs`, or a symbolic link
/// there to a file in one of them. The outer error says that it is not, the inner one comes from
/// opening it.
pub fn open_within<E: Env>(
    env: &E,
    dirs: &[PathBuf],
    path: &Path,
    access: Access,
) -> Result<io::Result<E::File>, Outside> {
    let mut why = Outside::Elsewhere;
    let mut next = Some(normal(path));
    for _ in 0..LINKS_MAX {
        let Some(path) = next.take() else { break };
        for dir in dirs {
            let Ok(within) = path.strip_prefix(dir) else { continue };
            match env.open_beneath(dir, within, access) {
                Err(err) if err.kind() == io::ErrorKind::CrossesDevices => {}
                opened => return Ok(opened),
            }
            why = Outside::LeadsOut;
            // Of links on the way, only the last is followed into another directory.
            if let (Ok(link), Some(here)) = (env.link_beneath(dir, within), path.parent()) {
                next = Some(normal(&here.join(link)));
            }
        }
    }
    Err(why)
}

/// An absolute path without `.` and `..`. It can lead elsewhere if a directory on the way is a
/// symbolic link: but whatever it leads to is confined when it is opened, and then has to match.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => _ = normal.pop(),
            other => normal.push(other),
        }
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_normal_path_has_no_way_up() {
        for (path, expected) in [
            ("/a/b", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/a/../../b", "/b"),
            ("/..", "/"),
            ("/a/b/..", "/a"),
        ] {
            assert_eq!(normal(Path::new(path)), Path::new(expected));
        }
    }
}
