//! A hostile frontend against a session, in one process and one thread: messages in any order, of
//! any content, cut off anywhere, with descriptors of every kind. What the session starts is served
//! without a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cow_format::SectorCount;
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigHandler, Signal, signal};
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::Input;
use crate::datapath::worker::RingStart;
use crate::datapath::worker::handle::StopOrder;
use crate::session::connection::Connection;
use crate::session::vring::RunningRing;
use crate::session::{Device, PROTOCOL_FEATURES, Session};
use crate::virtio::config::{self, DiskShape};
use crate::virtio::device_queue::DeviceQueue;
use crate::virtio::notify::{Bell, EventDescriptor, Kick};
use crate::virtio::request::{IoVecs, ParseLimits, Parsed, parse};
use crate::virtio::split_queue::SplitQueue;

const CAPACITY: u64 = 1000;
const QUEUES: u16 = 2;
const MESSAGES_MAX: usize = 48;
/// Requests that are served at a time: the guest could offer them for ever.
const SERVED_MAX: usize = 64;

/// Where the well-formed beginning of a session has its memory, in the guest's and in the
/// frontend's terms, and its length.
const GUEST: u64 = 0x10_0000;
const FRONTEND: u64 = 0x7f00_0000_0000;
const MEMORY_LEN: u64 = 0x1_0000;
/// Places in it: available ring, used ring.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

/// Serves one frontend after the other.
///
/// Input: which part of a well-formed beginning is sent; changes of memory before and while rings
/// are served; messages.
pub fn vhost_user(data: &[u8]) {
    // SAFETY: ignoring a signal runs no code. (libFuzzer's main function is not Rust's, which does
    // this.)
    let ignored = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
    assert!(ignored.is_ok());
    let input = &mut Input(data);
    let memory = Arc::new(memfd(MEMORY_LEN));
    let beginning = input.u8();
    for _ in 0..input.u8() % 16 {
        let at = u64::from(input.u16()) % MEMORY_LEN;
        memory.write_all_at(input.short(), at).expect("a file in memory takes it");
    }
    let changes = Mutex::new(input.short().to_vec());
    let guest = Arc::new(Guest { memory, changes });
    let shape = DiskShape {
        capacity: CAPACITY,
        num_queues: QUEUES,
        queue_size_max: 256,
        read_only: false,
        logical_block: 512,
    };
    let failure = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let device = FuzzDevice { guest: Arc::clone(&guest), failure };
    let session = Arc::new(Mutex::new(Session::new(device, &shape)));
    for any_file in [false, true] {
        let (frontend, backend) = UnixStream::pair().expect("two sockets");
        frontend.set_nonblocking(true).expect("a socket");
        begin(&frontend, &guest.memory, beginning);
        for _ in 0..MESSAGES_MAX {
            if input.is_empty() || !send_message(&frontend, &guest.memory, input) {
                break;
            }
        }
        frontend.shutdown(Shutdown::Write).expect("a connected socket");
        let connection = Connection::new(backend, &session, any_file).expect("two sockets");
        let served = connection.serve(None, None);
        assert!(served.is_ok(), "{served:?}");
        if input.is_empty() {
            break;
        }
    }
}

fn memfd(len: u64) -> File {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("a file in memory"));
    file.set_len(len).expect("a file in memory");
    file
}

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    [[request, flags, len].map(u32::to_ne_bytes).concat().as_slice(), body].concat()
}

/// Sends as much of a session's beginning as the bits say: after all of it ring 0 runs.
fn begin(frontend: &UnixStream, memory: &File, bits: u8) {
    let numbers = |numbers: &[u64]| numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
    let state = |value: u32| [0, value].map(u32::to_ne_bytes).concat();
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    let (memory, event) = (memory.as_raw_fd(), event.as_raw_fd());
    // All that are offered but LOG_ALL; the layout of a queue's addresses is flags, then five.
    let features = config::features(false) & !config::F_LOG_ALL;
    let ring = [0, FRONTEND, FRONTEND + USED, FRONTEND + AVAIL, 0];
    let messages: [(FrontendReq, Vec<u8>, Option<i32>); 8] = [
        (FrontendReq::SET_FEATURES, numbers(&[features]), None),
        (FrontendReq::SET_PROTOCOL_FEATURES, numbers(&[PROTOCOL_FEATURES.bits()]), None),
        (FrontendReq::SET_MEM_TABLE, numbers(&[1, GUEST, MEMORY_LEN, FRONTEND, 0]), Some(memory)),
        (FrontendReq::SET_VRING_NUM, state(16), None),
        (FrontendReq::SET_VRING_ADDR, numbers(&ring), None),
        (FrontendReq::SET_VRING_CALL, numbers(&[0]), Some(event)),
        (FrontendReq::SET_VRING_KICK, numbers(&[0]), Some(event)),
        (FrontendReq::SET_VRING_ENABLE, state(1), None),
    ];
    for (index, (request, body, fd)) in messages.into_iter().enumerate() {
        if bits & (1 << index) != 0 {
            let fds: Vec<_> = fd.into_iter().collect();
            let bytes = message(request.into(), 1, &body);
            frontend.send_with_fds(&[bytes.as_slice()], &fds).expect("room in the socket");
        }
    }
}

/// Sends one message with its descriptors; whether there was room.
fn send_message(frontend: &UnixStream, memory: &File, input: &mut Input<'_>) -> bool {
    let (request, shape) = (input.u8(), input.u8());
    // Version 1, and perhaps "a reply is requested"; or anything.
    let flags = match shape & 3 {
        0 | 1 => 1 | u32::from(shape & 1) << 3,
        _ => input.u8().into(),
    };
    let mut bytes = message(request.into(), flags, input.short());
    if shape & 4 != 0 {
        // Another length than there is.
        bytes[8..12].copy_from_slice(&input.array::<4>());
    }
    let mut kept: Vec<OwnedFd> = Vec::new();
    let mut fds = Vec::new();
    for _ in 0..shape >> 3 & 3 {
        let count = fds.len() + usize::from(input.u8() >> 6);
        let fd = descriptor(input.u8(), memory, frontend, &mut kept);
        fds.resize(count + 1, fd);
    }
    if shape & 0x40 != 0 {
        let cut = usize::from(input.u8()).min(bytes.len() - 1);
        bytes.truncate(bytes.len() - cut);
    }
    frontend.send_with_fds(&[bytes.as_slice()], &fds).is_ok()
}

/// A descriptor of the kind that `kind` says.
fn descriptor(kind: u8, memory: &File, frontend: &UnixStream, kept: &mut Vec<OwnedFd>) -> i32 {
    let open = |path: &str| OpenOptions::new().read(true).open(path);
    let pipe = || io::pipe().map(|(reader, writer)| (OwnedFd::from(reader), OwnedFd::from(writer)));
    let event = |value, flags| {
        EventFd::new(flags).and_then(|event| {
            event.write(value)?;
            // A duplicate, as an owned descriptor.
            event.fd().try_clone_to_owned()
        })
    };
    let made = match kind % 16 {
        0 | 1 => return memory.as_raw_fd(),
        2 => event(1, EFD_NONBLOCK),
        3 => event(1, 0),
        // The next signal would block.
        4 => event(u64::MAX - 1, 0),
        5 => pipe().map(|(reader, _)| reader),
        6 => pipe().map(|(_, writer)| writer),
        7 => pipe().map(|(reader, writer)| {
            kept.push(writer);
            reader
        }),
        8 => Ok(memfd(4096 + u64::from(kind >> 4) * 1000).into()),
        9 => open("/dev/null").map(OwnedFd::from),
        10 => open("/dev/zero").map(OwnedFd::from),
        11 => open("/").map(OwnedFd::from),
        12 => return frontend.as_raw_fd(),
        13 => Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(|epoll| epoll.0).map_err(Into::into),
        14 => open(&format!("/proc/self/fd/{}", memory.as_raw_fd())).map(OwnedFd::from),
        _ => UnixStream::pair().map(|(one, other)| {
            kept.push(other.into());
            one.into()
        }),
    };
    kept.push(made.expect("a descriptor"));
    kept.last().map_or(-1, |fd| fd.as_fd().as_raw_fd())
}

/// The memory that the frontend shares, and what becomes of it while rings are served.
struct Guest {
    memory: Arc<File>,
    changes: Mutex<Vec<u8>>,
}

impl Guest {
    /// Makes the next change: some bytes are others, or the file is shorter.
    fn change(&self) {
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut input = Input(&changes);
        let (kind, at) = (input.u8(), u64::from(input.u16()));
        let bytes = input.array::<4>();
        let left = input.0.to_vec();
        *changes = left;
        let changed = match kind {
            0..16 => Ok(()),
            16 => self.memory.set_len(at),
            _ => self.memory.write_all_at(&bytes[..usize::from(kind) % 4], at % MEMORY_LEN),
        };
        assert!(changed.is_ok(), "{changed:?}");
    }
}

struct FuzzDevice {
    guest: Arc<Guest>,
    failure: EventFd,
}

impl Device for FuzzDevice {
    type Ring = FuzzRing;

    fn start(&self, mut start: RingStart) -> io::Result<FuzzRing> {
        let next_avail = start.state.next_avail;
        let queue = SplitQueue::new(Arc::clone(&start.memory), start.state).map(|mut queue| {
            if let Some(inflight) = start.inflight.take() {
                queue.track(inflight);
            }
            if let Some(log) = &start.log {
                queue.log(log.clone());
            }
            queue
        });
        Kick::new(start.kick.fd()).consume();
        let mut ring =
            FuzzRing { queue: queue.ok(), start, guest: Arc::clone(&self.guest), next_avail };
        if !ring.serve() {
            _ = self.failure.write(1);
        }
        Ok(ring)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn release(&self) -> io::Result<()> {
        Ok(())
    }

    fn failure(&self) -> &EventFd {
        &self.failure
    }
}

struct FuzzRing {
    queue: Option<SplitQueue>,
    start: RingStart,
    guest: Arc<Guest>,
    next_avail: u16,
}

impl RunningRing for FuzzRing {
    fn ask(&self, _order: StopOrder) {}

    fn stop(mut self, _asked: Instant) -> Option<u16> {
        _ = self.serve();
        Some(self.queue.map_or(self.next_avail, |queue| queue.next_avail()))
    }
}

impl FuzzRing {
    /// Answers what is in the ring, every other request as done; false once the ring is broken.
    fn serve(&mut self) -> bool {
        let Some(queue) = &mut self.queue else { return false };
        let call = self.start.call.as_ref().map(|call| Bell::new(call.fd()));
        let limits = ParseLimits { capacity: SectorCount::new(CAPACITY), read_only: false };
        let mut iovecs = IoVecs::new();
        for served in 0..SERVED_MAX {
            self.guest.change();
            let head = match queue.pop() {
                Ok(Some(head)) => head,
                Ok(None) if queue.enable_notifications() => continue,
                Ok(None) => return !queue.poisoned(),
                Err(_) => return false,
            };
            let chain = queue.chain(&head).inspect(|_| self.guest.change());
            let reply = match parse(&self.start.memory, chain, &limits, &mut iovecs) {
                Parsed::Reply(reply) => reply,
                Parsed::Request(request) => {
                    let (_, pending) = request.start();
                    if served % 2 == 0 { pending.done() } else { pending.failed() }
                }
            };
            queue.mark_buffers(&head, reply.status_at());
            let written = reply.finish(&self.start.memory);
            queue.push(head, written);
            // Nothing that came from lost memory may be published.
            if queue.poisoned() {
                return false;
            }
            if queue.publish()
                && let Some(call) = &call
            {
                call.signal();
            }
        }
        true
    }
}
