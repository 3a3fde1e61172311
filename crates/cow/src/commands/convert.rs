//! `cow convert`: the same disk in another format.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::image::{BaseOptions, CreateOptions};
use block_io::ops;
use block_io::ops::walk::Image;
use block_io::{CowFormat, Disk, DiskOptions, Host, Shown};
use cow_format::header::BackingFormat;

use crate::base::BaseArgs;
use crate::copying::CopyArgs;
use crate::error::CowError;
use crate::size::{Human, MaxSize};
use crate::source::format::FileFormat;
use crate::source::qcow2::convert_to_qcow2;
use crate::source::{AnyImage, Opening, open};
use crate::ui::Ui;

/// Write a disk to a new file in another format
///
/// Zeros become holes. OUT appears under its name only when it is complete and safely on the disk.
/// With -b, OUT is a COW file over BASE that holds only the differences; without, it has no base.
///
/// qcow2 images may be compressed. Features that the library does not support (zstd, extended L2
/// entries) are left to qemu-img, which must then be installed. What an image names, its backing
/// file or data file, is opened only in a directory that --backing-dir allows. An image that QEMU
/// has open for writing is refused.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Examples:
  cow convert -f qcow2 -O raw cloud.qcow2 debian.img         a base image of a cloud image
  cow convert -O qcow2 vm1.cow vm1.qcow2                     a disk for others
  cow convert -f raw -b debian.img vm1.img vm1.cow           only what differs from debian.img")]
pub struct Args {
    /// The format of FILE; optional for a COW file
    #[arg(short = 'f', long, value_name = "FORMAT", value_enum)]
    format: Option<FileFormat>,

    /// The format of OUT
    #[arg(short = 'O', long, value_name = "FORMAT", value_enum, default_value = "native")]
    output_format: FileFormat,

    #[command(flatten)]
    base: BaseArgs,

    #[command(flatten)]
    copy: CopyArgs,

    #[command(flatten)]
    max_size: MaxSize,

    /// Replace OUT if it exists
    #[arg(long)]
    force: bool,

    /// The disk
    file: PathBuf,

    /// The new file
    out: PathBuf,
}

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let opening = Opening { max_size: self.max_size, scratch: &self.out, ui };
        let image = open(&self.file, self.format, opening)?;
        match self.output_format {
            FileFormat::Native => self.cow(&image, CowFormat::Native, ui)?,
            FileFormat::Uml if self.base.base.is_none() => {
                return Err(CowError::Usage("--base: a UML COW file needs one".into()));
            }
            FileFormat::Uml => self.cow(&image, CowFormat::Uml, ui)?,
            FileFormat::Raw | FileFormat::Qcow2 if self.base.base.is_some() => {
                return Err(CowError::Usage(
                    "--base: only a COW file (native, uml) can have one".into(),
                ));
            }
            FileFormat::Raw => {
                let progress = ui.progress("convert", image.size());
                let add = |n| progress.add(n);
                let (out, force, copying) = (&self.out, self.force, self.copy.copying(&add));
                match &image {
                    AnyImage::Disk(disk) => ops::merge_to(&Host, disk, out, force, copying)?,
                    AnyImage::Qcow2(_) => {
                        ops::convert_to_raw(
                            &Host,
                            &image,
                            &self.inputs(&image),
                            out,
                            force,
                            copying,
                        )?;
                    }
                }
            }
            FileFormat::Qcow2 => {
                let progress = ui.progress("convert", image.size());
                let (inputs, add) = (self.inputs(&image), |n| progress.add(n));
                let copying = self.copy.copying(&add);
                convert_to_qcow2(&image, &inputs, &self.out, self.force, copying)?;
            }
        }
        ui.note(format_args!("{}: {}", self.out.shown(), Human(image.size())));
        Ok(ExitCode::SUCCESS)
    }

    /// The files that are read.
    fn inputs<'a>(&'a self, image: &'a AnyImage) -> Vec<&'a Path> {
        let files: Vec<&Path> = match image {
            AnyImage::Disk(disk) => disk.layers().iter().map(|layer| layer.path()).collect(),
            AnyImage::Qcow2(qcow2) => qcow2.files().collect(),
        };
        files.into_iter().chain([&*self.file]).collect()
    }

    fn cow(&self, image: &AnyImage, format: CowFormat, ui: Ui) -> Result<(), CowError> {
        let base = self.base.options()?;
        let below = base.as_ref().map(open_base).transpose()?;
        let size = Some(image.size());
        let options = CreateOptions {
            format,
            base,
            size,
            replace: self.force,
            journal_len: None,
            mode: None,
        };
        let progress = ui.progress("convert", image.size());
        let add = |bytes| progress.add(bytes);
        ops::convert_to_cow(
            &Host,
            image,
            &self.inputs(image),
            (&self.out, &options),
            below.as_ref(),
            self.copy.copying(&add),
        )?;
        Ok(())
    }
}

/// The disk in a base.
fn open_base(base: &BaseOptions) -> Result<Disk, CowError> {
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    Ok(match base.format {
        BackingFormat::Raw => Disk::open_raw(&base.path, &options)?,
        _ => Disk::open_cow(&base.path, None, &options)?,
    })
}
