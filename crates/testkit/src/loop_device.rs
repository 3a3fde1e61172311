//! A loop device over a file, for tests of several crates.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A block device whose content is a file; gone when dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Over `image`, with logical blocks of `block` bytes. `None`, after printing why, if no loop
    /// device can be set up.
    pub fn new(image: &Path, block: u32) -> Option<Self> {
        let block = format!("--sector-size={block}");
        let made = Command::new("losetup").args(["--find", "--show", &block]).arg(image).output();
        match made {
            Ok(made) if made.status.success() => {
                let name = String::from_utf8(made.stdout).unwrap();
                Some(LoopDevice(name.trim_end().into()))
            }
            Ok(made) => {
                println!("skipped: no loop device: {}", String::from_utf8_lossy(&made.stderr));
                None
            }
            Err(why) => {
                println!("skipped: cannot run losetup: {why}");
                None
            }
        }
    }

    /// The device's node.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
