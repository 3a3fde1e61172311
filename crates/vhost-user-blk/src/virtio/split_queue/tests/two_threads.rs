//! Driver and device in two threads, each of which sleeps whenever the other one promised to wake
//! it. A notification that gets lost leaves both asleep.
//!
//! On x86 this finds a missing second look, but hardly a missing fence. Miri, which keeps stores
//! back as weaker machines do, finds those as well:
//! `MIRIFLAGS=-Zmiri-many-seeds=0..8 cargo +nightly miri test -p vhost-user-blk --lib two_threads`.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use testkit::driver::Driver;

use super::*;

const SIZE: u16 = 16;
const REQUESTS: u32 = if cfg!(miri) { 200 } else { 100_000 };
/// Not a limit on how long anything may take: it ends a test that would hang for ever.
const HANG: Duration = Duration::from_secs(120);

fn sleep(call: &Receiver<()>, who: &str) {
    call.recv_timeout(HANG).unwrap_or_else(|error| panic!("{who} sleeps for ever: {error}"));
}

/// Spends some time, now more, now less, so that the threads meet in ever new places.
fn dawdle(state: &mut u32) {
    *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    for _ in 0..*state >> 25 {
        std::hint::spin_loop();
    }
}

/// The driver's side of a ring as Linux does it (`virtqueue_kick_prepare`, `virtqueue_enable_cb`).
struct LinuxDriver {
    guest: Guest,
    event_idx: bool,
    /// `avail.idx` when the device was last told, and the next used entry to look at.
    told: u16,
    seen: u16,
    free: Vec<u16>,
}

impl LinuxDriver {
    fn field(&self, address: u64) -> *mut u16 {
        self.guest.memory.contiguous_mut(GuestAddress(address), 2).unwrap().cast()
    }

    fn offer(&mut self) {
        let head = self.free.pop().unwrap();
        let Driver { layout, avail_idx } = self.guest.driver;
        store(self.field(layout.avail_entry(avail_idx)), head, Ordering::Relaxed);
        self.guest.driver.avail_idx = avail_idx.wrapping_add(1);
        store(self.field(layout.avail_idx()), self.guest.driver.avail_idx, Ordering::Release);
    }

    /// Whether the device wants to hear of what was offered since it was last told.
    fn must_kick(&mut self) -> bool {
        fence(Ordering::SeqCst);
        let (old, new) = (self.told, self.guest.driver.avail_idx);
        self.told = new;
        let layout = self.guest.driver.layout;
        if self.event_idx {
            let event = load(self.field(layout.avail_event()), Ordering::Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            load(self.field(layout.used_flags()), Ordering::Relaxed) == 0
        }
    }

    /// Gets the answers there are; how many.
    fn collect(&mut self) -> u32 {
        let used_idx = load(self.field(self.guest.driver.layout.used_idx()), Ordering::Acquire);
        let mut count = 0;
        while self.seen != used_idx {
            let (id, written) = self.guest.used(self.seen);
            assert_eq!(written, id + 1);
            self.free.push(u16::try_from(id).unwrap());
            self.seen = self.seen.wrapping_add(1);
            count += 1;
        }
        assert!(self.free.len() <= usize::from(SIZE), "a head was answered twice");
        count
    }

    /// Asks to be notified of the next answer; false if there is one already.
    fn may_sleep(&self) -> bool {
        let layout = self.guest.driver.layout;
        if self.event_idx {
            store(self.field(layout.used_event()), self.seen, Ordering::Relaxed);
        } else {
            store(self.field(layout.avail_flags()), 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        load(self.field(self.guest.driver.layout.used_idx()), Ordering::Relaxed) == self.seen
    }

    fn run(mut self, kick: &Sender<()>, call: &Receiver<()>) {
        let (mut offered, mut collected, mut dawdling) = (0, 0, 1);
        while collected < REQUESTS {
            if !self.event_idx {
                // While it is awake it wants no notification.
                store(self.field(self.guest.driver.layout.avail_flags()), 1, Ordering::Relaxed);
            }
            // Bursts of different lengths, so that the ring is found full, empty and in between.
            let burst = 1 + offered % 7;
            for _ in 0..burst {
                if offered < REQUESTS && !self.free.is_empty() {
                    self.offer();
                    offered += 1;
                }
            }
            dawdle(&mut dawdling);
            if self.must_kick() {
                // The device may have served it all without, and be gone.
                _ = kick.send(());
            }
            let got = self.collect();
            collected += got;
            if got == 0 && self.free.len() < usize::from(SIZE) && self.may_sleep() {
                sleep(call, "driver");
            }
        }
    }
}

fn device(mut queue: SplitQueue, kick: &Receiver<()>, call: &Sender<()>) {
    let (mut served, mut dawdling) = (0, 7);
    while served < REQUESTS {
        queue.disable_notifications();
        let mut batch = 0;
        while let Some(head) = queue.pop().unwrap() {
            let written = u32::from(head.index()) + 1;
            queue.push(head, written);
            batch += 1;
            if batch == 3 {
                break;
            }
        }
        served += batch;
        if queue.publish() {
            // The driver may have all it wanted, and be gone.
            _ = call.send(());
        }
        if batch == 0 {
            dawdle(&mut dawdling);
            if !queue.enable_notifications() {
                sleep(kick, "device");
            }
        }
    }
}

fn no_notification_gets_lost(event_idx: bool) {
    let guest = Guest::new(SIZE, 65530);
    let queue = guest.queue(event_idx);
    let free = (0..SIZE).collect();
    let driver = LinuxDriver { told: 65530, seen: 65530, free, guest, event_idx };
    let (kick_sender, kick) = channel();
    let (call_sender, call) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || driver.run(&kick_sender, &call));
        scope.spawn(move || device(queue, &kick, &call_sender));
    });
}

#[test]
fn no_notification_gets_lost_with_flags() {
    no_notification_gets_lost(false);
}

#[test]
fn no_notification_gets_lost_with_event_index() {
    no_notification_gets_lost(true);
}
