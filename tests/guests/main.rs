//! The tests with real guests, hosts and frontends, in one program: it is linked once.

mod faults;
mod firmware;
mod guest_life;
mod guests;
mod harness;
mod hotplug;
mod interop;
mod lost_page_cache;
mod migration;
mod old_kernels;
mod powercut;
mod real_frontends;
mod reconnect;
mod upgrade;
mod verified_load;
