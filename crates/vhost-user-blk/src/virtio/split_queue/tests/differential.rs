//! This ring beside `virtio_queue::Queue`: the same bytes in two memories, the same driver, and the
//! same must come out.

use proptest::collection::vec;
use proptest::prelude::*;
use testkit::descriptor::table;
use testkit::driver::GuestMemory;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::*;

const SIZE: u16 = 8;

/// One step of driver or device.
#[derive(Clone, Debug)]
enum Step {
    /// The driver offers heads, as many as there is room for.
    Offer(Vec<u16>),
    /// The device takes this many and walks them.
    Take(usize),
    /// The device answers one of those it has, with this length.
    Answer(prop::sample::Index, u32),
    /// The device publishes and asks whether to notify.
    Publish,
    /// The driver wants to be notified this far from where `used.idx` is.
    UsedEvent(i16),
    Disable,
    Enable,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => vec(0..SIZE, 1..6).prop_map(Step::Offer),
        2 => (1..6_usize).prop_map(Step::Take),
        4 => (any::<prop::sample::Index>(), any::<u32>()).prop_map(|(which, len)| Step::Answer(which, len)),
        2 => Just(Step::Publish),
        2 => (-4..4_i16).prop_map(Step::UsedEvent),
        1 => Just(Step::Disable),
        1 => Just(Step::Enable),
    ]
}

/// Descriptors that make chains of every shape, direct and indirect, some of them broken.
fn descriptor() -> impl Strategy<Value = Desc> {
    let address =
        prop_oneof![Just(DATA), Just(DATA + 0x100), Just(BORDER - 24), Just(END - 32), 0..END];
    let len = prop_oneof![3 => (0..6_u32).prop_map(|count| 16 * count), 1 => 0..100_u32];
    let flags = prop_oneof![3 => Just(0), 3 => Just(NEXT), 2 => Just(NEXT | WRITE), 2 => Just(INDIRECT), 1 => 0..8_u16];
    let next = prop_oneof![4 => 0..SIZE, 1 => 0..2 * SIZE];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| Desc {
        address,
        len,
        flags,
        next,
    })
}

/// Both devices and the memories they work in.
struct Pair {
    guest: Guest,
    ours: SplitQueue,
    our_heads: Vec<Head>,
    memory: GuestMemoryMmap<()>,
    theirs: Queue,
    their_heads: Vec<u16>,
    event_idx: bool,
}

/// What the driver does, it does in both memories. What the device did is the same in both.
impl GuestMemory for Pair {
    fn write_guest(&self, address: u64, bytes: &[u8]) {
        self.guest.write(address, bytes);
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn read_guest(&self, address: u64, bytes: &mut [u8]) {
        self.guest.memory.read_guest(address, bytes);
    }
}

impl Pair {
    fn new(event_idx: bool, start: u16, descs: &[Desc], more: &[Desc]) -> Self {
        let guest = Guest::new(SIZE, start);
        let len = |from: u64, to: u64| usize::try_from(to - from).unwrap();
        let ranges =
            [(GuestAddress(RING), len(RING, BORDER)), (GuestAddress(BORDER), len(BORDER, END))];
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let layout = guest.driver.layout;
        let mut theirs = Queue::new(SIZE).unwrap();
        theirs.set_size(SIZE);
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        theirs.set_desc_table_address(low(layout.desc), Some(0));
        theirs.set_avail_ring_address(low(layout.avail), Some(0));
        theirs.set_used_ring_address(low(layout.used), Some(0));
        theirs.set_event_idx(event_idx);
        theirs.set_next_avail(start);
        theirs.set_next_used(start);
        theirs.set_ready(true);
        let ours = guest.queue(event_idx);
        let (our_heads, their_heads) = (Vec::new(), Vec::new());
        let pair = Self { guest, ours, our_heads, memory, theirs, their_heads, event_idx };
        let driver = &pair.guest.driver;
        driver.set_descs(&pair, 0, descs);
        for start in [DATA, DATA + 0x100, BORDER - 24] {
            pair.write_guest(start, &table(more));
        }
        pair.write_guest(driver.layout.avail_idx(), &start.to_le_bytes());
        pair.write_guest(driver.layout.used_idx(), &start.to_le_bytes());
        pair
    }

    fn offer(&mut self, heads: &[u16]) {
        let waiting = self.guest.driver.avail_idx.wrapping_sub(self.ours.next_avail());
        let room = usize::from(SIZE - waiting) - self.our_heads.len();
        let mut driver = self.guest.driver;
        driver.offer(self, &heads[..heads.len().min(room)]);
        self.guest.driver = driver;
    }

    fn take(&mut self, count: usize) {
        for _ in 0..count {
            let ours = self.ours.pop().unwrap();
            let theirs = self.theirs.iter(&self.memory).unwrap().next();
            assert_eq!(
                ours.as_ref().map(Head::index),
                theirs.as_ref().map(|chain| chain.head_index())
            );
            let (Some(head), Some(chain)) = (ours, theirs) else { return };
            let (good, broken): (Vec<_>, Vec<_>) = self.ours.chain(&head).partition(Result::is_ok);
            let good: Vec<Descriptor> = good.into_iter().flatten().collect();
            let same: Vec<Descriptor> =
                chain.map(|desc| buffer(desc.addr().0, desc.len(), desc.is_write_only())).collect();
            // They end where a chain breaks, we say that it does. They follow a loop once round and
            // an indirect descriptor that has a next one; we do neither.
            let common = good.len().min(same.len());
            assert_eq!(good[..common], same[..common]);
            assert!(
                !broken.is_empty() || good.len() == same.len(),
                "ours {good:?}, theirs {same:?}"
            );
            self.their_heads.push(head.index());
            self.our_heads.push(head);
        }
    }

    fn answer(&mut self, which: &prop::sample::Index, written: u32) {
        if self.our_heads.is_empty() {
            return;
        }
        let at = which.index(self.our_heads.len());
        self.ours.push(self.our_heads.swap_remove(at), written);
        self.theirs.add_used(&self.memory, self.their_heads.swap_remove(at), written).unwrap();
    }

    fn publish(&mut self) {
        let ours = self.ours.publish();
        let theirs = self.theirs.needs_notification(&self.memory).unwrap();
        // Without EVENT_IDX they always say yes, even if there is nothing new.
        if self.event_idx {
            assert_eq!(ours, theirs);
        }
        self.compare();
    }

    /// What the device writes: the used ring, flags and event included.
    fn compare(&self) {
        let len = 6 + 8 * usize::from(SIZE);
        let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
        let used = GuestAddress(self.guest.driver.layout.used);
        self.guest.memory.read(used, &mut ours).unwrap();
        self.memory.read_slice(&mut theirs, used).unwrap();
        assert_eq!(ours, theirs);
        assert_eq!(self.ours.next_avail(), self.theirs.next_avail());
        assert_eq!(self.ours.used_idx(), self.theirs.next_used());
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Offer(heads) => self.offer(heads),
            Step::Take(count) => self.take(*count),
            Step::Answer(which, written) => self.answer(which, *written),
            Step::Publish => self.publish(),
            Step::UsedEvent(distance) => {
                let event = self.ours.used_idx().wrapping_add_signed(*distance);
                self.guest.driver.set_used_event(self, event);
            }
            Step::Disable => {
                self.ours.disable_notifications();
                self.theirs.disable_notification(&self.memory).unwrap();
                self.publish();
            }
            Step::Enable => {
                let theirs = self.theirs.enable_notification(&self.memory).unwrap();
                assert_eq!(self.ours.enable_notifications(), theirs);
                self.publish();
            }
        }
    }
}

proptest! {
    #![proptest_config(crate::guest::proptest_config(512))]

    #[test]
    fn same_as_virtio_queue(
        event_idx: bool,
        start in prop_oneof![Just(0), 65500..=65535_u16, any::<u16>()],
        table in vec(descriptor(), usize::from(SIZE)),
        more in vec(descriptor(), 6),
        steps in vec(step(), 1..120),
    ) {
        let mut pair = Pair::new(event_idx, start, &table, &more);
        for step in &steps {
            pair.step(step);
        }
        pair.publish();
    }
}
