//! One thread for each queue. It pops requests from the ring, asks the disk's layer map where their
//! data is, has io_uring (or threads, where io_uring is refused) move it between the files and
//! guest memory, and pushes the answers into the used ring.
//!
//! This is the only place where virtio and the layers meet. A turn of the loop
//! takes a batch of requests, hands it to the kernel with one system call,
//! fetches what has completed, and publishes it with one notification.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
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
use crate::datapath::route::Router;
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

use handle::WorkerHandle;

/// Requests taken in one turn: enough to share a system call and a
/// notification among many, few enough that the first is not held up by the
/// last.
const BATCH_MAX: usize = 32;
/// Requests of one queue that are in flight at most, whatever the size of its ring: the others wait
/// in the ring. No disk gets faster by more, and each takes some hundred bytes here.
const IN_FLIGHT_MAX: u16 = 1024;

/// Bytes to read after which a turn takes no more requests. A guest can make a request of 4 GiB by
/// naming one piece of its memory many times. The worker itself zeroes holes and copies what is in
/// the page cache, and stopping the ring waits for that. As much as [`BATCH_MAX`] of the longest
/// requests that guests really send.
const BATCH_BYTES_MAX: u64 = 64 << 20;

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
    Read,
    /// The one that is offloaded, see [`OFFLOAD_MIN`].
    OffloadedRead,
    Write(SectorRange, Writing<'a>),
    Zero(ZeroWork<'a>),
    /// A flush, for itself or for a write that must be durable.
    Commit,
}

/// Ranges that are being turned into zeros.
struct ZeroWork<'a> {
    segments: Vec<Segment>,
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
    /// Requests that wait for the committer; the tag is the place.
    committing: Vec<Option<InFlight<'a, Q::Head>>>,
    uncommitted: Vec<u32>,
    spin: Spin,
    pulse: &'a Pulse,
    /// Bytes to read of the batch that is being taken.
    batch_bytes: u64,
    /// A read is offloaded. One at a time: two that copy take the memory's speed.
    offloaded: bool,
    /// Requests are still being taken.
    open: bool,
    /// Reported as [`TIDY`].
    timer: TimerFd,
    /// It is set.
    tidying: bool,
    // Used again from one request to the next.
    plan: Plan,
    iovecs: IoVecs,
    answers: Vec<(u32, Flushed)>,
    segments: Vec<Vec<Segment>>,
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
            committing: (0..depth).map(|_| None).collect(),
            uncommitted: (0..u32::from(depth)).rev().collect(),
            spin: Spin::new(shared.poll),
            pulse,
            batch_bytes: 0,
            offloaded: false,
            open: true,
            timer,
            tidying: false,
            plan: Plan::default(),
            iovecs: IoVecs::new(),
            answers: Vec::new(),
            segments: Vec::new(),
        })
    }

    fn run(mut self) -> u16 {
        fault::try_operations(&mut self.ring);
        self.notify();
        loop {
            self.pulse.beat();
            let busy = self.turn();
            if !self.open && self.in_flight() == 0 {
                return self.queue.next_avail();
            }
            if !busy {
                self.rest();
            }
        }
    }

    /// One turn of the loop; whether there was anything to do.
    fn turn(&mut self) -> bool {
        let mut busy = self.take();
        self.enter();
        busy |= self.reap();
        self.publish();
        busy
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
    fn can_take(&self) -> bool {
        self.open && self.in_flight() < self.depth
    }

    /// Takes and starts a batch of requests; whether there was one.
    fn take(&mut self) -> bool {
        self.router.resident().tick();
        self.batch_bytes = 0;
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
            Operation::In(range) => self.read(head, pending, range),
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

    fn read(&mut self, head: Q::Head, pending: Pending, range: SectorRange) {
        self.batch_bytes += range.len_bytes();
        let memory = &self.start.memory;
        // With nothing else to copy it would only take longer.
        let offload = range.len_bytes() >= OFFLOAD_MIN && !self.offloaded && self.queue.has_work();
        let (data, plan) = (self.iovecs.data(), &mut self.plan);
        let planned = self.router.plan_read(range, memory, data, offload, plan);
        if let Err(e) = planned {
            log_limit::request_failed(self.start.queue, "read failed", &e);
            return self.answer(head, pending.failed());
        }
        self.offloaded |= offload && !self.plan.is_empty();
        let work = if offload && self.offloaded { Work::OffloadedRead } else { Work::Read };
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
        let request = InFlight { head, pending, work: Work::Write(range, writing) };
        let data = self.iovecs.data();
        // SAFETY: as in `submit`.
        if unsafe { self.router.write_inline(range, data) } {
            return self.completed(request, Ok(()));
        }
        self.router.plan_write(range, data, &mut self.plan);
        self.submit(request);
    }

    fn zero(&mut self, head: Q::Head, pending: Pending, discard: bool) {
        if self.shared.disk.is_failed() {
            return self.answer(head, pending.failed());
        }
        let mut segments = self.segments.pop().unwrap_or_default();
        segments.extend(self.iovecs.segments().iter().filter(|s| !s.range.is_empty()));
        for segment in &mut segments {
            segment.unmap |= discard;
        }
        let Some(hull) = segments.iter().map(|segment| segment.range).reduce(SectorRange::hull)
        else {
            return self.answer(head, pending.done());
        };
        let writing = self.shared.disk.begin_write(hull);
        self.router.plan_zero(&segments, discard, &mut self.plan);
        let work = Work::Zero(ZeroWork { segments, method: ZeroMethod::Punch, writing });
        self.submit(InFlight { head, pending, work });
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
                Event::Ready(_) => self.open = false,
                Event::Lost(watch, e) => self.lost(watch, &e),
            }
        }
        busy
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

    /// The data of a request has been moved, or could not be.
    fn completed(&mut self, request: InFlight<'a, Q::Head>, result: io::Result<()>) {
        let InFlight { head, pending, work } = request;
        self.offloaded &= !matches!(work, Work::OffloadedRead);
        match (work, result) {
            (Work::Zero(zero), Err(e))
                if zero.method == ZeroMethod::Punch
                    && e.raw_os_error() == Some(libc::EOPNOTSUPP) =>
            {
                self.router.plan_written_zeros(&zero.segments, &mut self.plan);
                let work = Work::Zero(ZeroWork { method: ZeroMethod::Written, ..zero });
                self.submit(InFlight { head, pending, work });
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
            (Work::Read | Work::OffloadedRead | Work::Commit, Ok(())) => {
                self.answer(head, pending.done())
            }
            (Work::Write(range, writing), Ok(())) => {
                self.written(head, pending, writing, &[range]);
            }
            (Work::Zero(ZeroWork { mut segments, writing, .. }), Ok(())) => {
                let ranges: Vec<_> = segments.iter().map(|s| s.range).collect();
                self.written(head, pending, writing, &ranges);
                segments.clear();
                self.segments.push(segments);
            }
        }
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
        self.committing[tag as usize] = Some(InFlight { head, pending, work: Work::Commit });
        self.shared.committer.submit(Waiter { queue: self.start.queue, tag });
    }

    fn committed(&mut self) {
        let mut answers = std::mem::take(&mut self.answers);
        _ = nix::unistd::read(self.shared.committer.event(self.start.queue), &mut [0; 8]);
        self.shared.committer.drain(self.start.queue, &mut answers);
        for (tag, flushed) in answers.drain(..) {
            let waiting = self.committing.get_mut(tag as usize).and_then(Option::take);
            let Some(InFlight { head, pending, .. }) = waiting else { continue };
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
            if self.open
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
        self.open = false;
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
