//! The threads of this crate, and what a program may do when one of them starts.

use std::sync::OnceLock;

/// What a thread does, and so which system calls it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Carries out operations of a ring without io_uring.
    Operations,
    /// Flushes the disk, or gives leaked space back.
    Metadata,
    /// Watches the files below the top.
    BaseWatch,
}

static AT_START: OnceLock<fn(Task)> = OnceLock::new();

/// Makes every thread of this crate that starts from now on call `action` first. Only the first
/// call has an effect.
pub fn at_start(action: fn(Task)) {
    _ = AT_START.set(action);
}

/// To be called by a thread before it does anything else.
pub(crate) fn started(task: Task) {
    if let Some(action) = AT_START.get() {
        action(task);
    }
}
