//! Prints what a COW file says about itself: `cargo run --example inspect -- FILE`

use std::error::Error;
use std::fs::File;
use std::io::Read;

use cow_format::{HEADER_PREFIX_LEN, Header};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: inspect FILE")?;
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut prefix = Vec::new();
    file.take(HEADER_PREFIX_LEN as u64).read_to_end(&mut prefix)?;
    match Header::check(&prefix, len)? {
        Header::Uml(header) => {
            println!("UML COW file, version {}", header.version().number());
            println!(
                "backing file: {}",
                String::from_utf8_lossy(header.backing_path()).escape_debug()
            );
        }
        Header::Native(header) => {
            println!("native COW file {}, {:?}", header.uuid(), header.state());
            if let Some(backing) = header.backing() {
                let path = String::from_utf8_lossy(backing.path());
                println!("backing file: {} ({})", path.escape_debug(), backing.format());
            }
        }
    }
    Ok(())
}
