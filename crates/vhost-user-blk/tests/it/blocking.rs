//! Frontends that try to make the daemon wait for ever: with descriptors that block, with replies
//! that they do not read, with files that do not answer. The daemon must stay able to do everything
//! else, and to end.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, send};
use testkit::frontend::{
    F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend, message,
};
use testkit::fuse::DeafFile;
use testkit::memory::{DEFAULT_LEN, Memory, single_region, table};
use testkit::request::IN;
use testkit::ring::{Ring, running};
use testkit::socket::set_low_water;
use testkit::wait::wait_until;
use vhost::vhost_user::message::FrontendReq;

use crate::common::{Daemon, sector, upgrade_ok};

const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES;
const ENGINES: [&str; 2] = ["--io-engine=io_uring", "--io-engine=sync"];

/// A frontend whose queue's thread sleeps, in the write to a call descriptor.
struct Stuck {
    frontend: RawFrontend,
    _memory: Memory,
    _ring: Ring,
    _call: Box<dyn AsFd>,
}

/// The system call in which a thread of the daemon with this name sleeps.
fn system_call(daemon: &Daemon, name: &str) -> Option<i64> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).ok()?;
    tasks.flatten().find_map(|task| {
        let comm = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let call = std::fs::read_to_string(task.path().join("syscall")).ok()?;
        let number = call.split(' ').next()?.trim().parse().ok();
        if comm.trim() == name { number } else { None }
    })
}

/// The frontend makes its call descriptor blocking and full once the queue's thread has looked at
/// it. `None` if this test may not see where the thread sleeps.
fn stick(daemon: &Daemon, call: impl AsFd + 'static, fill: impl FnOnce()) -> Option<Stuck> {
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
    let (memory, mut ring) = (Memory::default(), Ring::new(0));
    memory.set(&mut frontend);
    ring.set_up(&mut frontend);
    frontend.send_fd(FrontendReq::SET_VRING_CALL, 0, &call.as_fd());
    ring.enable(&mut frontend, true);
    // It is served: the thread knows its descriptor.
    ring.submit(&memory, IN, 1, &[0; 512]);
    ring.kick();
    wait_until("the answer", || ring.is_done(&memory));
    fcntl(&call, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    fill();
    ring.submit(&memory, IN, 2, &[0; 512]);
    ring.kick();
    let task = format!("/proc/{}/task/{}/syscall", daemon.pid(), daemon.pid());
    if let Err(e) = std::fs::read_to_string(task) {
        println!("skipped: cannot see where a thread sleeps: {e}");
        return None;
    }
    wait_until("the thread to sleep in its write", || {
        system_call(daemon, "queue-0") == Some(libc::SYS_write)
    });
    Some(Stuck { frontend, _memory: memory, _ring: ring, _call: Box::new(call) })
}

/// One that counts, so full that nothing can be added.
fn eventfd(daemon: &Daemon) -> Option<Stuck> {
    let call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    let same = File::from(call.as_fd().try_clone_to_owned().unwrap());
    stick(daemon, call, move || {
        // What the queue has signalled so far is taken out first, so that this has room.
        _ = (&same).read(&mut [0; 8]);
        (&same).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    })
}

/// A pipe, full.
fn pipe(daemon: &Daemon) -> Option<(Stuck, PipeReader)> {
    let (reader, writer): (_, PipeWriter) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let same = writer.try_clone().unwrap();
    let stuck = stick(daemon, writer, move || {
        // Blocking by now.
        fcntl(&same, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        while (&same).write(&[0; 8]).is_ok() {}
        fcntl(&same, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    });
    Some((stuck?, reader))
}

fn is_served(daemon: &Daemon) {
    let (_frontend, memory, mut ring) = running(daemon.connect(), FEATURES);
    assert_eq!(ring.read_sector(&memory, 3), sector(3));
}

#[test]
fn a_call_descriptor_that_blocks_holds_up_its_queue_only_until_that_is_stopped() {
    for engine in ENGINES {
        let directory = tempfile::tempdir().unwrap();
        let control = format!("--control={}", directory.path().join("control").display());
        let daemon = Daemon::with_image(directory.path(), &[engine, &control]);
        let Some(mut stuck) = eventfd(&daemon) else { return };
        upgrade_ok(directory.path());
        assert_eq!(stuck.frontend.get_vring_base(0), 2);
        drop(stuck);
        is_served(&daemon);

        let Some(mut stuck) = pipe(&daemon) else { return };
        assert_eq!(stuck.0.frontend.get_vring_base(0), 2);
        drop(stuck);
        is_served(&daemon);

        // The frontend hangs up.
        drop(eventfd(&daemon));
        is_served(&daemon);
        daemon.terminate();
    }
}

#[test]
fn a_queue_that_is_stuck_does_not_keep_the_daemon_from_ending() {
    for engine in ENGINES {
        let directory = tempfile::tempdir().unwrap();
        let daemon = Daemon::with_image(directory.path(), &[engine]);
        let Some(_stuck) = eventfd(&daemon) else { return };
        daemon.terminate();
    }
}

/// Of a socket with SO_RCVLOWAT, poll(2) says that it can be read when read(2) would wait.
#[test]
fn a_kick_socket_that_wants_more_is_not_waited_for() {
    for engine in ENGINES {
        let directory = tempfile::tempdir().unwrap();
        let daemon = Daemon::with_image(directory.path(), &[engine]);
        let (mut frontend, memory, mut ring) = running(daemon.connect(), FEATURES);
        let (theirs, mut ours) = UnixStream::pair().unwrap();
        set_low_water(&theirs, 512);
        frontend.send_fd(FrontendReq::SET_VRING_KICK, 0, &theirs);
        for number in 0..3 {
            ring.submit(&memory, IN, number, &[0; 512]);
            ours.write_all(b"k").unwrap();
            assert_eq!(ring.wait::<512>(&memory), (0, sector(number)));
        }
        assert_eq!(frontend.get_vring_base(0), 3);
        daemon.terminate();
    }
}

#[test]
fn replies_that_nobody_reads_hold_up_only_their_own_connection() {
    let directory = tempfile::tempdir().unwrap();
    let control = format!("--control={}", directory.path().join("control").display());
    let daemon = Daemon::with_image(directory.path(), &[&control]);
    let mut frontend = RawFrontend::new(daemon.connect());
    let question = message(FrontendReq::GET_FEATURES.into(), 1, &[]);
    let (mut asked, mut looks) = (0, 0);
    frontend.stream.set_nonblocking(true).unwrap();
    // It takes what it can answer, and no more: then nothing changes any more.
    wait_until("a daemon that takes no more", || {
        looks += 1;
        while let Ok(sent) = frontend.stream.write(&question) {
            assert_eq!(sent, question.len());
            (asked, looks) = (asked + 1, 0);
        }
        looks > 200
    });
    upgrade_ok(directory.path());
    frontend.stream.set_nonblocking(false).unwrap();
    for _ in 0..asked {
        assert_ne!(frontend.reply_u64(FrontendReq::GET_FEATURES), 0);
    }
    daemon.terminate();
}

#[test]
fn a_byte_out_of_band_ends_the_connection() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let mut frontend = RawFrontend::new(daemon.connect());
    match send(frontend.stream.as_raw_fd(), b"!", MsgFlags::MSG_OOB) {
        Err(Errno::EOPNOTSUPP) => return println!("skipped: before Linux 5.15 there is none"),
        sent => assert_eq!(sent, Ok(1)),
    }
    // With it there seem to be enough bytes for a message. The connection may be closed already.
    _ = frontend.try_send(&message(FrontendReq::GET_FEATURES.into(), 1, &[])[..11], &[]);
    daemon.closes(frontend, "out of band");
    is_served(&daemon);
    daemon.terminate();
}

/// What a message gets that must not have it.
fn misfits<'a>(
    deaf: Option<BorrowedFd<'a>>,
    zero: BorrowedFd<'a>,
) -> Vec<(FrontendReq, Vec<u8>, BorrowedFd<'a>)> {
    let memory = [
        (FrontendReq::SET_MEM_TABLE, table(DEFAULT_LEN)),
        (FrontendReq::ADD_MEM_REG, single_region(DEFAULT_LEN)),
        (FrontendReq::SET_LOG_BASE, [4096u64, 0].map(u64::to_ne_bytes).concat()),
        (FrontendReq::SET_INFLIGHT_FD, [8192u64, 0, 0x10_0001].map(u64::to_ne_bytes).concat()),
    ];
    let events = [
        (FrontendReq::SET_VRING_KICK, vec![0; 8]),
        (FrontendReq::SET_VRING_CALL, vec![0; 8]),
        (FrontendReq::SET_VRING_ERR, vec![0; 8]),
        (FrontendReq::SET_LOG_FD, Vec::new()),
        (FrontendReq::SET_DEVICE_STATE_FD, vec![0; 8]),
        (FrontendReq::SET_BACKEND_REQ_FD, Vec::new()),
    ];
    let all = memory.into_iter().chain(events);
    let with = |fd| all.clone().map(move |(request, body)| (request, body, fd));
    with(zero).chain(deaf.into_iter().flat_map(with)).collect()
}

#[test]
fn a_message_gets_only_descriptors_that_answer() {
    let deaf =
        DeafFile::new(DEFAULT_LEN).inspect_err(|e| println!("skipped: files of FUSE: {e}")).ok();
    let file = deaf.as_ref().map(|deaf| deaf.file.as_fd());
    let zero = File::options().read(true).write(true).open("/dev/zero").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    for (request, body, fd) in misfits(file, zero.as_fd()) {
        let mut frontend = RawFrontend::new(daemon.connect());
        frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
        frontend.need_reply = false;
        frontend.send(request, &body, &[fd.as_raw_fd()]);
        daemon.closes(frontend, &format!("{request:?}: its descriptor is "));
    }
    is_served(&daemon);
    daemon.terminate();
}

/// The `vhost` crate has room for 32, and would wait for a message that comes with more. Found by
/// fuzzing.
#[test]
fn a_message_with_more_descriptors_than_any_has_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &[]);
    let event = EventFd::new().unwrap();
    for request in [FrontendReq::GET_FEATURES, FrontendReq::SET_MEM_TABLE] {
        let mut frontend = RawFrontend::new(daemon.connect());
        frontend.need_reply = false;
        let memory = Memory::default();
        let fd = match request {
            FrontendReq::SET_MEM_TABLE => memory.file.as_raw_fd(),
            _ => event.as_raw_fd(),
        };
        frontend.send(request, &[], &[fd; 33]);
        daemon.closes(frontend, "33 descriptors");
    }
    is_served(&daemon);
    daemon.terminate();
}
