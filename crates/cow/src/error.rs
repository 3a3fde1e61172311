//! What can go wrong in the tool itself; what can go wrong with an image is said by block-io.

use std::io;

use block_io::ops::OpError;
use block_io::{DiskError, OpenError};

/// A failure of a command: one message.
#[derive(Debug, thiserror::Error)]
pub enum CowError {
    /// An operation on images failed.
    #[error(transparent)]
    Op(#[from] OpError),
    /// Options that do not go together.
    #[error("{0}")]
    Usage(String),
    /// Standard output was not taken.
    #[error("cannot write to standard output: {0}")]
    Output(io::Error),
}

impl From<OpenError> for CowError {
    fn from(err: OpenError) -> Self {
        CowError::Op(err.into())
    }
}

impl From<DiskError> for CowError {
    fn from(err: DiskError) -> Self {
        CowError::Op(err.into())
    }
}
