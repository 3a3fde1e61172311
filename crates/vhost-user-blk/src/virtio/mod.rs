//! The device as virtio and vhost-user define it. Nothing in here knows layers or files.

pub mod config;
pub mod device_queue;
pub mod device_state;
pub mod dirty_log;
pub mod inflight;
pub mod notify;
pub mod request;
pub mod split_queue;
