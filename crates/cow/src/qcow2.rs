//! qcow2 images, through imago: read with their backing chains and with compressed clusters (zlib), and written. What
//! imago does not read (zstd, extended L2 entries) qemu-img does.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use block_io::file::File;
use block_io::ops::walk::{Image, Piece, Reader, Source};
use block_io::ops::{OpError, Output, Progress, copy};
use block_io::storage::FileId;
use block_io::{Disk, DiskOptions, Host};
use cow_format::{ByteOffset, LayerIndex, SectorRange};
use imago::format::builder::{FormatCreateBuilder, FormatDriverBuilder};
use imago::{
    DenyImplicitOpenGate, FormatAccess, Mapping, PermissiveImplicitOpenGate, StorageOpenOptions,
};

use crate::error::CowError;
use crate::ui::Ui;

type Storage = imago::file::File;
type Format = imago::qcow2::Qcow2<Storage>;

/// An open qcow2 image.
pub struct Qcow2 {
    path: PathBuf,
    image: FormatAccess<Storage>,
}

impl Qcow2 {
    /// Opens the image at `path` and its backing chain for reading.
    pub fn open(path: &Path) -> io::Result<Self> {
        let image = Format::builder_path(path).open(PermissiveImplicitOpenGate::default())?;
        Ok(Qcow2 { path: path.to_owned(), image: FormatAccess::new(image) })
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

/// Writes the content of `image` to a qcow2 image that gets the name `out` when it is complete and durable.
pub fn convert_to_qcow2(
    image: &impl Image,
    inputs: &[&Path],
    out: &Path,
    replace: bool,
    progress: Progress<'_>,
) -> Result<(), CowError> {
    let output = Output::create(&Host, out, replace, inputs)?;
    let new = create(output.file(), image.size()).map_err(OpError::io(out, "create"))?;
    let write = |at: u64, bytes: &[u8]| new.write(bytes, at).map_err(OpError::write(out, at));
    // One thread: clusters are allocated in the order in which they are written.
    copy(image, &write, &|_| Ok(0), std::num::NonZeroUsize::MIN, progress)?;
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

/// Lets qemu-img make a raw image of a qcow2 image that imago refused, and opens that. It has no name any more.
pub fn open_with_qemu_img(path: &Path, refused: &io::Error, ui: Ui) -> Result<Disk, CowError> {
    ui.note(format_args!("{}: {refused}; asking qemu-img", path.display()));
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
    // Open or not, it is nobody else's.
    _ = fs::remove_file(&raw);
    disk
}
