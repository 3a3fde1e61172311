//! The integration tests of this crate, in one program: it is linked once.

mod bitmap;
mod check;
mod flush;
mod hostile;
mod journal;
mod map;
mod native;
mod vectors;
