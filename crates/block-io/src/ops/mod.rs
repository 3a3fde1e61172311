//! Operations on whole images, for the tool: crash-safe, and on any [`crate::storage::Env`].

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

/// How bytes are copied.
#[derive(Clone, Copy)]
pub struct Copying<'a> {
    /// Zeros that stand in a file become holes; what is a hole stays one anyway.
    pub detect_zeroes: bool,
    /// Hears of what is done.
    pub progress: Progress<'a>,
}

/// Told the number of bytes that are done since its last call; from any thread.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);
