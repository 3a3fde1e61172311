use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::*;

fn iovec(buffer: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }
}

fn file_of(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

fn ring_over<'a, R>(engine: &'a mut Option<Uring>, depth: usize, file: &File) -> Ring<'a, R> {
    Ring::new(engine.as_mut(), depth, &[None, Some(file.as_fd())]).unwrap()
}

/// What the daemon's rings use.
fn io_uring() -> Option<Uring> {
    Some(DisabledUring::new(1).unwrap().enable().unwrap())
}

/// Ends the calling test if there is no io_uring, as in many containers.
macro_rules! needs_io_uring {
    () => {
        if let Err(why) = crate::ring::IoEngine::IoUring.probe() {
            println!("skipped: no io_uring here: {why}");
            return;
        }
    };
}
use needs_io_uring;

/// A test that both engines must pass.
macro_rules! with_both_engines {
    ($($test:ident),+ $(,)?) => {
        mod io_uring {
            $(
                #[test]
                fn $test() {
                    super::needs_io_uring!();
                    super::$test(&mut super::io_uring());
                }
            )+
        }
        mod sync {
            $(#[test] fn $test() { super::$test(&mut None); })+
        }
    };
}

with_both_engines! {
    a_request_comes_back_once_with_all_its_parts,
    the_engine_gets_no_more_operations_than_the_limit_and_what_a_long_plan_took_is_given_back,
    more_parts_than_entries_and_more_iovecs_than_one_call_takes,
    a_read_past_the_end_is_an_error_and_not_zeros,
    the_first_error_is_kept_until_all_parts_are_done,
    punch_and_zero_keep_the_length,
    a_watched_descriptor_is_reported_each_time,
    a_watched_eventfd_need_not_be_read,
    one_whose_other_side_is_gone_is_reported_once,
    a_timer_is_reported_each_time_that_it_is_set,
    a_buffer_that_is_not_there_is_an_error,
    a_file_that_is_not_there_is_an_error,
}

const SLOT: FileSlot = FileSlot(1);

/// Enters until a request comes back.
fn wait<R>(ring: &mut Ring<R>) -> (R, io::Result<()>) {
    loop {
        if let Some(Event::Done(request, result)) = ring.next_event() {
            return (request, result);
        }
        ring.enter(true).unwrap();
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

fn a_request_comes_back_once_with_all_its_parts(engine: &mut Option<Uring>) {
    let content = pattern(64 << 10);
    let file = file_of(&content);
    let mut ring = ring_over(engine, 4, &file);
    let (mut a, mut b, mut c) = (vec![0; 1000], vec![0; 3000], vec![0; 512]);
    let mut plan = Plan::default();
    plan.read(SLOT, ByteOffset::new(100), &[iovec(&mut a), iovec(&mut b)]);
    plan.read(SLOT, ByteOffset::new(50_000), &[iovec(&mut c)]);
    // SAFETY: the buffers live to the end of the test, past `wait`.
    unsafe { ring.submit("request", &mut plan) }.unwrap();
    assert!(!ring.is_idle());
    let (request, result) = wait(&mut ring);
    assert_eq!(request, "request");
    result.unwrap();
    assert_eq!(a, content[100..1100]);
    assert_eq!(b, content[1100..4100]);
    assert_eq!(c, content[50_000..50_512]);
    assert!(ring.is_idle());
    ring.enter(false).unwrap();
    assert!(ring.next_event().is_none());
}

fn more_parts_than_entries_and_more_iovecs_than_one_call_takes(engine: &mut Option<Uring>) {
    let content = pattern(3 << 20);
    let file = file_of(&content);
    let mut ring = ring_over(engine, 1, &file);
    let mut buffer = vec![0u8; content.len()];
    let mut plan = Plan::default();
    let (head, tail) = buffer.split_at_mut(2 << 20);
    for (i, chunk) in head.chunks_mut(512).enumerate() {
        plan.read(SLOT, ByteOffset::new(i as u64 * 512), &[iovec(chunk)]);
    }
    let many: Vec<_> = tail.chunks_mut(512).map(iovec).collect();
    assert!(many.len() > IOVECS_PER_OP_MAX);
    plan.read(SLOT, ByteOffset::new(2 << 20), &many);
    // SAFETY: the buffer lives to the end of the test, past `wait`.
    unsafe { ring.submit((), &mut plan) }.unwrap();
    // SAFETY: an empty plan, and no room: nothing is submitted.
    assert!(unsafe { ring.submit((), &mut plan) }.is_err());
    wait(&mut ring).1.unwrap();
    assert!(buffer == content);
}

fn the_engine_gets_no_more_operations_than_the_limit_and_what_a_long_plan_took_is_given_back(
    engine: &mut Option<Uring>,
) {
    const PARTS: usize = 3 * OPERATIONS_MAX + 7;
    let content = pattern(PARTS * 512);
    let file = file_of(&content);
    let mut ring = ring_over(engine, 2, &file);
    let mut buffer = vec![0u8; content.len()];
    let mut plan = Plan::default();
    let mut plan_all = |plan: &mut Plan| {
        for (at, chunk) in (0..).step_by(512).zip(buffer.chunks_mut(512)) {
            plan.read(SLOT, ByteOffset::new(at), &[iovec(chunk)]);
        }
    };
    plan_all(&mut plan);
    // SAFETY: the buffer lives to the end of the test, past `wait` and the ring.
    unsafe { ring.submit((), &mut plan) }.unwrap();
    let mut left = PARTS;
    let result = loop {
        assert_eq!(ring.waiting.len(), left.saturating_sub(OPERATIONS_MAX));
        assert_eq!(
            (ring.pieces_in_flight(), ring.bytes_in_flight()),
            (2 * PARTS, PARTS as u64 * 512)
        );
        ring.enter(true).unwrap();
        if let Some(Event::Done((), result)) = ring.next_event() {
            break result;
        }
        left = ring.parts_in_flight;
    };
    result.unwrap();
    assert_eq!((ring.pieces_in_flight(), ring.bytes_in_flight()), (0, 0));
    let room = |plan: &Plan| (plan.parts.capacity(), plan.iovecs.capacity());
    assert!(ring.slots.iter().all(|slot| room(&slot.plan) == (0, 0)) && room(&plan) == (0, 0));
    // What waits is not begun by a ring that goes.
    plan_all(&mut plan);
    // SAFETY: as above.
    unsafe { ring.submit((), &mut plan) }.unwrap();
    drop(ring);
    assert!(buffer == content);
}

fn a_read_past_the_end_is_an_error_and_not_zeros(engine: &mut Option<Uring>) {
    let file = file_of(&pattern(1000));
    let mut ring = ring_over(engine, 1, &file);
    let mut buffer = vec![0; 1024];
    let mut plan = Plan::default();
    plan.read(SLOT, ByteOffset::new(0), &[iovec(&mut buffer)]);
    // SAFETY: the buffer lives to the end of the test, past `wait`.
    unsafe { ring.submit((), &mut plan) }.unwrap();
    let error = wait(&mut ring).1.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(buffer[..1000], pattern(1000));
}

#[test]
fn short_transfers_go_on_where_they_ended() {
    needs_io_uring!();
    // A pipe gives what is in it: two short reads, split inside an iovec.
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut uring = io_uring();
    let mut ring = Ring::new(uring.as_mut(), 1, &[None, Some(reader.as_fd())]).unwrap();
    let (mut a, mut b) = (vec![0; 10], vec![0; 10]);
    let mut plan = Plan::default();
    plan.read(SLOT, ByteOffset::new(0), &[iovec(&mut a), iovec(&mut b)]);
    writer.write_all(b"0123456789ab").unwrap();
    // SAFETY: the buffers live to the end of the test, past `wait`.
    unsafe { ring.submit((), &mut plan) }.unwrap();
    ring.enter(false).unwrap();
    writer.write_all(b"cdefghij").unwrap();
    wait(&mut ring).1.unwrap();
    assert_eq!((&a[..], &b[..]), (&b"0123456789"[..], &b"abcdefghij"[..]));
}

fn the_first_error_is_kept_until_all_parts_are_done(engine: &mut Option<Uring>) {
    let mut file = File::open("/proc/self/exe").unwrap();
    let mut ring = ring_over(engine, 1, &file);
    let (mut good, mut refused) = (vec![0; 64], vec![1; 64]);
    let mut plan = Plan::default();
    plan.write(SLOT, ByteOffset::new(0), &[iovec(&mut refused)]);
    plan.read(SLOT, ByteOffset::new(0), &[iovec(&mut good)]);
    // SAFETY: the buffers live to the end of the test, past `wait`.
    unsafe { ring.submit((), &mut plan) }.unwrap();
    assert_eq!(wait(&mut ring).1.unwrap_err().raw_os_error(), Some(libc::EBADF));
    let mut expected = [0; 64];
    file.read_exact(&mut expected).unwrap();
    assert_eq!(good, expected);
}

fn punch_and_zero_keep_the_length(engine: &mut Option<Uring>) {
    let content = pattern(64 << 10);
    let file = file_of(&content);
    let mut ring = ring_over(engine, 2, &file);
    let mut plan = Plan::default();
    plan.punch(SLOT, ByteOffset::new(4096), 8192);
    plan.zero(SLOT, ByteOffset::new(32 << 10), 512);
    // SAFETY: there are no buffers.
    unsafe { ring.submit((), &mut plan) }.unwrap();
    wait(&mut ring).1.unwrap();
    let mut expected = content;
    expected[4096..12288].fill(0);
    expected[32 << 10..(32 << 10) + 512].fill(0);
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == expected);
    assert_eq!(file.metadata().unwrap().len(), expected.len() as u64);
}

fn a_watched_descriptor_is_reported_each_time(engine: &mut Option<Uring>) {
    let file = file_of(b"");
    let mut ring: Ring<'_, ()> = ring_over(engine, 1, &file);
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    ring.watch(reader.as_fd(), Watch(7)).unwrap();
    ring.enter(false).unwrap();
    assert!(ring.next_event().is_none());
    for _ in 0..3 {
        writer.write_all(b"x").unwrap();
        ring.enter(true).unwrap();
        assert!(matches!(ring.next_event(), Some(Event::Ready(Watch(7)))));
        reader.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn dropping_a_ring_waits_for_what_is_in_flight() {
    needs_io_uring!();
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut uring = io_uring();
    let mut ring = Ring::new(uring.as_mut(), 1, &[None, Some(reader.as_fd())]).unwrap();
    let mut buffer = vec![0; 4];
    let mut plan = Plan::default();
    plan.read(SLOT, ByteOffset::new(0), &[iovec(&mut buffer)]);
    // SAFETY: the buffer outlives the ring, which is dropped below.
    unsafe { ring.submit((), &mut plan) }.unwrap();
    ring.enter(false).unwrap();
    let late = std::thread::spawn(move || {
        writer.write_all(b"late").unwrap();
        writer
    });
    drop(ring);
    assert_eq!(buffer, b"late");
    drop(late.join().unwrap());
}

#[test]
fn touches_say_nothing_are_limited_and_go_on_once_they_are_done() {
    needs_io_uring!();
    let file = file_of(&pattern(4096));
    let mut uring = io_uring();
    let mut ring = ring_over(&mut uring, 1, &file);
    // Past the end and of a file that is not there: no error either.
    let places = [(SLOT, 0), (SLOT, 1 << 40), (FileSlot(0), 0), (FileSlot(9), 0)];
    for (slot, at) in places.into_iter().cycle().take(TOUCHES_MAX) {
        assert!(ring.can_touch());
        ring.touch(slot, ByteOffset::new(at));
    }
    assert!(!ring.can_touch());
    let mut buffer = vec![0; 4096];
    let mut plan = Plan::default();
    plan.read(SLOT, ByteOffset::new(0), &[iovec(&mut buffer)]);
    // SAFETY: the buffer outlives the ring.
    unsafe { ring.submit("request", &mut plan) }.unwrap();
    let (request, result) = wait(&mut ring);
    assert_eq!((request, result.is_ok()), ("request", true));
    while !ring.can_touch() || ring.touches_in_flight > 0 {
        assert!(ring.next_event().is_none());
        ring.enter(ring.touches_in_flight > 0).unwrap();
    }
    assert_eq!(buffer, pattern(4096));
}

#[test]
fn dropping_a_ring_waits_for_touches() {
    needs_io_uring!();
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let mut uring = io_uring();
    let mut ring: Ring<'_, ()> =
        Ring::new(uring.as_mut(), 1, &[None, Some(reader.as_fd())]).unwrap();
    ring.touch(SLOT, ByteOffset::new(0));
    ring.enter(false).unwrap();
    let late = std::thread::spawn(move || writer.write_all(b"xy").unwrap());
    drop(ring);
    late.join().unwrap();
    let mut left = Vec::new();
    reader.read_to_end(&mut left).unwrap();
    assert_eq!(left, b"y");
}

fn a_watched_eventfd_need_not_be_read(engine: &mut Option<Uring>) {
    let file = file_of(b"");
    let mut ring: Ring<'_, ()> = ring_over(engine, 1, &file);
    // It was signalled before it was watched.
    let bell = EventFd::from_value(1).unwrap();
    ring.watch(bell.as_fd(), Watch(3)).unwrap();
    for _ in 0..3 {
        ring.enter(true).unwrap();
        assert!(matches!(ring.next_event(), Some(Event::Ready(Watch(3)))));
        ring.enter(false).unwrap();
        assert!(ring.next_event().is_none(), "nothing has happened since");
        bell.write(1).unwrap();
    }
}

fn one_whose_other_side_is_gone_is_reported_once(engine: &mut Option<Uring>) {
    let file = file_of(b"");
    let mut ring: Ring<'_, ()> = ring_over(engine, 1, &file);
    let (reader, writer) = std::io::pipe().unwrap();
    ring.watch(reader.as_fd(), Watch(1)).unwrap();
    drop(writer);
    ring.enter(true).unwrap();
    assert!(matches!(ring.next_event(), Some(Event::Ready(Watch(1)))));
    for _ in 0..3 {
        ring.enter(false).unwrap();
        assert!(ring.next_event().is_none());
    }
}

fn a_timer_is_reported_each_time_that_it_is_set(engine: &mut Option<Uring>) {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC).unwrap();
    let file = file_of(b"");
    let mut ring: Ring<'_, ()> = ring_over(engine, 1, &file);
    ring.watch(timer.as_fd(), Watch(5)).unwrap();
    for _ in 0..3 {
        ring.enter(false).unwrap();
        assert!(ring.next_event().is_none(), "it is not set, or was reported");
        let once = Expiration::OneShot(Duration::from_millis(5).into());
        timer.set(once, TimerSetTimeFlags::empty()).unwrap();
        ring.enter(true).unwrap();
        assert!(matches!(ring.next_event(), Some(Event::Ready(Watch(5)))));
    }
}

fn a_buffer_that_is_not_there_is_an_error(engine: &mut Option<Uring>) {
    let content = pattern(8192);
    let file = file_of(&content);
    let mut ring = ring_over(engine, 2, &file);
    let mut good = vec![0; 4096];
    // Of the zero page, which no process may map.
    let gone = libc::iovec { iov_base: std::ptr::without_provenance_mut(16), iov_len: 4096 };
    let mut plan = Plan::default();
    plan.read(SLOT, ByteOffset::new(0), &[iovec(&mut good), gone]);
    // SAFETY: one buffer outlives the ring; the other is nobody's memory.
    unsafe { ring.submit("read", &mut plan) }.unwrap();
    let (_, result) = wait(&mut ring);
    assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EFAULT));
    assert!(good == content[..4096], "what came before it was read");
    plan.write(SLOT, ByteOffset::new(0), &[gone]);
    // SAFETY: as above.
    unsafe { ring.submit("write", &mut plan) }.unwrap();
    assert_eq!(wait(&mut ring).1.unwrap_err().raw_os_error(), Some(libc::EFAULT));
}

fn a_file_that_is_not_there_is_an_error(engine: &mut Option<Uring>) {
    let file = file_of(b"");
    let mut ring = ring_over(engine, 1, &file);
    let mut buffer = vec![0; 16];
    for slot in [FileSlot(0), FileSlot(99)] {
        let mut plan = Plan::default();
        plan.read(slot, ByteOffset::new(0), &[iovec(&mut buffer)]);
        // SAFETY: the buffer outlives the ring.
        unsafe { ring.submit((), &mut plan) }.unwrap();
        assert_eq!(wait(&mut ring).1.unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}

#[test]
fn what_is_not_open_cannot_be_watched() {
    needs_io_uring!();
    let file = file_of(b"");
    for mut engine in [io_uring(), None] {
        let mut ring: Ring<'_, ()> = ring_over(&mut engine, 1, &file);
        // SAFETY: the number is not that of an open descriptor, which is the point.
        let not_open = unsafe { BorrowedFd::borrow_raw(1_000_000) };
        assert_eq!(ring.watch(not_open, Watch(1)).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}

/// Linux before 5.13 says EINVAL to a multishot poll; every Linux says EBADF to one of a place
/// without a file.
#[test]
fn a_poll_that_fails_is_not_its_event() {
    needs_io_uring!();
    let mut uring = io_uring();
    let mut ring: Ring<'_, ()> = ring_over(&mut uring, 1, &file_of(b""));
    let Engine::Uring(uring) = &mut ring.engine else { unreachable!() };
    uring.poll(Watch(1));
    ring.enter(true).unwrap();
    match ring.next_event() {
        Some(Event::Lost(Watch(1), e)) => assert_eq!(e.raw_os_error(), Some(libc::EBADF)),
        other => panic!("{other:?}"),
    }
}

/// A thread's operation is held up until the test releases it.
mod held_up {
    use std::sync::{Condvar, Mutex};

    use super::super::threads::{self, Operation, Threads};
    use super::*;

    /// Operations under way, and how many may end.
    static GATE: Mutex<(usize, usize)> = Mutex::new((0, 0));
    static MOVED: Condvar = Condvar::new();

    fn perform(operation: &Operation) -> i32 {
        let mut gate = GATE.lock().unwrap();
        gate.0 += 1;
        MOVED.notify_all();
        gate = MOVED.wait_while(gate, |gate| gate.1 == 0).unwrap();
        *gate = (gate.0 - 1, gate.1 - 1);
        drop(gate);
        threads::perform(operation)
    }

    fn let_go(operations: usize) {
        GATE.lock().unwrap().1 += operations;
        MOVED.notify_all();
    }

    fn wait_until_under_way(operations: usize) {
        let gate = GATE.lock().unwrap();
        drop(MOVED.wait_while(gate, |gate| gate.0 < operations).unwrap());
    }

    /// A single test, since there is one gate.
    #[test]
    fn slow_operations_overlap_up_to_a_limit_and_a_drop_waits_for_them() {
        const REQUESTS: usize = 7;
        const AT_A_TIME: usize = 4;
        let content = pattern(REQUESTS * 512);
        let file = file_of(&content);
        let threads = Threads::new(&[None, Some(file.as_fd())], perform).unwrap();
        let mut ring = Ring::over(Engine::Threads(threads), REQUESTS);
        let mut buffers = vec![vec![0; 512]; REQUESTS];
        for (number, buffer) in buffers.iter_mut().enumerate() {
            let mut plan = Plan::default();
            plan.read(SLOT, ByteOffset::new(number as u64 * 512), &[iovec(buffer)]);
            // SAFETY: the buffers outlive the ring.
            unsafe { ring.submit(number, &mut plan) }.unwrap();
            ring.enter(false).unwrap();
        }
        wait_until_under_way(AT_A_TIME);
        ring.enter(false).unwrap();
        assert!(ring.next_event().is_none() && !ring.wants_enter());
        // A released thread takes the next operation; no more threads are started.
        let_go(1);
        wait(&mut ring).1.unwrap();
        wait_until_under_way(AT_A_TIME);
        assert_eq!(GATE.lock().unwrap().0, AT_A_TIME);
        let late = std::thread::spawn(|| let_go(REQUESTS - 1));
        drop(ring);
        assert_eq!(buffers.concat(), content);
        assert_eq!(*GATE.lock().unwrap(), (0, 0));
        late.join().unwrap();
    }
}

#[test]
fn an_engine_that_can_be_probed_can_be_used() {
    IoEngine::Sync.probe().unwrap();
    needs_io_uring!();
    drop(ring_over::<()>(&mut io_uring(), 256, &file_of(b"")));
}

mod restricted;
