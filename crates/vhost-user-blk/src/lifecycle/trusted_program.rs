//! Which programs an upgrade may run: those that the operator has named when the daemon was
//! started, and that nobody else can replace. Whoever can connect to the control socket may have
//! less rights than the daemon, for example a VMM of the same user in a sandbox of its own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

use crate::lifecycle::upgrade::UpgradeError;

/// Permissions of others than the owner to write.
const WRITABLE: u32 = 0o022;
/// In such a directory only its owner can rename what belongs to someone else.
const STICKY: u32 = 0o1000;

/// The resolved path of the program to run: `named`, or the daemon's `own`.
///
/// # Errors
/// Unless it is the daemon's own or lies directly in `upgrade_dir`, and it is a regular file that
/// nobody but root and the daemon's user can change or replace.
pub fn choose(
    named: Option<&Path>,
    own: &Path,
    upgrade_dir: Option<&Path>,
) -> Result<PathBuf, UpgradeError> {
    let program = named.unwrap_or(own);
    let resolved = fs::canonicalize(program).map_err(UpgradeError::start(program))?;
    let is = |path: &Path, expected: &Path| fs::canonicalize(path).is_ok_and(|it| it == expected);
    let in_dir = upgrade_dir.zip(resolved.parent()).is_some_and(|(dir, parent)| is(dir, parent));
    // A relative name would depend on the daemon's directory, which the client does not know.
    if !program.is_absolute() || !(in_dir || is(own, &resolved)) {
        return Err(UpgradeError::NotNamed { program: program.to_owned(), own: own.to_owned() });
    }
    check_file(&resolved)?;
    Ok(resolved)
}

/// `path` is resolved, so it has no symbolic links.
fn check_file(path: &Path) -> Result<(), UpgradeError> {
    for (height, at) in path.ancestors().enumerate() {
        let found = fs::symlink_metadata(at).map_err(UpgradeError::start(path))?;
        let why = if height == 0 && !found.is_file() {
            "it is not a regular file".to_owned()
        } else if ![0, geteuid().as_raw()].contains(&found.uid()) {
            format!("it belongs to user {}", found.uid())
        } else if found.mode() & WRITABLE != 0 && (height < 2 || found.mode() & STICKY == 0) {
            format!("its mode is {:04o}", found.mode() & 0o7777)
        } else {
            continue;
        };
        return Err(UpgradeError::Replaceable { path: at.to_owned(), why });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A directory that only its owner can write to, and a program in it.
    fn program() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().canonicalize().unwrap().join("program");
        fs::write(&program, "").unwrap();
        chmod(&program, 0o755);
        (directory, program)
    }

    fn refused(result: Result<PathBuf, UpgradeError>, why: &str) {
        let text = result.unwrap_err().to_string();
        assert!(text.contains(why), "no {why:?} in {text}");
    }

    #[test]
    fn only_the_own_program_and_those_in_the_directory_are_run() {
        let ((_own_dir, own), (dir, other)) = (program(), program());
        assert_eq!(choose(None, &own, None).unwrap(), own);
        assert_eq!(choose(Some(&own), &own, Some(dir.path())).unwrap(), own);
        assert_eq!(choose(Some(&other), &own, Some(dir.path())).unwrap(), other);
        refused(choose(Some(&other), &own, None), "--upgrade-dir");
        // By a link, and by a way through the directory.
        let link = dir.path().join("link");
        symlink(&own, &link).unwrap();
        assert_eq!(choose(Some(&link), &other, own.parent()).unwrap(), own);
        refused(choose(Some(&link), &other, Some(dir.path())), "--upgrade-dir");
        fs::create_dir(dir.path().join("below")).unwrap();
        let below = dir.path().join("below/program");
        fs::copy(&other, &below).unwrap();
        refused(choose(Some(&below), &own, Some(dir.path())), "--upgrade-dir");
        let around = dir.path().join("below/../program");
        assert_eq!(choose(Some(&around), &own, Some(dir.path())).unwrap(), other);
        refused(choose(Some(&dir.path().join("none")), &own, Some(dir.path())), "No such file");
    }

    #[test]
    fn a_relative_name_is_refused() {
        let (_dir, own) = program();
        // The tests run in the crate's directory.
        refused(choose(Some(Path::new("Cargo.toml")), &own, Some(Path::new("."))), "--upgrade-dir");
    }

    #[test]
    fn a_program_that_others_can_change_or_replace_is_refused() {
        let (dir, own) = program();
        for mode in [0o775, 0o757] {
            chmod(&own, mode);
            refused(choose(None, &own, None), &format!("its mode is 0{mode:o}"));
        }
        chmod(&own, 0o755);
        // The sticky bit does not keep others from adding a program.
        for mode in [0o770, 0o707, 0o1777] {
            chmod(dir.path(), mode);
            refused(choose(None, &own, None), &format!("its mode is {mode:04o}"));
        }
        chmod(dir.path(), 0o700);
        refused(choose(None, dir.path(), None), "not a regular file");
        assert_eq!(choose(None, &own, None).unwrap(), own);
        if chown(&own, Some(65534), None).is_err() {
            println!("skipped: cannot give a file to another user");
            return;
        }
        refused(choose(None, &own, None), "user 65534");
    }

    #[test]
    fn the_directories_above_count() {
        let (dir, _) = program();
        let inner = dir.path().canonicalize().unwrap().join("inner");
        fs::create_dir(&inner).unwrap();
        let own = inner.join("program");
        fs::write(&own, "").unwrap();
        chmod(dir.path(), 0o777);
        refused(choose(None, &own, None), "its mode is 0777");
        // What belongs to someone else cannot be renamed there.
        chmod(dir.path(), 0o1777);
        assert_eq!(choose(None, &own, None).unwrap(), own);
    }
}
