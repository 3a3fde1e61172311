use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use virtio_queue::Queue;

use proptest::prelude::*;

use super::*;
use crate::fault::crash::crash_after;
use crate::guest::Guest;
use crate::virtio::device_queue::DeviceQueue;
use crate::virtio::split_queue::{Head, SplitQueue, indices};

const SIZE: u16 = 8;

/// A guest and an area of two queues; the ring is the second one's.
struct Rig {
    guest: Guest,
    file: File,
    /// Heads that the driver may use.
    free: Vec<u16>,
    /// Heads made available, in order, that were not answered.
    waiting: VecDeque<u16>,
    used_seen: u16,
}

impl Rig {
    fn new(start: u16) -> Self {
        let file = AreaInfo::new(2, SIZE).create().unwrap();
        let guest = Guest::new(SIZE, start);
        let free = (0..SIZE).collect();
        Rig { guest, file, free, waiting: VecDeque::new(), used_seen: start }
    }

    fn area(&self) -> Area {
        Area::map(&AreaInfo::new(2, SIZE), self.file.try_clone().unwrap()).unwrap()
    }

    fn recover(&self) -> Result<Tracker, InflightError> {
        let queue = Queue::try_from(self.guest.layout).unwrap();
        self.area().recover(1, indices(&self.guest.memory, &queue).unwrap())
    }

    /// A daemon that begins to serve the ring.
    fn queue(&self) -> SplitQueue {
        let inflight = self.recover().unwrap();
        let mut queue = self.guest.queue(true);
        queue.track(inflight);
        queue
    }

    fn offer(&mut self, pick: usize) {
        if !self.free.is_empty() {
            let head = self.free.remove(pick % self.free.len());
            self.guest.offer(head);
            self.waiting.push_back(head);
        }
    }

    /// What the driver does when it looks at the used ring: every answer must be awaited.
    fn look(&mut self) {
        while self.used_seen != self.guest.used_idx() {
            let (id, _) = self.guest.used(self.used_seen);
            let at = self.waiting.iter().position(|&head| u32::from(head) == id);
            let head = self.waiting.remove(at.expect("answered twice, or not asked")).unwrap();
            self.free.push(head);
            self.used_seen = self.used_seen.wrapping_add(1);
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(AreaInfo::new(2, SIZE).size).unwrap()];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Offer(usize),
    Fetch,
    Answer(usize),
    Publish,
}

/// What a daemon holds.
struct Daemon {
    queue: SplitQueue,
    fetched: Vec<Head>,
}

impl Daemon {
    fn step(&mut self, step: Step) {
        match step {
            Step::Offer(_) => {}
            Step::Fetch => self.fetched.extend(self.queue.pop().unwrap()),
            Step::Answer(pick) => {
                if !self.fetched.is_empty() {
                    let head = self.fetched.remove(pick % self.fetched.len());
                    self.queue.push(head, 0);
                }
            }
            Step::Publish => {
                self.queue.publish();
            }
        }
    }

    /// Takes and answers everything there is.
    fn finish(&mut self) {
        while let Some(head) = self.queue.pop().unwrap() {
            self.fetched.push(head);
        }
        while !self.fetched.is_empty() {
            self.step(Step::Answer(0));
        }
        self.queue.publish();
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..8usize).prop_map(Step::Offer),
        3 => Just(Step::Fetch),
        3 => (0..8usize).prop_map(Step::Answer),
        1 => Just(Step::Publish),
    ]
}

proptest! {
    #![proptest_config(crate::guest::proptest_config(300))]

    /// The daemon dies after any number of stores, again and again, also while it recovers. In the
    /// end each request has exactly one answer.
    #[test]
    fn every_request_is_answered_once_whenever_the_daemon_dies(
        start in any::<u16>(),
        lives in prop::collection::vec((prop::collection::vec(step(), 0..30), 0..60u32), 1..8),
    ) {
        let mut rig = Rig::new(start);
        for (steps, places) in lives {
            crash_after(places, || {
                let queue = rig.queue();
                let mut daemon = Daemon { queue, fetched: Vec::new() };
                for step in steps {
                    if let Step::Offer(pick) = step {
                        rig.look();
                        rig.offer(pick);
                    }
                    daemon.step(step);
                }
            });
            rig.look();
        }
        let mut daemon = Daemon { queue: rig.queue(), fetched: Vec::new() };
        daemon.finish();
        rig.look();
        prop_assert_eq!(&rig.waiting, &VecDeque::new());
        // And nothing is marked any more.
        let mut next = rig.queue();
        prop_assert!(next.pop().unwrap().is_none());
        prop_assert_eq!(next.next_avail(), rig.guest.driver.avail_idx);
    }
}

#[test]
fn requests_are_done_again_in_the_order_they_were_fetched() {
    let mut rig = Rig::new(0xfffe);
    let mut queue = rig.queue();
    let heads = [5, 2, 7, 0, 3];
    for head in heads {
        rig.guest.offer(head);
    }
    let mut fetched: Vec<Head> = (0..5).map(|_| queue.pop().unwrap().unwrap()).collect();
    queue.push(fetched.remove(1), 0);
    queue.push(fetched.remove(2), 0);
    queue.publish();
    // Answered, but never shown.
    queue.push(fetched.remove(0), 0);
    drop(queue);

    rig.guest.offer(2);
    let mut queue = rig.queue();
    assert_eq!(queue.next_avail(), 3);
    assert!(queue.has_work());
    let again: Vec<u16> = (0..4).map(|_| queue.pop().unwrap().unwrap().index()).collect();
    assert_eq!(again, [5, 7, 3, 2]);
    assert!(queue.pop().unwrap().is_none());
    assert!(!queue.has_work());
}

#[test]
fn the_layout_is_the_specification_s() {
    assert_eq!([stride(1), stride(3), stride(4), stride(128)], [64, 64, 128, 2112]);
    let mut rig = Rig::new(3);
    let mut queue = rig.queue();
    rig.guest.offer(4);
    rig.guest.offer(6);
    let (first, second) = (queue.pop().unwrap().unwrap(), queue.pop().unwrap().unwrap());
    let bytes = rig.bytes();
    let queue_1 = usize::try_from(stride(SIZE)).unwrap();
    assert!(bytes[..queue_1].iter().all(|&byte| byte == 0), "queue 0 was not started");
    let at = |offset: usize, len: usize| bytes[queue_1 + offset..][..len].to_vec();
    // features, version 1, desc_num 8, last_batch_head, used_idx 3
    assert_eq!(at(0, 16), [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 0, 0, 0, 3, 0]);
    assert_eq!(at(16 + 16 * 4, 16), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(at(16 + 16 * 6, 16), [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);

    queue.push(second, 0);
    queue.push(first, 0);
    queue.publish();
    let bytes = rig.bytes();
    let at = |offset: usize, len: usize| bytes[queue_1 + offset..][..len].to_vec();
    assert_eq!(at(12, 4), [4, 0, 5, 0]);
    assert_eq!(at(16 + 16 * 4, 8), [0, 0, 0, 0, 0, 0, 6, 0]);
    assert_eq!(at(16 + 16 * 6, 8), [0; 8]);
}

#[test]
fn a_head_that_is_in_flight_is_not_taken_again() {
    let mut rig = Rig::new(0);
    let mut queue = rig.queue();
    rig.guest.offer(4);
    rig.guest.offer(4);
    let _first = queue.pop().unwrap().unwrap();
    let error = queue.pop().unwrap_err();
    assert_eq!(error.to_string(), "available ring names descriptor 4, which is in flight");
}

/// An area with two requests in flight, heads 1 and 2, and one, 3, answered; and where in it queue
/// 1 begins.
fn used_area() -> (Rig, u64) {
    let mut rig = Rig::new(10);
    let mut queue = rig.queue();
    for head in [1, 2, 3] {
        rig.guest.offer(head);
    }
    let heads: Vec<_> = (0..3).map(|_| queue.pop().unwrap().unwrap()).collect();
    let [_, _, third] = heads.try_into().unwrap();
    queue.push(third, 0);
    queue.publish();
    (rig, stride(SIZE))
}

#[test]
fn an_area_that_contradicts_itself_or_the_ring_is_refused_and_left_alone() {
    let descriptor = |head: u64| 16 + 16 * head;
    let cases: [(u64, &[u8], &str); 12] = [
        (0, &[1], "features is 1; expected 0"),
        (8, &[2], "version is 2; expected 1"),
        (10, &[9], "desc_num is 9; expected 8"),
        (14, &[2], "its used_idx is 2, the ring's is 11; a batch has 8"),
        (14, &[12], "its used_idx is 12, the ring's is 11"),
        (12, &[8, 0, 10], "names descriptor 8, which cannot be in it"),
        (12, &[0, 0, 9], "names descriptor 0, which cannot be in it twice"),
        (descriptor(4), &[2], "descriptor 4 has inflight 2"),
        (descriptor(1) + 8, &[1], "descriptor 2 has counter 1"),
        (descriptor(2) + 8, &[0xff; 8], "descriptor 2 has counter 18446744073709551615"),
        (descriptor(6), &[1, 0, 0, 0, 0, 0, 0, 0, 9], "3 requests are marked, but the ring, of 8"),
        (descriptor(3) + 6, &[7], ""),
    ];
    for (at, bytes, expected) in cases {
        let (rig, queue_1) = used_area();
        rig.file.write_all_at(bytes, queue_1 + at).unwrap();
        let before = rig.bytes();
        match rig.recover() {
            // What is linked behind the batch says nothing.
            Ok(_) => assert_eq!(expected, "", "byte {at}"),
            Err(e) => {
                assert!(!expected.is_empty() && e.to_string().contains(expected), "{at}: {e}");
                assert_eq!(rig.bytes(), before);
            }
        }
    }
}

#[test]
fn a_ring_that_contradicts_the_area_is_refused() {
    let (mut rig, _) = used_area();
    rig.guest.set_avail_idx(12);
    let error = rig.recover().unwrap_err().to_string();
    assert!(error.contains("2 requests are marked") && error.contains("has 1 that"), "{error}");
    rig.guest.set_avail_idx(20);
    let error = rig.recover().unwrap_err().to_string();
    assert!(error.contains("has 9 that"), "{error}");
    // Head 2 is beyond a smaller ring.
    rig.guest.set_avail_idx(13);
    rig.guest.layout.size = 2;
    let error = rig.recover().unwrap_err().to_string();
    assert!(error.contains("descriptor 2 has inflight 1"), "{error}");
    rig.guest.layout.size = 16;
    let error = rig.recover().unwrap_err().to_string();
    assert!(error.contains("for 8 descriptors; the ring has 16"), "{error}");
    let error = rig.area().recover(2, RingIndices { size: 8, avail: 0, used: 0 }).unwrap_err();
    assert!(error.to_string().contains("has 2 queues"), "{error}");
}

#[test]
fn numbers_of_an_area_are_checked() {
    let good = AreaInfo { size: 384, offset: 64, num_queues: 2, queue_size: 8 };
    good.check(2, 8).unwrap();
    let cases = [
        (AreaInfo { num_queues: 0, ..good }, "0 queues; expected 1 to 2"),
        (AreaInfo { num_queues: 3, ..good }, "3 queues; expected 1 to 2"),
        (AreaInfo { queue_size: 0, ..good }, "0 descriptors; expected 1 to 8"),
        (AreaInfo { queue_size: 9, ..good }, "9 descriptors; expected 1 to 8"),
        (AreaInfo { offset: 8, ..good }, "offset 0x8"),
        (AreaInfo { size: 383, ..good }, "383 bytes; 2 queues of 8 descriptors need 384"),
    ];
    for (info, expected) in cases {
        let error = info.check(2, 8).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let short = AreaInfo::new(1, 8).create().unwrap();
    let error = Area::map(&AreaInfo::new(2, 8), short).unwrap_err().to_string();
    assert!(error.contains("its file has 256 bytes"), "{error}");
}

#[test]
fn the_file_keeps_its_length_and_clearing_leaves_nothing() {
    let (rig, _) = used_area();
    assert!(rig.file.set_len(0).is_err());
    assert!(rig.file.set_len(1 << 20).is_err());
    assert!(rig.bytes().iter().any(|&byte| byte != 0));
    let state = DeviceState { write_cache: false };
    rig.area().keep(state);
    assert_eq!(rig.area().kept(), Some(state));
    rig.area().clear();
    assert!(rig.bytes().iter().all(|&byte| byte == 0));
    assert_eq!(rig.area().kept(), None);
    // An area that was made elsewhere has no room for it.
    let mut info = AreaInfo::new(2, SIZE);
    info.size = 2 * stride(SIZE);
    let area = Area::map(&info, rig.file.try_clone().unwrap()).unwrap();
    area.keep(state);
    assert_eq!(area.kept(), None);
}

#[test]
fn a_reset_does_not_touch_what_is_behind_the_area() {
    let AreaInfo { size: needed, num_queues, queue_size, .. } = AreaInfo::new(2, SIZE);
    for extra in [0, 1 << 20] {
        let info = AreaInfo { size: needed + extra, offset: 0, num_queues, queue_size };
        let file = info.create().unwrap();
        file.write_all_at(&vec![0x5a; usize::try_from(info.size).unwrap()], 0).unwrap();
        Area::map(&info, file.try_clone().unwrap()).unwrap().clear();
        let mut bytes = vec![1; usize::try_from(info.size).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let (area, behind) = bytes.split_at(usize::try_from(needed).unwrap());
        assert!(area.iter().all(|&byte| byte == 0) && behind.iter().all(|&byte| byte == 0x5a));
    }
}

/// Request n uses descriptor n once, so what another thread sees of it tells when it looked.
#[test]
fn another_thread_sees_the_stores_in_their_order() {
    const SIZE: u16 = if cfg!(miri) { 24 } else { 256 };
    const ROUNDS: usize = if cfg!(miri) { 2 } else { 100 };
    for round in 0..ROUNDS {
        let len = usize::try_from(stride(SIZE)).unwrap();
        let memory = Arc::new(Memory::anonymous(&[(0, len)]));
        let area = Area { memory, num_queues: 1, queue_size: SIZE };
        let ring = RingIndices { size: SIZE, avail: 0, used: 0 };
        let [mut daemon, watcher] = [(); 2].map(|()| area.recover(0, ring).unwrap());
        // The ring's `used.idx`.
        let shown = &AtomicU16::new(0);
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let batch_max = 1 + round % 7;
                let heads: Vec<u16> = (0..SIZE).collect();
                for batch in heads.chunks(batch_max) {
                    batch.iter().for_each(|&head| assert!(daemon.fetched(head)));
                    batch.iter().for_each(|&head| daemon.answered(head));
                    let used_idx = batch[batch.len() - 1] + 1;
                    shown.store(used_idx, Ordering::Release);
                    daemon.published(used_idx);
                }
            });
            while !thread.is_finished() {
                watch(&watcher, shown);
            }
        });
        assert_eq!(watch(&watcher, shown), SIZE);
    }
}

/// Checks what can be seen of an area whose request n has descriptor n; returns its `used_idx`.
fn watch(area: &Tracker, shown: &AtomicU16) -> u16 {
    let used_idx = area.header().used_idx.load(Ordering::Acquire);
    assert!(shown.load(Ordering::Relaxed) >= used_idx, "saved before the guest was shown it");
    let last = area.header().last_batch_head.load(Ordering::Acquire);
    let next = area.descriptors()[usize::from(last)].next.load(Ordering::Relaxed);
    assert_eq!(next, last.saturating_sub(1), "linked before it had a next");
    let mut later_is_fetched = false;
    // Where something may be going on; a look at all would come too late.
    for head in (used_idx.saturating_sub(4)..area.desc_num.min(used_idx + 8)).rev() {
        let descriptor = &area.descriptors()[usize::from(head)];
        if descriptor.inflight.load(Ordering::Acquire) == 1 {
            let counter = descriptor.counter.load(Ordering::Relaxed);
            assert_eq!(counter, u64::from(head), "marked before it was counted");
            assert!(head >= used_idx, "saved before its mark was removed");
            later_is_fetched = true;
        } else if later_is_fetched {
            let shown = shown.load(Ordering::Relaxed);
            assert!(shown > head, "its mark was removed before the guest was shown it");
        }
    }
    used_idx
}
