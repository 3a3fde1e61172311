//! `cow measure`: the space that a merged image of a disk would take.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::ops::walk::{Image, Reader, Source};
use cow_format::SectorCount;
use serde::Serialize;

use crate::error::CowError;
use crate::output::OutputArgs;
use crate::size::Human;
use crate::source::format::FileFormat;
use crate::source::open_to_look;
use crate::steps::steps;
use crate::ui::Ui;

/// Print how much space a raw image of a disk takes
///
/// Holes are not counted. Zeros that are stored in a file are, so the image can turn out smaller.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The format of FILE; optional for a COW file
    #[arg(short, long, value_name = "FORMAT", value_enum)]
    format: Option<FileFormat>,

    #[command(flatten)]
    output: OutputArgs,

    /// A disk
    file: PathBuf,
}

/// Keys as those of qemu-img measure.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Measured {
    /// Bytes of space, whole blocks.
    required: u64,
    /// Bytes without any hole.
    fully_allocated: u64,
}

/// Bytes that file systems allocate at a time.
const BLOCK_LEN: u64 = 4096;

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let disk = open_to_look(&self.file, self.format, ui)?;
        let mut reader = disk.reader();
        let (mut required, mut counted_to) = (0, 0);
        for range in steps(SectorCount::covering(disk.size())) {
            for piece in reader.pieces(range)? {
                if let Source::Data { .. } = piece.source {
                    // Blocks, each once.
                    let from = (piece.at.get() / BLOCK_LEN * BLOCK_LEN).max(counted_to);
                    counted_to = (piece.at.get() + piece.len).next_multiple_of(BLOCK_LEN);
                    required += counted_to.saturating_sub(from);
                }
            }
        }
        let measured = Measured { required, fully_allocated: disk.size() };
        self.output.print(&measured, |measured| {
            let Measured { required, fully_allocated } = measured;
            format!(
                "required size: {required} bytes ({})\nfully allocated size: {fully_allocated} bytes ({})\n",
                Human(*required),
                Human(*fully_allocated)
            )
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
