//! What tests put in place of the real system: a simulated disk that loses power.

pub(crate) mod mem;
pub mod sim;
