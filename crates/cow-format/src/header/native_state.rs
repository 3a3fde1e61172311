//! The states of a native file (`docs/spec/format-native.md` section 6).

use super::page_cache::PageCache;

/// The state of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NativeState {
    /// Closed in order: the durable bitmap says everything.
    Clean,
    /// Opened for writing and not closed since. In the given page cache, if any, the live bitmap
    /// counts as well.
    InUse {
        /// The page cache of the live bitmap; none if it is void, as it is after a failed sync.
        live: Option<PageCache>,
    },
    /// Never written again: other files build on it.
    Frozen,
}
