//! Opening a disk: every file of its chain, the map of the chain, and the state needed for writing.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use cow_format::{Bitmap, ByteOffset, Geometry, Header, LayerMap, SECTOR_SIZE};

use super::bitmap::source::BitmapSource;
use super::chain::{Content, Held, Lower, Opener, path_to_store, reference, resolve};
use super::create::{CreateOptions, create_cow};
use super::identity::renewed;
use super::layer::Layer;
use super::opened::Opened;
use super::references::Below;
use super::trust::{Trust, recover};
use super::write::header_io::{check_writable, set_backing_path};
use super::write::journal::Journal;
use super::write::writable::{WritableCow, make_writable};
use super::{CachePolicy, CowFormat, DiskOptions, ImageError};
use crate::storage::{Access, Env, FILE_BLOCK, Storage};

/// Everything that an open disk consists of.
pub(crate) struct Chain<F> {
    pub(crate) layers: Vec<Layer<F>>,
    pub(crate) map: LayerMap,
    /// Of each COW file, the top first.
    pub(crate) bits: Vec<BitmapSource<F>>,
    pub(crate) data_offset: ByteOffset,
    pub(crate) size: u64,
    pub(crate) logical_block: u32,
    pub(crate) cow: Option<WritableCow<F>>,
    pub(crate) journal: Journal,
    /// The file may contain data that is not marked present: it was written but not flushed when
    /// the page cache was lost.
    pub(crate) leaky: bool,
}

/// What is opened.
pub(crate) struct Source<F> {
    /// The top; if it is `held`, for messages, and for comparing.
    pub(crate) path: PathBuf,
    pub(crate) held: Option<Held<F>>,
    /// The files below the top, nearest first, if the user has named them.
    pub(crate) below: Vec<Below<F>>,
}

impl<F> Source<F> {
    /// A file, and perhaps those below it, by path.
    pub(crate) fn named(path: &Path, below: &[PathBuf]) -> Self {
        let below = below.iter().cloned().map(Below::Named).collect();
        Source { path: path.to_owned(), held: None, below }
    }
}

/// Opens a raw image.
pub(crate) fn open_single<E: Env>(
    env: &E,
    source: Source<E::File>,
    options: &DiskOptions,
) -> Result<Chain<E::File>, ImageError> {
    let top = Opener::new(env, options, &source.path).holding(source.held).top()?;
    let len = top.stat.size;
    if len == 0 || (!options.read_only && !len.is_multiple_of(SECTOR_SIZE)) {
        return Err(ImageError::RawLength { path: top.path, len });
    }
    let logical_block = top.stat.logical_block;
    let layers = vec![Layer { file: top.file, path: top.path }];
    Ok(Chain {
        logical_block,
        layers,
        map: LayerMap::raw(len),
        bits: Vec::new(),
        data_offset: ByteOffset::new(0),
        size: len,
        cow: None,
        journal: Journal::none(),
        leaky: false,
    })
}

/// Opens a COW file and everything below it. Creates it first if it does not exist and the file
/// below it is named. Nothing on disk is changed before every file has been checked, and nothing at
/// all if the top is inherited from a predecessor that may still be running.
pub(crate) fn open_chain<E: Env>(
    env: &E,
    source: Source<E::File>,
    options: &DiskOptions,
) -> Result<Chain<E::File>, ImageError> {
    let Source { path, held, below } = source;
    let path = path.as_path();
    let inherited = held.as_ref().is_some_and(|held| held.inherited);
    let base = match below.first() {
        // A predecessor has already adopted it.
        Some(Below::Named(base)) if !inherited => Some(base.clone()),
        _ => None,
    };
    let base = base.as_deref();
    if let Some(base) = base
        && !options.read_only
        && !env.exists(path).map_err(ImageError::io(path, "look for"))?
    {
        create_cow(env, path, &CreateOptions::over(options.format, base))?;
    }
    let mut opener = Opener::new(env, options, path).holding(held).naming(below);
    let top = opener.top()?;
    let mut header = top.header()?;
    if !options.read_only {
        check_writable(path, &header)?;
    }
    let below = opener.below(path, &header)?;
    let geometry = *header.geometry();
    let trust = match (inherited, options.read_only) {
        (true, _) => Trust::Held,
        (false, true) => Trust::Witness,
        (false, false) => recover(env, &top, &mut header)?,
    };
    if !options.read_only && !inherited {
        renew_backing(path, &mut header, below.first())?;
    }
    let access = if options.read_only { Access::Read } else { Access::ReadWrite };
    let bits = BitmapSource::find_for(access, env, &top, &header, trust)?;
    bits.check_data(&top)?;

    if inherited && !bits.live_counts() {
        return Err(ImageError::NotHeld { path: path.to_owned() });
    }

    let (mut cow, mut journal) = (None, Journal::none());
    if !options.read_only {
        if let (Some(base), Some(nearest)) = (base, below.first()) {
            adopt_base(env, &top, &mut header, base, &nearest.opened)?;
        }
        // A journal record is read back from the page cache, which direct I/O bypasses.
        journal = Journal::new(&header, options.cow_cache == CachePolicy::Buffered);
        cow = Some(make_writable(env, &top, header, &bits, inherited)?);
    }
    let chain = join(top, below, geometry, bits, cow, journal)?;
    Ok(Chain { leaky: trust == Trust::Nothing, ..chain })
}

/// The map of a chain, with nothing loaded yet. `complete`: the top has its last sector in full, as
/// a file that is open for writing does.
pub(crate) fn new_map<F>(
    top: &Opened<F>,
    below: &[Lower<F>],
    geometry: &Geometry,
    bitmap: Bitmap,
    complete: bool,
) -> Result<LayerMap, ImageError> {
    let frozen = below.iter().filter_map(|lower| match &lower.content {
        Content::Raw => None,
        Content::Cow(geometry, _) => Some(*geometry),
    });
    let frozen: Vec<_> = frozen.collect();
    let base = below.last().filter(|lower| matches!(lower.content, Content::Raw));
    let map = LayerMap::new(geometry, bitmap, &frozen, base.map(|base| base.opened.stat.size));
    let mut map = map.map_err(|_| ImageError::TooDeep { top: top.path.clone() })?;
    if !complete {
        map.ends_after(0, top.disk_bytes(geometry));
    }
    for (layer, lower) in (1..).zip(below) {
        if let Content::Cow(geometry, _) = &lower.content {
            map.ends_after(layer, lower.opened.disk_bytes(geometry));
        }
    }
    Ok(map)
}

/// Joins the files of a chain.
fn join<F>(
    top: Opened<F>,
    below: Vec<Lower<F>>,
    geometry: Geometry,
    bits: BitmapSource<F>,
    cow: Option<WritableCow<F>>,
    journal: Journal,
) -> Result<Chain<F>, ImageError> {
    let bitmap = Bitmap::unknown(geometry.sectors());
    let map = new_map(&top, &below, &geometry, bitmap, cow.is_some())?;
    let mut layers = vec![Layer { file: top.file, path: top.path }];
    let mut all_bits = vec![bits];
    for lower in below {
        layers.push(Layer { file: lower.opened.file, path: lower.opened.path });
        if let Content::Cow(_, bits) = lower.content {
            all_bits.push(bits);
        }
    }
    let (data_offset, size) = (geometry.data_offset(), geometry.virtual_size());
    let logical_block = FILE_BLOCK;
    Ok(Chain {
        layers,
        map,
        bits: all_bits,
        data_offset,
        size,
        logical_block,
        cow,
        journal,
        leaky: false,
    })
}

/// Updates the header's description of its base, whose content was found to match. It is written
/// with the next change of the header, since nothing depends on it.
fn renew_backing<F: Storage>(
    path: &Path,
    header: &mut Header,
    nearest: Option<&Lower<F>>,
) -> Result<(), ImageError> {
    let (Header::Native(native), Some(nearest)) = (header, nearest) else { return Ok(()) };
    let Some(backing) = native.backing() else { return Ok(()) };
    let new = renewed(backing.identity(), &nearest.opened, nearest.header.as_ref())?;
    if let Some(new) = new {
        let backing = backing.with_identity(new).map_err(ImageError::header(path))?;
        native.set_backing(Some(backing));
    }
    Ok(())
}

/// If the path in the header does not lead to the given base, it is replaced, as UML does.
fn adopt_base<E: Env>(
    env: &E,
    top: &Opened<E::File>,
    header: &mut Header,
    base: &Path,
    found: &Opened<E::File>,
) -> Result<(), ImageError> {
    let Some(reference) = reference(header) else { return Ok(()) };
    let stored = resolve(env, &top.path, &reference.stored)?;
    if env.id(&stored).is_ok_and(|id| id == found.stat.id) {
        return Ok(());
    }
    let path = path_to_store(env, &top.path, base, CowFormat::of(header))?;
    set_backing_path(&top.file, header, path.as_os_str().as_bytes(), found.stat.mtime)
        .map_err(|err| err.at(&top.path))
}
