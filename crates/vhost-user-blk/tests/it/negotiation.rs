//! How each frontend begins, replayed from its source: the same messages in the same order with the
//! same flags. At the end a sector is read through the ring that was set up.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::common::{Daemon, SECTORS, sector};
use testkit::frontend::{
    F_CONFIG_WCE, F_FLUSH, F_LOG_ALL, F_PROTOCOL_FEATURES, F_VERSION_1, P_BACKEND_REQ, P_CONFIG,
    P_CONFIGURE_MEM_SLOTS, P_INFLIGHT_SHMFD, P_LOG_SHMFD, P_MQ, P_REPLY_ACK, PROTOCOL_FEATURES,
    RawFrontend,
};
use testkit::memory::{DEFAULT_LEN, GUEST, Memory, VMM, table};
use testkit::queue::{Queue, readable, writable};
use testkit::request::{IN, header};
use testkit::ring::{Call, Ring};
use vhost::vhost_user::message::{
    FrontendReq, VHOST_USER_CONFIG_OFFSET, VhostUserConfigFlags, VhostUserHeaderFlag,
    VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

/// RING_INDIRECT_DESC, RING_EVENT_IDX, SEG_MAX, BLK_SIZE, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES.
const F_MORE: u64 = 1 << 28 | 1 << 29 | 1 << 2 | 1 << 6 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 14;
/// What a writable disk offers.
const F_ALL: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH | F_CONFIG_WCE | F_LOG_ALL | F_MORE;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn capacity(config: &[u8]) -> u64 {
    u64::from_le_bytes(config[..8].try_into().unwrap())
}

#[test]
fn qemu() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &["--num-queues=2"]);
    let mut frontend = RawFrontend::new(daemon.connect());
    // vhost_dev_init
    assert_eq!(frontend.get_u64(FrontendReq::GET_FEATURES), F_ALL);
    assert_eq!(frontend.get_u64(FrontendReq::GET_PROTOCOL_FEATURES), PROTOCOL_FEATURES);
    frontend.send_u64(FrontendReq::SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES);
    assert_eq!(frontend.get_u64(FrontendReq::GET_QUEUE_NUM), 2);
    assert!(frontend.get_u64(FrontendReq::GET_MAX_MEM_SLOTS) >= 32);
    frontend.send(FrontendReq::SET_OWNER, &[], &[]);
    assert_eq!(frontend.get_u64(FrontendReq::GET_FEATURES), F_ALL);
    let masked = EventFd::new(0).unwrap();
    for queue in 0..2 {
        frontend.send_fd(FrontendReq::SET_VRING_CALL, queue, &masked);
    }
    let config = frontend.get_config(0, 60).unwrap();
    assert_eq!((capacity(&config), config[32]), (SECTORS, 1));
    assert_eq!(u16::from_le_bytes([config[34], config[35]]), 2);
    // vhost_dev_start; only some messages ask for an acknowledgement.
    frontend.send_u64(FrontendReq::SET_FEATURES, F_ALL & !F_LOG_ALL);
    let memory = Memory::default();
    frontend.need_reply = true;
    let fds = [memory.file.as_raw_fd()];
    frontend.send(FrontendReq::ADD_MEM_REG, &memory.region(), &fds);
    frontend.need_reply = false;
    let mut rings = [Ring::new(0), Ring::new(1)];
    for ring in &rings {
        ring.set_up(&mut frontend);
    }
    for ring in &rings {
        ring.enable(&mut frontend, true);
    }
    for ring in &mut rings {
        assert_eq!(ring.read_sector(&memory, 77), sector(77));
    }
    // vhost_dev_stop
    for (queue, ring) in (0..).zip(&rings) {
        ring.enable(&mut frontend, false);
        assert_eq!(frontend.get_vring_base(queue), 1);
    }
    daemon.terminate();
}

/// cloud-hypervisor and Firecracker use the frontend of the `vhost` crate.
fn vhost_crate_start(frontend: &mut Frontend, memory: &Memory, ring: &Ring, need_reply: bool) {
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST,
        memory_size: memory.len,
        userspace_addr: VMM,
        mmap_offset: 0,
        mmap_handle: memory.file.as_raw_fd(),
    };
    if need_reply {
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    frontend.set_mem_table(&[region]).unwrap();
    frontend.set_vring_num(0, 16).unwrap();
    let addresses = ring.addresses();
    let at = |n: usize| u64::from_ne_bytes(addresses[8 * n..8 * n + 8].try_into().unwrap());
    let config = VringConfigData {
        queue_max_size: 16,
        queue_size: 16,
        flags: 0,
        desc_table_addr: at(1),
        used_ring_addr: at(2),
        avail_ring_addr: at(3),
        log_addr: None,
    };
    frontend.set_vring_addr(0, &config).unwrap();
    frontend.set_vring_base(0, 0).unwrap();
    let Call::Event(call) = &ring.call else { panic!("a pipe") };
    frontend.set_vring_call(0, call).unwrap();
    frontend.set_vring_kick(0, &ring.queue.kick).unwrap();
}

#[test]
fn cloud_hypervisor() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &["--num-queues=4"]);
    let mut frontend = Frontend::from_stream(daemon.connect(), 4);
    frontend.set_owner().unwrap();
    let wanted = F_ALL & !F_LOG_ALL | 1 << 1 | 1 << 5;
    let features = frontend.get_features().unwrap() & wanted;
    frontend.set_features(features).unwrap();
    let offered = frontend.get_protocol_features().unwrap();
    let protocol = offered
        & (VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD);
    let tracking = P_INFLIGHT_SHMFD | P_LOG_SHMFD;
    let expected = P_CONFIG | P_MQ | P_CONFIGURE_MEM_SLOTS | P_REPLY_ACK | tracking;
    assert_eq!(protocol.bits(), expected);
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert_eq!(frontend.get_queue_num().unwrap(), 4);
    // The structure begins at 0x100 for it.
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, config) = frontend.get_config(VHOST_USER_CONFIG_OFFSET, 60, flags, &[0; 60]).unwrap();
    assert_eq!((capacity(&config), u32_at(&config, 20)), (SECTORS, 512));

    frontend.set_features(features).unwrap();
    let (memory, mut ring) = (Memory::default(), Ring::new(0));
    let asked = VhostUserInflight::new(0, 0, 4, 16);
    let (inflight, area) = frontend.get_inflight_fd(&asked).unwrap();
    frontend.set_inflight_fd(&inflight, area.as_raw_fd()).unwrap();
    vhost_crate_start(&mut frontend, &memory, &ring, true);
    frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(ring.read_sector(&memory, 5), sector(5));
    // Pause and resume.
    frontend.set_vring_enable(0, false).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(ring.read_sector(&memory, 6), sector(6));
    // The guest switches the write cache off.
    frontend.set_config(32, flags, &[0]).unwrap();
    assert_eq!(frontend.get_config(32, 1, flags, &[0]).unwrap().1, [0]);
    // Reset.
    frontend.set_vring_enable(0, false).unwrap();
    assert_eq!(frontend.get_vring_base(0).unwrap(), 2);
    daemon.terminate();
}

#[test]
fn firecracker() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut frontend = Frontend::from_stream(daemon.connect(), 1);
    frontend.set_owner().unwrap();
    // Its default cache_type, Unsafe, leaves FLUSH out.
    let wanted = F_VERSION_1 | F_PROTOCOL_FEATURES | 1 << 29 | 1 << 5;
    let features = frontend.get_features().unwrap() & wanted;
    frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(VhostUserProtocolFeatures::CONFIG).unwrap();
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, config) = frontend.get_config(0, 60, flags, &[0; 60]).unwrap();
    assert_eq!(capacity(&config), SECTORS);

    frontend.set_features(features).unwrap();
    let (memory, mut ring) = (Memory::default(), Ring::new(0));
    vhost_crate_start(&mut frontend, &memory, &ring, false);
    // A kick comes before the ring is enabled.
    ring.submit(&memory, testkit::request::IN, 9, &[0; 512]);
    ring.kick();
    frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(ring.wait::<512>(&memory), (0, sector(9)));
    daemon.terminate();
}

#[test]
fn crosvm() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &["--num-queues=3"]);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.send(FrontendReq::SET_OWNER, &[], &[]);
    let features = frontend.get_u64(FrontendReq::GET_FEATURES);
    assert_eq!(frontend.get_u64(FrontendReq::GET_PROTOCOL_FEATURES), PROTOCOL_FEATURES);
    frontend.send_u64(FrontendReq::SET_PROTOCOL_FEATURES, P_CONFIG | P_MQ | P_REPLY_ACK);
    // It sets up as many queues as there are.
    let queues = u32::try_from(frontend.get_u64(FrontendReq::GET_QUEUE_NUM)).unwrap();
    assert_eq!(queues, 3);
    // It passes each access of the guest on.
    let whole = frontend.get_config(0, 60).unwrap();
    for (offset, size) in [(0, 4), (4, 4), (20, 4), (24, 1), (26, 2), (33, 1), (35, 1), (56, 1)] {
        let (from, to) = (offset as usize, (offset + size) as usize);
        assert_eq!(frontend.get_config(offset, size).unwrap(), whole[from..to]);
    }
    assert_eq!(frontend.get_config(58, 38).unwrap(), [0; 38]);

    frontend.send_u64(FrontendReq::SET_FEATURES, features);
    let mut memory = Memory::new(1500);
    let rings = (0..queues).map(|number| Queue::new(&mut memory, number, CROSVM_RING_SIZE));
    let mut rings: Vec<_> = rings.collect();
    memory.set(&mut frontend);
    for ring in &rings {
        ring.start(&mut frontend, false);
    }
    let count = u16::try_from(SECTORS).unwrap();
    for ring in &mut rings {
        let answers = read_all_sectors(ring, &mut memory);
        assert!(
            answers.iter().zip(0..).all(|(answer, n)| *answer == (0, sector(n))),
            "{}",
            ring.number
        );
    }
    for queue in 0..queues {
        assert_eq!(frontend.get_vring_base(queue), u32::from(count));
    }
    daemon.terminate();
}

/// Unless its `max-queue-size=` says less.
const CROSVM_RING_SIZE: u16 = 32768;

/// Reads each sector of the image by a request of its own, all at the same time, in descriptors up
/// to the ring's last; status and data of each.
fn read_all_sectors(ring: &mut Queue, memory: &mut Memory) -> Vec<(u8, [u8; 512])> {
    let headers = memory.take(16 * SECTORS);
    let (data, statuses) = (memory.take(512 * SECTORS), memory.take(SECTORS));
    let first = ring.driver.layout.size - 3 * u16::try_from(SECTORS).unwrap();
    for (n, head) in (0..SECTORS).zip((first..).step_by(3)) {
        let (at, status) = (headers + 16 * n, statuses + n);
        memory.write(at, &header(IN, n));
        memory.write(status, &[0xee]);
        let buffers = [readable(at, 16), writable(data + 512 * n, 512), writable(status, 1)];
        ring.describe(memory, head, &buffers);
        ring.offer(memory, head);
    }
    ring.wait(memory);
    let answer = |n| {
        let [status] = memory.read(statuses + n);
        (status, memory.read(data + 512 * n))
    };
    (0..SECTORS).map(answer).collect()
}

#[test]
fn user_mode_linux() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.send(FrontendReq::SET_OWNER, &[], &[]);
    let features = frontend.get_u64(FrontendReq::GET_FEATURES);
    frontend.get_u64(FrontendReq::GET_PROTOCOL_FEATURES);
    let wanted = P_CONFIG | P_REPLY_ACK | P_BACKEND_REQ;
    frontend.send_u64(FrontendReq::SET_PROTOCOL_FEATURES, wanted);
    frontend.need_reply = true;
    let (requests, backends_end) = UnixStream::pair().unwrap();
    let fds = [backends_end.as_raw_fd()];
    frontend.send(FrontendReq::SET_BACKEND_REQ_FD, &[], &fds);
    drop(backends_end);
    // It always reads from the start, as far as it needs, and wants exactly that.
    for size in [8, 12, 24, 33, 36, 57, 96] {
        let config = frontend.get_config(0, size).unwrap();
        assert_eq!(capacity(&config), SECTORS);
    }
    frontend.send_u64(FrontendReq::SET_FEATURES, features);
    let memory = Memory::default();
    // Room for two regions, one of them used.
    let padded = [table(DEFAULT_LEN), vec![0; 32]].concat();
    frontend.send(FrontendReq::SET_MEM_TABLE, &padded, &[memory.file.as_raw_fd()]);
    // Its call descriptor is a pipe, passed before the ring is described.
    let mut ring = Ring::new(0);
    let (reader, writer) = std::io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    frontend.send_fd(FrontendReq::SET_VRING_CALL, 0, &writer);
    drop(writer);
    frontend.send_state(FrontendReq::SET_VRING_NUM, 0, testkit::ring::RING_SIZE.into());
    frontend.send_state(FrontendReq::SET_VRING_BASE, 0, 0);
    frontend.send(FrontendReq::SET_VRING_ADDR, &ring.addresses(), &[]);
    frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &ring.queue.kick);
    ring.enable(&mut frontend, true);
    ring.call = Call::Pipe(reader);
    for number in [0, 1, 1000] {
        assert_eq!(ring.read_sector(&memory, number), sector(number));
    }
    // The channel for the backend's requests is still open.
    requests.set_nonblocking(true).unwrap();
    let error = (&requests).read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    daemon.terminate();
}

#[test]
fn the_configuration_space_ends_somewhere() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES, PROTOCOL_FEATURES);
    assert_eq!(frontend.get_config(0, 256).unwrap()[60..], [0; 196]);
    // An error is a reply of size 0, and not the end.
    assert_eq!(frontend.get_config(1, 256), None);
    assert_eq!(frontend.get_config(255, 1), Some(vec![0]));
    daemon.terminate();
}

#[test]
fn a_read_only_disk_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &["--read-only"]);
    let mut frontend = RawFrontend::new(daemon.connect());
    let read_only = 1 << 5;
    let writing = F_CONFIG_WCE | 1 << 13 | 1 << 14;
    assert_eq!(frontend.get_u64(FrontendReq::GET_FEATURES), F_ALL & !writing | read_only);
    daemon.terminate();
}
