//! What is marked in the dirty log.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use testkit::descriptor::linked;
use testkit::memory::memfd;

use super::*;
use crate::virtio::dirty_log::DirtyLog;

/// A log, and how its marks are taken.
fn dirty_log() -> (Arc<DirtyLog>, impl Fn() -> Vec<u64>) {
    let file = memfd(16);
    let log = DirtyLog::map(16, 0, file.try_clone().unwrap()).unwrap();
    let take = move || {
        let mut bits = [0; 16];
        file.read_exact_at(&mut bits, 0).unwrap();
        file.write_all_at(&[0; 16], 0).unwrap();
        let bits = u128::from_le_bytes(bits);
        (0..128).filter(|page| bits >> page & 1 != 0).collect()
    };
    (Arc::new(log), take)
}

#[test]
#[cfg_attr(miri, ignore = "maps a file")]
fn each_change_of_the_used_ring_is_marked_where_the_frontend_wants_it() {
    const SIZE: u16 = 256;
    // So that each field is alone in its page in one of these.
    for used in [0x8000, 0x8ffe, 0x8ffc, 0x8fe0, 0x9000 - (4 + 8 * u64::from(SIZE))] {
        let pages = |offset: u64, len: u64| -> Vec<u64> {
            ((used + offset) / 4096..=(used + offset + len - 1) / 4096).collect()
        };
        for event_idx in [true, false] {
            let fields = |flags, event| if event_idx { event } else { flags };
            let mut guest = Guest::new(SIZE, 0);
            let mut queue = guest.queue(event_idx);
            let (log, take) = dirty_log();
            queue.log(RingLog { log, used, call: None });
            assert_eq!(take(), pages(0, 6 + 8 * u64::from(SIZE)), "at the start");
            for entry in 0..u64::from(SIZE) {
                guest.set_desc(0, Desc { address: DATA, len: 1, flags: WRITE, next: 0 });
                guest.offer(0);
                let head = queue.pop().unwrap().unwrap();
                assert!(take().is_empty());
                queue.push(head, 0);
                assert_eq!(take(), pages(4 + 8 * entry, 8), "entry {entry}");
                queue.publish();
                assert_eq!(take(), pages(2, 2), "used.idx");
                queue.publish();
                assert!(take().is_empty(), "nothing to publish");
            }
            queue.disable_notifications();
            assert_eq!(take(), fields(pages(0, 2), vec![]), "flags");
            queue.enable_notifications();
            let avail_event = pages(4 + 8 * u64::from(SIZE), 2);
            assert_eq!(take(), fields(pages(0, 2), avail_event), "the wish to be notified");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "maps a file")]
fn the_buffers_of_a_request_are_marked_as_far_as_they_can_have_been_written() {
    let page = |page: u64, len: u32, flags| Desc { address: page << 12, len, flags, next: 0 };
    let status = Some(GuestAddress(7 << 12));
    let huge = page(3, u32::MAX, WRITE);
    for (descs, marked) in [
        (
            linked(0, [page(1, 4096, 0), page(2, 4096, WRITE), page(4, 8192, WRITE)]),
            vec![2, 4, 5, 7],
        ),
        // Refused: it is too long for the length in the used ring.
        (linked(0, [page(2, 1, WRITE), huge, page(9, 1, WRITE)]), vec![2, 7]),
        // Broken after the first.
        (vec![Desc { next: 999, ..page(2, 1, WRITE | NEXT) }], vec![2, 7]),
    ] {
        for indirect in [false, true] {
            let mut guest = Guest::new(16, 0);
            if indirect {
                guest.set_table(DATA, &descs);
                guest.set_desc(0, Desc::indirect(DATA, descs.len()));
            } else {
                (0..).zip(&descs).for_each(|(at, &desc)| guest.set_desc(at, desc));
            }
            guest.offer(0);
            let mut queue = guest.queue(true);
            let head = queue.pop().unwrap().unwrap();
            queue.mark_buffers(&head, status);
            let (log, take) = dirty_log();
            queue.log(RingLog { log, used: 0, call: None });
            take();
            queue.mark_buffers(&head, status);
            assert_eq!(take(), marked, "{descs:?}");
            queue.push(head, 0);
        }
    }
}
