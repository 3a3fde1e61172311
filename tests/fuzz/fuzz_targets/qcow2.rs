//! A qcow2 image, converted by the tool. What it says of its errors goes to standard error: run
//! this with `-close_fd_mask=2`.
//!
//! Input: the length of the file in clusters, then pieces of it: where, and the bytes.

#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use fuzz::Input;
use libfuzzer_sys::fuzz_target;

/// What the header says is left alone if it is more, so that a disk of zeros does not take long.
const DISK_LEN_MAX: u64 = 64 << 20;
/// Where the size of the disk is in the header, big-endian.
const SIZE_AT: u64 = 24;

fuzz_target!(|data: &[u8]| {
    let place = Place::get();
    let mut input = Input::new(data);
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(true);
    let file = options.open(&place.image).unwrap();
    file.set_len(u64::from(input.u8()) * 4096).unwrap();
    while !input.is_empty() {
        let at = u64::from(input.u16()) * 8;
        file.write_all_at(input.short(), at).unwrap();
    }
    let mut size = [0; 8];
    let read = file.read_exact_at(&mut size, SIZE_AT);
    if read.is_ok() && u64::from_be_bytes(size) > DISK_LEN_MAX {
        return;
    }
    let words = ["cow", "--quiet", "convert", "--force", "-f", "qcow2", "-O", "raw"];
    let words = words.iter().map(Into::into);
    let files = [&place.image, &place.out].map(|path| path.clone().into_os_string());
    _ = cow::cli::run(words.chain(files).collect());
});

/// Files in memory.
struct Place {
    image: PathBuf,
    out: PathBuf,
}

impl Place {
    fn get() -> &'static Self {
        static PLACE: OnceLock<Place> = OnceLock::new();
        PLACE.get_or_init(|| {
            // SAFETY: no other thread runs yet. Nothing but the tool itself is to be tested: not
            // qemu-img, which it asks for what it cannot read.
            unsafe { std::env::set_var("PATH", "/nonexistent") };
            let dir = PathBuf::from(format!("/dev/shm/fuzz-qcow2-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            Place { image: dir.join("image.qcow2"), out: dir.join("image.raw") }
        })
    }
}
