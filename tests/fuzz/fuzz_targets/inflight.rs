//! An in-flight area with any content: see `fuzzing/inflight.rs` of the daemon.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhost_user_blk::fuzzing::inflight(data));
