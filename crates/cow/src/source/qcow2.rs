//! qcow2 images, through imago: read with their backing chains and with compressed clusters (zlib),
//! and written. qemu-img reads what imago cannot (zstd, extended L2 entries).

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use block_io::ops::walk::{Image, Piece, Reader, Source};
use block_io::ops::{Copying, OpError, Output, copy};
use block_io::storage::file::File;
use block_io::storage::{FileId, Storage as _};
use block_io::{Disk, DiskOptions, Host, ImageError, Layer, Shown};
use cow_format::{ByteOffset, LayerIndex, SectorRange};
use imago::format::builder::{FormatCreateBuilder, FormatDriverBuilder};
use imago::format::gate::ImplicitOpenGate;
use imago::{DenyImplicitOpenGate, FormatAccess, Mapping, StorageOpenOptions};

use crate::error::CowError;
use crate::ui::Ui;

type Storage = imago::file::File;
type Format = imago::qcow2::Qcow2<Storage>;

/// Where the header says how an image is encrypted; 0: it is not (docs/interop/qcow2.txt of QEMU).
const CRYPT_METHOD_AT: u64 = 32;

/// An open qcow2 image.
pub struct Qcow2 {
    path: PathBuf,
    image: FormatAccess<Storage>,
    locked: Locked,
}

impl Qcow2 {
    /// Opens the image at `path` and its backing chain for reading.
    pub fn open(path: &Path) -> Result<Self, Refused> {
        let mut locked = Locked::default();
        locked.lock(path).map_err(Refused::InUse)?;
        if locked.is_last_encrypted() {
            return Err(Refused::Encrypted(path.to_owned()));
        }
        match Format::builder_path(path).open(&mut locked) {
            Ok(image) => {
                Ok(Qcow2 { path: path.to_owned(), image: FormatAccess::new(image), locked })
            }
            Err(err) => Err(locked.refused.take().unwrap_or(Refused::ByImago(err))),
        }
    }

    /// The files that it is made of.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.locked.files.iter().flat_map(Disk::layers).map(|layer| layer.path())
    }
}

/// Why a qcow2 image was not opened.
pub enum Refused {
    /// A file of it cannot be opened, or is in use.
    InUse(ImageError),
    /// It is encrypted, and the library would return the ciphertext.
    Encrypted(PathBuf),
    /// The library does not support a feature of the image.
    ByImago(io::Error),
}

/// Opens the files that an image refers to, and locks them against writers.
#[derive(Default)]
struct Locked {
    files: Vec<Disk>,
    refused: Option<Refused>,
}

impl Locked {
    fn lock(&mut self, path: &Path) -> Result<(), ImageError> {
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        self.files.push(Disk::open_raw(path, &options)?);
        Ok(())
    }

    /// The file that was opened last.
    fn last(&self) -> Option<&Layer<File>> {
        self.files.last()?.layers().first()
    }

    /// Whether that, a qcow2 image, is encrypted.
    fn is_last_encrypted(&self) -> bool {
        let mut method = [0; 4];
        let at = ByteOffset::new(CRYPT_METHOD_AT);
        let read = self.last().map(|last| last.file().read_exact_at(&mut method, at));
        matches!(read, Some(Ok(()))) && method != [0; 4]
    }

    fn refuse(&mut self, refused: Refused) -> io::Error {
        // The caller replaces this error by `refused`.
        self.refused = Some(refused);
        io::Error::other("refused")
    }
}

impl ImplicitOpenGate<Storage> for &mut Locked {
    fn open_format<F: FormatDriverBuilder<Storage>>(
        &mut self,
        builder: F,
    ) -> io::Result<FormatAccess<Storage>> {
        // Its file has just been opened.
        if F::FORMAT == imago::format::Format::Qcow2 && self.is_last_encrypted() {
            let path = self.last().map(|last| last.path().to_owned()).unwrap_or_default();
            return Err(self.refuse(Refused::Encrypted(path)));
        }
        Ok(FormatAccess::new(builder.open(&mut **self)?))
    }

    fn open_storage(&mut self, builder: StorageOpenOptions) -> io::Result<Storage> {
        if let Some(path) = builder.get_filename()
            && let Err(err) = self.lock(path.as_ref())
        {
            return Err(self.refuse(Refused::InUse(err)));
        }
        <Storage as imago::Storage>::open(builder)
    }
}

impl Image for Qcow2 {
    type Reader<'a> = &'a Qcow2;

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn reader(&self) -> &Qcow2 {
        self
    }
}

impl Reader for &Qcow2 {
    fn pieces(&mut self, range: SectorRange) -> Result<Vec<Piece>, OpError> {
        let mut pieces = Vec::new();
        let (mut at, end) =
            (range.start_bytes().get(), range.start_bytes().get() + range.len_bytes());
        while at < end {
            let left = end - at;
            let mapped = self.image.get_mapping(at, left).map_err(OpError::read(&self.path, at))?;
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
        self.image.read(buf, at.get()).map_err(OpError::read(&self.path, at.get()))
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

/// Lets qemu-img make a raw image of a qcow2 image that imago refused, and opens that. It has no
/// name any more.
pub fn open_with_qemu_img(path: &Path, refused: &io::Error, ui: Ui) -> Result<Disk, CowError> {
    ui.note(format_args!("{}: {refused}; asking qemu-img", path.shown()));
    let dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let raw = dir.join(format!(".cow-{}.raw", std::process::id()));
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .args([path, &raw])
        .stdin(Stdio::null())
        .output();
    let disk = match converted {
        Err(err) => Err(CowError::Qcow2 {
            path: path.to_owned(),
            imago: refused.to_string(),
            qemu_img: format!("cannot be run: {err}"),
        }),
        Ok(output) if !output.status.success() => Err(CowError::Qcow2 {
            path: path.to_owned(),
            imago: refused.to_string(),
            qemu_img: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }),
        Ok(_) => {
            let options = DiskOptions { read_only: true, ..DiskOptions::default() };
            Disk::open_raw(&raw, &options).map_err(CowError::from)
        }
    };
    // Whether it was opened or not, its name is no longer needed.
    _ = fs::remove_file(&raw);
    disk
}
