//! Opens the disk that the command line names.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use block_io::Shown;
use block_io::ops::inspect::{Content, inspect_chain, inspect_files};
use block_io::ops::signature::{Signature, signature_of};
use block_io::storage::file::File;
use block_io::storage::{Access, FILE_BLOCK};
use block_io::{CachePolicy, CowFormat, Disk, DiskOptions, GivenFiles, Host, ImageError};
use cow_format::{HeaderError, Sector, SectorCount, SectorRange};

use crate::cli::{Cache, DiskFds, Format, Image, Options};
use crate::guest_memory::PAGE_SIZE;
use crate::lifecycle::error::DaemonError;
use crate::process::fd;
use crate::process::socket::PREDECESSOR_WAIT;

/// Opens the disk that the command line names, and creates a COW file that does not exist. With
/// `inherited`, takes the disk over from a predecessor by the descriptions of its top file.
pub fn open_disk(
    options: &Options,
    given: Option<&GivenFiles>,
    inherited: Option<File>,
) -> Result<Disk, DaemonError> {
    let policy = |cache| match cache {
        Cache::Buffered => CachePolicy::Buffered,
        Cache::Direct => CachePolicy::Direct,
    };
    let mut disk_options = DiskOptions {
        read_only: options.read_only,
        base_cache: policy(options.base_cache),
        cow_cache: policy(options.cow_cache),
        lock_wait: PREDECESSOR_WAIT,
        unlocked: options.allow_unlocked,
        ..DiskOptions::default()
    };
    let disk = match (&options.image, inherited) {
        (Image::Fds(fds), inherited) => {
            // A predecessor has the same descriptions.
            let files = files_of(fds, given, options.read_only)?;
            match fds.raw {
                true => Disk::open_raw_files(files, inherited.is_some(), &disk_options)?,
                false => Disk::open_cow_files(files, inherited.is_some(), &disk_options)?,
            }
        }
        (Image::File { path, format: Some(Format::Raw) }, None) => {
            Disk::open_raw(path, &disk_options)?
        }
        (Image::File { path, format: Some(Format::Raw) }, Some(top)) => {
            Disk::inherit_raw(path, top, &disk_options)?
        }
        (Image::File { path, .. }, Some(top)) => Disk::inherit_cow(path, &[], top, &disk_options)?,
        (Image::Cow { cow, below, .. }, Some(top)) => {
            Disk::inherit_cow(cow, below, top, &disk_options)?
        }
        (Image::File { path, format }, None) => {
            check_format(path, *format)?;
            Disk::open_cow(path, None, &disk_options).map_err(|e| unless_raw(path, e))?
        }
        (Image::Cow { cow, below, format }, None) => {
            check_format(cow, *format)?;
            if *format == Some(Format::Uml) {
                disk_options.format = CowFormat::Uml;
            }
            if let Some(base) = below.first()
                && !cow.exists()
            {
                check_base(base)?;
            }
            Disk::open_named(cow, below, &disk_options)?
        }
    };
    Ok(disk)
}

/// `--backing-dir`.
pub fn allow_backing_dirs(dirs: &[PathBuf]) -> Result<(), DaemonError> {
    dirs.iter().try_for_each(|dir| {
        let wrong = |source| DaemonError::BackingDir { path: dir.clone(), source };
        Host::allow_backing_dir(dir).map_err(wrong)
    })
}

/// The files of the disk, if they are open already.
pub fn given_files(options: &Options) -> Result<Option<GivenFiles>, DaemonError> {
    match &options.image {
        Image::Fds(fds) => files_of(fds, None, options.read_only).map(Some),
        Image::Cow { .. } | Image::File { .. } => Ok(None),
    }
}

/// The files with these numbers, or the same as `given` once more.
fn files_of(
    fds: &DiskFds,
    given: Option<&GivenFiles>,
    read_only: bool,
) -> Result<GivenFiles, DaemonError> {
    if let Some(given) = given {
        return given.again().map_err(DaemonError::system("use the disk's descriptors"));
    }
    let wrong =
        |option: &'static str, fd| move |source| DaemonError::Descriptor { option, fd, source };
    let access = if read_only { Access::Read } else { Access::ReadWrite };
    let top = fd::duplicate(fds.cow).map_err(wrong("--cow-fd", fds.cow))?;
    let direct =
        fds.direct.map(|direct| fd::duplicate(direct).map_err(wrong("--cow-direct-fd", direct)));
    let top = File::given(top, direct.transpose()?, access).map_err(wrong("--cow-fd", fds.cow))?;
    let below = fds.below.iter().map(|&base| {
        let file = fd::duplicate(base).and_then(File::given_base);
        Ok((file.map_err(wrong("--base-fd", base))?, name_of(base)))
    });
    let below = below.collect::<Result<_, DaemonError>>()?;
    Ok(GivenFiles { top, name: name_of(fds.cow), below })
}

/// A name of an open file for messages: what the kernel says, or the descriptor's number.
fn name_of(fd: RawFd) -> PathBuf {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    link.unwrap_or_else(|_| format!("descriptor {fd}").into())
}

/// What can be seen of a disk that another daemon has open.
pub struct Seen {
    /// The name of its top file.
    pub name: PathBuf,
    /// Its size.
    pub capacity: SectorCount,
    /// Its logical block in bytes.
    pub logical_block: u32,
    /// The paths of its files, the top first.
    pub files: Vec<PathBuf>,
}

/// Looks at a disk that another daemon may be writing to.
///
/// # Errors
/// The reason, if opening it would fail even without the other daemon, as far as can be seen.
pub fn look(options: &Options, given: Option<&GivenFiles>) -> Result<Seen, DaemonError> {
    let named = |path: &Path, below: &[PathBuf], format| {
        if format != Some(Format::Raw) {
            check_format(path, format)?;
        }
        Ok::<_, DaemonError>((inspect_chain(&Host, path, below)?, format == Some(Format::Raw)))
    };
    let (found, raw) = match &options.image {
        Image::File { path, format } => named(path, &[], *format)?,
        Image::Cow { cow, below, format } => named(cow, below, *format)?,
        Image::Fds(fds) => (inspect_files(files_of(fds, given, options.read_only)?)?, fds.raw),
    };
    let name = found.files.first().map(|top| top.path.clone()).unwrap_or_default();
    let not_cow = || DaemonError::NotCow { path: name.clone() };
    let top = found.files.first();
    let capacity = match top.map(|top| (&top.content, top.stat.size)) {
        Some((_, len)) if raw => SectorCount::covering(len),
        Some((Content::Cow(cow), _)) => cow.header.geometry().sectors(),
        Some((Content::Raw, _)) => return Err(not_cow()),
        _ => return found.problem.map_or_else(|| Err(not_cow()), |e| Err(e.into())),
    };
    let logical_block = top.map_or(FILE_BLOCK, |top| top.stat.logical_block);
    match found.problem {
        // Its writer may have extended it meanwhile.
        None | Some(ImageError::Data { .. }) => {}
        Some(_) if raw => {}
        Some(problem) => return Err(problem.into()),
    }
    let files = found.files.iter().map(|file| file.path.clone()).collect();
    Ok(Seen { name, capacity, logical_block, files })
}

/// Logs the files of the disk, its size, and how it is used.
pub fn describe(disk: &Disk) {
    for (depth, layer) in disk.layers().iter().enumerate() {
        log::info!("{}{}", if depth == 0 { "disk " } else { "  over " }, layer.path().shown());
    }
    if let (Some(top), Some(start)) =
        (disk.layers().first(), SectorRange::new(Sector::new(0), SectorCount::new(0)))
        && top.file().direct().is_some()
        && !disk.write_at(start).get().is_multiple_of(PAGE_SIZE)
    {
        log::warn!(
            "{}: --cow-cache=direct: the data does not begin at a multiple of {PAGE_SIZE} bytes, as in old files of UML; \
             writes go through the page cache",
            top.path().shown()
        );
    }
    let access = if disk.read_only() { "read-only" } else { "writable" };
    log::info!("{} sectors of 512 bytes, {access}", disk.capacity().get());
}

/// Refuses a COW file that does not have the expected format. A missing file or a bad header is
/// reported when the file is opened.
pub fn check_format(path: &Path, expected: Option<Format>) -> Result<(), DaemonError> {
    let Some(expected) = expected else { return Ok(()) };
    let found = match signature_of(&Host, path) {
        Some(Signature::Uml) => Format::Uml,
        Some(Signature::Native) => Format::Native,
        _ => return Ok(()),
    };
    if found == expected {
        return Ok(());
    }
    Err(DaemonError::Format { path: path.to_owned(), found, expected })
}

/// Refuses to create a COW file over a base that looks like another format, because its bytes would
/// be served as a raw disk. (A raw image can look like this too, since a guest can write anything
/// to its disk; for such a base use `cow create -F raw`.)
fn check_base(base: &Path) -> Result<(), DaemonError> {
    let found = match signature_of(&Host, base) {
        Some(Signature::Qcow2) => "a qcow2 image",
        Some(Signature::Uml | Signature::Native | Signature::BrokenCow) => "a COW file",
        None => return Ok(()),
    };
    Err(DaemonError::Base { path: base.to_owned(), found })
}

/// Adds the remedy to the error for a file that is not a COW file, as it is probably a raw image.
fn unless_raw(path: &Path, error: ImageError) -> DaemonError {
    match error {
        ImageError::Header { source: HeaderError::NotCow { .. }, .. } => {
            DaemonError::NotCow { path: path.to_owned() }
        }
        error => error.into(),
    }
}
