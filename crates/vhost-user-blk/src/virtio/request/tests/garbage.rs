//! Rings and chains of random bytes: nothing panics, and each head that is taken is answered once.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::guest::RING;
use crate::virtio::split_queue::RingError;

const QUEUE_SIZE: u16 = 8;

/// A descriptor that is often plausible: an address and a length inside memory, flags that mean
/// something.
fn descriptor() -> impl Strategy<Value = Desc> {
    let address = prop_oneof![6 => RING..END, 2 => BORDER - 64..BORDER + 64, 1 => any::<u64>()];
    let len = prop_oneof![
        Just(0),
        Just(1),
        Just(16),
        Just(17),
        Just(512),
        Just(64),
        0..0x8000_u32,
        any::<u32>()
    ];
    let flags = prop_oneof![6 => 0..4_u16, 2 => 0..8_u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..QUEUE_SIZE, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| Desc {
        address,
        len,
        flags,
        next,
    })
}

/// Serves a ring until it has nothing more or breaks, and gives what was answered and why it broke.
fn serve(guest: &Guest, event_idx: bool) -> (Vec<(u32, u32)>, Result<(), RingError>) {
    let mut queue = guest.queue(event_idx);
    let mut iovecs = IoVecs::new();
    let mut answered = Vec::new();
    let end = loop {
        let head = match queue.pop() {
            Ok(Some(head)) => head,
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        };
        let parsed = parse(&guest.memory, queue.chain(&head), &limits(), &mut iovecs);
        let reply = match parsed {
            Parsed::Reply(reply) => reply,
            Parsed::Request(request) => {
                let (operation, pending) = request.start();
                let bytes: u64 = iovecs.data().iter().map(|iovec| iovec.iov_len as u64).sum();
                match operation {
                    Operation::In(range) | Operation::Out(range) => {
                        assert_eq!(bytes, range.len_bytes());
                        assert!(range.end().get() <= CAPACITY);
                        pending.done()
                    }
                    Operation::GetId => pending.answer_id(&guest.memory, &iovecs, &[b'#'; ID_LEN]),
                    Operation::Flush | Operation::Discard | Operation::WriteZeroes => {
                        pending.failed()
                    }
                }
            }
        };
        let id = u32::from(head.index());
        let written = reply.finish(&guest.memory);
        queue.push(head, written);
        answered.push((id, written));
        queue.publish();
    };
    queue.enable_notifications();
    assert_eq!((queue.in_flight(), usize::from(queue.used_idx())), (0, answered.len()));
    (answered, end)
}

proptest! {
    #![proptest_config(crate::guest::proptest_config(256))]

    /// Descriptors that point at each other, at headers and at tables of more of them. Buffers stay
    /// off the rings, so that what was answered can be looked up afterwards.
    #[test]
    fn plausible_descriptors(
        table in vec(descriptor(), usize::from(QUEUE_SIZE)),
        more in vec(descriptor(), 64),
        kinds in vec((0..16_u32, 0..CAPACITY + 8), 32),
        heads in vec(0..QUEUE_SIZE, 1..8),
        event_idx: bool,
    ) {
        let mut guest = Guest::new(QUEUE_SIZE, 0);
        // The same 16 bytes may be a descriptor or a header: whichever way they are looked at.
        for at in (DATA..BORDER).step_by(4096) {
            guest.set_table(at, &more);
            let (kind, sector) = kinds[usize::try_from(at / 4096).unwrap() % kinds.len()];
            guest.write(at + 2048, &header(kind, sector));
        }
        for (index, desc) in (0..).zip(&table) {
            let address = if desc.address < DATA { DATA + desc.address % (END - DATA) } else { desc.address };
            guest.set_desc(index, Desc { address, ..*desc });
        }
        for &head in &heads {
            guest.offer(head);
        }
        let (answered, end) = serve(&guest, event_idx);
        prop_assert_eq!(end, Ok(()));
        let ids: Vec<u16> = answered.iter().map(|&(id, _)| u16::try_from(id).unwrap()).collect();
        prop_assert_eq!(ids, heads);
    }

    /// Nothing but noise, in the rings as well. `avail.idx` is often believable.
    #[test]
    fn noise(
        noise in vec(any::<u8>(), 4096),
        avail_idx in prop_oneof![4 => 0..=QUEUE_SIZE, 1 => any::<u16>()],
        density in 1..8_usize,
        event_idx: bool,
    ) {
        let mut guest = Guest::new(QUEUE_SIZE, 0);
        // Zeros in between make small numbers, and so lengths and indices that fit.
        let thin = |(at, byte): (usize, &u8)| if at % 8 < density { *byte } else { 0 };
        let noise: Vec<u8> = noise.iter().enumerate().map(thin).collect();
        for at in (RING..END).step_by(noise.len()) {
            guest.write(at, &noise);
        }
        guest.write(guest.driver.layout.used_idx(), &[0; 2]);
        guest.set_avail_idx(avail_idx);
        let (answered, end) = serve(&guest, event_idx);
        match end {
            Ok(()) => prop_assert_eq!(answered.len(), usize::from(avail_idx)),
            Err(RingError::AvailIndex { found, .. }) => prop_assert_eq!(found, avail_idx),
            Err(RingError::Head { found, size }) => prop_assert!(found >= size),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
