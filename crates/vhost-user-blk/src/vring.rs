//! One ring as the frontend has set it up so far.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost::vhost_user::message::{FrontendReq, VhostUserVringAddrFlags};

use crate::dirty_log::{DirtyLog, RingLog};
use crate::inflight::{Area, Tracker};
use crate::memory::Memory;
use crate::notify::Doorbell;
use crate::replay::Message;
use crate::virtqueue::{RingLayout, indices};
use crate::worker::RingStart;

/// In the number of a queue: no descriptor comes with it, the ring is polled.
const NO_FD: u64 = 0x100;

/// A ring that is being served.
pub trait RunningRing {
    /// Completes what is in flight and ends; returns the index of the next available entry.
    fn stop(self) -> u16;
}

/// Ring addresses in the frontend's own address space (SET_VRING_ADDR).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub avail: u64,
    /// Used ring.
    pub used: u64,
}

impl RingAddresses {
    /// The name and value of the first address that is in no region of `memory`.
    pub fn outside(&self, memory: &Memory) -> Option<(&'static str, u64)> {
        let parts = [
            ("descriptor table", self.desc),
            ("available ring", self.avail),
            ("used ring", self.used),
        ];
        parts.into_iter().find(|&(_, address)| memory.vmm_va_to_gpa(address).is_none())
    }
}

/// What the frontend said about one ring, and the worker that serves it, if it is being served.
pub struct Vring<R> {
    /// Descriptors; 0 as long as it is not known.
    pub size: u16,
    /// Where the ring stands.
    pub addresses: Option<RingAddresses>,
    /// The guest address under which the frontend wants the used ring logged
    /// (`VHOST_VRING_F_LOG`).
    pub log_address: Option<u64>,
    /// Next entry of the available ring to be taken; out of date while the ring runs, and of no
    /// concern where there is an in-flight area, which knows better.
    pub next_avail: u16,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// `None`: the ring is stopped. Set by SET_VRING_KICK, cleared by what stops the ring.
    kick: Option<Kick>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    running: Option<R>,
}

enum Kick {
    Fd(OwnedFd),
    /// The frontend does not kick: the ring is to be looked at again and again, so we do.
    Polling(EventFd),
}

impl<R> Default for Vring<R> {
    fn default() -> Self {
        Vring {
            size: 0,
            addresses: None,
            log_address: None,
            next_avail: 0,
            enabled: false,
            kick: None,
            call: None,
            err: None,
            running: None,
        }
    }
}

impl<R: RunningRing> Vring<R> {
    /// Whether a worker serves the ring.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Where the ring stands in guest memory, if all is known that it needs to run and all of it
    /// lies in `memory`.
    pub fn layout(&self, memory: &Memory) -> Option<RingLayout> {
        let addresses = self.addresses?;
        if self.size == 0 || self.kick.is_none() {
            return None;
        }
        Some(RingLayout {
            size: self.size,
            desc: memory.vmm_va_to_gpa(addresses.desc)?,
            avail: memory.vmm_va_to_gpa(addresses.avail)?,
            used: memory.vmm_va_to_gpa(addresses.used)?,
        })
    }

    /// Where the used ring is logged, if all is known that is needed to say so: where it was asked for,
    /// else at its own place. (A frontend that wants the log at all wants all that changes.)
    pub fn logged_at(&self, memory: &Memory) -> Option<u64> {
        let own = || memory.vmm_va_to_gpa(self.addresses?.used).map(|at| at.0);
        self.log_address.or_else(own)
    }

    /// What a worker needs to serve the ring at `layout`.
    ///
    /// # Errors
    /// If a descriptor cannot be had, or the in-flight area contradicts the ring.
    pub fn start_with(
        &self,
        queue: usize,
        layout: RingLayout,
        common: &StartCommon<'_>,
    ) -> io::Result<RingStart> {
        let inflight = match (common.inflight, indices(common.memory, &layout)) {
            (Some(area), Ok(ring)) => Some(area.recover(queue, ring).map_err(io::Error::other)?),
            // A ring that cannot be read is the guest's fault, and the worker's to give up.
            _ => None,
        };
        Ok(RingStart {
            queue,
            memory: Arc::clone(common.memory),
            layout,
            event_idx: common.event_idx,
            next_avail: inflight.as_ref().map_or(self.next_avail, Tracker::next_avail),
            write_through: Arc::clone(common.write_through),
            kick: match &self.kick {
                Some(Kick::Fd(fd)) => fd.try_clone()?,
                Some(Kick::Polling(event)) => event.as_fd().try_clone_to_owned()?,
                None => return Err(io::ErrorKind::NotFound.into()),
            },
            call: self.call.as_ref().map(OwnedFd::try_clone).transpose()?,
            err: self.err.as_ref().map(OwnedFd::try_clone).transpose()?,
            inflight,
            log: common.log.map(|log| RingLog {
                log: Arc::clone(log),
                used: self.log_address.unwrap_or(layout.used.0),
                bell: common.log_bell.map(Arc::clone),
            }),
        })
    }

    /// The ring is served by `ring` from now on.
    pub fn set_running(&mut self, ring: R) {
        self.running = Some(ring);
    }

    /// Completes what is in flight and stops serving the ring; nothing that was set up is
    /// forgotten.
    pub fn pause(&mut self) {
        if let Some(ring) = self.running.take() {
            self.next_avail = ring.stop();
        }
    }

    /// Stops the ring in the sense of the specification: it is not served again before the next
    /// SET_VRING_KICK.
    pub fn stop(&mut self) {
        self.pause();
        self.kick = None;
    }

    /// Stops a running ring because its set-up changes under it: a frontend that did not read the
    /// base first, and will send the rest of a new set-up, SET_VRING_KICK last or nearly so. Until
    /// then the ring must not be looked at.
    pub fn stop_if_running(&mut self) {
        if self.is_running() {
            self.stop();
        }
    }

    /// SET_VRING_KICK; `None` means that the frontend does not kick.
    pub fn set_kick(&mut self, file: Option<File>) -> io::Result<()> {
        self.pause();
        self.kick = Some(match file {
            Some(file) => Kick::Fd(file.into()),
            None => {
                Kick::Polling(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)
            }
        });
        Ok(())
    }

    /// The messages that set up ring `queue` as it is, but for its being enabled.
    pub fn export(&self, queue: u32) -> impl Iterator<Item = Message<BorrowedFd<'_>>> {
        let size = (self.size > 0)
            .then(|| Message::state(FrontendReq::SET_VRING_NUM, queue, self.size.into()));
        let base = Message::state(FrontendReq::SET_VRING_BASE, queue, self.next_avail.into());
        let addresses = self.addresses.map(|RingAddresses { desc, avail, used }| {
            let flags = VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits();
            let flags = if self.log_address.is_some() { flags } else { 0 };
            let mut message = Message::state(FrontendReq::SET_VRING_ADDR, queue, flags);
            let addresses = [desc, used, avail, self.log_address.unwrap_or(0)];
            message.body.extend(addresses.iter().flat_map(|address| address.to_ne_bytes()));
            message
        });
        let bell = |request, fd| Message::new(request, &[queue.into()]).with(fd);
        let call = self.call.as_ref().map(|fd| bell(FrontendReq::SET_VRING_CALL, fd.as_fd()));
        let err = self.err.as_ref().map(|fd| bell(FrontendReq::SET_VRING_ERR, fd.as_fd()));
        let kick = self.kick.as_ref().map(|kick| match kick {
            Kick::Fd(fd) => bell(FrontendReq::SET_VRING_KICK, fd.as_fd()),
            Kick::Polling(_) => {
                Message::new(FrontendReq::SET_VRING_KICK, &[u64::from(queue) | NO_FD])
            }
        });
        size.into_iter().chain([base]).chain(addresses).chain(call).chain(kick).chain(err)
    }

    /// In place of a frontend that does not kick, kicks. False if the frontend does it itself, or
    /// the ring is not served.
    pub fn poll(&self) -> bool {
        match (&self.kick, &self.running) {
            (Some(Kick::Polling(event)), Some(_)) => {
                // Full is as good.
                let _ = event.write(1);
                true
            }
            _ => false,
        }
    }

    /// SET_VRING_CALL. The descriptor is signalled once: completions may have been published before
    /// it was known. A running ring is paused; it signals when it starts again.
    pub fn set_call(&mut self, file: Option<File>) {
        let was_running = self.is_running();
        self.pause();
        self.call = file.map(OwnedFd::from);
        if let Some(call) = &self.call
            && !was_running
        {
            Doorbell::new(call.as_fd()).ring();
        }
    }

    /// SET_VRING_ERR. A running ring is paused.
    pub fn set_err(&mut self, file: Option<File>) {
        self.pause();
        self.err = file.map(OwnedFd::from);
    }
}

/// What all rings of a session have in common when they start.
pub struct StartCommon<'a> {
    /// Guest memory.
    pub memory: &'a Arc<Memory>,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// See [`RingStart`].
    pub write_through: &'a Arc<AtomicBool>,
    /// What the frontend keeps for the time after this process.
    pub inflight: Option<&'a Area>,
    /// The dirty log, if it is to be kept.
    pub log: Option<&'a Arc<DirtyLog>>,
    /// Rings when the log is written.
    pub log_bell: Option<&'a Arc<File>>,
}
