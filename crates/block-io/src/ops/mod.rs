//! Operations on whole images, for the tool: crash-safe, and generic over [`crate::storage::Env`].

pub mod check;
mod compare;
mod copy;
mod error;
mod holes;
pub mod inspect;
mod merge;
mod merge_in_place;
mod merge_marker;
mod output;
mod parallel;
mod rebase;
mod reset;
pub mod signature;
pub mod walk;
mod windows;
mod zeroes;

pub use compare::{Pair, first_difference};
pub use copy::copy;
pub use error::OpError;
pub use holes::Holes;
pub use merge::{CowWriter, convert_to_cow, convert_to_raw, create_raw, merge_to};
pub use merge_in_place::{Merged, merge_in_place};
pub use output::{Output, check_target};
pub use parallel::threads;
pub use rebase::{rebase, rebase_unsafe};
pub use reset::reset;

/// Options for copying.
#[derive(Clone, Copy)]
pub struct Copying<'a> {
    /// Turn zeros in data into holes; holes stay holes in any case.
    pub detect_zeroes: bool,
    /// Called with the progress.
    pub progress: Progress<'a>,
}

/// Called with the number of bytes done since the last call, from any thread.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);
