use super::*;
use crate::guest::{BORDER, DATA, Desc, END, Guest, INDIRECT, NEXT, RING, WRITE};
use crate::guest_memory::memory::OutsideMemory;
use crate::virtio::device_queue::CHAIN_DESCRIPTORS_MAX;

mod differential;
mod logged;
mod two_threads;

fn desc(address: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { address, len, flags, next }
}

/// Offers head 0 of a chain and walks it.
fn walk(guest: &mut Guest) -> Result<Vec<Descriptor>, ChainError> {
    guest.set_avail_idx(0);
    let mut queue = guest.queue(false);
    guest.offer(0);
    let head = queue.pop().unwrap().unwrap();
    queue.chain(&head).collect()
}

fn buffer(address: u64, len: u32, writable: bool) -> Descriptor {
    Descriptor { address: GuestAddress(address), len, writable }
}

#[test]
fn requests_go_round_and_indices_wrap() {
    let mut guest = Guest::new(4, 65533);
    let mut queue = guest.queue(false);
    assert_eq!(queue.pop(), Ok(None));
    for round in 0..10_u16 {
        let heads = [round % 4, (round + 2) % 4];
        heads.iter().for_each(|&head| guest.offer(head));
        assert!(queue.has_work());
        let popped = [queue.pop().unwrap().unwrap(), queue.pop().unwrap().unwrap()];
        assert_eq!(popped.each_ref().map(Head::index), heads);
        assert_eq!((queue.pop(), queue.in_flight()), (Ok(None), 2));
        let before = guest.used_idx();
        let [first, second] = popped;
        queue.push(second, 7);
        queue.push(first, 9);
        assert_eq!(guest.used_idx(), before, "nothing is seen before it is published");
        assert!(queue.publish());
        assert!(!queue.publish(), "nothing new");
        assert_eq!(guest.used_idx(), before.wrapping_add(2));
        assert_eq!(guest.used(before), (heads[1].into(), 7));
        assert_eq!(guest.used(before.wrapping_add(1)), (heads[0].into(), 9));
    }
    assert_eq!((queue.next_avail(), queue.used_idx()), (17, 17));
}

#[test]
fn a_ring_is_taken_up_where_it_stands() {
    let mut guest = Guest::new(8, 100);
    guest.write(guest.driver.layout.used_idx(), &98_u16.to_le_bytes());
    guest.write(guest.driver.layout.used_flags(), &1_u16.to_le_bytes());
    let mut queue = guest.queue(false);
    assert_eq!(guest.used_flags(), 0, "a predecessor's wish for silence is over");
    guest.offer(5);
    let head = queue.pop().unwrap().unwrap();
    queue.push(head, 1);
    queue.publish();
    assert_eq!((guest.used_idx(), guest.used(98)), (99, (5, 1)));
}

#[test]
fn rings_that_cannot_be_trusted() {
    let mut guest = Guest::new(4, 65534);
    let mut queue = guest.queue(false);
    guest.set_avail_idx(3);
    assert_eq!(queue.pop(), Err(RingError::AvailIndex { found: 3, next: 65534, size: 4 }));
    guest.set_avail_idx(65533);
    assert_eq!(queue.pop(), Err(RingError::AvailIndex { found: 65533, next: 65534, size: 4 }));

    let mut guest = Guest::new(4, 0);
    let mut queue = guest.queue(false);
    guest.offer(4);
    assert_eq!(queue.pop(), Err(RingError::Head { found: 4, size: 4 }));

    let mut guest = Guest::new(2, 0);
    let mut queue = guest.queue(false);
    let mut heads = Vec::new();
    for _ in 0..2 {
        guest.offer(1);
        heads.push(queue.pop().unwrap().unwrap());
    }
    guest.offer(0);
    assert_eq!(queue.pop(), Err(RingError::InFlight { size: 2 }));
    queue.push(heads.pop().unwrap(), 0);
    assert_eq!(queue.pop().unwrap().map(|head| head.index()), Some(0));
}

#[test]
fn layouts_that_are_refused() {
    let guest = Guest::new(4, 0);
    let good = guest.layout;
    let start = |layout| SplitQueue::new(guest.memory.clone(), layout).map(|_| ());
    assert_eq!(start(good), Ok(()));
    for found in [0, 3, 40000] {
        assert_eq!(start(QueueState { size: found, ..good }), Err(RingError::Size { found }));
    }
    let alignment = |part, address, align| Err(RingError::Alignment { part, address, align });
    let desc = QueueState { desc_table: RING + 8, ..good };
    assert_eq!(start(desc), alignment("descriptor table", RING + 8, 16));
    let avail = QueueState { avail_ring: RING + 1, ..good };
    assert_eq!(start(avail), alignment("available ring", RING + 1, 2));
    let used = QueueState { used_ring: RING + 2, ..good };
    assert_eq!(start(used), alignment("used ring", RING + 2, 4));
    // The last entry that fits, then the first that does not, at the end of memory and at a border.
    for end in [END, BORDER] {
        assert_eq!(start(QueueState { used_ring: end - 40, ..good }), Ok(()));
        let place = RingError::Place { part: "used ring", address: end - 36, len: 38 };
        assert_eq!(start(QueueState { used_ring: end - 36, ..good }), Err(place));
    }
    let address = u64::MAX - 15;
    let place = RingError::Place { part: "descriptor table", address, len: 64 };
    assert_eq!(start(QueueState { desc_table: address, ..good }), Err(place));
}

#[test]
fn notification_by_flags() {
    let mut guest = Guest::new(4, 0);
    let mut queue = guest.queue(false);
    for (flags, wanted) in [(0, true), (1, false), (0, true)] {
        guest.set_avail_flags(flags);
        guest.offer(0);
        let head = queue.pop().unwrap().unwrap();
        queue.push(head, 0);
        assert_eq!(queue.publish(), wanted);
    }
    queue.disable_notifications();
    assert_eq!(guest.used_flags(), 1);
    assert!(!queue.enable_notifications());
    assert_eq!(guest.used_flags(), 0);
    queue.disable_notifications();
    guest.offer(0);
    assert!(queue.enable_notifications(), "what came before the wish is reported");
}

#[test]
fn notification_by_event_index() {
    let mut guest = Guest::new(8, 65530);
    let mut queue = guest.queue(true);
    guest.set_avail_flags(1); // means nothing with EVENT_IDX
    // (heads in the batch, used_event, wanted); used.idx starts at 65530.
    let cases =
        [(1, 65530, true), (1, 65530, false), (3, 65533, true), (3, 65534, false), (4, 3, true)];
    for (batch, event, wanted) in cases {
        guest.set_used_event(event);
        for head in 0..batch {
            guest.offer(head);
        }
        while let Some(head) = queue.pop().unwrap() {
            queue.push(head, 0);
        }
        assert_eq!(queue.publish(), wanted, "batch {batch}, event {event}");
    }
    queue.disable_notifications();
    assert_eq!(guest.used_flags(), 0, "always 0 with EVENT_IDX");
    assert!(!queue.enable_notifications());
    assert_eq!(guest.avail_event(), guest.driver.avail_idx);
}

#[test]
fn direct_indirect_and_mixed_chains() {
    let mut guest = Guest::new(4, 0);
    guest.set_desc(0, desc(DATA, 16, NEXT, 3));
    guest.set_desc(3, desc(DATA + 100, 5, NEXT | WRITE, 1));
    guest.set_desc(1, desc(7, 0, WRITE, 99));
    let direct = [buffer(DATA, 16, false), buffer(DATA + 100, 5, true), buffer(7, 0, true)];
    assert_eq!(walk(&mut guest).unwrap(), direct);

    // An indirect table's WRITE flag is ignored, and so is NEXT's place in memory: the table is
    // unaligned and goes over the border of two regions, in the middle of a descriptor.
    for table in [DATA + 3, BORDER - 24] {
        guest.set_table(
            table,
            &[
                desc(1, 2, NEXT, 2),
                desc(0, 0, INDIRECT, 0),
                desc(3, 4, NEXT | WRITE, 3),
                desc(5, 6, WRITE, 0),
            ],
        );
        guest.set_desc(3, desc(table, 64, INDIRECT | WRITE, 0));
        let mixed =
            [buffer(DATA, 16, false), buffer(1, 2, false), buffer(3, 4, true), buffer(5, 6, true)];
        assert_eq!(walk(&mut guest).unwrap(), mixed);
    }
}

#[test]
fn malformed_chains() {
    let mut guest = Guest::new(4, 0);
    let mut fails = |first: Desc, table: &[Desc]| {
        guest.set_desc(0, first);
        guest.set_table(DATA, table);
        walk(&mut guest).unwrap_err()
    };
    let indirect = |len| desc(DATA, len, INDIRECT, 0);
    assert_eq!(fails(desc(DATA, 1, NEXT, 4), &[]), ChainError::Next { next: 4, len: 4 });
    assert_eq!(fails(desc(DATA, 1, NEXT, 0), &[]), ChainError::TooLong);
    assert_eq!(fails(desc(DATA, 16, INDIRECT | NEXT, 1), &[]), ChainError::IndirectNext);
    for len in [0, 8, 17, u32::MAX] {
        assert_eq!(fails(indirect(len), &[]), ChainError::IndirectLength { len });
    }
    assert_eq!(fails(indirect(32), &[indirect(16)]), ChainError::NestedIndirect);
    assert_eq!(
        fails(indirect(32), &[desc(1, 1, NEXT, 1), indirect(16)]),
        ChainError::NestedIndirect
    );
    assert_eq!(fails(indirect(32), &[desc(1, 1, NEXT, 2)]), ChainError::Next { next: 2, len: 2 });
    let long = [desc(1, 1, NEXT, 1), desc(1, 1, NEXT, 0)];
    assert_eq!(fails(indirect(32), &long), ChainError::TooLong);
    // A table whose first descriptor is inside memory and whose second is not.
    let table = END - 16;
    guest.set_table(table, &[desc(1, 1, NEXT, 1)]);
    guest.set_desc(0, desc(table, 32, INDIRECT, 0));
    let outside = OutsideMemory { address: END, len: 16 };
    assert_eq!(walk(&mut guest), Err(ChainError::IndirectOutside(outside)));
    let top = u64::MAX - 8;
    guest.set_desc(0, desc(top, 64, INDIRECT, 0));
    let outside = OutsideMemory { address: top, len: 16 };
    assert_eq!(walk(&mut guest), Err(ChainError::IndirectOutside(outside)));
}

#[test]
fn longest_chain() {
    let longest = u32::from(CHAIN_DESCRIPTORS_MAX) - 1;
    for (more, fits) in [(0, true), (1, false)] {
        let mut guest = Guest::new(2, 0);
        let count = longest + more;
        guest.set_desc(0, desc(DATA, count * 16, INDIRECT, 0));
        let table: Vec<Desc> =
            (1..count).map(|next| desc(1, 1, NEXT, u16::try_from(next).unwrap())).collect();
        guest.set_table(DATA, &table);
        guest.write(DATA + u64::from(count - 1) * 16, &desc(1, 1, 0, 0).bytes());
        let walked = walk(&mut guest).map(|all| all.len());
        let expected = if fits { Ok(count as usize) } else { Err(ChainError::TooLong) };
        assert_eq!(walked, expected);
    }
}
