//! The data path: one thread for each queue takes requests and moves their data.

pub mod cold_stream;
pub mod holes;
pub mod inline_write;
pub mod layer_files;
pub mod resident;
pub mod route;
pub mod spin;
pub mod worker;
