//! The integration tests of this crate, in one program: it is linked once.

mod command_line;
mod common;
mod descriptors;
mod dirty_log;
mod drain;
mod engines;
mod fence;
mod hidden;
mod hostile;
mod idle;
mod inflight_area;
mod lifecycle;
mod log_fd;
mod log_limits;
mod logical_block;
mod migration;
mod negotiation;
mod peers;
mod privileges;
mod recovery;
mod restarts;
mod seccomp_profile;
mod shared_memory;
mod systemd;
mod untracked;
mod upgrade;
