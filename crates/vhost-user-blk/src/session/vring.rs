//! One ring, as far as the frontend has set it up.
//!
//! Its state is a vring of the `vhost-user-backend` crate, with a `Queue` of `virtio-queue`. A
//! worker that serves the ring gets a copy. When the worker stops, its position is stored in the
//! queue. What the crate does not keep, or has no getter for, is kept beside it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use vhost::vhost_user::message::{FrontendReq, VhostUserVringAddrFlags};
use vhost_user_backend::{VringMutex, VringT};
use virtio_queue::{QueueState, QueueT};
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::event::{EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::datapath::worker::RingStart;
use crate::datapath::worker::handle::StopOrder;
use crate::guest_memory::memory::Memory;
use crate::session::replay::Message;
use crate::virtio::dirty_log::{DirtyLog, RingLog};
use crate::virtio::inflight::{Area, RingIndices, Tracker};
use crate::virtio::notify::{Bell, EventDescriptor, notifier};
use crate::virtio::split_queue::indices;

/// Flag in the number of a queue: no descriptor comes with the message, the ring is polled.
const NO_FD: u64 = 0x100;

/// A ring that is being served.
pub trait RunningRing {
    /// Asks it to complete the requests in flight and to end. [`RunningRing::stop`] is to follow.
    fn ask(&self, order: StopOrder);

    /// Waits for the end of a ring that was asked at `asked`, and returns the index of the next
    /// available entry. `None` if the daemon has to end and the ring does not.
    fn stop(self, asked: Instant) -> Option<u16>;
}

/// Stops all rings as [`Vring::pause`] does, at the same time.
pub fn pause_all<R: RunningRing>(vrings: &mut [Vring<R>], order: StopOrder) {
    let asked = Instant::now();
    vrings.iter().filter_map(|vring| vring.running.as_ref()).for_each(|ring| ring.ask(order));
    vrings.iter_mut().for_each(|vring| vring.await_end(asked));
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

/// The frontend's settings for one ring, and the worker that serves it, if any.
pub struct Vring<R> {
    /// These fields of its queue are used: the size; the next entry of the available ring (out of
    /// date while the ring runs, and not used if there is an in-flight area, which knows better);
    /// EVENT_IDX; "ready", from SET_VRING_KICK until the ring is stopped. The addresses are those
    /// of the last start.
    state: VringMutex<GuestMemoryAtomic<Memory>>,
    /// SET_VRING_NUM has come. (Before that, the queue has the largest size.)
    sized: bool,
    /// The ring's addresses as the frontend sends them. The guest addresses depend on the memory
    /// table at the time.
    pub addresses: Option<RingAddresses>,
    /// The guest address at which to log the used ring (`VHOST_VRING_F_LOG`).
    pub log_address: Option<u64>,
    /// If the frontend does not kick, the session polls the ring by kicking it.
    polling: Option<EventNotifier>,
    /// Not in `state`, which has no getter for it.
    err: Option<EventNotifier>,
    running: Option<R>,
}

impl<R: RunningRing> Vring<R> {
    /// A ring without any settings, with at most `size_max` descriptors.
    pub fn new(
        memory: GuestMemoryAtomic<Memory>,
        size_max: u16,
    ) -> Result<Self, virtio_queue::Error> {
        Ok(Vring {
            state: VringMutex::new(memory, size_max)?,
            sized: false,
            addresses: None,
            log_address: None,
            polling: None,
            err: None,
            running: None,
        })
    }

    /// Stops the ring and forgets its settings.
    pub fn reset(&mut self) {
        self.stop();
        self.state.get_mut().get_queue_mut().reset();
        self.state.set_enabled(false);
        self.state.set_call(None);
        self.sized = false;
        self.addresses = None;
        self.log_address = None;
        self.err = None;
    }

    /// Its queue, by value.
    fn queue(&self) -> QueueState {
        self.state.get_ref().get_queue().state()
    }

    /// Number of descriptors; 0 before SET_VRING_NUM.
    pub fn size(&self) -> u16 {
        if self.sized { self.queue().size } else { 0 }
    }

    /// SET_VRING_NUM, with a size that was checked.
    pub fn set_size(&mut self, size: u16) {
        self.state.set_queue_size(size);
        self.sized = true;
    }

    /// Next entry of the available ring, as of the last stop.
    pub fn next_avail(&self) -> u16 {
        self.state.queue_next_avail()
    }

    /// SET_VRING_BASE
    pub fn set_next_avail(&mut self, next_avail: u16) {
        self.state.set_queue_next_avail(next_avail);
    }

    /// Sets whether `VIRTIO_F_EVENT_IDX` was negotiated, for the next start.
    pub fn set_event_idx(&mut self, event_idx: bool) {
        self.state.set_queue_event_idx(event_idx);
    }

    /// The last SET_VRING_ENABLE.
    pub fn is_enabled(&self) -> bool {
        self.state.get_ref().is_enabled()
    }

    /// SET_VRING_ENABLE
    pub fn set_enabled(&mut self, enabled: bool) {
        self.state.set_enabled(enabled);
    }

    /// Whether a worker serves the ring.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// The ring with its guest addresses, if its settings are complete and it lies in `memory`.
    pub fn located(&self, memory: &Memory) -> Option<QueueState> {
        let (addresses, queue) = (self.addresses?, self.queue());
        if !self.sized || !queue.ready {
            return None;
        }
        Some(QueueState {
            desc_table: memory.vmm_va_to_gpa(addresses.desc)?.0,
            avail_ring: memory.vmm_va_to_gpa(addresses.avail)?.0,
            used_ring: memory.vmm_va_to_gpa(addresses.used)?.0,
            ..queue
        })
    }

    /// The guest address at which the used ring is logged: the one that the frontend has set, else
    /// the ring's own. (A frontend that wants a log wants all changes in it.) `None` if neither is
    /// known.
    pub fn logged_at(&self, memory: &Memory) -> Option<u64> {
        let own = || memory.vmm_va_to_gpa(self.addresses?.used).map(|at| at.0);
        self.log_address.or_else(own)
    }

    /// Everything that a worker needs to serve `ring`, which comes from [`Vring::located`].
    ///
    /// # Errors
    /// If a descriptor cannot be duplicated, or the in-flight area contradicts the ring.
    pub fn start_with(
        &self,
        queue: usize,
        ring: QueueState,
        common: &StartCommon<'_>,
    ) -> io::Result<RingStart> {
        let inflight = match (common.inflight, self.set_addresses(&ring, common.memory)) {
            (Some(area), Some(at)) => Some(area.recover(queue, at).map_err(io::Error::other)?),
            // If the ring cannot be read, the worker gives it up.
            _ => None,
        };
        let vring = self.state.get_ref();
        let kick = vring.get_kick().as_ref().ok_or(io::ErrorKind::NotFound)?;
        Ok(RingStart {
            queue,
            memory: Arc::clone(common.memory),
            state: QueueState {
                next_avail: inflight.as_ref().map_or(ring.next_avail, Tracker::next_avail),
                ..ring
            },
            write_through: Arc::clone(common.write_through),
            kick: kick.try_clone()?,
            call: vring.get_call().as_ref().map(EventNotifier::try_clone).transpose()?,
            err: self.err.as_ref().map(EventNotifier::try_clone).transpose()?,
            inflight,
            log: common.log.map(|log| RingLog {
                log: Arc::clone(log),
                used: self.log_address.unwrap_or(ring.used_ring),
                call: common.log_call.map(Arc::clone),
            }),
        })
    }

    /// Sets the queue's addresses and reads its indices. `None` if the ring is not aligned or not
    /// wholly in `memory`.
    fn set_addresses(&self, ring: &QueueState, memory: &Memory) -> Option<RingIndices> {
        let QueueState { desc_table, avail_ring, used_ring, .. } = *ring;
        self.state.set_queue_info(desc_table, avail_ring, used_ring).ok()?;
        let vring = self.state.get_ref();
        let queue = vring.get_queue();
        queue.is_valid(memory).then(|| indices(memory, queue).ok())?
    }

    /// The descriptor with which the guest kicks.
    fn kick(&self) -> Option<BorrowedFd<'_>> {
        let fd = self.state.get_ref().get_kick().as_ref()?.as_raw_fd();
        // SAFETY: only `self` has the vring, and whatever closes its kick borrows `self` mutably.
        Some(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// The descriptor that notifies the guest.
    fn call(&self) -> Option<BorrowedFd<'_>> {
        let fd = self.state.get_ref().get_call().as_ref()?.as_raw_fd();
        // SAFETY: as in `kick`.
        Some(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Records that `ring` serves the ring from now on.
    pub fn set_running(&mut self, ring: R) {
        self.running = Some(ring);
    }

    /// Completes the requests in flight and stops serving the ring. All settings stay.
    pub fn pause(&mut self) {
        self.running.as_ref().inspect(|ring| ring.ask(StopOrder::Finish));
        self.await_end(Instant::now());
    }

    /// The same of a ring that starts again at once: with an in-flight area it need not complete
    /// long requests.
    fn interrupt(&mut self) {
        self.running.as_ref().inspect(|ring| ring.ask(StopOrder::Leave));
        self.await_end(Instant::now());
    }

    /// Waits for the ring's end, if it is being served. It was asked.
    fn await_end(&mut self, asked: Instant) {
        if let Some(next_avail) = self.running.take().and_then(|ring| ring.stop(asked)) {
            self.state.set_queue_next_avail(next_avail);
        }
    }

    /// Stops the ring in the sense of the specification: it is not served again before the next
    /// SET_VRING_KICK.
    pub fn stop(&mut self) {
        self.pause();
        self.state.set_queue_ready(false);
        self.state.set_kick(None);
        self.polling = None;
    }

    /// Stops a running ring because its settings change. The frontend has not read the base first,
    /// and will send the rest of the new settings, with SET_VRING_KICK at or near the end. Until
    /// then the ring must not be read.
    pub fn stop_if_running(&mut self) {
        if self.is_running() {
            self.stop();
        }
    }

    /// SET_VRING_KICK. `None`: the frontend does not kick.
    pub fn set_kick(&mut self, file: Option<File>) -> io::Result<()> {
        self.pause();
        let (kick, polling) = match file {
            Some(file) => (file, None),
            None => {
                let flags = EventFlag::CLOEXEC | EventFlag::NONBLOCK;
                let (kick, polling) = new_event_consumer_and_notifier(flags)?;
                // SAFETY: `kick` owns the descriptor and gives it up.
                (unsafe { File::from_raw_fd(kick.into_raw_fd()) }, Some(polling))
            }
        };
        self.state.set_kick(Some(kick));
        self.state.set_queue_ready(true);
        self.polling = polling;
        Ok(())
    }

    /// The messages that set up ring `queue` as it is, except that it is enabled.
    pub fn export(&self, queue: u32) -> impl Iterator<Item = Message<BorrowedFd<'_>>> {
        let state = self.queue();
        let size = self
            .sized
            .then(|| Message::state(FrontendReq::SET_VRING_NUM, queue, state.size.into()));
        let base = Message::state(FrontendReq::SET_VRING_BASE, queue, state.next_avail.into());
        let addresses = self.addresses.map(|RingAddresses { desc, avail, used }| {
            let flags = VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits();
            let flags = if self.log_address.is_some() { flags } else { 0 };
            let mut message = Message::state(FrontendReq::SET_VRING_ADDR, queue, flags);
            let addresses = [desc, used, avail, self.log_address.unwrap_or(0)];
            message.body.extend(addresses.iter().flat_map(|address| address.to_ne_bytes()));
            message
        });
        let descriptor = |request, fd| Message::new(request, &[queue.into()]).with(fd);
        let call = self.call().map(|fd| descriptor(FrontendReq::SET_VRING_CALL, fd));
        let err = self.err.as_ref().map(|err| descriptor(FrontendReq::SET_VRING_ERR, err.fd()));
        let kick = self.kick().map(|fd| match self.polling {
            None => descriptor(FrontendReq::SET_VRING_KICK, fd),
            Some(_) => Message::new(FrontendReq::SET_VRING_KICK, &[u64::from(queue) | NO_FD]),
        });
        size.into_iter().chain([base]).chain(addresses).chain(call).chain(kick).chain(err)
    }

    /// Kicks in place of a frontend that does not. False if the frontend kicks itself, or the ring
    /// is not served.
    pub fn poll(&self) -> bool {
        match (&self.polling, &self.running) {
            (Some(polling), Some(_)) => {
                // If the counter is full, the worker wakes as well.
                _ = polling.notify();
                true
            }
            _ => false,
        }
    }

    /// SET_VRING_CALL. A running ring is paused. When a ring starts, it signals its call descriptor
    /// once, because completions may have been published before that arrived.
    pub fn set_call(&mut self, file: Option<File>) {
        self.interrupt();
        self.state.set_call(file);
    }

    /// SET_VRING_ERR. A running ring is paused.
    pub fn set_err(&mut self, file: Option<File>) {
        self.interrupt();
        self.err = file.map(notifier);
    }
}

/// What all rings of a session have in common when they start.
pub struct StartCommon<'a> {
    /// Guest memory.
    pub memory: &'a Arc<Memory>,
    /// See [`RingStart`].
    pub write_through: &'a Arc<AtomicBool>,
    /// The in-flight area, which the frontend keeps beyond this process.
    pub inflight: Option<&'a Area>,
    /// The dirty log, if logging is on.
    pub log: Option<&'a Arc<DirtyLog>>,
    /// Signalled when the log is written.
    pub log_call: Option<&'a Arc<Bell<File>>>,
}
