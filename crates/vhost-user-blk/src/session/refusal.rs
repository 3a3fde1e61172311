//! Why a message of the frontend is refused. The log gives the reason when the connection ends.

use std::io;

use vhost::vhost_user;
use vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;

use crate::guest_memory::memory::{Loss, MemoryError};
use crate::session::admission::Unfit;
use crate::virtio::config;
use crate::virtio::device_state::StateError;
use crate::virtio::dirty_log::LogError;
use crate::virtio::inflight::InflightError;

/// Why a message is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error("queue {queue}: there is no such queue, {num_queues} are offered (--num-queues)")]
    NoSuchQueue { queue: u32, num_queues: usize },
    #[error("features {found:#x}: {unknown:#x} of them were not offered")]
    Features { found: u64, unknown: u64 },
    #[error("protocol features {found:#x}: {unknown:#x} of them were not offered")]
    ProtocolFeatures { found: u64, unknown: u64 },
    #[error("queue {queue}: size {found}; expected a power of two up to {max} (--queue-size)")]
    QueueSize { queue: u32, found: u32, max: u16 },
    #[error("queue {queue}: next available index {found}; a split ring's has 16 bits")]
    NextAvail { queue: u32, found: u32 },
    #[error("queue {queue}: its {part} at {address:#x} is in no memory region")]
    RingOutside { queue: u32, part: &'static str, address: u64 },
    #[error("queue {queue}: cannot serve it: {source}")]
    Start { queue: usize, source: io::Error },
    #[error("queue {queue}: cannot use its descriptor: {source}")]
    Descriptor { queue: u32, source: io::Error },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("cannot release the disk: {0}")]
    Release(io::Error),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("device state: cannot be transferred while a ring is running")]
    StateWhileRunning,
    #[error("cannot make an in-flight area: {0}")]
    InflightFile(io::Error),
    #[error("cannot make the disk durable for the change to write-through: {0}")]
    Flush(io::Error),
    #[error(
        "the configuration space ends at byte {}; asked for {size} bytes at {offset:#x}",
        config::CONFIG_SPACE_LEN
    )]
    ConfigRange { offset: u32, size: usize },
    #[error("{0} was not offered")]
    NotOffered(&'static str),
    #[error("{what}: {loss}")]
    Lost { what: &'static str, loss: Loss },
    #[error("postcopy migration was not offered")]
    Postcopy,
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("{found} descriptors; a message has at most {MAX_ATTACHED_FD_ENTRIES}")]
    TooManyDescriptors { found: usize },
}

impl From<Refusal> for vhost_user::Error {
    fn from(refusal: Refusal) -> Self {
        vhost_user::Error::ReqHandlerError(io::Error::other(refusal))
    }
}
