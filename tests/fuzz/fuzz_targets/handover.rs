//! The text that a daemon hands to its successor.
//!
//! Input: the text. Without the right first line, that is put in front.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vhost_user_blk::fuzzing::Handover;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let whole;
    let text = match text.starts_with("vhost-user-blk") {
        true => text,
        false => {
            whole = format!("vhost-user-blk handover 1\n{text}");
            &whole
        }
    };
    match Handover::decode(text) {
        Ok(handover) => {
            assert!(handover.fds().len() <= text.len());
            let again = Handover::decode(&handover.encode());
            // A daemon always says which version it is.
            assert!(handover.from.is_empty() || again.is_ok_and(|again| again == handover));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
