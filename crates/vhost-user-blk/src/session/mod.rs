//! One frontend's session: features, the memory table, the rings.
//!
//! The messages arrive through `BackendReqHandler` of the `vhost` crate, which checks their form,
//! sends replies and acknowledgements, and answers REPLY_ACK by itself. The remaining checks are
//! done here: subsets of the offered features, queue numbers, order. A refused message ends the
//! connection, with the reason in the log; the disk is not affected.
//!
//! A ring is served while all of this holds: it has a size, addresses that lie in guest memory, a
//! kick descriptor (or the frontend's announcement that it does not kick), it is enabled
//! (vhost-user specification, "Ring states"), and features are set. The frontend can do this in any
//! order. The specification starts a ring with its first kick. Here a worker looks at it at once:
//! that makes no difference for a ring without work, and loses no kick of a ring that was kicked
//! too early.

pub(crate) mod admission;
pub(crate) mod connection;
pub(crate) mod log_fd;
pub(crate) mod memory_table;
pub(crate) mod message;
pub(crate) mod replay;
pub(crate) mod vring;

mod migration;
mod refusal;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use log::Level;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{self, Backend, GpuBackend, VhostUserBackendReqHandlerMut};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::eventfd::EventFd;

use self::refusal::Refusal;
use crate::datapath::worker::RingStart;
use crate::datapath::worker::handle::StopOrder;
use crate::guest_memory::memory::{Memory, REGIONS_MAX, RegionInfo};
use crate::process::fd::received;
use crate::process::log_limit::{CONNECTIONS, RINGS, WRITE_CACHE};
use crate::session::vring::{RingAddresses, RunningRing, StartCommon, Vring, pause_all};
use crate::virtio::config::{self, DeviceConfig, DiskShape};
use crate::virtio::device_state::{DeviceState, StateError};
use crate::virtio::dirty_log::DirtyLog;
use crate::virtio::inflight::{Area, AreaInfo, Tracker};
use crate::virtio::notify::Bell;

/// The answer to GET_PROTOCOL_FEATURES. BACKEND_REQ is offered because User Mode Linux (6.1) cannot
/// use a disk without it: its `virtio_uml` takes the interrupt of the rings from that channel.
pub(crate) const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::DEVICE_STATE)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// A session's view of the disk.
pub(crate) trait Device {
    /// A ring that is being served.
    type Ring: RunningRing;

    /// Starts to serve a ring. Opens the disk first if it is not open yet or was released.
    ///
    /// # Errors
    /// If the ring is invalid, the disk cannot be opened, or the system has no room for a thread.
    fn start(&self, ring: RingStart) -> io::Result<Self::Ring>;

    /// Makes everything durable that was written before the call.
    ///
    /// # Errors
    /// If that failed. It then fails for good.
    fn flush(&self) -> io::Result<()>;

    /// Closes the disk, so that it can be opened elsewhere. No ring may be running.
    ///
    /// # Errors
    /// If not everything could be made durable. The disk then stays open.
    fn release(&self) -> io::Result<()>;

    /// Signalled when a ring was given up.
    fn failure(&self) -> &EventFd;
}

/// A device state in transfer.
enum Transfer {
    Saved(Result<(), StateError>),
    /// The pipe to read it from. The frontend writes it after SET_DEVICE_STATE_FD.
    Load(File),
}

/// The answer to a message, unless another error is named.
type Result<T, E = vhost_user::Error> = std::result::Result<T, E>;

/// State of the connection with the frontend, and what outlives the connection: the device, and
/// whether the guest has switched the write cache off. (A frontend that reconnects does not repeat
/// that setting, but its guest relies on it and sends no flush.)
pub struct Session<D: Device> {
    device: D,
    config: DeviceConfig,
    offered: u64,
    queue_size_max: u16,
    /// SET_OWNER.
    owned: bool,
    /// SET_FEATURES; `None` before it.
    features: Option<u64>,
    /// SET_PROTOCOL_FEATURES.
    protocol_features: u64,
    /// Every write is durable before it completes. Shared with the workers.
    write_through: Arc<AtomicBool>,
    memory: Arc<Memory>,
    /// The same memory, as the vrings use it.
    address_space: GuestMemoryAtomic<Memory>,
    /// SET_DEVICE_STATE_FD, until CHECK_DEVICE_STATE.
    transfer: Option<Transfer>,
    /// SET_INFLIGHT_FD. It belongs to the connection: the next one sends it again.
    inflight: Option<Area>,
    /// SET_LOG_BASE.
    log: Option<Arc<DirtyLog>>,
    /// SET_LOG_FD: signalled when the log is written.
    log_call: Option<Arc<Bell<File>>>,
    /// A ring has run since the disk was last released.
    served: bool,
    vrings: Vec<Vring<D::Ring>>,
    /// The channel for requests to the frontend, kept open as long as the connection. No request is
    /// sent on it.
    requests: Option<OwnedFd>,
}

impl<D: Device> Session<D> {
    /// A session without any message so far.
    ///
    /// # Panics
    /// If no ring can have the size in `shape`. The command line refuses such a size.
    pub fn new(device: D, shape: &DiskShape) -> Self {
        let memory = Arc::new(Memory::empty());
        let address_space = GuestMemoryAtomic::from(Arc::clone(&memory));
        let vring = |_| {
            Vring::new(address_space.clone(), shape.queue_size_max)
                .expect("--queue-size is a power of two up to 32768")
        };
        let vrings = (0..shape.num_queues).map(vring).collect();
        Session {
            device,
            config: DeviceConfig::new(shape),
            offered: config::features(shape.read_only),
            queue_size_max: shape.queue_size_max,
            owned: false,
            features: None,
            protocol_features: 0,
            write_through: Arc::new(AtomicBool::new(true)),
            memory,
            vrings,
            address_space,
            transfer: None,
            inflight: None,
            log: None,
            log_call: None,
            served: false,
            requests: None,
        }
    }

    /// The frontend is gone: completes the requests in flight on every ring, except for long ones
    /// that the next connection finds in its in-flight area, and resets the session.
    pub fn disconnect(&mut self) {
        self.reset_rings();
        self.owned = false;
        self.protocol_features = 0;
        self.transfer = None;
        self.inflight = None;
        self.log = None;
        self.log_call = None;
        self.set_memory(Memory::empty());
        self.requests = None;
    }

    /// Stops every ring, and resets rings and features to their initial state.
    fn reset_rings(&mut self) {
        pause_all(&mut self.vrings, StopOrder::Leave);
        self.vrings.iter_mut().for_each(Vring::reset);
        self.features = None;
        self.write_through.store(true, Ordering::SeqCst);
    }

    /// RESET_DEVICE. Memory and protocol features belong to the connection and stay.
    fn reset(&mut self) {
        self.reset_rings();
        if let Some(area) = &self.inflight {
            area.clear();
        }
        self.config.set_write_cache(true);
    }

    /// Whether the frontend means to use the disk. Some may leave SET_OWNER out.
    pub fn is_owned(&self) -> bool {
        self.owned || self.features.is_some()
    }

    /// Whether a ring is being served.
    #[cfg(test)]
    fn is_running(&self, queue: usize) -> bool {
        self.vrings[queue].is_running()
    }

    fn has(&self, feature: u64) -> bool {
        self.features.unwrap_or(0) & feature != 0
    }

    fn vring(&mut self, queue: u32) -> Result<&mut Vring<D::Ring>, Refusal> {
        let num_queues = self.vrings.len();
        usize::try_from(queue)
            .ok()
            .and_then(|at| self.vrings.get_mut(at))
            .ok_or(Refusal::NoSuchQueue { queue, num_queues })
    }

    /// Starts every ring that can be served, and pauses every ring that must not run.
    fn reconcile(&mut self) -> Result<()> {
        let logging = self.is_logging();
        if logging {
            self.check_log()?;
        }
        let common = StartCommon {
            memory: &self.memory,
            write_through: &self.write_through,
            inflight: self.inflight.as_ref(),
            log: self.log.as_ref().filter(|_| logging),
            log_call: self.log_call.as_ref(),
        };
        // While logging is on, nothing may be written before there is a log.
        let ready = self.features.is_some() && logging == common.log.is_some();
        let all_enabled = !self.has(config::F_PROTOCOL_FEATURES);
        let chain_len_max = self.chain_len_max();
        for (queue, vring) in self.vrings.iter_mut().enumerate() {
            let allowed = ready && (vring.is_enabled() || all_enabled);
            match vring.located(&self.memory) {
                Some(ring) if allowed && !vring.is_running() => {
                    let start = |source| Refusal::Start { queue, source };
                    let ring = vring.start_with(queue, ring, &common).map_err(start)?;
                    let again = ring.inflight.as_ref().map_or(0, Tracker::unfinished_count);
                    if again > 0 {
                        let line = format_args!(
                            "queue {queue}: repeating {again} requests that were in flight"
                        );
                        RINGS.say(Level::Info, line);
                    }
                    warn_of_long_chains(queue, ring.state.size, chain_len_max);
                    log::debug!(
                        "queue {queue}: {} descriptors from {}",
                        ring.state.size,
                        ring.state.next_avail
                    );
                    vring.set_running(self.device.start(ring).map_err(start)?);
                    self.served = true;
                }
                Some(_) if allowed => {}
                _ => vring.pause(),
            }
        }
        Ok(self.release_if_idle()?)
    }

    /// The most descriptors of the ring that a request may take: as the configuration says. 0 if
    /// the driver puts them into a table beside the ring, or has not negotiated the limit.
    fn chain_len_max(&self) -> u32 {
        if self.has(config::F_SEG_MAX) && !self.has(config::F_INDIRECT_DESC) {
            self.config.chain_len_max()
        } else {
            0
        }
    }

    /// Updates whether writes must be durable before they complete.
    fn update_write_through(&mut self) -> Result<()> {
        let write_through = !self.has(config::F_FLUSH) || !self.config.write_cache();
        let before = self.write_through.swap(write_through, Ordering::SeqCst);
        if write_through != before {
            let state = if write_through { "off" } else { "on" };
            WRITE_CACHE.say(Level::Info, format_args!("write cache {state}"));
        }
        if write_through && !before {
            // From here on the guest sends no flush, not even for earlier writes.
            self.device.flush().map_err(Refusal::Flush)?;
        }
        Ok(())
    }

    fn state(&self) -> DeviceState {
        DeviceState { write_cache: self.config.write_cache() }
    }

    /// Adopts the state of a predecessor.
    fn adopt(&mut self, state: DeviceState) -> Result<()> {
        self.config.set_write_cache(state.write_cache);
        self.keep_state();
        self.update_write_through()
    }

    /// Keeps the guest's settings for a successor.
    fn keep_state(&self) {
        if let Some(area) = &self.inflight {
            area.keep(self.state());
        }
    }

    /// Makes every ring use `memory`, after the requests in flight on the old memory are complete.
    fn change_memory(&mut self, memory: Memory) -> Result<()> {
        pause_all(&mut self.vrings, StopOrder::Finish);
        // Before the old memory goes, which knows whether some of it was lost.
        self.check_intact()?;
        self.set_memory(memory);
        self.reconcile()
    }

    fn set_memory(&mut self, memory: Memory) {
        self.address_space.lock().unwrap_or_else(PoisonError::into_inner).replace(memory);
        self.memory = self.address_space.memory().into_inner();
    }

    /// Kicks the rings whose frontend does not kick. False if there are none.
    pub fn poll_rings(&self) -> bool {
        self.vrings.iter().filter(|vring| vring.poll()).count() > 0
    }

    /// A descriptor that becomes readable when a ring was given up; see [`Session::check`].
    pub fn failure(&self) -> &EventFd {
        self.device.failure()
    }

    /// Whether the session can continue after a ring was given up. If the guest has made its ring
    /// invalid, it can. If the frontend has shortened the file of its memory, it cannot.
    pub fn check(&self) -> Result<(), impl std::error::Error + use<D>> {
        // Resets the event. It does not matter if it was reset already.
        _ = self.device.failure().read();
        self.check_intact()
    }
}

/// A request with more descriptors than the ring has does not fit, and some drivers wait for ever
/// for room. When the frontend reads the configuration space only it knows the sizes of its rings,
/// so the limit cannot be adapted.
fn warn_of_long_chains(queue: usize, size: u16, chain_len_max: u32) {
    if u32::from(size) < chain_len_max {
        let line = format_args!(
            "queue {queue}: the ring has {size} descriptors, but a request may take {chain_len_max}; \
             without indirect descriptors the guest may wait for ever for room; start the daemon \
             with --queue-size={size}, or leave indirect descriptors on"
        );
        RINGS.say(Level::Warn, line);
    }
}

fn region_info(region: &VhostUserMemoryRegion) -> RegionInfo {
    RegionInfo {
        guest_address: region.guest_phys_addr,
        size: region.memory_size,
        vmm_address: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

impl<D: Device> VhostUserBackendReqHandlerMut for Session<D> {
    fn set_owner(&mut self) -> Result<()> {
        // The connection is the owner; another SET_OWNER changes nothing.
        self.owned = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated. The specification recommends to disable the rings or to ignore it; some
        // versions of cloud-hypervisor send it to reset the device.
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered;
        if unknown != 0 {
            return Err(Refusal::Features { found: features, unknown }.into());
        }
        let changed = self.features.replace(features).unwrap_or(features) ^ features;
        if changed & (config::F_EVENT_IDX | config::F_LOG_ALL) != 0 {
            pause_all(&mut self.vrings, StopOrder::Finish);
            self.check_intact()?;
        }
        let event_idx = self.has(config::F_EVENT_IDX);
        self.vrings.iter_mut().for_each(|vring| vring.set_event_idx(event_idx));
        log::debug!("features {features:#x}");
        if self.is_logging() && self.log.is_none() {
            RINGS.say(Level::Info, format_args!("the rings start when the dirty log arrives"));
        }
        self.update_write_through()?;
        self.reconcile()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        if postcopy_listening.is_some() {
            return Err(Refusal::Postcopy.into());
        }
        let files = files.into_iter().map(received);
        let memory = Memory::from_regions(regions.iter().map(region_info).zip(files));
        self.change_memory(memory.map_err(Refusal::Memory)?)?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(u64::try_from(REGIONS_MAX).unwrap_or(u64::MAX))
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if postcopy_listening.is_some() {
            return Err(Refusal::Postcopy.into());
        }
        let memory = self.memory.with_region(region_info(region), received(file));
        self.change_memory(memory.map_err(Refusal::Memory)?)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.without_region(region_info(region));
        self.change_memory(memory.map_err(Refusal::Memory)?)
    }

    fn set_vring_num(&mut self, queue: u32, num: u32) -> Result<()> {
        let max = self.queue_size_max;
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= max);
        let size = size.ok_or(Refusal::QueueSize { queue, found: num, max })?;
        let vring = self.vring(queue)?;
        vring.stop_if_running();
        vring.set_size(size);
        self.reconcile()
    }

    fn set_vring_addr(
        &mut self,
        queue: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let addresses = RingAddresses { desc: descriptor, avail: available, used };
        // Without a memory table the addresses cannot be checked yet.
        if self.memory.regions().next().is_some()
            && let Some((part, address)) = addresses.outside(&self.memory)
        {
            return Err(Refusal::RingOutside { queue, part, address }.into());
        }
        let (memory, logging) = (Arc::clone(&self.memory), self.is_logging());
        let vring = self.vring(queue)?;
        let logged_at = vring.logged_at(&memory);
        if vring.addresses != Some(addresses) {
            vring.stop_if_running();
            vring.addresses = Some(addresses);
        }
        vring.log_address =
            flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        if logging && vring.logged_at(&memory) != logged_at {
            vring.pause();
        }
        self.reconcile()
    }

    fn set_vring_base(&mut self, queue: u32, base: u32) -> Result<()> {
        let next_avail =
            u16::try_from(base).map_err(|_| Refusal::NextAvail { queue, found: base })?;
        let vring = self.vring(queue)?;
        vring.stop_if_running();
        vring.set_next_avail(next_avail);
        self.reconcile()
    }

    fn get_vring_base(&mut self, queue: u32) -> Result<VhostUserVringState> {
        let vring = self.vring(queue)?;
        vring.stop();
        let next_avail = vring.next_avail();
        self.check_intact()?;
        self.release_if_idle()?;
        Ok(VhostUserVringState::new(queue, next_avail.into()))
    }

    fn set_vring_kick(&mut self, queue: u8, file: Option<File>) -> Result<()> {
        let queue = queue.into();
        let set = self.vring(queue)?.set_kick(file.map(received));
        set.map_err(|source| Refusal::Descriptor { queue, source })?;
        self.reconcile()
    }

    fn set_vring_call(&mut self, queue: u8, file: Option<File>) -> Result<()> {
        self.vring(queue.into())?.set_call(file.map(received));
        self.reconcile()
    }

    fn set_vring_err(&mut self, queue: u8, file: Option<File>) -> Result<()> {
        self.vring(queue.into())?.set_err(file.map(received));
        self.reconcile()
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !PROTOCOL_FEATURES.bits();
        if unknown != 0 {
            return Err(Refusal::ProtocolFeatures { found: features, unknown }.into());
        }
        self.protocol_features = features;
        Ok(())
    }

    fn set_backend_req_fd(&mut self, _requests: Backend) {
        // The crate does not give its descriptor away, so a successor could not get it. See
        // `keep_requests`.
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::try_from(self.vrings.len()).unwrap_or(u64::MAX))
    }

    fn set_vring_enable(&mut self, queue: u32, enable: bool) -> Result<()> {
        self.vring(queue)?.set_enabled(enable);
        self.reconcile()
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let out_of_range = || Refusal::ConfigRange { offset, size: size as usize };
        Ok(self.config.read(offset, size).ok_or_else(out_of_range)?)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let size = data.len();
        // A driver that has not negotiated CONFIG_WCE must not write. If it does, nothing changes.
        if self.has(config::F_CONFIG_WCE) {
            self.config.write(offset, data).ok_or(Refusal::ConfigRange { offset, size })?;
            self.keep_state();
        }
        self.update_write_through()
    }

    // The crate requires these handlers. It passes the first one on without checking what was
    // negotiated.

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Refusal::NotOffered("GPU_SET_SOCKET").into())
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        phase: VhostTransferStatePhase,
        fd: File,
    ) -> Result<Option<File>> {
        if phase != VhostTransferStatePhase::STOPPED || self.vrings.iter().any(Vring::is_running) {
            return Err(Refusal::StateWhileRunning.into());
        }
        self.transfer = Some(match direction {
            VhostTransferStateDirection::SAVE => Transfer::Saved(self.state().save(fd)),
            VhostTransferStateDirection::LOAD => Transfer::Load(received(fd)),
        });
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        let result = match self.transfer.take() {
            None => Err(StateError::Nothing),
            Some(Transfer::Saved(result)) => result.map(|()| None),
            Some(Transfer::Load(pipe)) => DeviceState::load(pipe),
        };
        match result {
            Ok(Some(state)) => self.adopt(state),
            Ok(None) => Ok(()),
            Err(error) => {
                CONNECTIONS.say(Level::Warn, format_args!("{error}"));
                Err(Refusal::State(error).into())
            }
        }
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Refusal::NotOffered("SHARED_OBJECT").into())
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let info = AreaInfo::new(inflight.num_queues, inflight.queue_size);
        info.check(self.vrings.len(), self.queue_size_max).map_err(Refusal::Inflight)?;
        let file = info.create().map_err(Refusal::InflightFile)?;
        let AreaInfo { size, offset, num_queues, queue_size } = info;
        Ok((VhostUserInflight::new(size, offset, num_queues, queue_size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let info = AreaInfo {
            size: inflight.mmap_size,
            offset: inflight.mmap_offset,
            num_queues: inflight.num_queues,
            queue_size: inflight.queue_size,
        };
        info.check(self.vrings.len(), self.queue_size_max).map_err(Refusal::Inflight)?;
        let area = Area::map(&info, received(file)).map_err(Refusal::Inflight)?;
        pause_all(&mut self.vrings, StopOrder::Finish);
        self.check_intact()?;
        let kept = area.kept().unwrap_or(self.state());
        self.inflight = Some(area);
        self.adopt(kept)?;
        self.reconcile()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Refusal::NotOffered("SHMEM").into())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.change_log(log, received(file))?;
        self.reconcile()
    }
}

mod export;
#[cfg(test)]
mod tests;
