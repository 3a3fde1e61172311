//! One thread for each queue. It pops requests from the ring, asks the disk's layer map where their
//! data is, has io_uring (or threads, where io_uring is refused) move it between the files and
//! guest memory, and pushes the answers into the used ring.
//!
//! This is the only place where virtio and the layers meet. A turn of the loop
//! takes a batch of requests, hands it to the kernel with one system call,
//! fetches what has completed, and publishes it with one notification.
//!
//! A guest can make a request of 4 GiB by naming one piece of its memory many times, and offer
//! thousands of them. So a long request is done in windows ([`WINDOW`]), and what a queue has in
//! flight is limited in requests, pieces and bytes: the rest waits in the ring.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use block_io::pulse::Pulse;
use block_io::ring::{Event, Plan, Ring, Uring, Watch};
use block_io::{Committer, Disk, Flushed, Waiter, Writing};
use cow_format::SectorRange;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use virtio_queue::QueueState;
use vmm_sys_util::event::{EventConsumer, EventNotifier};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::datapath::holes::Holes;
use crate::datapath::queue_threads::{QueueThreads, ThreadUring};
use crate::datapath::resident::Mappings;
use crate::datapath::route::{Cursor, ReadWindow, Router, Segments, WINDOW, Window, after};
use crate::datapath::spin::{For, Spin};
use crate::fault;
use crate::guest_memory::memory::Memory;
use crate::process::log_limit::{self, RINGS};
use crate::process::watchdog;
use crate::virtio::device_queue::DeviceQueue;
use crate::virtio::dirty_log::RingLog;
use crate::virtio::inflight::Tracker;
use crate::virtio::notify::{Bell, EventDescriptor, Kick};
use crate::virtio::request::{
    Fault, ID_LEN, IoVecs, Operation, ParseLimits, Parsed, Pending, Reply, Segment, parse,
};
use crate::virtio::split_queue::{RingError, SplitQueue};

pub(crate) mod handle;

use handle::{StopOrder, WorkerHandle};

/// Requests taken in one turn: enough to share a system call and a
/// notification among many, few enough that the first is not held up by the
/// last.
const BATCH_MAX: usize = 32;
/// Requests of one queue that are in flight at most, whatever the size of its ring. No disk gets
/// faster by more, and each takes some hundred bytes here and in the kernel.
const IN_FLIGHT_MAX: u16 = 256;
/// Parts and pieces of memory in flight, of 16 to 48 bytes each, after which no more windows are
/// begun: enough for 32 requests of as many segments as the device offers. Also the pieces of long
/// requests that are kept, after which no more requests are taken.
const PIECES_MAX: usize = 4096;
/// Bytes to be read or written after which no more windows are begun: stopping the ring waits for
/// them.
const BYTES_MAX: u64 = 64 << 20;
/// How long a ring that is stopped goes on with requests of several windows, before it fails them.
/// Whoever stops it waits for that.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// Bytes to read after which a turn takes no more requests: the worker itself zeroes holes and
/// copies what is in the page cache. With 64 queues on two cores their turns take half a second: a
/// ring that is to stop is asked between two turns.
const BATCH_BYTES_MAX: u64 = 16 << 20;
/// The same for the next windows of requests that were taken before.
const RESUMED_BYTES_MAX: u64 = BATCH_BYTES_MAX / 2;

/// A read of at least so many bytes that are in the page cache can be offloaded to a thread of the
/// kernel, while the queue's thread copies the next: for less it takes as long to offload it.
const OFFLOAD_MIN: u64 = 256 << 10;

const KICK: Watch = Watch(0);
const STOP: Watch = Watch(1);
const COMMIT: Watch = Watch(2);
const TIDY: Watch = Watch(3);

/// How long the mapped pages of a queue that sleeps are kept, at least; twice
/// that at most.
const TIDY_AFTER: Duration = Duration::from_secs(2);

/// What all queues of the device share.
pub(crate) struct Shared {
    /// The disk.
    pub(crate) disk: Arc<Disk>,
    /// Its layers as they are read without system calls.
    pub(crate) mappings: Mappings,
    /// What of its base is a hole.
    pub(crate) holes: Holes,
    /// Flushes it.
    pub(crate) committer: Committer,
    /// The answer to GET_ID.
    pub(crate) serial: [u8; ID_LEN],
    /// What requests are checked against.
    pub(crate) limits: ParseLimits,
    /// The longest time that a dry queue spins before it sleeps.
    pub(crate) poll: Duration,
    /// Serve the rings.
    pub(crate) threads: Arc<QueueThreads>,
    /// Signalled when a queue had to give up its ring.
    pub(crate) failure: Arc<EventFd>,
}

/// A ring that is ready to be served.
pub(crate) struct RingStart {
    /// The number of the queue.
    pub(crate) queue: usize,
    /// Guest memory.
    pub(crate) memory: Arc<Memory>,
    /// The ring as it was set up: its place in that memory, not checked, and the first entry of the
    /// available ring to take.
    pub(crate) state: QueueState,
    /// Every write is durable before it completes: no FLUSH was negotiated, or
    /// the guest has turned the write cache off.
    pub(crate) write_through: Arc<AtomicBool>,
    /// The guest rings it: an eventfd or a pipe.
    pub(crate) kick: EventConsumer,
    /// Rings the guest: an eventfd or a pipe.
    pub(crate) call: Option<EventNotifier>,
    /// Tells the frontend that the ring was given up.
    pub(crate) err: Option<EventNotifier>,
    /// Where to keep what is in flight, and what a predecessor left there.
    pub(crate) inflight: Option<Tracker>,
    /// Where to mark what is written into guest memory.
    pub(crate) log: Option<RingLog>,
}

/// Serves a ring until it is stopped. The call descriptor is signalled once at
/// the start, and work that is in the ring already needs no kick.
///
/// # Errors
/// What the system says to the eventfd or the thread. A ring that cannot be
/// used is no error here: it is given up, and [`Shared::failure`] signalled.
pub(crate) fn spawn(mut start: RingStart, shared: Arc<Shared>) -> io::Result<WorkerHandle> {
    let stop = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
    let inflight = start.inflight.take();
    let pulse = Arc::new(Pulse::waiting());
    watchdog::watch(&format!("queue-{}", start.queue), &pulse);
    let theirs = (Arc::clone(&stop), Arc::clone(&pulse));
    let (threads, queue) = (Arc::clone(&shared.threads), start.queue);
    let (ending, done) = channel();
    let thread = threads.run(queue, move |uring| {
        let (stop, pulse) = (&*theirs.0, &*theirs.1);
        let next_avail = serve(&start, inflight, &shared, stop, pulse, uring);
        // It has ended, even if its handle is kept.
        pulse.rest();
        // Whoever waits for the end may count on it.
        drop((start, shared, theirs));
        _ = ending.send(next_avail);
    })?;
    Ok(WorkerHandle { thread, threads, stop, pulse, done })
}

fn serve(
    start: &RingStart,
    inflight: Option<Tracker>,
    shared: &Shared,
    stop: &EventFd,
    pulse: &Pulse,
    uring: &mut ThreadUring,
) -> u16 {
    pulse.beat();
    let worker = split_queue(start, inflight).map_err(Box::<dyn std::error::Error>::from).and_then(
        |queue| {
            let uring = uring.as_mut().map_err(|e| e.to_string())?;
            Ok(Worker::new(start, queue, shared, stop, pulse, uring.as_mut())?)
        },
    );
    match worker {
        Ok(worker) => worker.run(),
        Err(e) => {
            give_up(start, shared, e.as_ref());
            start.state.next_avail
        }
    }
}

/// The ring in guest memory, with its in-flight area and its dirty log.
fn split_queue(start: &RingStart, inflight: Option<Tracker>) -> Result<SplitQueue, RingError> {
    let mut queue = SplitQueue::new(Arc::clone(&start.memory), start.state)?;
    if let Some(inflight) = inflight {
        queue.track(inflight);
    }
    if let Some(log) = &start.log {
        queue.log(log.clone());
    }
    Ok(queue)
}

/// Logs that the ring is no longer served, and signals it to the frontend and the session.
fn give_up(start: &RingStart, shared: &Shared, why: &dyn std::fmt::Display) {
    let line = format_args!("queue {}: {why}; the ring is stopped", start.queue);
    RINGS.say(log::Level::Error, line);
    if let Some(err) = &start.err {
        Bell::new(err.fd()).signal();
    }
    _ = shared.failure.write(1);
}

/// Logs why a request was refused. A guest's own fault is a debug message. A guest that does
/// nothing wrong may have memory that the frontend does not share, which the operator can change.
#[cold]
fn log_refused(queue: usize, fault: Option<Fault>) {
    match fault {
        Some(fault) if fault.is_of_shared_memory() => {
            let hint = "is all of the guest's memory shared (QEMU: share=on), and writable?";
            log_limit::request_failed(queue, "request refused", &format_args!("{fault}; {hint}"));
        }
        fault => log::debug!("queue {queue}: {fault:?}"),
    }
}

/// A request between its descriptor chain and its answer.
struct InFlight<'a, H> {
    head: H,
    pending: Pending,
    work: Work<'a>,
}

/// What is being done for it, and so what remains when that is done.
enum Work<'a> {
    Read {
        moving: Moving,
        /// It is the one that is offloaded, see [`OFFLOAD_MIN`].
        offloaded: bool,
    },
    Write {
        range: SectorRange,
        writing: Writing<'a>,
        moving: Moving,
    },
    Zero(Box<ZeroWork<'a>>),
}

impl Work<'_> {
    /// The last window was begun.
    #[inline]
    fn is_last(&self) -> bool {
        match self {
            Work::Read { moving, .. } | Work::Write { moving, .. } => moving.left.is_empty(),
            Work::Zero(zero) => zero.segments.is_over(),
        }
    }
}

/// How far a read or write has come.
struct Moving {
    /// What was not begun.
    left: SectorRange,
    /// The memory for that; `None` before the first window, when it was just parsed, and if it is
    /// the only one.
    buffers: Option<Buffers>,
}

/// The memory of a long request.
struct Buffers {
    iovecs: Box<[libc::iovec]>,
    /// The first of them that is left, and the bytes of it that are not.
    first: usize,
    skip: usize,
    /// Counts the iovecs of all.
    kept: Rc<Cell<usize>>,
}

impl Buffers {
    fn new(iovecs: &[libc::iovec], kept: &Rc<Cell<usize>>) -> Self {
        kept.set(kept.get() + iovecs.len());
        Self { iovecs: iovecs.into(), first: 0, skip: 0, kept: Rc::clone(kept) }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        self.kept.set(self.kept.get() - self.iovecs.len());
    }
}

impl Moving {
    fn new(range: SectorRange) -> Self {
        Self { left: range, buffers: None }
    }

    /// The memory of what is left; `parsed` is that of the request that was parsed last.
    #[inline]
    fn cursor<'m>(&'m self, parsed: &'m [libc::iovec]) -> Cursor<'m> {
        match &self.buffers {
            None => Cursor::new(parsed),
            Some(buffers) => Cursor { left: &buffers.iovecs[buffers.first..], skip: buffers.skip },
        }
    }

    /// So many sectors were begun, after which so many iovecs are left, the first one without so
    /// many bytes.
    #[inline]
    fn advance(
        &mut self,
        sectors: u64,
        (left, skip): (usize, usize),
        parsed: &[libc::iovec],
        kept: &Rc<Cell<usize>>,
    ) {
        self.left = after(self.left, sectors);
        if !self.left.is_empty() {
            let buffers = self.buffers.get_or_insert_with(|| Buffers::new(parsed, kept));
            (buffers.first, buffers.skip) = (buffers.iovecs.len() - left, skip);
        }
    }
}

/// Ranges that are being turned into zeros.
struct ZeroWork<'a> {
    segments: Segments,
    discard: bool,
    method: ZeroMethod,
    writing: Writing<'a>,
}

/// How that is done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ZeroMethod {
    /// By fallocate(2), which not every file system can do.
    Punch,
    /// By writing zeros, which always works.
    Written,
}

/// How a ring that takes no more requests ends.
#[derive(Clone, Copy)]
enum Closing {
    /// All requests are answered; none of them begins a window after this time.
    Answering(Instant),
    /// Those that would have to begin one are not.
    Leaving,
}

struct Worker<'a, Q: DeviceQueue> {
    // First, so that it is dropped first: it waits until the kernel has completed all operations on
    // guest memory, which `queue` keeps mapped.
    ring: Ring<'a, InFlight<'a, Q::Head>>,
    queue: Q,
    start: &'a RingStart,
    shared: &'a Shared,
    router: Router<'a>,
    kick: Kick<'a>,
    call: Option<Bell<BorrowedFd<'a>>>,
    /// Requests that are in flight at most.
    depth: u16,
    window: Window,
    /// Requests of which a window is done, and not the last.
    unfinished: VecDeque<InFlight<'a, Q::Head>>,
    /// The iovecs of all [`Buffers`].
    kept: Rc<Cell<usize>>,
    /// Requests that wait for the committer; the tag is the place.
    committing: Vec<Option<(Q::Head, Pending)>>,
    uncommitted: Vec<u32>,
    spin: Spin,
    pulse: &'a Pulse,
    /// Bytes to read of the batch that is being taken.
    batch_bytes: u64,
    /// A read is offloaded. One at a time: two that copy take the memory's speed.
    offloaded: bool,
    stop: &'a EventFd,
    /// `None` while requests are taken.
    closing: Option<Closing>,
    /// Reported as [`TIDY`].
    timer: TimerFd,
    /// It is set.
    tidying: bool,
    // Used again from one request to the next.
    plan: Plan,
    iovecs: IoVecs,
    answers: Vec<(u32, Flushed)>,
}

impl<'a, Q: DeviceQueue> Worker<'a, Q> {
    fn new(
        start: &'a RingStart,
        queue: Q,
        shared: &'a Shared,
        stop: &'a EventFd,
        pulse: &'a Pulse,
        uring: Option<&'a mut Uring>,
    ) -> io::Result<Self> {
        let depth = start.state.size.min(IN_FLIGHT_MAX);
        let router = Router::new(&shared.disk, &shared.mappings, &shared.holes);
        let files = router.files().descriptors();
        let mut ring = Ring::new(uring, usize::from(depth), &files)?;
        let kick = Kick::new(start.kick.fd());
        ring.watch(start.kick.fd(), KICK)?;
        ring.watch(stop.fd(), STOP)?;
        ring.watch(shared.committer.event(start.queue), COMMIT)?;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
        ring.watch(timer.as_fd(), TIDY)?;
        Ok(Self {
            ring,
            queue,
            start,
            shared,
            router,
            kick,
            call: start.call.as_ref().map(|call| Bell::new(call.fd())),
            depth,
            window: WINDOW,
            unfinished: VecDeque::new(),
            kept: Rc::default(),
            committing: (0..depth).map(|_| None).collect(),
            uncommitted: (0..u32::from(depth)).rev().collect(),
            spin: Spin::new(shared.poll),
            pulse,
            batch_bytes: 0,
            offloaded: false,
            stop,
            closing: None,
            timer,
            tidying: false,
            plan: Plan::default(),
            iovecs: IoVecs::new(),
            answers: Vec::new(),
        })
    }

    fn run(mut self) -> u16 {
        fault::try_operations(&mut self.ring);
        self.notify();
        loop {
            self.pulse.beat();
            let busy = self.turn();
            if self.is_over() {
                return self.queue.next_avail();
            }
            if !busy {
                self.rest();
            }
        }
    }

    /// One turn of the loop; whether there was anything to do.
    fn turn(&mut self) -> bool {
        self.batch_bytes = 0;
        let mut busy = self.resume();
        busy |= self.take();
        self.enter();
        busy |= self.reap();
        self.publish();
        busy || self.can_resume()
    }

    /// Hands over what was submitted, and has the kernel report what it has done.
    fn enter(&mut self) {
        if let Err(e) = self.ring.enter(false) {
            self.fail(&e);
        }
    }

    /// In the middle of a batch, so that the next long read can be offloaded.
    #[inline]
    fn reap_offloaded(&mut self) {
        if self.offloaded && self.ring.wants_enter() {
            self.enter();
            self.reap();
            self.publish();
        }
    }

    fn in_flight(&self) -> u16 {
        self.queue.in_flight()
    }

    /// There is room for one more request, whatever it turns out to be.
    #[inline]
    fn can_take(&self) -> bool {
        self.is_open()
            && self.in_flight() < self.depth
            && self.has_room()
            && self.kept.get() < PIECES_MAX
    }

    /// One more window may be begun.
    #[inline]
    fn has_room(&self) -> bool {
        self.ring.pieces_in_flight() < PIECES_MAX && self.ring.bytes_in_flight() < BYTES_MAX
    }

    /// The next window of a request may be begun.
    #[inline]
    fn can_resume(&self) -> bool {
        !self.unfinished.is_empty()
            && self.has_room()
            && !matches!(self.closing, Some(Closing::Leaving))
    }

    /// Requests are still being taken.
    #[inline]
    fn is_open(&self) -> bool {
        self.closing.is_none()
    }

    /// It is closed, and nothing is left to be done.
    fn is_over(&self) -> bool {
        match self.closing {
            None => false,
            Some(Closing::Answering(_)) => self.in_flight() == 0,
            Some(Closing::Leaving) => usize::from(self.in_flight()) == self.unfinished.len(),
        }
    }

    /// Takes no more requests.
    fn close(&mut self, how: Closing) {
        self.closing.get_or_insert(how);
    }

    fn told_to_stop(&mut self) {
        let order = self.stop.read().unwrap_or(0);
        let leaves = order >= StopOrder::Leave as u64 && self.queue.is_tracked();
        let answering = || Closing::Answering(Instant::now() + STOP_PATIENCE);
        self.close(if leaves { Closing::Leaving } else { answering() });
    }

    /// Goes on with requests of which a window is done; whether there was one.
    fn resume(&mut self) -> bool {
        let waiting = self.unfinished.len();
        let is_late = |end| Instant::now() >= end;
        let failing =
            waiting > 0 && matches!(self.closing, Some(Closing::Answering(end)) if is_late(end));
        for resumed in 0..waiting {
            if !self.can_resume() || self.batch_bytes > RESUMED_BYTES_MAX {
                return resumed > 0;
            }
            match self.unfinished.pop_front() {
                Some(request) if failing => {
                    let why = "the ring was stopped before its end";
                    log_limit::request_failed(self.start.queue, "long request failed", &why);
                    self.answer(request.head, request.pending.failed());
                }
                Some(request) => self.go_on(request),
                None => {}
            }
        }
        waiting > 0
    }

    /// Begins the next window of a request.
    fn go_on(&mut self, request: InFlight<'a, Q::Head>) {
        let InFlight { head, pending, work } = request;
        match work {
            Work::Read { moving, .. } => self.read(head, pending, moving),
            Work::Write { range, writing, moving } => {
                self.write_window(head, pending, (range, writing), moving);
            }
            Work::Zero(zero) => self.zero_window(head, pending, zero),
        }
    }

    /// Takes and starts a batch of requests; whether there was one.
    fn take(&mut self) -> bool {
        self.router.resident().tick();
        for taken in 0..BATCH_MAX {
            self.reap_offloaded();
            if !self.can_take() || self.batch_bytes > BATCH_BYTES_MAX {
                return taken > 0;
            }
            match self.queue.pop() {
                Ok(Some(head)) => self.begin(head),
                Ok(None) => return taken > 0,
                Err(e) => {
                    self.fail(&e);
                    return true;
                }
            }
        }
        true
    }

    fn begin(&mut self, head: Q::Head) {
        let chain = self.queue.chain(&head);
        let request = match parse(&self.start.memory, chain, &self.shared.limits, &mut self.iovecs)
        {
            Parsed::Request(request) => request,
            Parsed::Reply(reply) => {
                log_refused(self.start.queue, reply.fault());
                return self.answer(head, reply);
            }
        };
        let (operation, pending) = request.start();
        match operation {
            Operation::In(range) => self.read(head, pending, Moving::new(range)),
            Operation::Out(range) => self.write(head, pending, range),
            Operation::Flush => self.commit(head, pending),
            Operation::Discard | Operation::WriteZeroes => {
                self.zero(head, pending, operation == Operation::Discard);
            }
            Operation::GetId => {
                let id = &self.shared.serial;
                let reply = pending.answer_id(&self.start.memory, &self.iovecs, id);
                self.answer(head, reply);
            }
        }
    }

    fn read(&mut self, head: Q::Head, pending: Pending, mut moving: Moving) {
        let window = self.window.of(moving.left);
        self.batch_bytes += window.len_bytes();
        let memory = &self.start.memory;
        // With nothing else to copy it would only take longer.
        let offload = window.len_bytes() >= OFFLOAD_MIN && !self.offloaded && self.queue.has_work();
        let mut cursor = moving.cursor(self.iovecs.data());
        let read = ReadWindow { range: window, parts_max: self.window.parts, offload };
        let planned = self.router.plan_read(&read, memory, &mut cursor, &mut self.plan);
        let place = cursor.place();
        match planned {
            Ok(sectors) => moving.advance(sectors, place, self.iovecs.data(), &self.kept),
            Err(e) => {
                log_limit::request_failed(self.start.queue, "read failed", &e);
                return self.answer(head, pending.failed());
            }
        }
        self.offloaded |= offload && !self.plan.is_empty();
        let work = Work::Read { moving, offloaded: offload && self.offloaded };
        self.submit(InFlight { head, pending, work });
        if offload {
            self.enter();
        }
        while self.ring.can_touch()
            && let Some((file, at)) = self.router.ahead()
        {
            self.ring.touch(file, at);
        }
    }

    fn write(&mut self, head: Q::Head, pending: Pending, range: SectorRange) {
        if self.shared.disk.is_failed() {
            return self.answer(head, pending.failed());
        }
        let writing = self.shared.disk.begin_write(range);
        // SAFETY: as in `submit`.
        if unsafe { self.router.write_inline(range, self.iovecs.data()) } {
            return self.written(head, pending, writing, &[range]);
        }
        self.write_window(head, pending, (range, writing), Moving::new(range));
    }

    fn write_window(
        &mut self,
        head: Q::Head,
        pending: Pending,
        (range, writing): (SectorRange, Writing<'a>),
        mut moving: Moving,
    ) {
        let window = self.window.of(moving.left);
        let mut cursor = moving.cursor(self.iovecs.data());
        self.router.plan_write(window, &mut cursor, &mut self.plan);
        let place = cursor.place();
        moving.advance(window.count().get(), place, self.iovecs.data(), &self.kept);
        self.submit(InFlight { head, pending, work: Work::Write { range, writing, moving } });
    }

    fn zero(&mut self, head: Q::Head, pending: Pending, discard: bool) {
        if self.shared.disk.is_failed() {
            return self.answer(head, pending.failed());
        }
        let segments = self.iovecs.segments().iter().filter(|s| !s.range.is_empty());
        let segments: Vec<_> =
            segments.map(|s| Segment { unmap: s.unmap || discard, ..*s }).collect();
        let Some(hull) = segments.iter().map(|segment| segment.range).reduce(SectorRange::hull)
        else {
            return self.answer(head, pending.done());
        };
        let zero = ZeroWork {
            segments: Segments::new(segments),
            discard,
            method: ZeroMethod::Punch,
            writing: self.shared.disk.begin_write(hull),
        };
        self.zero_window(head, pending, Box::new(zero));
    }

    fn zero_window(&mut self, head: Q::Head, pending: Pending, mut zero: Box<ZeroWork<'a>>) {
        let ZeroWork { segments, discard, method, .. } = &mut *zero;
        let (window, plan) = (&self.window, &mut self.plan);
        match method {
            ZeroMethod::Punch => self.router.plan_zero(segments, *discard, window, plan),
            ZeroMethod::Written => self.router.plan_written_zeros(segments, window, plan),
        }
        self.submit(InFlight { head, pending, work: Work::Zero(zero) });
    }

    /// Starts what was planned. An empty plan is done already.
    fn submit(&mut self, request: InFlight<'a, Q::Head>) {
        if self.plan.is_empty() {
            return self.completed(request, Ok(()));
        }
        // SAFETY: the buffers are guest memory (or zeros that live for ever),
        // which `queue` keeps mapped until after the ring has been dropped, and
        // to which no reference is ever made; the files are the disk's, which
        // `shared` keeps as long.
        if let Err(refused) = unsafe { self.ring.submit(request, &mut self.plan) } {
            // `can_take` leaves room, so this is never reached; the guest gets
            // an answer all the same.
            self.answer(refused.head, refused.pending.failed());
        }
    }

    /// Fetches what has happened; whether anything has.
    fn reap(&mut self) -> bool {
        let mut busy = false;
        while let Some(event) = self.ring.next_event() {
            busy = true;
            match event {
                Event::Done(request, result) => self.completed(request, result),
                Event::Ready(KICK) => self.kick.consume(),
                Event::Ready(COMMIT) => self.committed(),
                Event::Ready(TIDY) => {
                    self.tidying = !self.shared.mappings.forget_unused() && self.tidy_later()
                }
                Event::Ready(_) => self.told_to_stop(),
                Event::Lost(watch, e) => self.lost(watch, &e),
            }
        }
        busy || self.can_resume()
    }

    /// The kernel refuses to wake this thread for something. Requests that were begun are completed
    /// all the same: that needs no waking, except for a flush, for which this waits.
    #[cold]
    fn lost(&mut self, watch: Watch, e: &io::Error) {
        let what = match watch {
            KICK => "the guest's kicks",
            STOP => "the order to stop",
            COMMIT => "flushes",
            _ => "the timer",
        };
        self.fail(&format_args!("cannot wait for {what}: {e}"));
        while watch == COMMIT && self.committing.iter().any(Option::is_some) {
            let event = self.shared.committer.event(self.start.queue);
            _ = poll(&mut [PollFd::new(event, PollFlags::POLLIN)], PollTimeout::NONE);
            self.committed();
        }
    }

    /// The data of a request, or of a window of it, has been moved, or could not be.
    fn completed(&mut self, request: InFlight<'a, Q::Head>, result: io::Result<()>) {
        let InFlight { head, pending, work } = request;
        self.offloaded &= !matches!(work, Work::Read { offloaded: true, .. });
        match (work, result) {
            (Work::Zero(zero), Err(e))
                if zero.method == ZeroMethod::Punch
                    && e.raw_os_error() == Some(libc::EOPNOTSUPP) =>
            {
                self.not_punched(head, pending, zero);
            }
            // The kernel could not touch guest memory: a page was lost, for which the processor
            // would have raised SIGBUS.
            (_, Err(e)) if e.raw_os_error() == Some(libc::EFAULT) => {
                let why = format_args!("the frontend's memory cannot be used: {e}");
                log_limit::request_failed(self.start.queue, "I/O failed", &why);
                self.answer(head, pending.failed());
            }
            (_, Err(e)) => {
                log_limit::request_failed(self.start.queue, "I/O failed", &e);
                self.answer(head, pending.failed());
            }
            (work, Ok(())) if !work.is_last() => {
                self.unfinished.push_back(InFlight { head, pending, work });
            }
            (Work::Read { .. }, Ok(())) => self.answer(head, pending.done()),
            (Work::Write { range, writing, .. }, Ok(())) => {
                self.written(head, pending, writing, &[range]);
            }
            (Work::Zero(zero), Ok(())) => {
                let ranges: Vec<_> = zero.segments.ranges().collect();
                self.written(head, pending, zero.writing, &ranges);
            }
        }
    }

    /// The file system gives no space back and makes no zeros. A discard promises nothing: without
    /// a bit the sectors stay what they were. (To write zeros would take the space that is to be
    /// given back.)
    #[cold]
    fn not_punched(&mut self, head: Q::Head, pending: Pending, mut zero: Box<ZeroWork<'a>>) {
        if zero.discard {
            return self.answer(head, pending.done());
        }
        zero.method = ZeroMethod::Written;
        zero.segments.rewind();
        self.unfinished.push_back(InFlight { head, pending, work: Work::Zero(zero) });
    }

    /// The data is in the top file: tells the disk, then the guest.
    fn written(
        &mut self,
        head: Q::Head,
        pending: Pending,
        writing: Writing<'a>,
        ranges: &[SectorRange],
    ) {
        fault::reached("data");
        if let Err(e) = writing.written(ranges) {
            log_limit::request_failed(self.start.queue, "write failed", &e);
            return self.answer(head, pending.failed());
        }
        fault::reached("live-bit");
        if self.start.write_through.load(Ordering::Relaxed) {
            self.commit(head, pending);
        } else {
            self.answer(head, pending.done());
        }
    }

    /// Answers after everything that was acknowledged so far is durable.
    fn commit(&mut self, head: Q::Head, pending: Pending) {
        let Some(tag) = self.uncommitted.pop() else {
            // As in `submit`: there are as many places as requests.
            return self.answer(head, pending.failed());
        };
        self.committing[tag as usize] = Some((head, pending));
        self.shared.committer.submit(Waiter { queue: self.start.queue, tag });
    }

    fn committed(&mut self) {
        let mut answers = std::mem::take(&mut self.answers);
        _ = nix::unistd::read(self.shared.committer.event(self.start.queue), &mut [0; 8]);
        self.shared.committer.drain(self.start.queue, &mut answers);
        for (tag, flushed) in answers.drain(..) {
            let waiting = self.committing.get_mut(tag as usize).and_then(Option::take);
            let Some((head, pending)) = waiting else { continue };
            self.uncommitted.push(tag);
            let reply = match flushed {
                Ok(()) => pending.done(),
                Err(e) => {
                    log_limit::request_failed(self.start.queue, "flush failed", &e);
                    pending.failed()
                }
            };
            self.answer(head, reply);
        }
        self.answers = answers;
    }

    fn answer(&mut self, head: Q::Head, reply: Reply) {
        let status = reply.status_at();
        let written = reply.finish(&self.start.memory);
        fault::reached("status");
        self.queue.mark_buffers(&head, status);
        self.queue.push(head, written);
    }

    /// Shows the guest the answers, unless its memory is poisoned: then nothing that was read from
    /// it can be trusted.
    fn publish(&mut self) {
        if self.queue.poisoned() {
            if self.is_open()
                && let Some(loss) = self.queue.loss()
            {
                self.fail(&loss);
            }
            return;
        }
        if self.queue.publish() {
            self.notify();
        }
    }

    fn notify(&self) {
        if let Some(call) = &self.call {
            call.signal();
        }
    }

    /// Takes nothing more from a ring that cannot be trusted.
    fn fail(&mut self, why: &dyn std::fmt::Display) {
        self.close(Closing::Answering(Instant::now()));
        give_up(self.start, self.shared, why);
    }

    fn tidy_later(&mut self) -> bool {
        let once = Expiration::OneShot(TIDY_AFTER.into());
        self.timer.set(once, TimerSetTimeFlags::empty()).is_ok()
    }

    /// Nothing to do at the moment: spins while that has paid, then sleeps.
    fn rest(&mut self) {
        let can_take = self.can_take();
        let wait = if self.in_flight() == 0 { For::Guest } else { For::Disk };
        let (queue, ring) = (&self.queue, &mut self.ring);
        if self.spin.until(wait, || (can_take && queue.has_work()) || ring.wants_enter()) {
            return;
        }
        if can_take && self.queue.enable_notifications() {
            self.queue.disable_notifications();
            return;
        }
        if self.router.resident().rested() && !self.tidying {
            self.tidying = self.tidy_later();
        }
        let asleep = Instant::now();
        self.pulse.rest();
        if let Err(e) = self.ring.enter(true) {
            self.fail(&e);
        }
        self.spin.slept(wait, asleep.elapsed());
        self.queue.disable_notifications();
    }
}

#[cfg(test)]
mod tests;
