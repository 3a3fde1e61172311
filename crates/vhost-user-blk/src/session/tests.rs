use std::io::{PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_queue::QueueState;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::guest_memory::memory::GuestAddress;
use crate::virtio::notify::EventDescriptor;

mod migration;

/// What the session did with the device, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Call {
    Start { queue: usize, next_avail: u16, size: u16, event_idx: bool },
    Stop { queue: usize },
    Flush,
    LetGo,
}

type Calls = Arc<Mutex<Vec<Call>>>;

struct FakeDevice {
    calls: Calls,
    failure: EventFd,
    started: Arc<Mutex<Option<RingStart>>>,
}

struct FakeRing {
    queue: usize,
    next_avail: u16,
    calls: Calls,
}

/// What a fake ring has taken when it is stopped.
const TAKEN: u16 = 7;

impl RunningRing for FakeRing {
    fn ask(&self, _order: StopOrder) {}

    fn stop(self, _asked: std::time::Instant) -> Option<u16> {
        self.calls.lock().unwrap().push(Call::Stop { queue: self.queue });
        Some(self.next_avail.wrapping_add(TAKEN))
    }
}

impl Device for FakeDevice {
    type Ring = FakeRing;

    fn start(&self, ring: RingStart) -> io::Result<FakeRing> {
        let queue = ring.queue;
        let QueueState { next_avail, size, event_idx_enabled: event_idx, .. } = ring.state;
        let QueueState { desc_table, avail_ring, used_ring, .. } = ring.state;
        let places = [desc_table, avail_ring, used_ring].map(GuestAddress);
        assert_eq!(places, [gpa(0), gpa(0x1000), gpa(0x2000)]);
        self.calls.lock().unwrap().push(Call::Start { queue, next_avail, size, event_idx });
        *self.started.lock().unwrap() = Some(ring);
        Ok(FakeRing { queue, next_avail, calls: Arc::clone(&self.calls) })
    }

    fn flush(&self) -> io::Result<()> {
        self.calls.lock().unwrap().push(Call::Flush);
        Ok(())
    }

    fn release(&self) -> io::Result<()> {
        self.calls.lock().unwrap().push(Call::LetGo);
        Ok(())
    }

    fn failure(&self) -> &EventFd {
        &self.failure
    }
}

const GUEST_BASE: u64 = 0x10_0000;
const VMM_BASE: u64 = 0x7f00_0000_0000;
const MEMORY_LEN: u64 = 0x10_0000;
const WITH_PROTOCOL: u64 = config::F_PROTOCOL_FEATURES | config::F_FLUSH;

fn gpa(offset: u64) -> GuestAddress {
    GuestAddress(GUEST_BASE + offset)
}

/// A session together with what its fake device saw.
struct Rig {
    session: Session<FakeDevice>,
    calls: Calls,
    started: Arc<Mutex<Option<RingStart>>>,
}

impl Rig {
    fn new() -> Self {
        let (calls, started) = (Calls::default(), Arc::default());
        let failure = EventFd::new(EFD_NONBLOCK).unwrap();
        let device =
            FakeDevice { calls: Arc::clone(&calls), failure, started: Arc::clone(&started) };
        let (num_queues, queue_size_max) = (2, 256);
        let (capacity, read_only, logical_block) = (8, false, 512);
        let shape = DiskShape { capacity, num_queues, queue_size_max, read_only, logical_block };
        Rig { session: Session::new(device, &shape), calls, started }
    }

    /// A session in which queue 0 is running.
    fn running(features: u64) -> Self {
        let mut rig = Rig::new();
        for step in Step::ALL {
            rig.step(step, features);
        }
        assert_eq!(rig.take().len(), 1);
        rig
    }

    fn step(&mut self, step: Step, features: u64) {
        let session = &mut self.session;
        match step {
            Step::Features => session.set_features(features),
            Step::Memory => session.set_mem_table(&[region(0)], vec![file()], None).map(|_| ()),
            Step::Num => session.set_vring_num(0, 128),
            Step::Addr => set_addr(session, 0),
            Step::Kick => session.set_vring_kick(0, Some(eventfd())),
            Step::Enable => session.set_vring_enable(0, true),
        }
        .unwrap();
    }

    fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn write_through(&self) -> bool {
        self.session.write_through.load(Ordering::SeqCst)
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Features,
    Memory,
    Num,
    Addr,
    Kick,
    Enable,
}

impl Step {
    const ALL: [Step; 6] =
        [Step::Features, Step::Memory, Step::Num, Step::Addr, Step::Kick, Step::Enable];
}

fn set_addr(session: &mut Session<FakeDevice>, offset: u64) -> Result<()> {
    let flags = VhostUserVringAddrFlags::empty();
    let at = VMM_BASE + offset;
    session.set_vring_addr(0, flags, at, at + 0x2000, at + 0x1000, 0)
}

fn start(next_avail: u16) -> Call {
    Call::Start { queue: 0, next_avail, size: 128, event_idx: false }
}

fn stop() -> Call {
    Call::Stop { queue: 0 }
}

fn region(number: u64) -> VhostUserMemoryRegion {
    let shift = number * MEMORY_LEN;
    VhostUserMemoryRegion::new(GUEST_BASE + shift, MEMORY_LEN, VMM_BASE + shift, 0)
}

fn single_region(number: u64) -> VhostUserSingleMemoryRegion {
    let shift = number * MEMORY_LEN;
    VhostUserSingleMemoryRegion::new(GUEST_BASE + shift, MEMORY_LEN, VMM_BASE + shift, 0)
}

fn file() -> File {
    let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(MEMORY_LEN).unwrap();
    file
}

fn eventfd() -> File {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    File::from(event.fd().try_clone_to_owned().unwrap())
}

fn is_readable(fd: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
}

fn permutations(steps: Vec<Step>) -> Vec<Vec<Step>> {
    if steps.len() < 2 {
        return vec![steps];
    }
    let first = |at: usize| {
        let mut rest = steps.clone();
        let step = rest.remove(at);
        permutations(rest).into_iter().map(move |mut order| {
            order.insert(0, step);
            order
        })
    };
    (0..steps.len()).flat_map(first).collect()
}

fn reason<T>(result: Result<T>) -> String {
    result.err().expect("was accepted").to_string()
}

#[test]
fn a_ring_starts_with_the_last_thing_it_needs_in_whatever_order() {
    let orders = permutations(Step::ALL.to_vec());
    assert_eq!(orders.len(), 720);
    for order in orders {
        let mut rig = Rig::new();
        rig.session.set_vring_base(0, 40).unwrap();
        for (n, step) in order.iter().enumerate() {
            assert!(!rig.session.is_running(0), "{order:?} before step {n}");
            rig.step(*step, WITH_PROTOCOL);
        }
        assert_eq!(rig.take(), [start(40)], "{order:?}");
    }
}

#[test]
fn without_protocol_features_a_ring_needs_no_enabling() {
    let mut rig = Rig::new();
    for step in [Step::Features, Step::Memory, Step::Num, Step::Addr, Step::Kick] {
        rig.step(step, config::F_FLUSH);
    }
    assert_eq!(rig.take(), [start(0)]);
}

#[test]
fn get_vring_base_stops_until_the_next_kick_descriptor() {
    let mut rig = Rig::running(WITH_PROTOCOL);
    let state = rig.session.get_vring_base(0).unwrap();
    assert_eq!({ state.num }, u32::from(TAKEN));
    assert_eq!(rig.take(), [stop()]);
    rig.session.set_vring_enable(0, true).unwrap();
    rig.step(Step::Memory, 0);
    assert_eq!(rig.take(), []);
    rig.step(Step::Kick, 0);
    assert_eq!(rig.take(), [start(TAKEN)]);
    // One that was never started answers what it was given.
    rig.session.set_vring_base(1, 0xffff).unwrap();
    assert_eq!({ rig.session.get_vring_base(1).unwrap().num }, 0xffff);
}

#[test]
fn a_disabled_ring_goes_on_where_it_was() {
    let mut rig = Rig::running(WITH_PROTOCOL);
    rig.session.set_vring_enable(0, false).unwrap();
    assert_eq!(rig.take(), [stop()]);
    rig.session.set_vring_enable(0, true).unwrap();
    assert_eq!(rig.take(), [start(TAKEN)]);
}

#[test]
fn new_memory_is_used_after_the_old_is_drained() {
    let mut rig = Rig::running(WITH_PROTOCOL);
    rig.step(Step::Memory, 0);
    assert_eq!(rig.take(), [stop(), start(TAKEN)]);
    rig.session.add_mem_region(&single_region(1), file(), None).unwrap();
    assert_eq!(rig.take(), [stop(), start(2 * TAKEN)]);
    let memory = rig.started.lock().unwrap().take().unwrap().memory;
    assert_eq!(memory.regions().count(), 2);
}

#[test]
fn a_ring_waits_while_its_memory_is_away() {
    let mut rig = Rig::running(WITH_PROTOCOL);
    rig.session.remove_mem_region(&single_region(0)).unwrap();
    assert_eq!(rig.take(), [stop()]);
    rig.session.add_mem_region(&single_region(0), file(), None).unwrap();
    assert_eq!(rig.take(), [start(TAKEN)]);
    assert!(reason(rig.session.remove_mem_region(&single_region(1))).contains("no memory region"));
}

#[test]
fn a_new_set_up_of_a_running_ring_waits_for_its_kick_descriptor() {
    type Change = fn(&mut Session<FakeDevice>) -> Result<()>;
    let changes: [Change; 3] = [
        |session| session.set_vring_num(0, 128),
        |session| session.set_vring_base(0, 0),
        |session| set_addr(session, 0x4000),
    ];
    for change in changes {
        let mut rig = Rig::running(WITH_PROTOCOL);
        change(&mut rig.session).unwrap();
        rig.session.set_vring_enable(0, true).unwrap();
        assert_eq!(rig.take(), [stop()]);
        set_addr(&mut rig.session, 0).unwrap();
        rig.session.set_vring_base(0, 0).unwrap();
        rig.step(Step::Kick, 0);
        assert_eq!(rig.take(), [start(0)]);
    }
}

#[test]
fn the_same_addresses_again_change_nothing() {
    let mut rig = Rig::running(WITH_PROTOCOL);
    rig.step(Step::Addr, 0);
    assert_eq!(rig.take(), []);
}

#[test]
fn features_can_change_under_a_running_ring() {
    let mut rig = Rig::running(WITH_PROTOCOL);
    rig.session.set_features(WITH_PROTOCOL).unwrap();
    assert_eq!(rig.take(), []);
    rig.session.set_features(WITH_PROTOCOL | config::F_EVENT_IDX).unwrap();
    let event_idx = Call::Start { queue: 0, next_avail: TAKEN, size: 128, event_idx: true };
    assert_eq!(rig.take(), [stop(), event_idx]);
}

#[test]
fn writes_go_through_unless_the_guest_can_flush_and_wants_a_cache() {
    let mut rig = Rig::new();
    assert!(rig.write_through());
    rig.session.set_features(config::F_CONFIG_WCE).unwrap();
    assert!(rig.write_through());
    assert_eq!(rig.take(), []);
    rig.session.set_features(config::F_CONFIG_WCE | config::F_FLUSH).unwrap();
    assert!(!rig.write_through());

    let flags = VhostUserConfigFlags::empty();
    rig.session.set_config(32, &[0], flags).unwrap();
    assert!(rig.write_through());
    // What was written with the cache on is not left behind.
    assert_eq!(rig.take(), [Call::Flush]);
    assert_eq!(rig.session.get_config(32, 1, flags).unwrap(), [0]);
    rig.session.set_config(32, &[1], flags).unwrap();
    assert!(!rig.write_through());
    rig.session.set_features(config::F_CONFIG_WCE).unwrap();
    assert!(rig.write_through());
    assert_eq!(rig.take(), [Call::Flush]);
}

#[test]
fn the_write_cache_can_only_be_switched_if_that_was_negotiated() {
    let mut rig = Rig::new();
    rig.session.set_features(config::F_FLUSH).unwrap();
    rig.session.set_config(32, &[0], VhostUserConfigFlags::WRITABLE).unwrap();
    assert!(!rig.write_through());
}

#[test]
fn the_write_cache_stays_off_for_a_frontend_that_comes_again() {
    let mut rig = Rig::running(WITH_PROTOCOL | config::F_CONFIG_WCE);
    rig.session.set_config(32, &[0], VhostUserConfigFlags::WRITABLE).unwrap();
    rig.session.disconnect();
    assert_eq!(rig.take(), [Call::Flush, stop()]);
    rig.session.set_features(WITH_PROTOCOL | config::F_CONFIG_WCE).unwrap();
    assert!(rig.write_through());
    rig.session.reset_device().unwrap();
    rig.session.set_features(WITH_PROTOCOL | config::F_CONFIG_WCE).unwrap();
    assert!(!rig.write_through());
}

#[test]
fn after_disconnect_and_reset_everything_is_to_be_set_up_again() {
    let ways: [fn(&mut Session<FakeDevice>); 3] = [
        |session| session.disconnect(),
        |session| session.reset_device().unwrap(),
        |session| session.reset_owner().unwrap(),
    ];
    for way in ways {
        let mut rig = Rig::running(WITH_PROTOCOL);
        way(&mut rig.session);
        assert_eq!(rig.take(), [stop()]);
        assert!(rig.write_through());
        for step in Step::ALL {
            assert_eq!(rig.take(), []);
            rig.step(step, WITH_PROTOCOL);
        }
        assert_eq!(rig.take(), [start(0)]);
    }
}

#[test]
fn memory_that_is_replaced_or_whose_frontend_is_gone_is_given_back() {
    let mut rig = Rig::running(WITH_PROTOCOL);
    let first = Arc::downgrade(&rig.session.memory);
    rig.step(Step::Memory, 0);
    assert!(first.upgrade().is_none());
    let second = Arc::downgrade(&rig.session.memory);
    rig.session.disconnect();
    rig.started.lock().unwrap().take();
    assert!(second.upgrade().is_none());
}

#[test]
fn a_frontend_that_does_not_kick_is_kicked_for() {
    let mut rig = Rig::new();
    assert!(!rig.session.poll_rings());
    for step in Step::ALL {
        match step {
            Step::Kick => rig.session.set_vring_kick(0, None).unwrap(),
            step => rig.step(step, WITH_PROTOCOL),
        }
    }
    let kick = rig.started.lock().unwrap().take().unwrap().kick;
    assert!(!is_readable(&kick.fd()));
    assert!(rig.session.poll_rings());
    assert!(is_readable(&kick.fd()));
    rig.session.get_vring_base(0).unwrap();
    assert!(!rig.session.poll_rings());
}

/// A call descriptor can block for ever, so the session, on the main thread, leaves it alone.
#[test]
fn a_call_descriptor_is_signalled_by_the_ring_that_starts_with_it() {
    let mut rig = Rig::new();
    let (reader, writer): (PipeReader, _) = std::io::pipe().unwrap();
    let writer = std::os::fd::OwnedFd::from(writer);
    rig.session.set_vring_call(0, Some(writer.into())).unwrap();
    assert!(!is_readable(&reader));
    let mut rig = Rig::running(WITH_PROTOCOL);
    rig.session.set_vring_call(0, Some(eventfd())).unwrap();
    assert_eq!(rig.take(), [stop(), start(TAKEN)]);
    assert!(rig.started.lock().unwrap().take().unwrap().call.is_some());
}

#[test]
fn what_was_not_offered_is_refused_with_the_reason() {
    let mut rig = Rig::new();
    let session = &mut rig.session;
    assert!(reason(session.set_features(1 << 34)).contains("0x400000000"));
    assert!(reason(session.set_protocol_features(1 << 20)).contains("0x100000"));
    for size in [0, 3, 512, 1 << 16] {
        let why = reason(session.set_vring_num(0, size));
        assert!(why.contains("power of two up to 256"), "{why}");
    }
    assert!(reason(session.set_vring_num(2, 128)).contains("2 are offered"));
    assert!(reason(session.set_vring_base(0, 0x1_0000)).contains("65536"));
    assert!(reason(session.get_vring_base(u32::MAX)).contains("no such queue"));
    assert!(reason(session.set_vring_kick(2, None)).contains("no such queue"));
    assert!(reason(session.set_vring_call(2, None)).contains("no such queue"));
    assert!(reason(session.set_vring_err(255, None)).contains("no such queue"));
    assert!(reason(session.set_vring_enable(9, true)).contains("no such queue"));
    let flags = VhostUserConfigFlags::empty();
    assert!(reason(session.get_config(250, 7, flags)).contains("256"));
    rig.step(Step::Memory, 0);
    let why = reason(set_addr(&mut rig.session, MEMORY_LEN - 0x1000));
    assert!(why.contains("available ring"), "{why}");
}

#[test]
fn memory_that_cannot_be_used_is_refused() {
    let mut rig = Rig::new();
    let files = vec![file(), file()];
    let why = reason(rig.session.set_mem_table(&[region(0), region(0)], files, None));
    assert!(why.contains("overlaps"), "{why}");
    let short = File::from(memfd_create(c"short", MFdFlags::MFD_CLOEXEC).unwrap());
    let why = reason(rig.session.add_mem_region(&single_region(0), short, None));
    assert!(why.contains("0 bytes"), "{why}");
}

#[test]
fn shortened_memory_ends_the_session_and_a_spoilt_ring_does_not() {
    let mut rig = Rig::running(WITH_PROTOCOL);
    rig.session.failure().write(1).unwrap();
    rig.session.check().unwrap();
    assert!(!is_readable(&rig.session.failure().fd()));

    let file = file();
    let short = file.try_clone().unwrap();
    rig.session.set_mem_table(&[region(0)], vec![file], None).unwrap();
    short.set_len(0).unwrap();
    let memory = rig.started.lock().unwrap().take().unwrap().memory;
    // The access that a worker would make.
    memory.read(gpa(0), &mut [0; 8]).unwrap();
    assert!(rig.session.check().unwrap_err().to_string().contains("shortened"));
    // Other memory does not make it good.
    let refused = rig.session.set_mem_table(&[region(0)], vec![self::file()], None).unwrap_err();
    assert!(refused.to_string().contains("shortened"), "{refused}");
}

fn inflight_area(session: &mut Session<FakeDevice>) -> (VhostUserInflight, File) {
    session.get_inflight_fd(&VhostUserInflight::new(0, 0, 2, 128)).unwrap()
}

/// Queue 0's part of the area: where its header's used_idx and descriptor 3's mark are.
const USED_IDX: u64 = 14;
const MARK_3: u64 = 16 + 16 * 3;

#[test]
fn the_in_flight_area_says_where_a_ring_goes_on() {
    let mut rig = Rig::new();
    let (info, file) = inflight_area(&mut rig.session);
    assert_eq!((info.mmap_size, { info.mmap_offset }), (2 * 2112 + 64, 0));
    rig.session.set_inflight_fd(&info, file.try_clone().unwrap()).unwrap();
    let memory = self::file();
    let regions = [region(0)];
    let ring = |avail: u16, used: u16| {
        memory.write_all_at(&avail.to_le_bytes(), 0x1002).unwrap();
        memory.write_all_at(&used.to_le_bytes(), 0x2002).unwrap();
    };
    ring(41, 40);
    rig.session.set_vring_base(0, 12).unwrap();
    for step in [Step::Features, Step::Num, Step::Addr, Step::Kick, Step::Enable] {
        rig.step(step, WITH_PROTOCOL);
    }
    rig.session.set_mem_table(&regions, vec![memory.try_clone().unwrap()], None).unwrap();
    // The base that the frontend believes in is of no concern.
    assert_eq!(rig.take(), [start(40)]);

    // A successor, to which the frontend gives what it kept: one request is in flight.
    rig.session.disconnect();
    rig.take();
    file.write_all_at(&[1], MARK_3).unwrap();
    rig.session.set_inflight_fd(&info, file.try_clone().unwrap()).unwrap();
    rig.session.set_mem_table(&regions, vec![memory.try_clone().unwrap()], None).unwrap();
    for step in [Step::Features, Step::Num, Step::Addr, Step::Kick, Step::Enable] {
        rig.step(step, WITH_PROTOCOL);
    }
    assert_eq!(rig.take(), [start(41)]);

    // A reset forgets it.
    rig.session.reset_device().unwrap();
    let mut bytes = [0; 2112];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
}

#[test]
fn an_in_flight_area_that_contradicts_the_ring_ends_the_session() {
    let mut rig = Rig::new();
    let (info, file) = inflight_area(&mut rig.session);
    file.write_all_at(&[1], 8).unwrap();
    file.write_all_at(&[128], 10).unwrap();
    file.write_all_at(&[255, 255], USED_IDX).unwrap();
    file.write_all_at(&[2], MARK_3).unwrap();
    rig.session.set_inflight_fd(&info, file).unwrap();
    for step in Step::ALL {
        if !matches!(step, Step::Enable) {
            rig.step(step, WITH_PROTOCOL);
        }
    }
    let refused = reason(rig.session.set_vring_enable(0, true));
    assert!(refused.contains("queue 0: cannot serve it: in-flight area: "), "{refused}");
    assert_eq!(rig.take(), []);
}

#[test]
fn a_ring_that_is_not_wholly_in_memory_is_the_worker_s_to_give_up() {
    let mut rig = Rig::new();
    let (info, area) = inflight_area(&mut rig.session);
    // A counter from which no ring could go on, if it were asked.
    area.write_all_at(&[255, 255], USED_IDX).unwrap();
    rig.session.set_inflight_fd(&info, area).unwrap();
    rig.session.set_vring_base(0, 12).unwrap();
    for step in Step::ALL {
        if !matches!(step, Step::Memory) {
            rig.step(step, WITH_PROTOCOL);
        }
    }
    // It ends with the fourth byte of the used ring.
    let region = VhostUserMemoryRegion::new(GUEST_BASE, 0x2004, VMM_BASE, 0);
    rig.session.set_mem_table(&[region], vec![file()], None).unwrap();
    assert_eq!(rig.take(), [start(12)]);
}

#[test]
fn in_flight_areas_of_wrong_sizes_are_refused() {
    let mut rig = Rig::new();
    let session = &mut rig.session;
    for (queues, size) in [(3, 128), (2, 257)] {
        let asked = VhostUserInflight::new(0, 0, queues, size);
        let refused = reason(session.get_inflight_fd(&asked));
        assert!(refused.contains("in-flight area for"), "{refused}");
    }
    let (info, area) = inflight_area(session);
    let given = VhostUserInflight { mmap_size: 4223, ..info };
    let refused = reason(session.set_inflight_fd(&given, area.try_clone().unwrap()));
    assert!(refused.contains("need 4224"), "{refused}");
    let given = VhostUserInflight { mmap_size: info.mmap_size + 1, ..info };
    let refused = reason(session.set_inflight_fd(&given, area));
    assert!(refused.contains("its file has 4288 bytes, the region needs 4289"), "{refused}");
}

#[test]
fn an_in_flight_area_that_is_shortened_ends_the_session() {
    let mut rig = Rig::new();
    let area = self::file();
    let info = VhostUserInflight::new(MEMORY_LEN, 0, 2, 128);
    rig.session.set_inflight_fd(&info, area.try_clone().unwrap()).unwrap();
    rig.session.check().unwrap();
    area.set_len(0).unwrap();
    for step in Step::ALL {
        rig.step(step, WITH_PROTOCOL);
    }
    assert!(rig.session.check().unwrap_err().to_string().contains("shortened"));
    // Another one does not make it good.
    let (info, file) = inflight_area(&mut rig.session);
    let refused = rig.session.set_inflight_fd(&info, file).unwrap_err();
    assert!(refused.to_string().contains("shortened"), "{refused}");
}

/// The guest of `rig` switches its write cache off.
fn write_through(rig: &mut Rig) {
    let features = WITH_PROTOCOL | config::F_CONFIG_WCE;
    rig.session.set_features(features).unwrap();
    assert!(!rig.write_through());
    rig.session.set_config(32, &[0], VhostUserConfigFlags::empty()).unwrap();
    assert!(rig.write_through());
}

fn write_cache(rig: &mut Rig) -> u8 {
    rig.session.get_config(32, 1, VhostUserConfigFlags::empty()).unwrap()[0]
}

#[test]
fn a_write_cache_that_is_off_is_off_for_the_next_daemon_too() {
    let mut rig = Rig::new();
    let (info, area) = inflight_area(&mut rig.session);
    rig.session.set_inflight_fd(&info, area.try_clone().unwrap()).unwrap();
    write_through(&mut rig);

    let mut next = Rig::new();
    next.session.set_inflight_fd(&info, area.try_clone().unwrap()).unwrap();
    next.session.set_features(WITH_PROTOCOL | config::F_CONFIG_WCE).unwrap();
    assert!(next.write_through());
    assert_eq!(write_cache(&mut next), 0);
    next.session.reset_device().unwrap();
    assert_eq!(write_cache(&mut next), 1);
    let mut after_reset = Rig::new();
    after_reset.session.set_inflight_fd(&info, area).unwrap();
    assert_eq!(write_cache(&mut after_reset), 1);
}

const SAVE: VhostTransferStateDirection = VhostTransferStateDirection::SAVE;
const LOAD: VhostTransferStateDirection = VhostTransferStateDirection::LOAD;
const STOPPED: VhostTransferStatePhase = VhostTransferStatePhase::STOPPED;

fn pipe() -> (File, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
}

#[test]
fn the_state_of_a_device_is_saved_and_loaded() {
    let mut rig = Rig::new();
    write_through(&mut rig);
    let (mut reader, writer) = pipe();
    assert!(rig.session.set_device_state_fd(SAVE, STOPPED, writer).unwrap().is_none());
    rig.session.check_device_state().unwrap();
    // What follows is the end: the daemon has closed its descriptor.
    let mut saved = Vec::new();
    reader.read_to_end(&mut saved).unwrap();

    let load = |bytes: &[u8]| {
        let mut rig = Rig::new();
        let (reader, mut writer) = pipe();
        rig.session.set_device_state_fd(LOAD, STOPPED, reader).unwrap();
        writer.write_all(bytes).unwrap();
        drop(writer);
        let result = rig.session.check_device_state();
        (result, write_cache(&mut rig))
    };
    let (result, cache) = load(&saved);
    result.unwrap();
    assert_eq!(cache, 0);
    let (result, cache) = load(&[]);
    result.unwrap();
    assert_eq!(cache, 1);
    for bad in [&saved[1..], &[7; 4000]] {
        let (result, cache) = load(bad);
        assert!(reason(result).contains("not one of vhost-user-blk"));
        assert_eq!(cache, 1);
    }
}

#[test]
fn a_state_is_transferred_between_the_two_messages_and_while_the_rings_rest() {
    let mut rig = Rig::new();
    assert!(reason(rig.session.check_device_state()).contains("no device state"));
    // The frontend has not closed its end: not waited for.
    let (reader, _writer) = pipe();
    rig.session.set_device_state_fd(LOAD, STOPPED, reader).unwrap();
    assert!(reason(rig.session.check_device_state()).contains("cannot read"));
    let (reader, writer) = pipe();
    drop(reader);
    rig.session.set_device_state_fd(SAVE, STOPPED, writer).unwrap();
    assert!(reason(rig.session.check_device_state()).contains("cannot write"));

    let mut rig = Rig::running(WITH_PROTOCOL);
    let (_reader, writer) = pipe();
    assert!(
        reason(rig.session.set_device_state_fd(SAVE, STOPPED, writer))
            .contains("while a ring is running")
    );
}
