//! The harness of the tests with real guests: QEMU under TCG (or KVM where it was seen to work) and
//! User Mode Linux, booted from what `ci/setup` made, with this project's daemon, or any other
//! vhost-user backend, behind their disks.
//!
//! The way of a test: a [`TestDir`], a [`Backend`] on a socket in it, a [`Guest`] with a shell
//! script, and the results that the script printed ([`Console`]). What a test started is killed
//! when it ends, however it ends, and a failed test shows the output of its processes.

mod backend;
mod boot_disk;
mod files;
pub mod flushed;
mod guest;
mod monitor;
mod mount;
pub mod powercut;
mod process;
mod programs;

pub use backend::{Backend, Belongings};
pub use boot_disk::Firmware;
pub use files::{CowDisk, TestDir, patterned, sha256, write_image};
pub use guest::{Console, Guest, Kernel, Running};
pub use monitor::Monitor;
pub use mount::{LoopMount, SmallTmpfs, drop_page_cache};
pub use process::Process;
pub use programs::{Outcome, available, blk_bench, compile_c, cow, run, run_ok, vhost_user_blk};

/// Ends the calling test, which then counts as skipped in `ci/test`, where what it needs is not
/// here.
#[macro_export]
macro_rules! require {
    ($needed:expr) => {
        if let Err(why) = $needed {
            println!("skipped: {why}");
            return;
        }
    };
}
