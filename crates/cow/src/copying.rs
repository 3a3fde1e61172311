//! The options of the commands that copy disks.

use block_io::ops::{Copying, Progress};
use clap::ValueEnum;

/// How bytes are copied.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct CopyArgs {
    /// Whether zeros that are stored in a file become holes
    ///
    /// They are detected in blocks of 4 KiB, as by `qemu-img -S 4k`. If off, they are copied and
    /// take space. Holes stay holes either way.
    #[arg(
        long,
        value_name = "ON|OFF",
        default_value = "on",
        value_enum,
        hide_possible_values = true
    )]
    detect_zeroes: Switch,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

impl CopyArgs {
    /// The options for the copy, which reports to `progress`.
    pub fn copying(self, progress: Progress<'_>) -> Copying<'_> {
        Copying { detect_zeroes: self.detect_zeroes == Switch::On, progress }
    }
}
