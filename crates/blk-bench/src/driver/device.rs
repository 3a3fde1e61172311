//! The frontend's half of the vhost-user handshake: from a socket to running queues.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{
    Frontend, VhostUserFrontend, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::config::{CONFIG_LEN, Config, WRITEBACK_AT};
use crate::driver::memory::{GUEST_BASE, SharedMemory};
use crate::driver::queue::{Link, Queue, QueueEnds, SlotLayout};
use crate::driver::ring::RingLayout;
use crate::driver::watchdog::Watchdog;
use crate::error::Error;

/// Virtio features that this driver knows what to do with.
const KNOWN_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
/// Most queues that the `vhost` crate lets a frontend address.
const MAX_QUEUES: u64 = 256;
/// Size limit of a split virtqueue.
const MAX_QUEUE_SIZE: u16 = 32768;
/// The smallest ring that is set up if the caller leaves the size open; QEMU's default too.
const DEFAULT_QUEUE_SIZE: u16 = 128;
/// While a backend is not there yet, it is tried again this often.
const RETRY: Duration = Duration::from_millis(5);

/// What to connect to, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The backend's socket.
    pub socket: PathBuf,
    /// How long to try, for a backend that is still starting.
    pub connect_for: Duration,
    /// Number of queues.
    pub queues: u16,
    /// Requests in flight in each queue.
    pub depth: u16,
    /// Ring entries, a power of two; `None` for as many as the depth needs, at least 128.
    pub queue_size: Option<u16>,
    /// Most bytes of data in one request.
    pub max_data: usize,
    /// Most bytes of data in one descriptor; `None` for no limit but the device's.
    pub segment: Option<usize>,
    /// Feature bits that are not accepted although they are offered.
    pub refuse_features: u64,
    /// Put the memory into reserved huge pages.
    pub hugepages: bool,
    /// Without any completion for so long a queue is given up.
    pub stall_after: Duration,
    /// Keep account of what is in flight for the backend (INFLIGHT_SHMFD), so that a successor can
    /// go on after a [`Device::reconnect`].
    pub inflight: bool,
}

impl Options {
    /// One queue of depth 1 with requests of up to 64 KiB.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            connect_for: Duration::ZERO,
            queues: 1,
            depth: 1,
            queue_size: None,
            max_data: 64 << 10,
            segment: None,
            refuse_features: 0,
            hugepages: false,
            stall_after: Duration::from_secs(30),
            inflight: false,
        }
    }
}

/// A connected device, with its queues running.
pub struct Device {
    frontend: Frontend,
    config: Config,
    offered: u64,
    features: u64,
    protocol: Protocol,
    pid: i32,
    queues: Vec<Queue>,
    rings: Vec<Ring>,
    inflight: Option<(VhostUserInflight, File)>,
    memory: Arc<SharedMemory>,
    watchdog: Watchdog,
}

/// The parameters of a queue that the backend gets.
struct Ring {
    layout: RingLayout,
    kick: EventFd,
    call: EventFd,
}

impl Ring {
    fn of(queue: &Queue) -> Result<Self, Error> {
        let (layout, [kick, call]) = (*queue.ring_layout(), queue.ends()?);
        Ok(Self { layout, kick, call })
    }
}

impl Device {
    /// Connects, negotiates, shares the memory and starts the queues.
    ///
    /// # Errors
    /// Each step's own, see [`Error`].
    pub fn connect(options: &Options) -> Result<Self, Error> {
        let (stream, pid) = connect_stream(options)?;
        let watched = stream.try_clone().map_err(Error::io("dup of the socket"))?;
        let mut frontend = Frontend::from_stream(stream, MAX_QUEUES);
        let negotiated = negotiate(&mut frontend, options)?;
        let plan = Plan::new(options, &negotiated)?;
        let memory = Arc::new(
            SharedMemory::new(plan.memory_len(), options.hugepages)
                .map_err(Error::io("memory to share with the backend"))?,
        );
        let link = Arc::new(Link::default());
        let queues = plan.queues(&memory, &link, options)?;
        let rings = queues.iter().map(Ring::of).collect::<Result<Vec<_>, _>>()?;
        let inflight = if options.inflight {
            Some(get_inflight(&mut frontend, options.queues, &rings)?)
        } else {
            None
        };
        start(&mut frontend, negotiated.protocol, inflight.as_ref(), &memory, &rings)?;
        let watchdog = Watchdog::spawn(watched, calls(&rings)?, link)?;
        Ok(Self {
            frontend,
            config: negotiated.config,
            offered: negotiated.offered,
            features: negotiated.features,
            protocol: negotiated.protocol,
            pid,
            queues,
            rings,
            inflight,
            memory,
            watchdog,
        })
    }

    /// Connects to a backend that takes the place of one that has gone: the same memory, rings and
    /// account of what is in flight. The queues, wherever they are, go on.
    ///
    /// # Errors
    /// As [`Device::connect`], after which the device is dead; [`Error::Options`] if the new
    /// backend's features are others.
    pub fn reconnect(&mut self, options: &Options) -> Result<(), Error> {
        let link = self.give_up();
        let (stream, pid) = connect_stream(options)?;
        self.resume_over(stream, pid, options, link)
    }

    /// As [`Device::reconnect`], over a connection that the caller has made.
    ///
    /// # Errors
    /// As [`Device::reconnect`].
    pub fn resume(&mut self, stream: UnixStream, options: &Options) -> Result<(), Error> {
        let link = self.give_up();
        let pid = peer(&stream)?;
        self.resume_over(stream, pid, options, link)
    }

    /// Takes the backend for dead.
    fn give_up(&mut self) -> Arc<Link> {
        let link = Arc::clone(self.watchdog.link());
        self.watchdog.stop();
        link.dead.store(true, Ordering::Relaxed);
        link
    }

    fn resume_over(
        &mut self,
        stream: UnixStream,
        pid: i32,
        options: &Options,
        link: Arc<Link>,
    ) -> Result<(), Error> {
        let watched = stream.try_clone().map_err(Error::io("dup of the socket"))?;
        let mut frontend = Frontend::from_stream(stream, MAX_QUEUES);
        let negotiated = negotiate(&mut frontend, options)?;
        let now = (negotiated.features, negotiated.protocol);
        if now != (self.features, self.protocol) {
            let before = (self.features, self.protocol);
            return Err(Error::Options(format!("features were {before:x?} and are {now:x?}")));
        }
        start(&mut frontend, self.protocol, self.inflight.as_ref(), &self.memory, &self.rings)?;
        link.dead.store(false, Ordering::Relaxed);
        self.watchdog = Watchdog::spawn(watched, calls(&self.rings)?, link)?;
        (self.frontend, self.pid) = (frontend, pid);
        Ok(())
    }

    /// A duplicate of the connection, by which its end can be seen.
    ///
    /// # Errors
    /// The error of dup(2).
    pub fn connection(&self) -> std::io::Result<OwnedFd> {
        // SAFETY: the frontend keeps it open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.frontend.as_raw_fd()) }.try_clone_to_owned()
    }

    /// The device's configuration space as it was at connect.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Virtio features that the backend offers.
    pub fn offered_features(&self) -> u64 {
        self.offered
    }

    /// Virtio features in use.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Whether a virtio feature bit (by number) is in use.
    pub fn has(&self, bit: u32) -> bool {
        self.features >> bit & 1 == 1
    }

    /// Protocol features in use.
    pub fn protocol_features(&self) -> u64 {
        self.protocol.bits()
    }

    /// The process that made the backend's socket listen; 0 if it lives in another pid namespace.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Bytes shared with the backend.
    pub fn memory_len(&self) -> usize {
        self.memory.len()
    }

    /// The memory shared with the backend.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The queues, to be moved to their threads. Empty the second time.
    pub fn take_queues(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }

    /// Switches the write cache (CONFIG_WCE).
    ///
    /// # Errors
    /// The feature was not negotiated, or the message failed.
    pub fn set_write_cache(&mut self, on: bool) -> Result<(), Error> {
        if !self.has(VIRTIO_BLK_F_CONFIG_WCE) {
            return Err(Error::Missing {
                feature: "VIRTIO_BLK_F_CONFIG_WCE",
                offered: self.offered,
            });
        }
        self.frontend
            .set_config(WRITEBACK_AT, VhostUserConfigFlags::WRITABLE, &[u8::from(on)])
            .map_err(Error::message("SET_CONFIG"))
    }

    /// Reads part of the configuration space again.
    ///
    /// # Errors
    /// The message failed.
    pub fn read_config(&mut self, offset: u32, len: u32) -> Result<Vec<u8>, Error> {
        get_config(&mut self.frontend, offset, len)
    }

    /// Stops the queues as a VMM does; gives where each would go on (its `avail` index).
    ///
    /// # Errors
    /// A message failed, for example because the backend has gone.
    pub fn stop(&mut self) -> Result<Vec<u32>, Error> {
        (0..self.rings.len())
            .map(|queue| {
                self.frontend.get_vring_base(queue).map_err(Error::message("GET_VRING_BASE"))
            })
            .collect()
    }

    /// Whether the backend has closed the connection.
    pub fn is_dead(&self) -> bool {
        self.watchdog.is_dead()
    }
}

/// The connection, and the process at its other end.
fn connect_stream(options: &Options) -> Result<(UnixStream, i32), Error> {
    let until = Instant::now() + options.connect_for;
    loop {
        match UnixStream::connect(&options.socket) {
            Ok(stream) => {
                let pid = peer(&stream)?;
                return Ok((stream, pid));
            }
            Err(source) if Instant::now() >= until => {
                return Err(Error::Connect { path: options.socket.clone(), source });
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

/// The process at the other end.
fn peer(stream: &UnixStream) -> Result<i32, Error> {
    let peer = getsockopt(stream, PeerCredentials);
    Ok(peer.map_err(Error::io("SO_PEERCRED of the backend's socket"))?.pid())
}

struct Negotiated {
    offered: u64,
    features: u64,
    protocol: Protocol,
    config: Config,
    max_queues: u64,
}

fn negotiate(frontend: &mut Frontend, options: &Options) -> Result<Negotiated, Error> {
    let mut wanted_protocol =
        Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS;
    wanted_protocol.set(Protocol::INFLIGHT_SHMFD, options.inflight);
    frontend.set_owner().map_err(Error::message("SET_OWNER"))?;
    let offered = frontend.get_features().map_err(Error::message("GET_FEATURES"))?;
    let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    for (bit, feature) in [
        (protocol_bit, "VHOST_USER_F_PROTOCOL_FEATURES"),
        (1 << VIRTIO_F_VERSION_1, "VIRTIO_F_VERSION_1"),
    ] {
        if offered & bit == 0 {
            return Err(Error::Missing { feature, offered });
        }
    }
    let protocol_offered =
        frontend.get_protocol_features().map_err(Error::message("GET_PROTOCOL_FEATURES"))?;
    if !protocol_offered.contains(Protocol::CONFIG) {
        return Err(Error::Missing {
            feature: "VHOST_USER_PROTOCOL_F_CONFIG",
            offered: protocol_offered.bits(),
        });
    }
    let protocol = protocol_offered & wanted_protocol;
    frontend.set_protocol_features(protocol).map_err(Error::message("SET_PROTOCOL_FEATURES"))?;
    if protocol.contains(Protocol::REPLY_ACK) {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    let max_queues = if protocol.contains(Protocol::MQ) {
        frontend.get_queue_num().map_err(Error::message("GET_QUEUE_NUM"))?
    } else {
        1
    };
    let features = offered & (KNOWN_FEATURES & !options.refuse_features | protocol_bit);
    frontend.set_features(features).map_err(Error::message("SET_FEATURES"))?;
    let config = Config::parse(&get_config(frontend, 0, CONFIG_LEN)?, features);
    Ok(Negotiated { offered, features, protocol, config, max_queues })
}

fn get_config(frontend: &mut Frontend, offset: u32, len: u32) -> Result<Vec<u8>, Error> {
    let empty = vec![0; len as usize];
    let (_, bytes) = frontend
        .get_config(offset, len, VhostUserConfigFlags::empty(), &empty)
        .map_err(Error::message("GET_CONFIG"))?;
    Ok(bytes)
}

fn share_memory(
    frontend: &mut Frontend,
    protocol: Protocol,
    memory: &SharedMemory,
) -> Result<(), Error> {
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST_BASE,
        memory_size: memory.len() as u64,
        userspace_addr: memory.user_address(0),
        mmap_offset: 0,
        mmap_handle: memory.fd(),
    };
    if protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
        frontend.add_mem_region(&region).map_err(Error::message("ADD_MEM_REG"))?;
    } else {
        frontend.set_mem_table(&[region]).map_err(Error::message("SET_MEM_TABLE"))?;
    }
    Ok(())
}

fn get_inflight(
    frontend: &mut Frontend,
    queues: u16,
    rings: &[Ring],
) -> Result<(VhostUserInflight, File), Error> {
    let queue_size = rings.iter().map(|ring| ring.layout.size).max().unwrap_or(0);
    frontend
        .get_inflight_fd(&VhostUserInflight::new(0, 0, queues, queue_size))
        .map_err(Error::message("GET_INFLIGHT_FD"))
}

/// Gives the backend everything that it needs to serve the rings.
fn start(
    frontend: &mut Frontend,
    protocol: Protocol,
    inflight: Option<&(VhostUserInflight, File)>,
    memory: &SharedMemory,
    rings: &[Ring],
) -> Result<(), Error> {
    share_memory(frontend, protocol, memory)?;
    if let Some((description, file)) = inflight {
        frontend
            .set_inflight_fd(description, file.as_raw_fd())
            .map_err(Error::message("SET_INFLIGHT_FD"))?;
    }
    rings.iter().enumerate().try_for_each(|(index, ring)| start_ring(frontend, index, ring, memory))
}

fn start_ring(
    frontend: &mut Frontend,
    index: usize,
    ring: &Ring,
    memory: &SharedMemory,
) -> Result<(), Error> {
    let layout = &ring.layout;
    let addresses = VringConfigData {
        queue_max_size: layout.size,
        queue_size: layout.size,
        flags: 0,
        desc_table_addr: memory.user_address(layout.desc),
        used_ring_addr: memory.user_address(layout.used),
        avail_ring_addr: memory.user_address(layout.avail),
        log_addr: None,
    };
    // A backend without other information continues after the last request that it answered, as
    // QEMU specifies.
    let base = u16::from_le(memory.atomic_u16(layout.used + 2).load(Ordering::Acquire));
    frontend.set_vring_num(index, layout.size).map_err(Error::message("SET_VRING_NUM"))?;
    frontend.set_vring_base(index, base).map_err(Error::message("SET_VRING_BASE"))?;
    frontend.set_vring_addr(index, &addresses).map_err(Error::message("SET_VRING_ADDR"))?;
    frontend.set_vring_call(index, &ring.call).map_err(Error::message("SET_VRING_CALL"))?;
    frontend.set_vring_kick(index, &ring.kick).map_err(Error::message("SET_VRING_KICK"))?;
    frontend.set_vring_enable(index, true).map_err(Error::message("SET_VRING_ENABLE"))
}

/// What wakes the threads that drive the queues.
fn calls(rings: &[Ring]) -> Result<Vec<EventFd>, Error> {
    rings.iter().map(|ring| ring.call.try_clone().map_err(Error::io("dup of an eventfd"))).collect()
}

/// The memory of all queues, planned before it is allocated.
struct Plan {
    layouts: Vec<(RingLayout, SlotLayout)>,
    event_idx: bool,
}

impl Plan {
    fn new(options: &Options, negotiated: &Negotiated) -> Result<Self, Error> {
        let has = |bit: u32| negotiated.features >> bit & 1 == 1;
        let too_many = |what, asked, available| Err(Error::TooMany { what, asked, available });
        if options.queues == 0 || options.depth == 0 {
            return Err(Error::Options("a queue and a depth of at least 1 are needed".into()));
        }
        let available = negotiated.max_queues.min(u64::from(negotiated.config.num_queues));
        if u64::from(options.queues) > available {
            return too_many("queues", u64::from(options.queues), available);
        }
        let limit = negotiated.config.size_max.map_or(u32::MAX as usize, |size| size as usize);
        let segment = options.segment.unwrap_or(limit).min(limit).min(options.max_data.max(1));
        let segments = options.max_data.div_ceil(segment);
        if let Some(seg_max) = negotiated.config.seg_max.filter(|&max| segments > max as usize) {
            return too_many("data segments in a request", segments as u64, u64::from(seg_max));
        }
        let indirect = has(VIRTIO_RING_F_INDIRECT_DESC);
        let stride = if indirect { 1 } else { SlotLayout::descriptors(options.max_data, segment) };
        let needed = usize::from(options.depth) * stride;
        let size = match options.queue_size {
            Some(size) if !size.is_power_of_two() => {
                return Err(Error::Options(format!("queue size {size} is no power of two")));
            }
            Some(size) => usize::from(size),
            None => needed.next_power_of_two().max(usize::from(DEFAULT_QUEUE_SIZE)),
        };
        if needed > size || size > usize::from(MAX_QUEUE_SIZE) {
            let available = size.min(usize::from(MAX_QUEUE_SIZE));
            return too_many("ring entries for this depth", needed as u64, available as u64);
        }
        let size = u16::try_from(size).expect("at most 32768");
        let mut at = 0;
        let layouts = (0..options.queues)
            .map(|_| {
                let ring = RingLayout::new(size, at);
                let slots =
                    SlotLayout::new(ring.end, options.depth, options.max_data, segment, indirect);
                at = slots.end;
                (ring, slots)
            })
            .collect();
        Ok(Self { layouts, event_idx: has(VIRTIO_RING_F_EVENT_IDX) })
    }

    fn memory_len(&self) -> usize {
        self.layouts.last().map_or(0, |(_, slots)| slots.end)
    }

    fn queues(
        &self,
        memory: &Arc<SharedMemory>,
        link: &Arc<Link>,
        options: &Options,
    ) -> Result<Vec<Queue>, Error> {
        let eventfd = || EventFd::new(EFD_CLOEXEC).map_err(Error::io("eventfd"));
        let queue = |(index, &(ring, slots)): (u16, &(RingLayout, SlotLayout))| {
            let ends = QueueEnds {
                index,
                kick: eventfd()?,
                call: eventfd()?,
                link: Arc::clone(link),
                stall_after: options.stall_after,
            };
            Ok(Queue::new(Arc::clone(memory), ring, self.event_idx, slots, ends))
        };
        (0..).zip(&self.layouts).map(queue).collect()
    }
}
