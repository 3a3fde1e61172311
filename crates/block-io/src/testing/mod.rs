//! Test doubles for the real system: a simulated disk that loses power. Compiled only with the
//! feature `testing`.

pub mod sim;
mod sparse_bytes;
