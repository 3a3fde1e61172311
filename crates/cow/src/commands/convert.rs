//! `cow convert`: the same disk in another format.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use block_io::image::{BaseOptions, CreateOptions};
use block_io::ops::walk::Image;
use block_io::{CowFormat, Disk, DiskOptions, Host, ops};
use cow_format::header::BackingFormat;

use super::create::base_format;
use crate::error::CowError;
use crate::qcow2::convert_to_qcow2;
use crate::size::Human;
use crate::source::{AnyImage, BaseFormat, FileFormat, open};
use crate::ui::Ui;

/// Write a disk to a new file in another format
///
/// Zeros become holes. OUT appears under its name only when it is complete and safely on the disk. With -b, OUT is a COW
/// file over BASE that holds only what is different there; without, it stands alone.
///
/// qcow2 images may be compressed and have backing files. What the library for them does not know (zstd, extended L2
/// entries) is left to qemu-img, which must then be installed.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What FILE is; need not be said for a COW file
    #[arg(short = 'f', long, value_name = "FORMAT", value_enum)]
    format: Option<FileFormat>,

    /// What OUT becomes
    #[arg(short = 'O', long, value_name = "FORMAT", value_enum, default_value = "native")]
    output_format: FileFormat,

    /// A base for OUT
    #[arg(short, long, value_name = "BASE", required_if_eq("output_format", "uml"))]
    base: Option<PathBuf>,

    /// What BASE is; need not be said for a raw image that does not begin like a COW file
    #[arg(short = 'F', long, value_name = "FORMAT", value_enum, requires = "base")]
    base_format: Option<BaseFormat>,

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
        let image = open(&self.file, self.format, ui)?;
        match self.output_format {
            FileFormat::Native => self.cow(&image, CowFormat::Native, ui)?,
            FileFormat::Uml => self.cow(&image, CowFormat::Uml, ui)?,
            FileFormat::Raw | FileFormat::Qcow2 if self.base.is_some() => {
                return Err(CowError::Usage(
                    "--base: only a COW file (native, uml) can be over a base".into(),
                ));
            }
            FileFormat::Raw => {
                let progress = ui.progress("convert", image.size());
                let (out, force, add) = (&self.out, self.force, |n| progress.add(n));
                match &image {
                    AnyImage::Disk(disk) => ops::merge_to(&Host, disk, out, force, &add)?,
                    AnyImage::Qcow2(_) => {
                        ops::convert_to_raw(&Host, &image, &self.inputs(&image), out, force, &add)?;
                    }
                }
            }
            FileFormat::Qcow2 => {
                let progress = ui.progress("convert", image.size());
                let inputs = self.inputs(&image);
                convert_to_qcow2(&image, &inputs, &self.out, self.force, &|n| progress.add(n))?;
            }
        }
        ui.note(format_args!("{}: {}", self.out.display(), Human(image.size())));
        Ok(ExitCode::SUCCESS)
    }

    /// The files that are read.
    fn inputs<'a>(&'a self, image: &'a AnyImage) -> Vec<&'a Path> {
        let layers = match image {
            AnyImage::Disk(disk) => disk.layers(),
            AnyImage::Qcow2(_) => &[],
        };
        layers.iter().map(|layer| layer.path()).chain([&*self.file]).collect()
    }

    fn cow(&self, image: &AnyImage, format: CowFormat, ui: Ui) -> Result<(), CowError> {
        let base = match &self.base {
            Some(path) => Some(BaseOptions {
                path: path.clone(),
                format: base_format(path, self.base_format)?,
                digest: None,
            }),
            None => None,
        };
        let below = base.as_ref().map(open_base).transpose()?;
        let size = Some(image.size());
        let options = CreateOptions { format, base, size, replace: self.force };
        let progress = ui.progress("convert", image.size());
        ops::convert_to_cow(
            &Host,
            image,
            &self.inputs(image),
            (&self.out, &options),
            below.as_ref(),
            &|bytes| progress.add(bytes),
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
