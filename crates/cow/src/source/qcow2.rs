//! qcow2 images, through imago: read with compressed clusters (zlib), and written. qemu-img reads
//! what imago cannot (zstd, extended L2 entries).
//!
//! The author of an image can write any name into its header. So this module opens what an image
//! names, and only in the directories that the user allows; imago and qemu-img get descriptors and
//! open nothing by themselves.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use block_io::image::{CHAIN_DEPTH_MAX, Outside, open_within};
use block_io::ops::walk::{Image, Piece, Reader, Source};
use block_io::ops::{Copying, OpError, Output, copy};
use block_io::shown::argument;
use block_io::storage::file::File;
use block_io::storage::{Access, Env, FileId, FileKind, FileStat, Storage as _};
use block_io::{Disk, DiskOptions, GivenFiles, Host, ImageError, Shown};
use cow_format::{ByteOffset, LayerIndex, SECTOR_SIZE, SectorRange};
use imago::format::builder::{FormatCreateBuilder, FormatDriverBuilder};
use imago::{DenyImplicitOpenGate, FormatAccess, Mapping, StorageOpenOptions};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};

use crate::error::CowError;
use crate::source::qcow2_header::{Backing, DataFile, Qcow2Header};
use crate::source::{AnyReader, Opening};

type Storage = imago::file::File;
type Format = imago::qcow2::Qcow2<Storage>;
type Raw = imago::raw::Raw<Storage>;

/// An open qcow2 image.
pub struct Qcow2 {
    path: PathBuf,
    content: Content,
    chain: Chain,
}

/// What reads the image.
enum Content {
    /// The library.
    Imago(FormatAccess<Storage>),
    /// qemu-img has made a raw image of it.
    Raw(Box<Disk>),
}

impl Qcow2 {
    /// Opens the image at `path` for reading, and what it names as far as the user allows that.
    pub fn open(path: &Path, opening: Opening<'_>) -> Result<Self, CowError> {
        let chain = Chain::open(path, opening)?;
        let content = match chain.imago() {
            Ok(image) => Content::Imago(image),
            Err(refused) => Content::Raw(chain.convert(path, &refused, opening)?.into()),
        };
        Ok(Qcow2 { path: path.to_owned(), content, chain })
    }

    /// The files that it is made of.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let layers = self.chain.layers.iter();
        layers
            .flat_map(|layer| [Some(&layer.file), layer.data.as_ref()])
            .flatten()
            .map(Opened::path)
    }
}

/// The header of the file at `path`, if it begins like a qcow2 image. No other file is opened.
pub fn header_of(path: &Path) -> Result<Qcow2Header, CowError> {
    let file = Host.open(path, Access::Read).map_err(OpError::io(path, "open"))?;
    header(&file, path)
}

fn header(file: &File, path: &Path) -> Result<Qcow2Header, CowError> {
    Qcow2Header::read(file)
        .map_err(|source| CowError::Qcow2Header { path: path.to_owned(), source })
}

/// The files of an image, open and locked against writers, the image itself first.
struct Chain {
    size: u64,
    layers: Vec<Layer>,
}

/// An image and its data file.
struct Layer {
    file: Opened,
    /// Otherwise it is raw.
    is_qcow2: bool,
    data: Option<Opened>,
}

/// An open file.
struct Opened(Disk);

impl Opened {
    fn path(&self) -> &Path {
        self.0.layers()[0].path()
    }

    fn file(&self) -> &File {
        self.0.layers()[0].file()
    }

    fn stat(&self) -> Result<FileStat, CowError> {
        Ok(self.file().stat().map_err(OpError::io(self.path(), "stat"))?)
    }

    /// The same description for the library.
    fn storage(&self) -> io::Result<Storage> {
        fs::File::from(self.file().as_fd().try_clone_to_owned()?).try_into()
    }
}

fn read_only() -> DiskOptions {
    DiskOptions { read_only: true, ..DiskOptions::default() }
}

impl Chain {
    fn open(path: &Path, opening: Opening<'_>) -> Result<Self, CowError> {
        let mut file = Opened(Disk::open_raw(path, &read_only())?);
        let mut header = header(file.file(), path)?;
        let size = header.virtual_size;
        opening.max_size.check(path, size)?;
        let mut chain = Chain { size, layers: Vec::new() };
        let mut seen = HashSet::new();
        loop {
            chain.admit(&file, &mut seen)?;
            if header.encrypted {
                return Err(CowError::Encrypted(file.path().to_owned()));
            }
            let data = match &header.data_file {
                None => None,
                Some(DataFile(name)) => Some(open_data_file(&file, name.as_deref())?),
            };
            let below = header.backing.as_ref().map(|backing| open_backing(&file, backing));
            chain.layers.push(Layer { file, is_qcow2: true, data });
            match below.transpose()? {
                None => return Ok(chain),
                Some((base, false)) => {
                    chain.admit(&base, &mut seen)?;
                    chain.layers.push(Layer { file: base, is_qcow2: false, data: None });
                    return Ok(chain);
                }
                Some((next, true)) => {
                    header = self::header(next.file(), next.path())?;
                    file = next;
                }
            }
        }
    }

    /// Refuses a file that is in the chain already, and a chain that is too long.
    fn admit(&self, file: &Opened, seen: &mut HashSet<FileId>) -> Result<(), CowError> {
        let top = || self.layers.first().map(|top| top.file.path().to_owned()).unwrap_or_default();
        if self.layers.len() == CHAIN_DEPTH_MAX {
            return Err(ImageError::TooDeep { top: top() }.into());
        }
        if seen.insert(file.stat()?.id) {
            return Ok(());
        }
        let path = file.path().to_owned();
        Err(ImageError::Repeated { top: top(), again: path.clone(), path }.into())
    }

    /// The image, read by the library.
    fn imago(&self) -> io::Result<FormatAccess<Storage>> {
        let mut image: Option<FormatAccess<Storage>> = None;
        for layer in self.layers.iter().rev() {
            let (file, gate) = (layer.file.storage()?, DenyImplicitOpenGate::default());
            image = Some(match layer.is_qcow2 {
                false => FormatAccess::new(Raw::builder(file).open(gate)?),
                true => {
                    let data = layer.data.as_ref().map(Opened::storage).transpose()?;
                    let builder = Format::builder(file).backing(image).data_file(data);
                    FormatAccess::new(builder.open(gate)?)
                }
            });
        }
        image.ok_or_else(|| io::Error::other("no file"))
    }

    /// Lets qemu-img make a raw image, which has no name, of an image that the library refused.
    fn convert(
        &self,
        path: &Path,
        refused: &io::Error,
        opening: Opening<'_>,
    ) -> Result<Disk, CowError> {
        let refused = Path::new(&refused.to_string()).shown().to_string();
        opening.ui.note(format_args!("{}: {refused}; asking qemu-img", path.shown()));
        let failed = || OpError::io(opening.scratch, "make a temporary file beside");
        let (raw, name) = Host.create_unpublished(opening.scratch).map_err(failed())?;
        // Without a name nobody else can reach it, and it is gone when this process is.
        name.map_or(Ok(()), |name| Host.remove(&name)).map_err(failed())?;
        raw.set_len(self.size).map_err(failed())?;
        if let Err(qemu_img) = self.run_qemu_img(&raw) {
            // Its messages repeat names from the image.
            let qemu_img = Path::new(qemu_img.trim()).shown().to_string();
            return Err(CowError::Qcow2 { path: path.to_owned(), imago: refused, qemu_img });
        }
        let files = GivenFiles { top: raw, name: path.to_owned(), below: Vec::new() };
        Ok(Disk::open_raw_files(files, false, &read_only())?)
    }

    /// Has qemu-img write the disk into `raw`, or returns its message.
    fn run_qemu_img(&self, raw: &File) -> Result<(), String> {
        if !self.size.is_multiple_of(SECTOR_SIZE) {
            return Err(format!("not asked, it would cut off a partial sector of {}", self.size));
        }
        let mut passed = Passed::default();
        let node = self.node(&mut passed).and_then(|node| Ok((node, passed.add(raw)?)));
        let (node, target) = node.map_err(|err| err.to_string())?;
        let output = Command::new("qemu-img")
            .args(["convert", "-O", "raw", "-n", "--target-is-zero"])
            .args([format!("json:{node}"), target])
            .stdin(Stdio::null())
            .output()
            .map_err(|err| format!("cannot be run: {err}"))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// The whole chain as a node of QEMU's block layer, which then follows no name of a header.
    fn node(&self, passed: &mut Passed) -> io::Result<Value> {
        let mut node = Value::Null;
        for layer in self.layers.iter().rev() {
            let file = passed.node(&layer.file)?;
            node = match (layer.is_qcow2, &layer.data) {
                (false, _) => json!({"driver": "raw", "file": file}),
                (true, None) => json!({"driver": "qcow2", "file": file, "backing": node}),
                (true, Some(data)) => json!({
                    "driver": "qcow2", "file": file, "backing": node, "data-file": passed.node(data)?,
                }),
            };
        }
        Ok(node)
    }
}

/// Descriptors that a program inherits.
#[derive(Default)]
struct Passed(Vec<OwnedFd>);

impl Passed {
    /// Passes `file` on; returns its path there.
    fn add(&mut self, file: &impl AsFd) -> io::Result<String> {
        let fd = file.as_fd().try_clone_to_owned()?;
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        self.0.push(fd);
        Ok(path)
    }

    /// Passes `file` on as a node of QEMU's block layer. It is locked already.
    fn node(&mut self, file: &Opened) -> io::Result<Value> {
        let driver = match file.file().stat()?.kind {
            FileKind::BlockDevice => "host_device",
            _ => "file",
        };
        let path = self.add(file.file())?;
        Ok(json!({"driver": driver, "filename": path, "locking": "off", "read-only": true}))
    }
}

/// Opens the image that `image` is based on; true: it is qcow2 too.
fn open_backing(image: &Opened, backing: &Backing) -> Result<(Opened, bool), CowError> {
    const WHAT: &str = "backing file";
    let is_qcow2 = match backing.format.as_deref() {
        Some("qcow2") => true,
        // "file" is an old name of "raw".
        Some("raw" | "file") => false,
        other => {
            let why = match other {
                Some(format) => format!(
                    "in the format {}, expected raw or qcow2",
                    Path::new(format).shown()
                ),
                None => "without its format, which is never guessed; to set it: qemu-img rebase -u -F FORMAT"
                    .to_owned(),
            };
            return Err(not_allowed(image, WHAT, &backing.name, why));
        }
    };
    Ok((open_named(image, WHAT, &backing.name)?, is_qcow2))
}

fn open_data_file(image: &Opened, name: Option<&Path>) -> Result<Opened, CowError> {
    match name {
        Some(name) => open_named(image, "data file", name),
        None => Err(CowError::NoDataFile(image.path().to_owned())),
    }
}

/// Opens a file that the header of `image` names, if it is in a directory that the user allows.
fn open_named(image: &Opened, what: &'static str, name: &Path) -> Result<Opened, CowError> {
    let refused = |why| Err(not_allowed(image, what, name, why));
    if has_protocol(name.as_os_str()) {
        return refused(
            "which is not a path; only files are opened, and nothing on a network (if it means a file: \
             qemu-img rebase -u -F FORMAT -b PATH)"
                .to_owned(),
        );
    }
    let real = Host.canonical(image.path()).map_err(OpError::io(image.path(), "resolve"))?;
    let path = real.parent().unwrap_or(Path::new("/")).join(name);
    match open_within(&Host, &Host.backing_dirs(), &path, Access::Read) {
        Ok(opened) => {
            let top = opened.map_err(OpError::io(&path, "open"))?;
            let files = GivenFiles { top, name: path, below: Vec::new() };
            Ok(Opened(Disk::open_raw_files(files, false, &read_only())?))
        }
        Err(Outside::LeadsOut) => refused(
            "which leads out of the directories of --backing-dir through a symbolic link"
                .to_owned(),
        ),
        Err(_) => refused(format!(
            "which is not opened, because any file can be named there; if it is right, pass --backing-dir={}",
            argument(path.parent().unwrap_or(&path))
        )),
    }
}

fn not_allowed(image: &Opened, what: &'static str, name: &Path, why: String) -> CowError {
    CowError::NotAllowed { image: image.path().to_owned(), what, name: name.to_owned(), why }
}

/// Whether QEMU takes the name for something else than a path: `nbd://...`, `json:...`.
fn has_protocol(name: &OsStr) -> bool {
    let end = name.as_bytes().iter().position(|byte| matches!(byte, b':' | b'/'));
    end.is_some_and(|end| name.as_bytes()[end] == b':')
}

/// The reader of an image that the library reads.
pub struct ImagoReader<'a> {
    path: &'a Path,
    image: &'a FormatAccess<Storage>,
}

impl Qcow2 {
    /// The size of the disk in bytes.
    pub fn size(&self) -> u64 {
        match &self.content {
            Content::Imago(image) => image.size(),
            Content::Raw(disk) => disk.size(),
        }
    }

    /// The reader for one thread.
    pub fn reader(&self) -> AnyReader<'_> {
        match &self.content {
            Content::Imago(image) => AnyReader::Imago(ImagoReader { path: &self.path, image }),
            Content::Raw(disk) => AnyReader::Disk(disk.reader()),
        }
    }
}

impl Reader for ImagoReader<'_> {
    fn pieces(&mut self, range: SectorRange) -> Result<Vec<Piece>, OpError> {
        let mut pieces = Vec::new();
        let (mut at, end) =
            (range.start_bytes().get(), range.start_bytes().get() + range.len_bytes());
        while at < end {
            let left = end - at;
            let mapped = self.image.get_mapping(at, left).map_err(OpError::read(self.path, at))?;
            let (mapping, len) = mapped;
            let data = matches!(mapping, Mapping::Raw { .. } | Mapping::Special { .. });
            // Past the end there are zeros.
            let len = if matches!(mapping, Mapping::Eof { .. }) { left } else { len.min(left) };
            let place = ByteOffset::new(at);
            let source = match data {
                true => Source::Data { layer: LayerIndex::TOP, at: place },
                false => Source::Zero,
            };
            pieces.push(Piece { at: place, len, source });
            at += len;
        }
        Ok(pieces)
    }

    fn read(&self, _layer: LayerIndex, at: ByteOffset, buf: &mut [u8]) -> Result<(), OpError> {
        self.image.read(buf, at.get()).map_err(OpError::read(self.path, at.get()))
    }

    fn file(&self, _layer: LayerIndex) -> Option<FileId> {
        None
    }
}

/// Writes the content of `image` to a qcow2 image that gets the name `out` when it is complete and
/// durable.
pub fn convert_to_qcow2(
    image: &impl Image,
    inputs: &[&Path],
    out: &Path,
    replace: bool,
    copying: Copying<'_>,
) -> Result<(), CowError> {
    let output = Output::create(&Host, out, replace, inputs)?;
    let new = create(output.file(), image.size()).map_err(OpError::io(out, "create"))?;
    let write = |at: u64, bytes: &[u8]| new.write(bytes, at).map_err(OpError::write(out, at));
    // One thread: clusters are allocated in the order in which they are written.
    copy(image, &write, &|_| Ok(0), std::num::NonZeroUsize::MIN, copying)?;
    new.flush().map_err(OpError::io(out, "write"))?;
    drop(new);
    Ok(output.place()?)
}

fn create(file: &File, size: u64) -> io::Result<FormatAccess<Storage>> {
    let file = fs::File::from(file.as_fd().try_clone_to_owned()?);
    let storage = Storage::from_open_file(file, StorageOpenOptions::new().write(true))?;
    let image = Format::create_builder(storage)
        .size(size)
        .create_open(DenyImplicitOpenGate::default(), |storage| {
            Ok(Format::builder(storage).backing(None).write(true))
        })?;
    Ok(FormatAccess::new(image))
}
