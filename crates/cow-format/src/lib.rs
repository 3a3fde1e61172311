//! The formats of copy-on-write files and the layering. No I/O.
#![forbid(unsafe_code)]
