//! The integration tests of this crate, in one program: it is linked once.

mod base;
mod chain;
mod commands;
mod common;
mod convert;
mod delta;
mod hostile;
mod in_place;
mod info;
mod merge;
mod qemu_img;
mod random;
mod uml;
mod unreadable;
