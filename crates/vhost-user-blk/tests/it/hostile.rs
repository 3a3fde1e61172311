//! Frontends that send whatever comes to their minds, and guests that rewrite their rings while
//! they are served, for `HOSTILE_SECONDS` (60). The daemon must outlive them all, serve the next
//! one, and end cleanly; another disk on the same base must not notice.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::common::soak::{End, Soak, from_env};
use crate::common::{Daemon, sector};
use block_io::Host;
use block_io::ops::check::check;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, send};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore, SeedableRng};
use testkit::descriptor::{self, Desc};
use testkit::driver::Driver;
use testkit::frontend::{
    F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend, message,
};
use testkit::memory::{DEFAULT_LEN, GUEST, Memory, VMM, single_region, table};
use testkit::request::{DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES, header, segment};
use testkit::ring::{RING_SIZE, Ring, running};
use testkit::socket::set_low_water;
use testkit::wait::wait_until;
use vhost::vhost_user::message::FrontendReq;

/// Bytes of guest memory that two rings and their requests take.
const RINGS: u64 = 0x2_0000;
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

/// Descriptors of all kinds, and such as make a system call sleep.
fn descriptors(memory: &Memory) -> Vec<OwnedFd> {
    let (reader, writer) = std::io::pipe().unwrap();
    let (socket, _) = UnixStream::pair().unwrap();
    let (lone, mut peer) = UnixStream::pair().unwrap();
    set_low_water(&lone, 512);
    peer.write_all(b"x").unwrap();
    let full = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
    full.write(u64::MAX - 1).unwrap();
    vec![
        EventFd::new().unwrap().into(),
        full.into(),
        memory.file.try_clone().unwrap().into(),
        Memory::default().file.into(),
        reader.into(),
        writer.into(),
        socket.into(),
        lone.into(),
        File::open("/dev/null").unwrap().into(),
        File::options().read(true).write(true).open("/dev/zero").unwrap().into(),
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

/// A descriptor that is nearly right.
fn descriptor(rng: &mut StdRng) -> Desc {
    let len = [1, 16, 16, 512, 512, 4096, 1 << 20, u32::MAX].choose(rng).copied().unwrap();
    let address = match rng.random_range(0..8) {
        0 => number(rng),
        _ => GUEST + rng.random_range(0..DEFAULT_LEN / 512) * 512,
    };
    Desc { address, len, flags: rng.random_range(0..8), next: rng.random_range(0..RING_SIZE + 1) }
}

/// One thing that a guest does to its memory while it is served.
fn rewrite(rng: &mut StdRng, memory: &Memory, driver: &mut Driver) {
    let slot = rng.random_range(0..RING_SIZE);
    let place = rng.random_range(0..RINGS / 16) * 16;
    match rng.random_range(0..10) {
        0..3 => driver.set_desc(memory, slot, descriptor(rng)),
        3 => {
            let kind = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99].choose(rng).unwrap();
            memory.write(place, &header(*kind, number(rng) % 4096));
        }
        4 => memory.write(place, &segment(number(rng) % 4096, slot.into(), slot.into())),
        5 => {
            let descs: Vec<Desc> = (0..slot).map(|_| descriptor(rng)).collect();
            memory.write(place, &descriptor::table(&descs));
            driver.set_desc(memory, slot, Desc::indirect(GUEST + place, descs.len()));
        }
        6 => memory.write(place, &rng.next_u64().to_le_bytes()),
        7 if rng.random_ratio(1, 8) => driver.set_avail_idx(memory, rng.random()),
        _ => driver.offer(memory, &[slot]),
    }
}

/// A guest that goes on as it began: with requests that are answered.
fn ask(rng: &mut StdRng, memory: &Memory, driver: &mut Driver) {
    if driver.in_flight(memory) == 0 {
        // What the test has set up as request 0.
        driver.offer(memory, &[0]);
    } else {
        std::thread::sleep(Duration::from_micros(rng.random_range(0..100)));
    }
}

/// A guest that rewrites its rings until it is told to stop; how often it did.
fn rewrite_rings(mut rng: StdRng, memory: &Memory, rings: &[Ring], stop: &AtomicBool) -> u64 {
    let mut drivers: Vec<_> = rings.iter().map(|ring| ring.queue.driver).collect();
    let behaves = rng.random_ratio(1, 4);
    let act = if behaves { ask } else { rewrite };
    let mut count = 0;
    while !stop.load(Relaxed) {
        let number = rng.random_range(0..rings.len());
        act(&mut rng, memory, &mut drivers[number]);
        if rng.random_ratio(1, 4) {
            rings[number].kick();
        }
        count += 1;
    }
    count
}

/// What was done to a daemon.
#[derive(Default, Debug)]
struct Counts {
    connections: u64,
    messages: u64,
    rewrites: u64,
}

/// One frontend, with its guest.
fn attack(rng: &mut StdRng, stream: UnixStream, counts: &mut Counts) {
    let mut frontend = RawFrontend::new(stream);
    let memory = Memory::default();
    let mut rings = [Ring::new(0), Ring::new(1)];
    // Most begin well, so that there is something to break.
    let runs = rng.random_ratio(3, 4);
    if runs {
        frontend.negotiate(FEATURES, PROTOCOL_FEATURES);
        frontend.need_reply = false;
        memory.set(&mut frontend);
        for ring in &mut rings {
            ring.set_up(&mut frontend);
            ring.enable(&mut frontend, true);
            ring.submit(&memory, IN, rng.random_range(0..3000), &[0; 512]);
            ring.kick();
        }
    }
    let stop = AtomicBool::new(false);
    let guest_rng = StdRng::seed_from_u64(rng.next_u64());
    std::thread::scope(|scope| {
        let guest = runs.then(|| scope.spawn(|| rewrite_rings(guest_rng, &memory, &rings, &stop)));
        talk(rng, &mut frontend, &memory, counts);
        stop.store(true, Relaxed);
        counts.rewrites += guest.map_or(0, |guest| guest.join().unwrap());
    });
    if rng.random_ratio(1, 4) {
        memory.file.set_len(0).unwrap();
    }
    counts.connections += 1;
}

/// It answers into the void, and hangs up when it has had enough.
fn talk(rng: &mut StdRng, frontend: &mut RawFrontend, memory: &Memory, counts: &mut Counts) {
    let fds = descriptors(memory);
    frontend.stream.set_nonblocking(true).unwrap();
    for _ in 0..rng.random_range(0..MESSAGES_MAX) {
        let (mut bytes, count) = if rng.random_ratio(1, 8) {
            let flags = *[1, 1, 9, 5, 0, 3].choose(rng).unwrap();
            (message(request(rng), flags, &body(rng)), *[0, 0, 1, 2, 8].choose(rng).unwrap())
        } else {
            well_formed(rng)
        };
        if rng.random_ratio(1, 16) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        // The first two are eventfds, which every message about a ring may carry.
        let among = if rng.random() { &fds[..2] } else { &fds };
        let passed: Vec<RawFd> =
            among.choose_multiple(rng, count).map(AsRawFd::as_raw_fd).collect();
        if frontend.try_send(&bytes, &passed).is_err() {
            break;
        }
        counts.messages += 1;
        if rng.random_ratio(1, 8) {
            // What the daemon has set is the description's, and so everybody's.
            for fd in &fds {
                fcntl(fd, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            }
        }
        if rng.random_ratio(1, 64) {
            // An out-of-band byte; the daemon may have hung up.
            let _ =
                send(frontend.stream.as_raw_fd(), b"!", MsgFlags::MSG_OOB | MsgFlags::MSG_NOSIGNAL);
        }
        if rng.random_ratio(1, 4) {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..2000)));
        }
    }
}

#[test]
fn whatever_a_frontend_does_the_next_one_is_served_and_a_neighbour_does_not_notice() {
    let seed = seed();
    println!("TEST_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let until = Instant::now() + Duration::from_secs(from_env("HOSTILE_SECONDS").unwrap_or(60));
    let directory = tempfile::tempdir().unwrap();
    let mut neighbour = Soak::new(directory.path(), &[], &End::Killed { after: 0 });
    let base = directory.path().join("base");
    let before = std::fs::read(&base).unwrap();

    let victim = tempfile::tempdir().unwrap();
    let disk = format!("{},{}", victim.path().join("cow").display(), base.display());
    let mut daemon = Daemon::start(victim.path(), ["--num-queues=2", &disk]);
    let (files, threads) = (daemon.open_files(), daemon.threads());
    let mut counts = Counts::default();
    std::thread::scope(|scope| {
        let attacker = scope.spawn(|| {
            while Instant::now() < until {
                attack(&mut rng, daemon.connect(), &mut counts);
                daemon.wait_line("connection ended");
            }
        });
        neighbour.load_while(|_| !attacker.is_finished());
    });
    // A queue's thread stays for the next ring.
    let queues = daemon.threads_named("queue-0") + daemon.threads_named("queue-1");
    assert!(queues <= 2);
    // A thread closes what was refused.
    wait_until("no more files and threads than before", || {
        (daemon.open_files(), daemon.threads() - queues) == (files, threads)
    });
    println!("{counts:?}, {} requests of the neighbour answered", neighbour.completed);

    let (_frontend, memory, mut ring) = running(daemon.connect(), FEATURES);
    ring.write_sector(&memory, 3, &sector(7));
    assert_eq!(ring.read_sector(&memory, 3), sector(7));
    daemon.terminate();
    // Also checks all that it wrote.
    neighbour.finish();
    assert!(std::fs::read(&base).unwrap() == before, "the base has changed");
    let found = check(&Host, &victim.path().join("cow"), false).unwrap();
    assert!(found.is_empty(), "{found:?}");
}
