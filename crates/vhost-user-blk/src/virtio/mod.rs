//! The device as virtio and vhost-user define it. Nothing in here knows layers or files.

pub(crate) mod config;
pub mod device_queue;
pub mod device_state;
pub(crate) mod dirty_log;
pub(crate) mod inflight;
pub(crate) mod notify;
pub mod request;
pub mod split_queue;
