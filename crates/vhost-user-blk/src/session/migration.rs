//! Live migration: the log of dirty pages, and when the disk is released.
//!
//! The log is switched on and off, and replaced by a larger one, in the middle of I/O. Rings are
//! paused for that, which the guest sees as a short delay. Requests that began without the log
//! complete before the frontend gets the answer that the log is on, and all marks are there before
//! it gets the answer that it is off.
//!
//! While the log is on, the disk stays open only as long as a ring runs. The frontend stops the
//! rings when it is about to hand the guest over. The disk is then released, and the destination
//! can open it as soon as the frontend has its answer. If the guest stays after all, the rings
//! start again, and the disk is opened again.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::{VhostUserLog, VhostUserProtocolFeatures};

use super::{Device, Refusal, Result, Session};
use crate::datapath::worker::handle::StopOrder;
use crate::session::vring::{Vring, pause_all};
use crate::virtio::config;
use crate::virtio::dirty_log::DirtyLog;
use crate::virtio::inflight::Area;
use crate::virtio::notify::Bell;
use crate::virtio::split_queue::used_ring_len;

impl<D: Device> Session<D> {
    /// Whether writes into guest memory must be logged. A frontend that accepts every feature but
    /// cannot pass a log does not want one.
    pub(super) fn is_logging(&self) -> bool {
        self.has(config::F_LOG_ALL)
            && self.protocol_features & VhostUserProtocolFeatures::LOG_SHMFD.bits() != 0
    }

    /// SET_LOG_BASE. Once it is answered, an earlier log is no longer written.
    pub(super) fn change_log(&mut self, info: &VhostUserLog, file: File) -> Result<(), Refusal> {
        let log = DirtyLog::map(info.mmap_size, info.mmap_offset, file)?;
        if self.is_logging() {
            pause_all(&mut self.vrings, StopOrder::Finish);
            self.check_intact()?;
        }
        self.log = Some(Arc::new(log));
        self.check_log()
    }

    /// SET_LOG_FD, which may come at any time. Once it is answered, an earlier descriptor is no
    /// longer used.
    pub fn set_log_call(&mut self, call: File) -> Result<()> {
        if self.is_logging() {
            pause_all(&mut self.vrings, StopOrder::Finish);
        }
        self.log_call = Some(Arc::new(Bell::new(call)));
        self.reconcile()
    }

    /// Checks that the log has a bit for every page that can be written.
    pub(super) fn check_log(&self) -> Result<(), Refusal> {
        let Some(log) = &self.log else { return Ok(()) };
        let memory = self.memory.regions().map(|region| region.guest_address + region.size);
        let used = self.vrings.iter().filter_map(|vring| {
            Some(vring.log_address?.saturating_add(used_ring_len(vring.size()) as u64))
        });
        log.check(memory.chain(used).max().unwrap_or(0))?;
        Ok(())
    }

    /// Checks that no page of the frontend's shared memory was lost.
    pub(super) fn check_intact(&self) -> Result<(), Refusal> {
        let losses = [
            ("guest memory", self.memory.loss()),
            ("in-flight area", self.inflight.as_ref().and_then(Area::loss)),
            ("dirty log", self.log.as_ref().and_then(|log| log.loss())),
        ];
        match losses.into_iter().find_map(|(what, loss)| Some((what, loss?))) {
            Some((what, loss)) => Err(Refusal::Lost { what, loss }),
            None => Ok(()),
        }
    }

    /// Releases the disk if a migration has stopped its last ring.
    pub(super) fn release_if_idle(&mut self) -> Result<(), Refusal> {
        let idle = !self.vrings.iter().any(Vring::is_running);
        // Without a log the guest may be arriving, not leaving.
        if self.served && idle && self.is_logging() && self.log.is_some() {
            self.device.release().map_err(Refusal::Release)?;
            self.served = false;
        }
        Ok(())
    }
}
