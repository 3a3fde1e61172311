//! Storage under the formats: files, memory, a simulated disk, io_uring.
