//! `blk-bench`.
fn main() {}
