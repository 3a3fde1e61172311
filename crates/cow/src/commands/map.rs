//! `cow map`: which file each part of a disk is read from.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use block_io::ops::walk::{Reader, Source, Walker};
use block_io::{Disk, DiskOptions, Shown};
use serde::Serialize;

use crate::error::CowError;
use crate::output::{OutputArgs, OutputFormat, print};
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
        let parts = parts(&disk)?;
        match self.output.format {
            OutputFormat::Json => self.output.print(&parts, |_| String::new())?,
            OutputFormat::Human => print(&human(&disk, &parts))?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The parts of the disk, each as long as it can be.
fn parts(disk: &Disk) -> Result<Vec<Part>, CowError> {
    let mut walker = Walker::new(disk);
    let mut parts: Vec<Part> = Vec::new();
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
            match parts.last_mut() {
                Some(last) if last.continues(&part) => last.length += length,
                _ => parts.push(part),
            }
        }
    }
    Ok(parts)
}

impl Part {
    /// Whether `next` is more of the same.
    fn continues(&self, next: &Part) -> bool {
        let offset = self.offset.map(|offset| offset + self.length);
        (self.depth, self.data, offset) == (next.depth, next.data, next.offset)
    }
}

fn human(disk: &Disk, parts: &[Part]) -> String {
    let mut text =
        format!("{:<16} {:<16} {:<6} {:<16} File\n", "Offset", "Length", "Depth", "In file at");
    for part in parts.iter().filter(|part| part.data) {
        let file = disk.layers()[part.depth].path().shown();
        let (start, length, depth, offset) =
            (part.start, part.length, part.depth, part.offset.unwrap_or(0));
        // Writing to a String does not fail.
        _ = writeln!(text, "{start:<#16x} {length:<#16x} {depth:<6} {offset:<#16x} {file}");
    }
    text
}
