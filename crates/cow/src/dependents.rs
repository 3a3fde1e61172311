//! The COW files over a file, found by searching directories.

use std::fmt;
use std::path::{Path, PathBuf};

use block_io::ops::inspect::refers_to;
use block_io::storage::FileId;
use block_io::{Host, Shown};

/// The COW files over a file, and the directories that were searched.
#[derive(Debug)]
pub struct Dependents {
    files: Vec<PathBuf>,
    dirs: Vec<PathBuf>,
}

impl Dependents {
    /// Searches the directories of `target` and `cow` for COW files over `target` and over those;
    /// `cow` does not count.
    pub fn over(target: &Path, cow: &Path) -> Self {
        let mut dirs = vec![dir_of(target)];
        if id_of(&dir_of(cow)) != id_of(&dirs[0]) {
            dirs.push(dir_of(cow));
        }
        let entries = dirs.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten();
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut left: Vec<_> = paths
            .filter(|path| path.is_file())
            .filter_map(|path| Some((id_of(&path)?, path)))
            .filter(|(id, _)| Some(*id) != id_of(cow))
            .collect();
        let mut below: Vec<_> = id_of(target).into_iter().collect();
        let mut files = Vec::new();
        while let Some(id) = below.pop() {
            left.retain(|(this, path)| {
                let over = refers_to(&Host, path, id);
                if over {
                    below.push(*this);
                    files.push(path.strip_prefix("./").unwrap_or(path).to_owned());
                }
                !over
            });
        }
        files.sort();
        files.dedup_by_key(|path| id_of(path));
        Dependents { files, dirs }
    }
}

impl fmt::Display for Dependents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join = |paths: &[PathBuf], by| {
            paths.iter().map(|path| path.shown().to_string()).collect::<Vec<_>>().join(by)
        };
        let dirs = join(&self.dirs, " and ");
        match self.files.is_empty() {
            true => write!(f, "none found in {dirs}"),
            false => write!(f, "{}; found in {dirs}", join(&self.files, ", ")),
        }
    }
}

/// Which file it is, if it is there.
pub fn id_of(file: &Path) -> Option<FileId> {
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(file).ok()?;
    Some(FileId { dev: meta.dev(), ino: meta.ino() })
}

fn dir_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}
