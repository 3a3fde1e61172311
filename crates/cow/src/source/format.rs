//! The formats of a disk, as they are named on the command line.

use clap::ValueEnum;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FileFormat {
    /// The bytes of a disk and nothing else
    Raw,
    /// COW file of User Mode Linux
    Uml,
    /// COW file of this project
    Native,
    /// Image of QEMU, with its backing chain
    Qcow2,
}
