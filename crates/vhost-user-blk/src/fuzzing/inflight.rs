//! An in-flight area as a predecessor, or a hostile frontend, left it.

use std::os::unix::fs::FileExt;

use super::Input;
use crate::virtio::inflight::{Area, AreaInfo, RingIndices, Tracker};

/// Recovers from an area, serves requests as the input says, dies, and recovers again.
///
/// Input: the area's queues and their size; the ring's size and indices; bytes for the area; then
/// what becomes of the requests.
pub fn inflight(data: &[u8]) {
    let input = &mut Input(data);
    let (num_queues, queue_size) = (u16::from(input.u8() % 3) + 1, u16::from(input.u8()) + 1);
    let info = AreaInfo::new(num_queues, queue_size);
    let file = info.create().unwrap();
    let queue = usize::from(input.u8() % 4);
    let size = 1 << (input.u8() % 9);
    let (used, ahead) = (input.u16(), input.u16());
    let mut ring = RingIndices { size, avail: used.wrapping_add(ahead), used };
    for _ in 0..input.u8() % 32 {
        // Mostly one field of one descriptor, or of the header.
        let place = match input.u8() {
            0xff => input.u16().into(),
            index => u64::from(index) * 16 + u64::from(input.u8() % 16),
        };
        let bytes = input.short();
        let room = info.size.saturating_sub(place);
        let len = usize::try_from(room).unwrap().min(bytes.len());
        file.write_all_at(&bytes[..len], place).unwrap();
    }
    let area = Area::map(&info, file).unwrap();
    let _ = area.kept();
    let Ok(mut tracker) = area.recover(queue, ring) else { return };
    loop {
        serve(tracker, &mut ring, input);
        tracker = area.recover(queue, ring).expect("what this daemon left can be recovered");
        if input.is_empty() {
            break;
        }
    }
}

fn serve(mut tracker: Tracker, ring: &mut RingIndices, input: &mut Input<'_>) {
    assert!(tracker.unfinished_count() <= usize::from(ring.size));
    let pending = tracker.unfinished_count();
    assert_eq!(usize::from(tracker.next_avail().wrapping_sub(ring.used)), pending);
    let mut in_flight: Vec<u16> = std::iter::from_fn(|| tracker.unfinished()).collect();
    assert!(in_flight.iter().all(|head| *head < ring.size));
    let (mut fetched, mut answered) = (tracker.next_avail(), 0);
    for _ in 0..input.u8() % 64 {
        match input.u8() % 4 {
            0 | 1 => {
                // As the ring allows it: an entry that the guest made available.
                let head = u16::from(input.u8()) % ring.size;
                if fetched == ring.avail || in_flight.len() + answered == usize::from(ring.size) {
                    continue;
                }
                if tracker.fetched(head) {
                    assert!(!in_flight.contains(&head));
                    in_flight.push(head);
                    fetched = fetched.wrapping_add(1);
                }
            }
            2 => {
                if let Some(head) = in_flight.pop() {
                    tracker.answered(head);
                    answered += 1;
                }
            }
            _ => {
                for _ in 0..std::mem::take(&mut answered) {
                    ring.used = ring.used.wrapping_add(1);
                }
                // The process can die before the area knows.
                if input.u8() & 1 == 0 {
                    return;
                }
                tracker.published(ring.used);
            }
        }
    }
}
