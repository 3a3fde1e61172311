//! The formats of a disk, as they are named on the command line.

use clap::ValueEnum;

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FileFormat {
    /// The plain bytes of a disk
    Raw,
    /// COW file of User Mode Linux
    Uml,
    /// COW file of this project
    Native,
    /// Image of QEMU, with its backing chain
    Qcow2,
}
