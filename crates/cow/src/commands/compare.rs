//! `cow compare`: whether two disks have the same content.

use std::path::PathBuf;
use std::process::ExitCode;

use block_io::ops;
use block_io::ops::walk::Image;
use serde::Serialize;

use crate::error::CowError;
use crate::output::{OutputArgs, OutputFormat};
use crate::source::format::FileFormat;
use crate::source::open_to_look;
use crate::ui::Ui;

/// Compare the content of two disks
///
/// If one is longer, they are the same if the rest is zeros (with --strict never). Exits with 0 if
/// they are the same, 1 if they differ (the first difference is printed), 2 if they could not be
/// compared. With --quiet only the exit status shows the result.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The format of FIRST; optional for a COW file
    #[arg(short = 'f', long, value_name = "FORMAT", value_enum)]
    first_format: Option<FileFormat>,

    /// The format of SECOND; optional for a COW file
    #[arg(short = 'F', long, value_name = "FORMAT", value_enum)]
    second_format: Option<FileFormat>,

    /// Disks of different sizes differ
    #[arg(short, long)]
    strict: bool,

    #[command(flatten)]
    output: OutputArgs,

    /// A disk
    first: PathBuf,

    /// Another
    second: PathBuf,
}

/// Status when the disks differ, as qemu-img compare ends.
const STATUS_DIFFER: u8 = 1;

impl Args {
    pub fn run(self, ui: Ui) -> Result<ExitCode, CowError> {
        let first = open_to_look(&self.first, self.first_format, ui)?;
        let second = open_to_look(&self.second, self.second_format, ui)?;
        let sizes = (first.size(), second.size());
        let found = if self.strict && sizes.0 != sizes.1 {
            Found::Sizes { first: sizes.0, second: sizes.1 }
        } else {
            let progress = ui.progress("compare", sizes.0.max(sizes.1));
            match ops::first_difference(&first, &second, &|bytes| progress.add(bytes))? {
                None => Found::Identical,
                Some(offset) => Found::Content { offset },
            }
        };
        if self.output.format == OutputFormat::Json || !ui.is_quiet() {
            self.output.print(&found, Found::to_string)?;
        }
        Ok(match found {
            Found::Identical => ExitCode::SUCCESS,
            Found::Sizes { .. } | Found::Content { .. } => ExitCode::from(STATUS_DIFFER),
        })
    }
}

/// The result.
#[derive(Serialize)]
#[serde(tag = "difference", rename_all = "kebab-case")]
enum Found {
    #[serde(rename = "none")]
    Identical,
    Sizes {
        first: u64,
        second: u64,
    },
    Content {
        /// The first byte that differs.
        offset: u64,
    },
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Found::Identical => writeln!(f, "The disks are identical."),
            Found::Sizes { first, second } => {
                writeln!(f, "The sizes differ: {first} and {second} bytes.")
            }
            Found::Content { offset } => {
                writeln!(f, "The disks differ, first at offset {offset}.")
            }
        }
    }
}
