//! A virtqueue as the worker and the request parser see it, whatever its layout in guest memory.

use std::fmt::Display;

use crate::guest_memory::memory::{GuestAddress, Loss, OutsideMemory};

/// Largest queue (virtio 1.3, 2.7 and 2.8): what 16-bit indices can tell full from empty. (The
/// `virtio-queue` crate does not export its own constant.)
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// Descriptors of one request, direct and indirect together. As many as one system call takes
/// iovecs (IOV_MAX); the specification lets a device have "a reasonable limit" (2.7.4.1), and
/// drivers keep to `seg_max` + 2.
pub const CHAIN_DESCRIPTORS_MAX: u16 = 1024;

/// The device's end of a started virtqueue.
///
/// The path of a request: [`pop`](Self::pop) gives its head, [`chain`](Self::chain) walks its
/// descriptors, [`push`](Self::push) consumes the head; [`publish`](Self::publish) shows the guest
/// all that was pushed since the last time.
pub trait DeviceQueue {
    /// A request that the guest made available and that is not answered yet. Only
    /// [`push`](Self::push) consumes it.
    type Head;

    /// Why the ring can no longer be trusted. It says nothing about any one request, so it cannot
    /// be answered by failing one.
    type Error: Display;

    /// Takes the next request that the guest made available.
    ///
    /// # Errors
    /// The ring contradicts itself and is to be left alone.
    fn pop(&mut self) -> Result<Option<Self::Head>, Self::Error>;

    /// Whether [`pop`](Self::pop) would not answer `Ok(None)`. For a worker that spins.
    fn has_work(&self) -> bool;

    /// The descriptors of a request. Walk it once: the guest may change it between two walks.
    fn chain(&self, head: &Self::Head) -> impl Iterator<Item = Result<Descriptor, ChainError>>;

    /// Marks what may have been written for a request in the dirty log, if there is one: its
    /// device-writable buffers and the status. To be called when all of that is there. (What the
    /// kernel writes marks nothing itself, and the guest leaves the descriptors alone until it gets
    /// the answer.)
    fn mark_buffers(&self, head: &Self::Head, status: Option<GuestAddress>);

    /// Answers a request: `written` is what the device wrote into its device-writable buffers, in
    /// bytes from their start. The guest sees it after the next [`publish`](Self::publish).
    fn push(&mut self, head: Self::Head, written: u32);

    /// Shows the guest what was pushed since the last time, and says whether it wants to be
    /// notified of that.
    fn publish(&mut self) -> bool;

    /// Asks the guest not to kick: a hint.
    fn disable_notifications(&mut self);

    /// Asks the guest to kick for the next request it makes available. True: there is one already,
    /// for which no kick may come; look before you sleep.
    fn enable_notifications(&mut self) -> bool;

    /// Where a successor continues, as GET_VRING_BASE answers it.
    fn next_avail(&self) -> u16;

    /// Requests that were popped and are not pushed.
    fn in_flight(&self) -> u16;

    /// Whether a successor finds what was popped and not pushed, and does it again.
    fn is_tracked(&self) -> bool;

    /// Whether a page of the memory that the ring is in, of the in-flight area or of the dirty log
    /// was lost: nothing read from it may be published.
    fn poisoned(&self) -> bool;

    /// What became of that page.
    fn loss(&self) -> Option<Loss>;
}

/// One buffer of a request. Nothing about it is checked but the shape of the chain it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest address of its first byte.
    pub address: GuestAddress,
    /// Its length in bytes. The guest may say 0.
    pub len: u32,
    /// The device writes it; else it reads it.
    pub writable: bool,
}

/// A chain whose buffers cannot be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A NEXT that leads out of its table.
    #[error("next descriptor {next}, the table has {len}")]
    Next {
        /// What the guest wrote.
        next: u16,
        /// Entries of the table.
        len: u32,
    },
    /// More than [`CHAIN_DESCRIPTORS_MAX`] descriptors, as a loop has.
    #[error("more than {CHAIN_DESCRIPTORS_MAX} descriptors: a loop, or a chain too long")]
    TooLong,
    /// INDIRECT in an indirect table.
    #[error("indirect descriptor in an indirect table")]
    NestedIndirect,
    /// INDIRECT together with NEXT.
    #[error("descriptor is indirect and has a next one")]
    IndirectNext,
    /// The length of an indirect table is 0 or no multiple of 16.
    #[error("indirect table of {len} bytes")]
    IndirectLength {
        /// What the guest wrote.
        len: u32,
    },
    /// The descriptor to read is not in guest memory.
    #[error("indirect table: {0}")]
    IndirectOutside(OutsideMemory),
}
