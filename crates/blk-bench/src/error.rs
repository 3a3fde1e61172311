//! What can go wrong between a frontend and its backend.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// An error of the connection, the protocol or the device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing answers at the socket.
    #[error(
        "cannot connect to {path}: {source}; is the backend running, and is this its --socket-path?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The error of connect(2).
        source: io::Error,
    },
    /// A vhost-user message failed.
    #[error("vhost-user {message} failed: {source}")]
    Message {
        /// Name of the message as in the specification.
        message: &'static str,
        /// The error of the `vhost` crate.
        source: vhost::Error,
    },
    /// The backend does not offer something that cannot be done without.
    #[error("the backend does not offer {feature} (it offers {offered:#x})")]
    Missing {
        /// Name of the feature bit.
        feature: &'static str,
        /// The bits that it offers.
        offered: u64,
    },
    /// The caller asks for more than the device has.
    #[error("{what}: {asked} asked for, the device has {available}")]
    TooMany {
        /// What it is.
        what: &'static str,
        /// How many were asked for.
        asked: u64,
        /// How many there are.
        available: u64,
    },
    /// Options that contradict each other or the device.
    #[error("{0}")]
    Options(String),
    /// The backend put something into the used ring that was not in flight.
    #[error(
        "queue {queue}: the backend returned head {id} with {in_flight} requests in flight: {why}"
    )]
    BadHead {
        /// Index of the queue.
        queue: u16,
        /// The id field of the used element.
        id: u32,
        /// How many requests the frontend was waiting for.
        in_flight: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The backend closed the connection, or died, with requests in flight.
    #[error("queue {queue}: the backend closed the connection with {in_flight} requests in flight")]
    Disconnected {
        /// Index of the queue.
        queue: u16,
        /// How many requests the frontend was waiting for.
        in_flight: usize,
    },
    /// Nothing was completed for too long.
    #[error("queue {queue}: no completion for {waited:?} with {in_flight} requests in flight")]
    Stalled {
        /// Index of the queue.
        queue: u16,
        /// How many requests the frontend was waiting for.
        in_flight: usize,
        /// How long.
        waited: Duration,
    },
    /// A system call of this process failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's error.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err` of system calls.
    pub fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }

    pub(crate) fn message(message: &'static str) -> impl FnOnce(vhost::Error) -> Self {
        move |source| Self::Message { message, source }
    }
}
