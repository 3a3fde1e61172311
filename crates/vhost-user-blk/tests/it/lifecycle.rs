//! Connections come, go, break and misbehave; the disk stays, and the daemon ends when it is told
//! to.

use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::common::{Daemon, PROGRAM, SECTORS, content, image, sector, upgrade_ok, with_fd};
use nix::sys::signal::Signal;
use testkit::frontend::{
    F_FLUSH, F_PROTOCOL_FEATURES, F_VERSION_1, NO_FD, PROTOCOL_FEATURES, RawFrontend, message,
    state,
};
use testkit::memory::{DEFAULT_LEN, Memory, single_region, table};
use testkit::request::{FLUSH, IN};
use testkit::ring::{RING_SIZE, Ring, running};
use testkit::wait::{is_readable, wait_until};
use vhost::vhost_user::message::FrontendReq;

const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH;

/// A frontend with one ring running.
struct Guest {
    frontend: RawFrontend,
    memory: Memory,
    ring: Ring,
}

impl Guest {
    fn new(stream: UnixStream) -> Self {
        let (frontend, memory, ring) = running(stream, FEATURES);
        Guest { frontend, memory, ring }
    }

    fn read(&mut self, number: u64) -> [u8; 512] {
        self.ring.read_sector(&self.memory, number)
    }

    fn write(&mut self, number: u64, data: &[u8; 512]) {
        self.ring.write_sector(&self.memory, number, data);
    }
}

#[test]
fn the_disk_outlives_its_connections() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    for round in 0..20 {
        let mut guest = Guest::new(daemon.connect());
        assert_eq!(guest.read(round), sector(round));
        guest.write(round + 1, &sector(round + 1000));
        drop(guest);
        let mut guest = Guest::new(daemon.connect());
        assert_eq!(guest.read(round + 1), sector(round + 1000));
        guest.write(round + 1, &sector(round + 1));
    }
    daemon.terminate();
    assert_eq!(std::fs::read(directory.path().join("disk.img")).unwrap(), content());
}

#[test]
fn nothing_leaks_from_one_connection_to_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut before = None;
    for round in 0..100 {
        let mut guest = Guest::new(daemon.connect());
        assert_eq!(guest.read(3), sector(3));
        // Memory added, and removed with a descriptor that must be closed.
        let body = guest.memory.region();
        guest.frontend.send(FrontendReq::REM_MEM_REG, &body, &[guest.memory.file.as_raw_fd()]);
        let files = [guest.memory.file.as_raw_fd()];
        guest.frontend.send(FrontendReq::ADD_MEM_REG, &body, &files);
        match round % 4 {
            0 => drop(guest),
            1 => {
                guest.frontend.get_vring_base(0);
                drop(guest);
            }
            2 => {
                // Descriptors with a message that takes none.
                let bytes = message(FrontendReq::SET_OWNER.into(), 1, &[]);
                guest.frontend.send_raw(&bytes, &[0, 1, 2]);
                guest.frontend.wait_closed();
            }
            _ => {
                // Descriptors with a message that never ends.
                let bytes = message(FrontendReq::SET_VRING_KICK.into(), 1, &[0; 8]);
                guest.frontend.send_raw(&bytes[..13], &[0]);
                drop(guest);
            }
        }
        daemon.wait_line("connection ended");
        let now = || (daemon.open_files(), daemon.threads());
        let before = *before.get_or_insert_with(now);
        // A thread closes what was refused.
        wait_until(&format!("{before:?} after round {round}"), || now() == before);
    }
    daemon.terminate();
}

#[test]
fn what_cannot_be_a_message_closes_the_connection_only() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &["--num-queues=2", "--queue-size=64"]);
    let request = |request: FrontendReq, body: &[u8]| message(request.into(), 1, body);
    let addresses = |desc: u64| {
        let rest = [desc, 0x7f12_3450_2000, 0x7f12_3450_1000, 0].map(u64::to_ne_bytes).concat();
        request(FrontendReq::SET_VRING_ADDR, &[state(0, 0), rest].concat())
    };
    let cases = [
        (vec![0xff; 64], "message"),
        (message(0, 1, &[]), "unknown request 0"),
        (message(9999, 1, &[]), "unknown request 9999"),
        (message(FrontendReq::GET_FEATURES.into(), 0, &[]), "GET_FEATURES"),
        (message(FrontendReq::GET_FEATURES.into(), 5, &[]), "GET_FEATURES"),
        (message(FrontendReq::GET_FEATURES.into(), 0x81, &[]), "GET_FEATURES"),
        (message(FrontendReq::GET_FEATURES.into(), 1, &[0; 8]), "GET_FEATURES"),
        ([1u32, 1, 0x1001].map(u32::to_ne_bytes).concat(), "GET_FEATURES"),
        (request(FrontendReq::SET_FEATURES, &[0; 4]), "SET_FEATURES"),
        (request(FrontendReq::SET_FEATURES, &[0xff; 8]), "were not offered"),
        (request(FrontendReq::SET_PROTOCOL_FEATURES, &[0xff; 8]), "were not offered"),
        (request(FrontendReq::SET_MEM_TABLE, &[0; 8]), "SET_MEM_TABLE"),
        (request(FrontendReq::SET_MEM_TABLE, &table(DEFAULT_LEN)), "SET_MEM_TABLE"),
        (request(FrontendReq::ADD_MEM_REG, &single_region(DEFAULT_LEN)), "ADD_MEM_REG"),
        (request(FrontendReq::REM_MEM_REG, &[1; 40]), "no memory region"),
        (request(FrontendReq::SET_VRING_NUM, &state(2, 16)), "no such queue"),
        (request(FrontendReq::SET_VRING_NUM, &state(0, 128)), "--queue-size"),
        (request(FrontendReq::SET_VRING_NUM, &state(0, 48)), "power of two"),
        (request(FrontendReq::SET_VRING_BASE, &state(0, 0x1_0000)), "16 bits"),
        (addresses(0x7f12_3450_0008), "SET_VRING_ADDR"),
        (addresses(0x1000), "descriptor table at 0x1000 is in no memory region"),
        (request(FrontendReq::SET_VRING_ENABLE, &state(0, 2)), "SET_VRING_ENABLE"),
        (request(FrontendReq::SET_VRING_KICK, &0u64.to_ne_bytes()), "SET_VRING_KICK"),
        (request(FrontendReq::SET_VRING_CALL, &2u64.to_ne_bytes()), "SET_VRING_CALL"),
        (request(FrontendReq::SET_VRING_KICK, &(NO_FD | 9).to_ne_bytes()), "no such queue"),
        (request(FrontendReq::GET_VRING_BASE, &state(7, 0)), "no such queue"),
        (request(FrontendReq::GET_CONFIG, &[0; 4]), "GET_CONFIG"),
        (request(FrontendReq::SET_CONFIG, &[0; 12]), "SET_CONFIG"),
        (request(FrontendReq::GET_INFLIGHT_FD, &[1; 24]), "GET_INFLIGHT_FD"),
        (request(FrontendReq::SET_LOG_BASE, &[1; 16]), "SET_LOG_BASE"),
        (request(FrontendReq::SET_BACKEND_REQ_FD, &[]), "SET_BACKEND_REQ_FD"),
        (request(FrontendReq::VRING_KICK, &state(0, 0)), "VRING_KICK"),
        (request(FrontendReq::SET_STATUS, &[0; 8]), "SET_STATUS"),
        (request(FrontendReq::IOTLB_MSG, &[0; 32]), "IOTLB_MSG"),
    ];
    for (bytes, expected) in cases {
        let mut guest = Guest::new(daemon.connect());
        assert_eq!(guest.read(8), sector(8));
        guest.frontend.send_raw(&bytes, &[]);
        daemon.closes(guest.frontend, expected);
    }
    let mut guest = Guest::new(daemon.connect());
    assert_eq!(guest.read(8), sector(8));
    daemon.terminate();
}

#[test]
fn a_refused_message_is_answered_before_the_connection_ends() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(daemon.connect());
    let need_reply = 1 | 8;
    let bytes = message(FrontendReq::SET_VRING_NUM.into(), need_reply, &state(0, 3));
    guest.frontend.send_raw(&bytes, &[]);
    assert_ne!(guest.frontend.reply_u64(FrontendReq::SET_VRING_NUM), 0);
    guest.frontend.wait_closed();
    daemon.terminate();
}

#[test]
fn a_message_may_come_in_pieces() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
    let bytes = message(FrontendReq::SET_VRING_NUM.into(), 1 | 8, &state(0, 16));
    for byte in bytes {
        frontend.stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(frontend.reply_u64(FrontendReq::SET_VRING_NUM), 0);
    daemon.terminate();
}

#[test]
fn a_second_frontend_waits_for_the_first_to_go() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut first = Guest::new(daemon.connect());
    let mut second = RawFrontend::new(daemon.connect());
    second.send_raw(&message(FrontendReq::GET_FEATURES.into(), 1, &[]), &[]);
    assert_eq!(first.read(1), sector(1));
    assert!(!is_readable(&second.stream));
    drop(first);
    daemon.wait_line("connection ended");
    assert_ne!(second.reply_u64(FrontendReq::GET_FEATURES), 0);
    drop(second);
    daemon.terminate();
}

#[test]
fn a_signal_ends_it_in_every_state() {
    let stall_in_message = |guest: &mut Guest| guest.frontend.send_half(FrontendReq::SET_FEATURES);
    let stall_in_reply = |guest: &mut Guest| {
        // Requests without end, and nobody reads the replies.
        let bytes = message(
            FrontendReq::GET_CONFIG.into(),
            1,
            &[&[0u8, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &[0; 256]].concat(),
        );
        guest.frontend.stream.set_nonblocking(true).unwrap();
        let full = loop {
            if let Err(e) = guest.frontend.stream.write(&bytes) {
                break e;
            }
        };
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
    };
    let states: [&dyn Fn(&mut Guest); 4] = [
        &|_| {},
        &|guest| assert_eq!(guest.read(4), sector(4)),
        &stall_in_message,
        &stall_in_reply,
    ];
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        for state in states {
            let directory = tempfile::tempdir().unwrap();
            let daemon = Daemon::with_image(directory.path(), &[]);
            let mut guest = Guest::new(daemon.connect());
            guest.write(100, &sector(4711));
            state(&mut guest);
            daemon.signal(signal);
            // Once more; it does no harm.
            daemon.signal(signal);
            let (status, log) = daemon.wait();
            assert_eq!(status, Some(0), "{log}");
            assert!(log.contains("disk closed"), "{log}");
            let bytes = std::fs::read(directory.path().join("disk.img")).unwrap();
            assert_eq!(bytes[100 * 512..101 * 512], sector(4711));
            assert!(!directory.path().join("socket").exists());
        }
    }
}

#[test]
fn signals_that_were_ignored_stay_ignored() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut command = Command::new(PROGRAM);
    command.arg("--socket-path").arg(&socket);
    command.arg("--control").arg(directory.path().join("control"));
    command.arg("--format=raw").arg("--blk-file").arg(image(directory.path()));
    // SAFETY: signal(2) is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            libc::signal(libc::SIGINT, libc::SIG_IGN);
            Ok(())
        });
    }
    let mut daemon = Daemon::spawn(command, socket);
    daemon.wait_line("listening");
    let mut guest = Guest::new(daemon.connect());
    for number in 0..2 {
        for signal in [Signal::SIGHUP, Signal::SIGINT] {
            daemon.signal(signal);
            // The handler would have ended the connection before this is looked at.
            assert_ne!(guest.frontend.get_u64(FrontendReq::GET_FEATURES), 0, "{signal}");
        }
        assert_eq!(guest.read(number), sector(number));
        upgrade_ok(directory.path());
    }
    daemon.terminate();
}

#[test]
fn a_signal_ends_it_without_a_frontend() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let log = daemon.terminate();
    assert!(log.contains("disk closed"), "{log}");
}

#[test]
fn work_is_found_without_a_kick() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(daemon.connect());
    // Stopped, given work, started: nobody kicks.
    assert_eq!(guest.frontend.get_vring_base(0), 0);
    guest.ring.submit(&guest.memory, IN, 11, &[0; 512]);
    guest.frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &guest.ring.queue.kick);
    assert_eq!(guest.ring.wait::<512>(&guest.memory), (0, sector(11)));
    assert_eq!(guest.frontend.get_vring_base(0), 1);
    // Disabled, given work, enabled.
    guest.frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &guest.ring.queue.kick);
    guest.ring.enable(&mut guest.frontend, false);
    guest.ring.submit(&guest.memory, IN, 12, &[0; 512]);
    guest.ring.kick();
    guest.frontend.get_u64(FrontendReq::GET_FEATURES);
    assert!(!guest.ring.is_done(&guest.memory));
    guest.ring.enable(&mut guest.frontend, true);
    assert_eq!(guest.ring.wait::<512>(&guest.memory), (0, sector(12)));
    daemon.terminate();
}

#[test]
fn a_ring_without_descriptors_is_polled_both_ways() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(daemon.connect());
    guest.frontend.send_u64(FrontendReq::SET_VRING_CALL, NO_FD);
    guest.frontend.send_u64(FrontendReq::SET_VRING_KICK, NO_FD);
    for number in 20..30 {
        guest.ring.submit(&guest.memory, IN, number, &[0; 512]);
        while !guest.ring.is_done(&guest.memory) {
            std::thread::yield_now();
        }
        assert_eq!(guest.ring.answer::<512>(&guest.memory), (0, sector(number)));
    }
    daemon.terminate();
}

#[test]
fn a_new_call_descriptor_is_signalled_once() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(daemon.connect());
    let event = || vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let (call, next_call, kick) = (event(), event(), event());
    guest.frontend.send_fd(FrontendReq::SET_VRING_CALL, 0, &call);
    assert_eq!(call.read().unwrap(), 1);
    // That of a stopped ring is, when the ring starts.
    guest.frontend.get_vring_base(0);
    guest.frontend.send_fd(FrontendReq::SET_VRING_CALL, 0, &next_call);
    guest.frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &kick);
    assert_eq!(next_call.read().unwrap(), 1);
    daemon.terminate();
}

#[test]
fn memory_changes_in_the_middle() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(daemon.connect());
    for number in 0..10 {
        assert_eq!(guest.read(number), sector(number));
        // The same memory, mapped anew.
        guest.memory.set(&mut guest.frontend);
        guest.ring.submit(&guest.memory, IN, number + 1, &[0; 512]);
        guest.ring.kick();
        let fd = guest.memory.file.as_raw_fd();
        guest.frontend.send(FrontendReq::REM_MEM_REG, &guest.memory.region(), &[]);
        guest.frontend.send(FrontendReq::ADD_MEM_REG, &guest.memory.region(), &[fd]);
        assert_eq!(guest.ring.wait::<512>(&guest.memory), (0, sector(number + 1)));
    }
    daemon.terminate();
}

#[test]
fn a_device_can_be_reset_and_set_up_again() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(daemon.connect());
    for number in 0..3 {
        assert_eq!(guest.read(number), sector(number));
        guest.frontend.send(FrontendReq::RESET_DEVICE, &[], &[]);
        guest.frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES);
        guest.memory = Memory::default();
        guest.ring = Ring::new(0);
        guest.memory.set(&mut guest.frontend);
        guest.ring.set_up(&mut guest.frontend);
        guest.ring.enable(&mut guest.frontend, true);
    }
    daemon.terminate();
}

#[test]
fn a_spoilt_ring_is_given_up_and_the_device_can_be_set_up_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(daemon.connect());
    let err = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    guest.frontend.send_fd(FrontendReq::SET_VRING_ERR, 0, &err);
    // Available entries far ahead of what the ring can hold.
    for _ in 0..=RING_SIZE {
        guest.ring.submit(&guest.memory, FLUSH, 0, &[]);
    }
    guest.frontend.get_vring_base(0);
    guest.frontend.send_state(FrontendReq::SET_VRING_BASE, 0, 0x8000);
    guest.frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &guest.ring.queue.kick);
    assert_ne!(err.read().unwrap(), 0);
    daemon.wait_line("avail.idx");
    guest.frontend.send(FrontendReq::RESET_DEVICE, &[], &[]);
    guest.frontend.send_u64(FrontendReq::SET_FEATURES, FEATURES);
    guest.memory = Memory::default();
    guest.ring = Ring::new(0);
    guest.memory.set(&mut guest.frontend);
    guest.ring.set_up(&mut guest.frontend);
    guest.ring.enable(&mut guest.frontend, true);
    assert_eq!(guest.read(6), sector(6));
    daemon.terminate();
}

#[test]
fn a_frontend_that_shortens_its_memory_ends_its_session_only() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut guest = Guest::new(daemon.connect());
    assert_eq!(guest.read(2), sector(2));
    guest.memory.file.set_len(0).unwrap();
    guest.ring.kick();
    guest.frontend.wait_closed();
    daemon.wait_line("shortened");
    let mut guest = Guest::new(daemon.connect());
    assert_eq!(guest.read(2), sector(2));
    daemon.terminate();
}

#[test]
fn two_rings_are_served_side_by_side() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &["--num-queues=2"]);
    let mut guest = Guest::new(daemon.connect());
    let mut other = Ring::new(1);
    other.set_up(&mut guest.frontend);
    other.enable(&mut guest.frontend, true);
    guest.ring.submit(&guest.memory, IN, 1, &[0; 512]);
    other.submit(&guest.memory, IN, 2, &[0; 512]);
    guest.ring.kick();
    other.kick();
    assert_eq!(other.wait::<512>(&guest.memory), (0, sector(2)));
    assert_eq!(guest.ring.wait::<512>(&guest.memory), (0, sector(1)));
    daemon.terminate();
}

/// A command that serves an image in `directory` on a socket that it inherits.
fn inheriting(socket: OwnedFd, directory: &std::path::Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["--format=raw", "--log-level=debug"]);
    command.arg(format!("--blk-file={}", image(directory).display()));
    with_fd(command, socket)
}

#[test]
fn a_listening_descriptor_is_used_and_its_file_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("listener");
    let listener = UnixListener::bind(&path).unwrap();
    // As an event loop would have it.
    listener.set_nonblocking(true).unwrap();
    let command = inheriting(listener.into(), directory.path());
    let daemon = Daemon::spawn(command, path.clone());
    for number in 0..3 {
        assert_eq!(Guest::new(daemon.connect()).read(number), sector(number));
    }
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().0, Some(0));
    assert!(path.exists());
}

#[test]
fn with_a_connected_descriptor_it_ends_with_the_frontend() {
    let directory = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let command = inheriting(theirs.into(), directory.path());
    // The command goes with its copy of the other end once the daemon runs.
    let mut daemon = Daemon::spawn(command, directory.path().join("none"));
    let mut guest = Guest::new(ours);
    assert_eq!(guest.read(SECTORS - 1), sector(SECTORS - 1));
    drop(guest);
    daemon.wait_line("disk closed");
    assert_eq!(daemon.wait().0, Some(0));
}

#[test]
fn a_stale_socket_is_taken_over_and_owner_and_group_may_use_it() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    let path = daemon.socket.clone();
    daemon.signal(Signal::SIGKILL);
    assert_eq!(daemon.wait().0, None);
    assert!(path.exists());
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    assert_eq!(Guest::new(daemon.connect()).read(1), sector(1));
    daemon.wait_line("connection ended");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    daemon.terminate();
}

/// Whoever may read the directory can lock it: that holds up no start for ever.
#[test]
fn a_lock_on_the_directory_stops_no_start() {
    use nix::fcntl::{Flock, FlockArg};
    let directory = tempfile::tempdir().unwrap();
    let handle = std::fs::File::open(directory.path()).unwrap();
    let lock = Flock::lock(handle, FlockArg::LockExclusive).unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    assert_eq!(Guest::new(daemon.connect()).read(1), sector(1));
    daemon.terminate();
    drop(lock);
}

#[test]
fn of_many_that_take_over_a_stale_socket_one_serves() {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path());
    let path = directory.path().join("socket");
    drop(UnixListener::bind(&path).unwrap());
    let start = |_| {
        let mut command = Command::new(PROGRAM);
        command.arg("--socket-path").arg(&path).arg("--blk-file").arg(&image);
        command.args(["--format=raw", "--read-only"]);
        Daemon::spawn(command, path.clone())
    };
    let mut daemons: Vec<_> = (0..8).map(start).collect();
    // The others end; who stays is who can be connected to.
    let stays = daemons.iter_mut().position(Daemon::listens).expect("none listens");
    let winner = daemons.remove(stays);
    for other in daemons {
        let (status, log) = other.wait();
        assert_eq!(status, Some(1), "{log}");
        assert!(log.contains("another process is listening"), "{log}");
    }
    let mut guest = Guest::new(winner.connect());
    assert_eq!(guest.read(7), sector(7));
    drop(guest);
    winner.terminate();
}

#[test]
fn a_full_queue_is_a_sign_of_life() {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path());
    let path = directory.path().join("socket");
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap();
    let address = nix::sys::socket::UnixAddr::new(&path).unwrap();
    nix::sys::socket::bind(socket.as_raw_fd(), &address).unwrap();
    nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let _waiting = UnixStream::connect(&path).unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("--socket-path").arg(&path).arg("--blk-file").arg(&image).arg("--format=raw");
    let (status, log) = Daemon::spawn(command, path.clone()).wait();
    assert_eq!(status, Some(1), "{log}");
    assert!(log.contains("another process is listening"), "{log}");
}

#[test]
fn a_socket_that_another_took_over_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = Daemon::with_image(directory.path(), &[]);
    std::fs::remove_file(&daemon.socket).unwrap();
    let _other = UnixListener::bind(&daemon.socket).unwrap();
    let path = daemon.socket.clone();
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().0, Some(0));
    assert!(path.exists());
}
