//! What a frontend can send, with descriptors: see `fuzzing/session.rs` of the daemon.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhost_user_blk::fuzzing::vhost_user(data));
