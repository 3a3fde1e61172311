//! A whole image on the simulated disk: opened, read, written, flushed, cut off, checked.
//!
//! Input: which image; what is changed in its files; what is done with it.

#![no_main]

use block_io::testing::sim::Sim;
use fuzz::{Input, image};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let templates = image::templates();
    // One above the last: no file at all.
    let sim = match templates.get(usize::from(input.u8()) % (templates.len() + 1)) {
        Some(template) => template.fork(),
        None => Sim::new(),
    };
    image::change_files(&sim, &mut input);
    image::use_disk(&sim, &mut input);
});
