//! `cow`.
fn main() {}
