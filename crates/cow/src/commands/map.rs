//! `cow map`: which file each part of a disk is read from.

use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use block_io::ops::walk::{Reader, Source, Walker};
use block_io::{Disk, DiskOptions, Shown};
use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};

use crate::error::CowError;
use crate::output::{OutputArgs, OutputFormat};
use crate::steps::steps;
use crate::ui::Ui;

/// Print which file each part of a disk is read from
///
/// One line for each part: where it starts and how long it is, in bytes of the disk; the depth of
/// the file in the chain (0 is the top); the offset in that file. Zeros that are in no file are
/// left out, except with --output=json. The keys are those of qemu-img map.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The base image, instead of the path that FILE names
    #[arg(short, long, value_name = "BASE")]
    base: Option<PathBuf>,

    #[command(flatten)]
    output: OutputArgs,

    /// The COW file
    file: PathBuf,
}

/// A part of the disk.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
struct Part {
    start: u64,
    length: u64,
    /// The file that it is read from; the top for zeros that are in no file.
    depth: usize,
    /// It reads as zeros, and takes no space.
    zero: bool,
    /// It is read from a file.
    data: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

impl Args {
    pub fn run(self, _ui: Ui) -> Result<ExitCode, CowError> {
        let options = DiskOptions { read_only: true, ..DiskOptions::default() };
        let disk = Disk::open_cow(&self.file, self.base.as_deref(), &options)?;
        let mut out = BufWriter::new(io::stdout().lock());
        match self.output.format {
            OutputFormat::Json => json(&disk, &mut out)?,
            OutputFormat::Human => human(&disk, &mut out)?,
        }
        out.flush().map_err(CowError::Output)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Passes the parts of the disk to `found`, each as long as it can be. They are printed as they are
/// found: there can be more than fit into memory.
fn for_each_part(
    disk: &Disk,
    mut found: impl FnMut(&Part) -> io::Result<()>,
) -> Result<(), CowError> {
    let mut walker = Walker::new(disk);
    let mut last: Option<Part> = None;
    for range in steps(disk.capacity()) {
        for piece in walker.pieces(range)? {
            let (start, length) = (piece.at.get(), piece.len.min(disk.size() - piece.at.get()));
            let part = match piece.source {
                Source::Zero => {
                    Part { start, length, depth: 0, zero: true, data: false, offset: None }
                }
                Source::Data { layer, at } => Part {
                    start,
                    length,
                    depth: layer.get(),
                    zero: false,
                    data: true,
                    offset: Some(at.get()),
                },
            };
            match last.as_mut().filter(|last| last.continues(&part)) {
                Some(last) => last.length += length,
                None => {
                    let complete = last.replace(part);
                    complete.map_or(Ok(()), |part| found(&part)).map_err(CowError::Output)?;
                }
            }
        }
    }
    last.map_or(Ok(()), |part| found(&part)).map_err(CowError::Output)
}

impl Part {
    /// Whether `next` is more of the same.
    fn continues(&self, next: &Part) -> bool {
        let offset = self.offset.map(|offset| offset + self.length);
        (self.depth, self.data, offset) == (next.depth, next.data, next.offset)
    }
}

fn json(disk: &Disk, out: &mut impl Write) -> Result<(), CowError> {
    let failed = |err: serde_json::Error| CowError::Output(err.into());
    let mut json = serde_json::Serializer::pretty(&mut *out);
    let mut array = json.serialize_seq(None).map_err(failed)?;
    for_each_part(disk, |part| array.serialize_element(part).map_err(io::Error::from))?;
    array.end().map_err(failed)?;
    writeln!(out).map_err(CowError::Output)
}

fn human(disk: &Disk, out: &mut impl Write) -> Result<(), CowError> {
    writeln!(out, "{:<16} {:<16} {:<6} {:<16} File", "Offset", "Length", "Depth", "In file at")
        .map_err(CowError::Output)?;
    for_each_part(disk, |part| {
        let Part { start, length, depth, offset: Some(offset), .. } = *part else { return Ok(()) };
        let file = disk.layers()[depth].path().shown();
        writeln!(out, "{start:<#16x} {length:<#16x} {depth:<6} {offset:<#16x} {file}")
    })
}
