//! Which files the process may still open (Landlock).
//!
//! Rights go by path when a file is opened, and what is open stays usable. So the rules are only
//! for what happens after the start: a disk is opened again, sockets are removed, and a new program
//! starts. Rules go by the file, not by its name: another file that gets the name is refused.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, Scope, path_beneath_rules,
};

/// The newest version whose rights this program knows; older kernels have fewer of them.
const KNOWN: ABI = ABI::V7;

/// What the kernel reports of a file system and of a device: [`block_io`] asks for the page cache
/// that holds a file, and how far the kernel reads ahead.
const KERNEL: [&str; 3] = ["/proc/sys/kernel/random/boot_id", "/sys/fs", "/sys/devices"];

/// Where programs, their loader and libraries are. The last two are for NixOS and Guix.
const PROGRAMS: [&str; 7] =
    ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store", "/gnu/store"];

/// What a process needs to open after its start. What does not exist is left out.
#[derive(Debug, Default)]
pub struct Places {
    /// Files of the disk that are only read.
    pub read: Vec<PathBuf>,
    /// Files of the disk that are written.
    pub written: Vec<PathBuf>,
    /// A directory that is synced, to make a file's name durable.
    pub synced: Option<PathBuf>,
    /// A directory in which files are made and removed (the side file of a COW file of UML).
    pub side_files: Option<PathBuf>,
    /// Directories from which sockets are removed.
    pub sockets: Vec<PathBuf>,
    /// Directories of programs that may take over. Empty if none may.
    pub programs: Vec<PathBuf>,
}

/// Confines the calling thread, and all threads and programs that it starts. Returns the version of
/// the kernel's Landlock, or `None` if it has none, and then nothing is confined.
pub fn confine(places: &Places) -> Result<Option<i32>, RulesetError> {
    let mut scopes = BitFlags::from(Scope::Signal);
    // A service manager with an abstract socket is outside, and is still to be notified.
    if !std::env::var_os("NOTIFY_SOCKET")
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"@"))
    {
        scopes |= Scope::AbstractUnixSocket;
    }
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(scopes)?
        .create()?;
    let read = AccessFs::ReadFile | AccessFs::IoctlDev;
    let write = read | AccessFs::WriteFile | AccessFs::Truncate;
    let look = AccessFs::ReadFile | AccessFs::ReadDir;
    let make = write | AccessFs::ReadDir | AccessFs::MakeReg | AccessFs::RemoveFile;
    let run = look | AccessFs::Execute;
    let mut ruleset = ruleset
        .add_rules(path_beneath_rules(KERNEL, look))?
        .add_rules(path_beneath_rules(&places.read, read))?
        .add_rules(path_beneath_rules(&places.written, write))?
        .add_rules(path_beneath_rules(&places.synced, AccessFs::ReadDir))?
        .add_rules(path_beneath_rules(&places.side_files, make))?
        .add_rules(path_beneath_rules(&places.sockets, AccessFs::RemoveFile))?;
    if !places.programs.is_empty() {
        let run_from =
            PROGRAMS.map(Path::new).into_iter().chain(places.programs.iter().map(AsRef::as_ref));
        ruleset = ruleset
            .add_rules(path_beneath_rules(run_from, run))?
            .add_rules(path_beneath_rules(["/proc/self"], look))?
            .add_rules(path_beneath_rules(["/dev/null"], write))?;
    }
    let status = ruleset.restrict_self()?;
    Ok(match status.landlock {
        LandlockStatus::Available { effective_abi, kernel_abi } => {
            Some(kernel_abi.unwrap_or(effective_abi as i32))
        }
        _ => None,
    })
}
