//! Real guests, interop, crash and hostile-peer tests.
