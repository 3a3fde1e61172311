//! Inspecting a chain without opening it: this works beside a running daemon, and on chains that
//! cannot be opened.

use std::path::{Path, PathBuf};

use cow_format::header::{BackingFormat, NativeState};
use cow_format::identity::{ActualIdentity, BackingIdentity, Doubt, IdentityError};
use cow_format::{Header, HeaderError, Sector, SectorCount};

use super::merge_marker::marker_path;
use crate::disk::GivenFiles;
use crate::image::bitmap::source::BitmapSource;
use crate::image::chain::{Reference, reference, resolve};
use crate::image::identity::verify;
use crate::image::opened::Opened;
use crate::image::references::{Below, References};
use crate::image::trust::Trust;
use crate::image::{CHAIN_DEPTH_MAX, ImageError};
use crate::storage::file::Host;
use crate::storage::{Access, Env, FileId, FileKind, FileStat, LockError, LockKind, Storage};

/// The result of an inspection.
#[derive(Debug)]
pub struct Inspection {
    /// The files of the chain, the top first, as far as they could be followed.
    pub files: Vec<FileFacts>,
    /// Why the chain cannot be opened, or why it ends here. It concerns the last file, or the file
    /// that this refers to.
    pub problem: Option<ImageError>,
}

/// What is known about one file.
#[derive(Debug)]
pub struct FileFacts {
    /// Its path.
    pub path: PathBuf,
    /// Its length, allocation and times.
    pub stat: FileStat,
    /// A process has it open for writing.
    pub in_use: bool,
    /// A merge of it into a file below was interrupted and can be run again.
    pub merging: bool,
    /// Its content.
    pub content: Content,
    /// Its reference to a file below.
    pub backing: Option<BackingFacts>,
}

/// The content of a file.
#[derive(Debug)]
pub enum Content {
    /// A raw image: by its reference, or, at the top, because it has no known magic.
    Raw,
    /// Unreadable: see [`Inspection::problem`].
    Unknown,
    /// A COW file.
    Cow(Box<CowFacts>),
}

/// What is known about a COW file.
#[derive(Debug)]
pub struct CowFacts {
    /// Its header.
    pub header: Header,
    /// The number of sectors that are present: the durable ones, and the live ones if the live
    /// bitmap is valid.
    pub present: SectorCount,
    /// The last of them.
    pub last_present: Option<Sector>,
    /// It has a valid live bitmap: it is in use, or was not closed.
    pub live: bool,
}

/// The reference of a COW file, and the file that was found there.
#[derive(Debug)]
pub struct BackingFacts {
    /// The path in the header.
    pub stored: PathBuf,
    /// The resolved path, or the path that was given instead.
    pub path: PathBuf,
    /// The format in the header.
    pub format: BackingFormat,
    /// The identity in the header.
    pub identity: BackingIdentity,
    /// BLAKE3 of its content, if the header has it.
    pub digest: Option<[u8; 32]>,
    /// The file that was found, if it could be opened.
    pub found: Option<ActualIdentity>,
    /// Whether it matches the header.
    pub verdict: Option<Result<(), IdentityError>>,
    /// Why a match may be weaker than it should be.
    pub doubt: Option<Doubt>,
}

/// Inspects the file at `path` and everything below it. `base` replaces the path in the first
/// header. Fails only if the file itself cannot be opened. Takes no lock that outlasts the call,
/// and changes nothing.
pub fn inspect<E: Env>(
    env: &E,
    path: &Path,
    base: Option<&Path>,
) -> Result<Inspection, ImageError> {
    inspect_chain(env, path, base.map(Path::to_owned).as_slice())
}

/// The same with all paths below the file, nearest first, if any is given.
pub fn inspect_chain<E: Env>(
    env: &E,
    path: &Path,
    below: &[PathBuf],
) -> Result<Inspection, ImageError> {
    let top = env.open(path, Access::Read).map_err(ImageError::io(path, "open"))?;
    let below = below.iter().cloned().map(Below::Named);
    inspect_opened(env, opened(top, path.to_owned(), true)?, below)
}

/// The same for files that are open already.
pub fn inspect_files(files: GivenFiles) -> Result<Inspection, ImageError> {
    let below = files.below.into_iter().map(|(file, name)| Below::Open(file, name));
    inspect_opened(&Host, opened(files.top, files.name, false)?, below)
}

fn inspect_opened<E: Env>(
    env: &E,
    top: Opened<E::File>,
    below: impl IntoIterator<Item = Below<E::File>>,
) -> Result<Inspection, ImageError> {
    let references = References::of_user(&top.path, top.by_name, below);
    let mut found = Inspection { files: Vec::new(), problem: None };
    found.problem = found.follow(env, top, references).err();
    Ok(found)
}

/// Whether the file at `path` is a COW file that refers to the file `backing`. Only its header is
/// read, and what it refers to is not opened.
pub fn refers_to<E: Env>(env: &E, path: &Path, backing: FileId) -> bool {
    let referred = || -> Option<FileId> {
        let file = opened(env.open(path, Access::Read).ok()?, path.to_owned(), true).ok()?;
        let reference = reference(&file.header().ok()?)?;
        env.id(&resolve(env, path, &reference.stored).ok()?).ok()
    };
    referred() == Some(backing)
}

fn opened<F: Storage>(file: F, path: PathBuf, by_name: bool) -> Result<Opened<F>, ImageError> {
    let stat = file.stat().map_err(ImageError::io(&path, "stat"))?;
    if !matches!(stat.kind, FileKind::Regular | FileKind::BlockDevice) {
        let expected = "a regular file or a block device";
        return Err(ImageError::Kind { path, found: stat.kind, expected });
    }
    Ok(Opened { file, path, stat, by_name })
}

impl Inspection {
    fn follow<E: Env>(
        &mut self,
        env: &E,
        top: Opened<E::File>,
        mut references: References<E::File>,
    ) -> Result<(), ImageError> {
        let mut next = (top, None);
        loop {
            let (opened, format) = next;
            self.look(env, &opened, format)?;
            self.refuse(&opened)?;
            let Some(facts) = self.files.last_mut() else { return Ok(()) };
            let header = match &facts.content {
                Content::Cow(cow) => Some(&cow.header),
                Content::Raw | Content::Unknown => None,
            };
            let Some((header, reference)) = header.and_then(|it| Some((it, reference(it)?))) else {
                return references.check_all_used(&facts.path);
            };
            let path = references.path(env, &facts.path, &reference.stored)?;
            facts.backing = Some(BackingFacts::new(&reference, digest(header), path));
            let backing = self.open_backing(env, &mut references, &reference)?;
            next = (backing, Some(reference.format));
            self.verify(&next.0, &reference)?;
        }
    }

    /// Adds the facts about one file.
    fn look<E: Env>(
        &mut self,
        env: &E,
        opened: &Opened<E::File>,
        format: Option<BackingFormat>,
    ) -> Result<(), ImageError> {
        let path = opened.path.clone();
        let in_use = matches!(opened.file.try_lock(LockKind::Shared), Err(LockError::Held { .. }));
        let marked = || env.exists(&marker_path(&env.canonical(&path)?));
        let merging = opened.by_name && marked().map_err(ImageError::io(&path, "look beside"))?;
        let (stat, content) = (opened.stat, Content::Unknown);
        self.files.push(FileFacts { path, stat, in_use, merging, content, backing: None });
        let content = look_inside(env, opened, format, self.files.len() == 1)?;
        if let Some(facts) = self.files.last_mut() {
            facts.content = content;
        }
        Ok(())
    }

    /// The reason why the last file, which is readable, cannot be opened as part of the chain.
    fn refuse<F: Storage>(&self, opened: &Opened<F>) -> Result<(), ImageError> {
        let Some((last, above)) = self.files.split_last() else { return Ok(()) };
        let Content::Cow(cow) = &last.content else { return Ok(()) };
        if let (Header::Native(native), Some(above)) = (&cow.header, above.last())
            && native.state() != NativeState::Frozen
        {
            return Err(ImageError::NotFrozen { cow: above.path.clone(), path: last.path.clone() });
        }
        opened.check_data(cow.header.geometry(), cow.last_present)
    }

    /// Opens the file that the last one refers to.
    fn open_backing<E: Env>(
        &self,
        env: &E,
        references: &mut References<E::File>,
        reference: &Reference,
    ) -> Result<Opened<E::File>, ImageError> {
        let cow = self.files.last().map(|facts| facts.path.clone()).unwrap_or_default();
        let top = || self.files.first().map(|facts| facts.path.clone()).unwrap_or_default();
        if self.files.len() == CHAIN_DEPTH_MAX {
            return Err(ImageError::TooDeep { top: top() });
        }
        let (file, path, by_name) = references.open(env, &cow, &reference.stored, Access::Read)?;
        let opened = opened(file, path, by_name)?;
        let again = self.files.iter().find(|facts| facts.stat.id == opened.stat.id);
        match again {
            None => Ok(opened),
            Some(again) => Err(ImageError::Repeated {
                top: top(),
                path: opened.path,
                again: again.path.clone(),
            }),
        }
    }

    /// Compares a file with the last file's reference to it.
    fn verify<F: Storage>(
        &mut self,
        found: &Opened<F>,
        reference: &Reference,
    ) -> Result<(), ImageError> {
        let Some(facts) = self.files.last_mut() else { return Ok(()) };
        let header = found.header_as(reference.format, &facts.path)?;
        let actual = found.identity(header.as_ref());
        let compared = verify(&reference.identity, found, header.as_ref())?;
        let verdict = compared.map(|_| ());
        if let Some(backing) = &mut facts.backing {
            backing.found = Some(actual);
            backing.verdict = Some(verdict);
            backing.doubt = compared.ok().flatten();
        }
        let (cow, path) = (facts.path.clone(), found.path.clone());
        verdict.map_err(|source| ImageError::Identity { cow, path, source })
    }
}

/// Reads the header and counts the bits. A top without a known magic is a raw image; below the top,
/// the reference determines the format.
fn look_inside<E: Env>(
    env: &E,
    opened: &Opened<E::File>,
    format: Option<BackingFormat>,
    top: bool,
) -> Result<Content, ImageError> {
    if format == Some(BackingFormat::Raw) {
        return Ok(Content::Raw);
    }
    let header = match opened.header() {
        Ok(header) => header,
        Err(ImageError::Header { source: HeaderError::NotCow { .. }, .. }) if top => {
            return Ok(Content::Raw);
        }
        Err(ImageError::Kind { found: FileKind::BlockDevice, .. }) if top => {
            return Ok(Content::Raw);
        }
        Err(err) => return Err(err),
    };
    let bits = BitmapSource::find_as_it_is(env, opened, &header, Trust::Witness)?;
    let found = bits.present(&opened.file, 0..bits.pages());
    let found = found.map_err(ImageError::io(&opened.path, "read the bitmap"))?;
    Ok(Content::Cow(Box::new(CowFacts {
        header,
        present: SectorCount::new(found.count),
        last_present: found.last,
        live: bits.live_counts(),
    })))
}

impl BackingFacts {
    fn new(reference: &Reference, digest: Option<[u8; 32]>, path: PathBuf) -> Self {
        BackingFacts {
            stored: reference.stored.clone(),
            path,
            format: reference.format,
            identity: reference.identity,
            digest,
            found: None,
            verdict: None,
            doubt: None,
        }
    }
}

fn digest(header: &Header) -> Option<[u8; 32]> {
    match header {
        Header::Uml(_) => None,
        Header::Native(native) => native.backing()?.digest().copied(),
    }
}
