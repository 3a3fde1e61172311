//! What can go wrong in the tool itself; what can go wrong with an image is said by block-io.

use block_io::OpenError;
use block_io::ops::OpError;

/// A failure of a command: one message.
#[derive(Debug, thiserror::Error)]
pub enum CowError {
    /// An operation on images failed.
    #[error(transparent)]
    Op(#[from] OpError),
    /// Options that do not go together.
    #[error("{0}")]
    Usage(String),
}

impl From<OpenError> for CowError {
    fn from(err: OpenError) -> Self {
        CowError::Op(err.into())
    }
}
