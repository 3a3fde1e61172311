//! The options of the commands that copy disks.

use block_io::ops::{Copying, Progress};
use clap::ValueEnum;

/// How bytes are copied.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct CopyArgs {
    /// Whether zeros that stand in a file become holes
    ///
    /// They are found in blocks of 4 KiB, as by `qemu-img -S 4k`. Off, they are copied, which takes their space. What is a
    /// hole stays one either way.
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
    /// What was asked for; `progress` hears of it.
    pub fn copying(self, progress: Progress<'_>) -> Copying<'_> {
        Copying { detect_zeroes: self.detect_zeroes == Switch::On, progress }
    }
}
