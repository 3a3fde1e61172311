//! A request to the control socket.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_user_blk::process::control::{Reply, Request};

fuzz_target!(|data: &[u8]| {
    if let Some(request) = Request::decode(data) {
        let again = Request::decode(&request.encode());
        assert_eq!(again.as_ref(), Some(&request));
    }
    // The daemon's answer, as a client takes it.
    if let Some(reply) = std::str::from_utf8(data).ok().and_then(Reply::decode) {
        let (Reply::Done(text) | Reply::Failed(text)) = reply;
        assert!(text.len() <= data.len());
    }
});
