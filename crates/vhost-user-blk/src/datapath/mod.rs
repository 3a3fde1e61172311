//! The data path: one thread for each queue takes requests and moves their data.

pub(crate) mod cold_stream;
pub(crate) mod holes;
pub(crate) mod inline_write;
pub(crate) mod layer_files;
pub(crate) mod queue_threads;
pub(crate) mod resident;
pub(crate) mod route;
pub(crate) mod spin;
pub(crate) mod worker;
