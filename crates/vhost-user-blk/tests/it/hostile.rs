//! Frontends that send whatever comes to their minds. The daemon must outlive them all, serve the
//! next one, and end cleanly.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use crate::common::{Daemon, sector};
use nix::sys::eventfd::EventFd;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore, SeedableRng};
use testkit::frontend::{
    F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend, message,
};
use testkit::memory::{DEFAULT_LEN, GUEST, Memory, VMM, single_region, table};
use testkit::request::IN;
use testkit::ring::{Ring, running};
use vhost::vhost_user::message::FrontendReq;

const CONNECTIONS: usize = 1000;
const MESSAGES_MAX: usize = 40;
const FEATURES: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES;

/// From the environment, to play a failure again, or from the system.
fn seed() -> u64 {
    let given = std::env::var("TEST_SEED").ok();
    given.map_or_else(|| rand::rng().next_u64(), |text| text.parse().expect("TEST_SEED"))
}

/// Numbers that are more likely to be interesting than any.
fn number(rng: &mut StdRng) -> u64 {
    match rng.random_range(0..8) {
        0 => 0,
        1 => rng.random_range(0..4),
        2 => 1 << rng.random_range(0..64),
        3 => (1 << rng.random_range(0..64)) - 1,
        4 => u64::MAX - rng.random_range(0..4096),
        5 => VMM + rng.random_range(0..DEFAULT_LEN / 16) * 16,
        6 => GUEST + rng.random_range(0..DEFAULT_LEN),
        _ => rng.next_u64(),
    }
}

/// A body that is nearly right for some message.
fn body(rng: &mut StdRng) -> Vec<u8> {
    let small = |rng: &mut StdRng| u32::try_from(number(rng) & 0xffff_ffff).unwrap();
    match rng.random_range(0..7) {
        0 => Vec::new(),
        1 => number(rng).to_ne_bytes().to_vec(),
        2 => [rng.random_range(0..4), small(rng)].map(u32::to_ne_bytes).concat(),
        3 => {
            let size = rng.random_range(0..300u32);
            let head = [small(rng), size, rng.random_range(0..4)].map(u32::to_ne_bytes).concat();
            [head, vec![rng.random(); size as usize]].concat()
        }
        4 => {
            let words: Vec<u64> = (0..4).map(|_| number(rng)).collect();
            let head = [rng.random_range(0..2u32), 0].map(u32::to_ne_bytes).concat();
            [head, words.into_iter().flat_map(u64::to_ne_bytes).collect()].concat()
        }
        5 => single_region(DEFAULT_LEN),
        _ => {
            let mut bytes = vec![0; rng.random_range(0..200)];
            rng.fill_bytes(&mut bytes);
            bytes
        }
    }
}

/// Descriptors of all kinds.
fn descriptors(memory: &Memory) -> Vec<OwnedFd> {
    let (reader, writer) = std::io::pipe().unwrap();
    let (socket, _) = UnixStream::pair().unwrap();
    vec![
        EventFd::new().unwrap().into(),
        memory.file.try_clone().unwrap().into(),
        Memory::default().file.into(),
        reader.into(),
        writer.into(),
        socket.into(),
        File::open("/dev/null").unwrap().into(),
        File::open("/").unwrap().into(),
    ]
}

/// Every request there is, most of them more than once, and some that there are not.
fn request(rng: &mut StdRng) -> u32 {
    match rng.random_range(0..4) {
        0 => rng.random_range(0..50),
        1 => rng.random_range(8..15),
        2 => FrontendReq::SET_VRING_ENABLE.into(),
        _ => [2, 5, 16, 24, 25, 34, 37, 38].choose(rng).copied().unwrap(),
    }
}

/// A message that has the right form, with how many descriptors. What it says may be refused.
fn well_formed(rng: &mut StdRng) -> (Vec<u8>, usize) {
    let queue = rng.random_range(0..2u32);
    let value = rng.random_range(0..256u32);
    let state = |value: u32| testkit::frontend::state(queue, value);
    let with_fd = u64::from(queue).to_ne_bytes().to_vec();
    let (request, body, count) = match rng.random_range(0..14) {
        0 => (FrontendReq::SET_VRING_NUM, state(1 << (value % 11)), 0),
        1 => (FrontendReq::SET_VRING_BASE, state(value), 0),
        2 => {
            let at = |rng: &mut StdRng| VMM + rng.random_range(0..DEFAULT_LEN / 16) * 16;
            let words = [at(rng), at(rng), at(rng), 0].map(u64::to_ne_bytes).concat();
            (FrontendReq::SET_VRING_ADDR, [state(0), words].concat(), 0)
        }
        3 => (FrontendReq::SET_VRING_KICK, with_fd, 1),
        4 => (FrontendReq::SET_VRING_CALL, with_fd, 1),
        5 => (FrontendReq::SET_VRING_ERR, with_fd, 1),
        6 => (FrontendReq::SET_VRING_ENABLE, state(value % 2), 0),
        7 => (FrontendReq::GET_VRING_BASE, state(0), 0),
        8 => (FrontendReq::SET_MEM_TABLE, table(DEFAULT_LEN), 1),
        9 => (FrontendReq::ADD_MEM_REG, single_region(DEFAULT_LEN), 1),
        10 => (FrontendReq::REM_MEM_REG, single_region(DEFAULT_LEN), 0),
        11 => (FrontendReq::RESET_DEVICE, Vec::new(), 0),
        12 => (FrontendReq::SET_FEATURES, FEATURES.to_ne_bytes().to_vec(), 0),
        _ => {
            let no_fd = u64::from(queue) | testkit::frontend::NO_FD;
            (FrontendReq::SET_VRING_KICK, no_fd.to_ne_bytes().to_vec(), 0)
        }
    };
    (message(request.into(), 1 | (value & 8), &body), count)
}

fn talk(rng: &mut StdRng, stream: UnixStream) {
    let mut frontend = RawFrontend::new(stream);
    let memory = Memory::default();
    let fds = descriptors(&memory);
    // Most begin well, so that there is something to break.
    if rng.random_ratio(3, 4) {
        frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
        frontend.need_reply = false;
        memory.set(&mut frontend);
        let mut rings = [Ring::new(0), Ring::new(1)];
        for ring in &mut rings {
            ring.set_up(&mut frontend);
            ring.enable(&mut frontend, true);
            ring.submit(&memory, IN, rng.random_range(0..3000), &[0; 512]);
            ring.kick();
        }
        let mut noise = [0; 64];
        rng.fill_bytes(&mut noise);
        memory.file.write_all_at(&noise, rng.random_range(0..0x1_8000)).unwrap();
        rings.iter().for_each(Ring::kick);
    }
    // It answers into the void, and hangs up when it has had enough.
    frontend.stream.set_nonblocking(true).unwrap();
    for _ in 0..rng.random_range(0..MESSAGES_MAX) {
        let (bytes, count) = if rng.random_ratio(1, 8) {
            let flags = *[1, 1, 9, 5, 0, 3].choose(rng).unwrap();
            (message(request(rng), flags, &body(rng)), *[0, 0, 1, 2, 8].choose(rng).unwrap())
        } else {
            well_formed(rng)
        };
        let passed: Vec<RawFd> = fds.choose_multiple(rng, count).map(AsRawFd::as_raw_fd).collect();
        if frontend.try_send(&bytes, &passed).is_err() {
            break;
        }
    }
    if rng.random_ratio(1, 4) {
        memory.file.set_len(0).unwrap();
    }
}

#[test]
fn whatever_a_frontend_sends_the_next_one_is_served() {
    let seed = seed();
    println!("TEST_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let directory = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::with_image(directory.path(), &["--num-queues=2", "--read-only"]);
    let before = (daemon.open_files(), daemon.threads());
    for _ in 0..CONNECTIONS {
        talk(&mut rng, daemon.connect());
        daemon.wait_line("connection ended");
    }
    // A queue's thread stays for the next ring.
    let queues = daemon.threads_named("queue-0") + daemon.threads_named("queue-1");
    assert!(queues <= 2);
    assert_eq!((daemon.open_files(), daemon.threads() - queues), before);

    let (_frontend, memory, mut ring) = running(daemon.connect(), FEATURES);
    assert_eq!(ring.read_sector(&memory, 3), sector(3));
    daemon.terminate();
}
