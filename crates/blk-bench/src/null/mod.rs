//! A backend that does as little as a backend can: it answers every request at once, or keeps a
//! disk in memory.
//!
//! Against it the load generator measures itself. With [`Options::fault`] it goes wrong in one
//! chosen way, so that tests can show that the generator's checks see it. It trusts its frontend no
//! further than memory safety needs.

pub(crate) mod null_ring;

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as VhostError, GpuBackend, Result as VhostResult,
    VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::queue::SECTOR_SIZE;
use crate::error::Error;
use crate::null::null_ring::{DeviceRing, Mapping};

/// Most queues that it has.
const MAX_QUEUES: u16 = 64;
/// Bytes of `struct virtio_blk_config` that it has.
const CONFIG_LEN: usize = 60;
/// Data segments in a request, as a Linux guest would see it.
const SEG_MAX: u32 = 254;

/// What it is.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Size of the disk.
    pub sectors: u64,
    /// Number of queues.
    pub queues: u16,
    /// Keep what is written.
    pub ram: bool,
    /// How long a queue polls for work before it sleeps.
    pub poll_time: Duration,
    /// What to do wrong.
    pub fault: Option<Fault>,
}

/// An injected fault. The number selects the request concerned (the first is 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A write is acknowledged and forgotten.
    LoseWrite(u64),
    /// Of a write only the first half of each sector arrives.
    TearWrite(u64),
    /// A write goes one sector too far.
    MisplaceWrite(u64),
    /// A request is answered twice.
    AnswerTwice(u64),
    /// A request is never answered.
    NoAnswer(u64),
    /// A request fails.
    IoError(u64),
    /// The length in the used ring is one byte too small.
    ShortUsedLen(u64),
    /// The connection is closed instead of an answer.
    Disconnect(u64),
}

/// What a RAM disk holds, from one connection to the next. Without `ram` it is empty.
#[derive(Clone, Debug)]
pub struct Content(pub(crate) Arc<Mutex<Vec<u8>>>);

impl Content {
    /// Zeros.
    ///
    /// # Errors
    /// The disk is larger than the address space.
    pub fn new(options: &Options) -> Result<Self, Error> {
        let bytes =
            if options.ram { options.sectors.checked_mul(SECTOR_SIZE as u64) } else { Some(0) };
        let bytes = bytes.and_then(|bytes| usize::try_from(bytes).ok());
        let bytes =
            bytes.ok_or_else(|| Error::Options("the disk does not fit into memory".into()))?;
        Ok(Self(Arc::new(Mutex::new(vec![0; bytes]))))
    }
}

/// What the queues of a session share.
pub(crate) struct Disk {
    pub options: Options,
    pub content: Content,
    pub requests: AtomicU64,
    pub writes: AtomicU64,
    /// To be shut down by a fault.
    pub connection: UnixStream,
}

/// Makes a listening socket, over a dead one of the same name if need be.
///
/// # Errors
/// The path is too long, in use by a live listener, or cannot be written.
pub fn listen(path: &Path) -> Result<UnixListener, Error> {
    let what = || format!("listen on {}", path.display());
    if let Err(error) = UnixStream::connect(path)
        && error.kind() == io::ErrorKind::ConnectionRefused
    {
        std::fs::remove_file(path).map_err(Error::io(what()))?;
    }
    UnixListener::bind(path).map_err(Error::io(what()))
}

/// Serves one connection to its end.
///
/// # Errors
/// Accepting it failed. The end of the connection, whatever its reason, is no error.
pub fn serve_one(
    listener: &UnixListener,
    options: &Options,
    content: &Content,
) -> Result<(), Error> {
    let (stream, _) = listener.accept().map_err(Error::io("accept"))?;
    let connection = stream.try_clone().map_err(Error::io("dup of the connection"))?;
    let disk = Disk {
        options: Options { queues: options.queues.clamp(1, MAX_QUEUES), ..*options },
        content: content.clone(),
        requests: AtomicU64::new(0),
        writes: AtomicU64::new(0),
        connection,
    };
    let session = Arc::new(Mutex::new(Session::new(Arc::new(disk))));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    while let Ok(()) | Err(VhostError::ReqHandlerError(_) | VhostError::InvalidOperation(_)) =
        handler.handle_request()
    {}
    // The lock is poisoned only by a panic in a handler, and then its queues are stopped all the
    // same.
    session.lock().unwrap_or_else(std::sync::PoisonError::into_inner).stop_all();
    Ok(())
}

/// A queue as set up so far.
#[derive(Default)]
struct Vring {
    size: u16,
    base: u16,
    desc: u64,
    avail: u64,
    used: u64,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u16>>,
}

struct Session {
    disk: Arc<Disk>,
    features: u64,
    mappings: Arc<Vec<Mapping>>,
    vrings: Vec<Vring>,
}

impl Session {
    fn new(disk: Arc<Disk>) -> Self {
        let vrings = (0..disk.options.queues).map(|_| Vring::default()).collect();
        Self { disk, features: 0, mappings: Arc::new(Vec::new()), vrings }
    }

    fn vring(&mut self, index: u32) -> VhostResult<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(VhostError::InvalidParam)
    }

    fn start(&mut self, index: u32) -> VhostResult<()> {
        let (mappings, disk) = (Arc::clone(&self.mappings), Arc::clone(&self.disk));
        let event_idx = self.features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let vring = self.vring(index)?;
        if vring.thread.is_some() {
            return Ok(());
        }
        let (Some(kick), Some(call)) = (&vring.kick, &vring.call) else {
            return Err(VhostError::InvalidOperation("a queue is enabled without its eventfds"));
        };
        let (kick, call) = (clone(kick)?, clone(call)?);
        let parts = [vring.desc, vring.avail, vring.used];
        let ring = DeviceRing::new(mappings, vring.size, parts, vring.base, event_idx)
            .ok_or(VhostError::InvalidParam)?;
        vring.stop = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&vring.stop);
        vring.thread = Some(std::thread::spawn(move || ring.serve(&disk, &kick, &call, &stop)));
        Ok(())
    }

    fn stop(&mut self, index: u32) -> VhostResult<u16> {
        let vring = self.vring(index)?;
        if let Some(thread) = vring.thread.take() {
            vring.stop.store(true, Ordering::Relaxed);
            if let Some(kick) = &vring.kick {
                let _ = kick.write(1);
            }
            vring.base = thread.join().unwrap_or(vring.base);
        }
        Ok(vring.base)
    }

    fn stop_all(&mut self) {
        for index in 0..u32::from(self.disk.options.queues) {
            let _ = self.stop(index);
        }
    }

    /// Adds memory; queues that run are stopped for it, and go on after it.
    fn add_region(&mut self, region: &VhostUserMemoryRegion, file: &File) -> VhostResult<()> {
        let mapping = Mapping::new(region, file).map_err(VhostError::ReqHandlerError)?;
        let running: Vec<u32> = (0..)
            .zip(&self.vrings)
            .filter(|(_, vring)| vring.thread.is_some())
            .map(|(index, _)| index)
            .collect();
        self.stop_all();
        Arc::get_mut(&mut self.mappings)
            .ok_or(VhostError::InvalidOperation("a queue still uses the memory table"))?
            .push(mapping);
        running.into_iter().try_for_each(|index| self.start(index))
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut bytes = [0; CONFIG_LEN];
        bytes[..8].copy_from_slice(&self.disk.options.sectors.to_le_bytes());
        bytes[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        bytes[32] = 1;
        bytes[34..36].copy_from_slice(&self.disk.options.queues.to_le_bytes());
        for at in [36, 48] {
            bytes[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            bytes[at + 4..at + 8].copy_from_slice(&1_u32.to_le_bytes());
        }
        bytes
    }
}

fn clone(fd: &EventFd) -> VhostResult<EventFd> {
    fd.try_clone().map_err(VhostError::ReqHandlerError)
}

fn eventfd(file: Option<File>) -> Option<EventFd> {
    // SAFETY: the number is owned by `file`, which is given up for it.
    file.map(|file| unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

fn unsupported<T>() -> VhostResult<T> {
    Err(VhostError::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.stop_all();
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        let virtio = bits.iter().fold(0, |all, bit| all | 1 << bit);
        Ok(virtio | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.stop_all();
        self.mappings = Arc::new(Vec::new());
        for (region, file) in regions.iter().zip(&files) {
            self.add_region(region, file)?;
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        self.vring(index)?.size = u16::try_from(num).map_err(|_| VhostError::InvalidParam)?;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let vring = self.vring(index)?;
        (vring.desc, vring.used, vring.avail) = (descriptor, used, available);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        self.vring(index)?.base = u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let base = self.stop(index)?;
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        self.vring(index.into())?.kick = eventfd(fd);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        self.vring(index.into())?.call = eventfd(fd);
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> VhostResult<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<Protocol> {
        Ok(Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> VhostResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(self.disk.options.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        if enable { self.start(index) } else { self.stop(index).map(drop) }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> VhostResult<Vec<u8>> {
        let (offset, size) = (offset as usize, size as usize);
        let config = self.config();
        Ok((offset..offset + size).map(|at| config.get(at).copied().unwrap_or(0)).collect())
    }

    fn set_config(
        &mut self,
        _offset: u32,
        _buf: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> VhostResult<()> {
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        unsupported()
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> VhostResult<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> VhostResult<()> {
        unsupported()
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(8)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        self.add_region(region, &file)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        unsupported()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> VhostResult<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        unsupported()
    }
}
