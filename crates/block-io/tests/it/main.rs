//! The integration tests of this crate, in one program: it is linked once.

mod base_identity;
mod block_device;
mod chain;
mod crash;
mod crashing;
mod disk;
mod faults;
mod journal;
mod lazy;
mod lying_holes;
mod merge_in_place;
mod model;
mod rebase;
mod references;
mod sweep;
