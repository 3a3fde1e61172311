use super::*;
use crate::guest::{BORDER, DATA, Desc, END, Guest, INDIRECT, NEXT, WRITE};
use crate::virtio::config;
use crate::virtio::device_queue::DeviceQueue;
use cow_format::Sector;
use testkit::request::{DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES, segment};

mod chains;
mod garbage;

const CAPACITY: u64 = 1000;
const HEADER: u64 = DATA;
const BUFFER: u64 = DATA + 0x1000;
const STATUS: u64 = DATA + 0xfff;
/// What the status byte holds before the device writes it.
const UNTOUCHED: u8 = 0xee;

fn limits() -> ParseLimits {
    ParseLimits { capacity: SectorCount::new(CAPACITY), read_only: false }
}

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

/// With something in the reserved field, which means nothing.
fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = testkit::request::header(kind, sector);
    bytes[4..8].fill(0x77);
    bytes
}

/// One request on a ring of its own. What a test wants to know of it.
struct Asked {
    guest: Guest,
    iovecs: IoVecs,
    parsed: Parsed,
}

/// Readable and writable buffers by guest address and length, as the descriptors 0, 1, 2 … of a
/// ring.
fn ask_with(
    limits: &ParseLimits,
    mut guest: Guest,
    readable: &[(u64, u32)],
    writable: &[(u64, u32)],
) -> Asked {
    guest.write(STATUS, &[UNTOUCHED]);
    let buffers = readable
        .iter()
        .map(|buffer| (buffer, 0))
        .chain(writable.iter().map(|buffer| (buffer, WRITE)));
    let last = readable.len() + writable.len() - 1;
    for (index, (&(address, len), flags)) in buffers.enumerate() {
        let flags = if index < last { flags | NEXT } else { flags };
        let index = u16::try_from(index).unwrap();
        guest.set_desc(index, Desc { address, len, flags, next: index + 1 });
    }
    let mut queue = guest.queue(false);
    guest.offer(0);
    let head = queue.pop().unwrap().unwrap();
    let mut iovecs = IoVecs::new();
    let parsed = parse(&guest.memory, queue.chain(&head), limits, &mut iovecs);
    Asked { guest, iovecs, parsed }
}

fn ask(header: [u8; 16], readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Asked {
    let guest = Guest::new(16, 0);
    guest.write(HEADER, &header);
    let readable: Vec<_> = [(HEADER, 16)].into_iter().chain(readable.iter().copied()).collect();
    ask_with(&limits(), guest, &readable, writable)
}

/// The request's segment list at [`BUFFER`].
fn ask_segments(kind: u32, limits: &ParseLimits, list: &[[u8; 16]]) -> Asked {
    let guest = Guest::new(16, 0);
    guest.write(HEADER, &header(kind, 0));
    guest.write(BUFFER, list.as_flattened());
    let len = u32::try_from(16 * list.len()).unwrap();
    let list = (BUFFER, len);
    let readable = [(HEADER, 16), list];
    ask_with(limits, guest, &readable[..if len == 0 { 1 } else { 2 }], &[(STATUS, 1)])
}

impl Asked {
    fn accepted(self) -> (Operation, Pending, Guest, IoVecs) {
        match self.parsed {
            Parsed::Request(request) => {
                let (operation, pending) = request.start();
                (operation, pending, self.guest, self.iovecs)
            }
            Parsed::Reply(reply) => panic!("refused: {:?}", reply.fault()),
        }
    }

    /// The fault, the status byte the guest sees, and the length in the used ring.
    fn refused(self) -> (Fault, u8, u32) {
        match self.parsed {
            Parsed::Request(request) => panic!("accepted: {request:?}"),
            Parsed::Reply(reply) => {
                let fault = reply.fault().unwrap();
                let written = reply.finish(&self.guest.memory);
                (fault, self.guest.read::<1>(STATUS)[0], written)
            }
        }
    }
}

/// Lengths of the data iovecs.
fn lens(iovecs: &IoVecs) -> Vec<usize> {
    iovecs.data().iter().map(|iovec| iovec.iov_len).collect()
}

#[test]
fn reads_and_writes() {
    let (operation, pending, guest, iovecs) =
        ask(header(IN, 3), &[], &[(BUFFER, 1024), (STATUS, 1)]).accepted();
    assert_eq!(operation, Operation::In(range(3, 2)));
    assert_eq!(lens(&iovecs), [1024]);
    assert!(guest.memory.write_host(iovecs.data()[0].iov_base.cast(), b"data"));
    assert_eq!(&guest.read::<4>(BUFFER), b"data");
    assert_eq!(pending.done().finish(&guest.memory), 1025);
    assert_eq!(guest.read::<1>(STATUS), [0]);

    let (operation, pending, guest, iovecs) =
        ask(header(OUT, 998), &[(BUFFER, 1024)], &[(STATUS, 1)]).accepted();
    assert_eq!(operation, Operation::Out(range(998, 2)));
    assert_eq!(lens(&iovecs), [1024]);
    assert_eq!(pending.done().finish(&guest.memory), 1);
    assert_eq!(guest.read::<1>(STATUS), [0]);
}

#[test]
fn failures_say_what_was_written_for_sure() {
    let read = || ask(header(IN, 0), &[], &[(BUFFER, 512), (STATUS, 1)]).accepted();
    let (_, pending, guest, _) = read();
    assert_eq!(
        pending.failed().finish(&guest.memory),
        0,
        "the status stands behind data that was not written"
    );
    assert_eq!(guest.read::<1>(STATUS), [1]);
    let (_, pending, guest, _) = ask(header(FLUSH, 0), &[], &[(STATUS, 1)]).accepted();
    assert_eq!(pending.failed().finish(&guest.memory), 1);
    assert_eq!(guest.read::<1>(STATUS), [1]);
    // Flush with data to write, which nobody fills.
    let (operation, pending, guest, _) =
        ask(header(FLUSH, 0), &[], &[(BUFFER, 8), (STATUS, 1)]).accepted();
    assert_eq!(operation, Operation::Flush);
    assert_eq!(pending.done().finish(&guest.memory), 0);
    assert_eq!(guest.read::<1>(STATUS), [0]);
}

#[test]
fn requests_without_data_are_fine() {
    let (operation, pending, guest, iovecs) =
        ask(header(IN, CAPACITY), &[], &[(STATUS, 1)]).accepted();
    assert_eq!((operation, iovecs.data().len()), (Operation::In(range(CAPACITY, 0)), 0));
    assert_eq!(pending.done().finish(&guest.memory), 1);
    let (operation, ..) = ask(header(OUT, 0), &[], &[(STATUS, 1)]).accepted();
    assert_eq!(operation, Operation::Out(range(0, 0)));
    let (operation, _, _, iovecs) = ask_segments(DISCARD, &limits(), &[]).accepted();
    assert_eq!((operation, iovecs.segments()), (Operation::Discard, &[][..]));
}

#[test]
fn serial_number_goes_into_whatever_room_there_is() {
    const ID: &[u8; ID_LEN] = b"serial-number-of-20b";
    for (room, filled, written) in [(20, 20, 21), (7, 7, 8), (64, 20, 20)] {
        // In two buffers, the second of which holds the status as well.
        let writable = [(BUFFER, 5), (BUFFER + 5, room - 5 + 1)];
        let (operation, pending, guest, iovecs) = ask(header(GET_ID, 0), &[], &writable).accepted();
        assert_eq!(operation, Operation::GetId);
        let reply = pending.answer_id(&guest.memory, &iovecs, ID);
        assert_eq!(reply.finish(&guest.memory), written);
        let got = guest.read::<65>(BUFFER);
        assert_eq!(got[..filled], ID[..filled]);
        let room = usize::try_from(room).unwrap();
        assert!(got[filled..room].iter().all(|&byte| byte == 0), "room {room}");
        assert_eq!(got[room], Status::Ok as u8);
    }
}

#[test]
fn segment_lists() {
    let list = [segment(0, 8, 0), segment(992, 8, 0), segment(1000, 0, 0)];
    let (operation, pending, guest, iovecs) = ask_segments(DISCARD, &limits(), &list).accepted();
    assert_eq!(operation, Operation::Discard);
    let expected =
        [range(0, 8), range(992, 8), range(1000, 0)].map(|range| Segment { range, unmap: false });
    assert_eq!(iovecs.segments(), expected);
    assert_eq!(pending.done().finish(&guest.memory), 1);

    let list = [segment(1, 2, 1), segment(3, 4, 0)];
    let (operation, _, _, iovecs) = ask_segments(WRITE_ZEROES, &limits(), &list).accepted();
    assert_eq!(operation, Operation::WriteZeroes);
    let expected =
        [(range(1, 2), true), (range(3, 4), false)].map(|(range, unmap)| Segment { range, unmap });
    assert_eq!(iovecs.segments(), expected);

    // As many as are allowed, and one more.
    let most = vec![segment(5, 1, 0); config::RANGES_MAX as usize];
    assert_eq!(ask_segments(DISCARD, &limits(), &most).accepted().3.segments().len(), most.len());
    let more = vec![segment(5, 1, 0); config::RANGES_MAX as usize + 1];
    let found = more.len() as u64;
    assert_eq!(
        ask_segments(DISCARD, &limits(), &more).refused(),
        (Fault::Segments { found }, 1, 1)
    );
}

#[test]
fn segments_that_are_refused() {
    let huge = ParseLimits { capacity: SectorCount::new(1 << 40), ..limits() };
    let refused = |kind, list: &[[u8; 16]]| ask_segments(kind, &huge, list).refused();
    for (kind, max) in
        [(DISCARD, config::DISCARD_SECTORS_MAX), (WRITE_ZEROES, config::WRITE_ZEROES_SECTORS_MAX)]
    {
        let (_, _, _, iovecs) = ask_segments(kind, &huge, &[segment(0, max, 0)]).accepted();
        assert_eq!(iovecs.segments()[0].range.count(), SectorCount::new(max.into()));
        let found = max + 1;
        assert_eq!(
            refused(kind, &[segment(0, found, 0)]),
            (Fault::SegmentLength { found, max }, 1, 1)
        );
        let past = Fault::Capacity { sector: (1 << 40) - 1, count: 2, capacity: 1 << 40 };
        assert_eq!(refused(kind, &[segment(0, 1, 0), segment((1 << 40) - 1, 2, 0)]), (past, 1, 1));
        let overflow = Fault::Capacity { sector: u64::MAX, count: 2, capacity: 1 << 40 };
        assert_eq!(refused(kind, &[segment(u64::MAX, 2, 0)]), (overflow, 1, 1));
        // An unknown flag counts before anything else, in whichever segment it is.
        let list = [segment(u64::MAX, u32::MAX, 0), segment(0, 0, 2)];
        assert_eq!(refused(kind, &list), (Fault::SegmentFlags(2), 2, 1));
    }
    assert_eq!(refused(DISCARD, &[segment(0, 1, 1)]), (Fault::SegmentFlags(1), 2, 1));
    for len in [1, 15, 17, 500] {
        let asked = ask(header(DISCARD, 0), &[(BUFFER, len)], &[(STATUS, 1)]);
        assert_eq!(asked.refused(), (Fault::DataLength(len.into()), 1, 1));
    }
}

#[test]
fn read_only_disk_refuses_what_writes() {
    let limits = ParseLimits { read_only: true, ..limits() };
    for kind in [OUT, DISCARD, WRITE_ZEROES, IN, FLUSH, GET_ID, 7] {
        // The flags would make it UNSUPP on a writable disk.
        let asked = ask_segments(kind, &limits, &[segment(0, 1, 8)]);
        match kind {
            OUT | DISCARD | WRITE_ZEROES => assert_eq!(asked.refused(), (Fault::ReadOnly, 1, 1)),
            IN | GET_ID => assert_eq!(asked.refused(), (Fault::Direction, 1, 1)),
            FLUSH => assert_eq!(asked.accepted().0, Operation::Flush),
            unknown => assert_eq!(asked.refused(), (Fault::Type(unknown), 2, 1)),
        }
    }
}

#[test]
fn direction_and_length_of_data() {
    let status = (STATUS, 1);
    for kind in [OUT, DISCARD, WRITE_ZEROES] {
        assert_eq!(
            ask(header(kind, 0), &[], &[(BUFFER, 512), status]).refused(),
            (Fault::Direction, 1, 0)
        );
    }
    for len in [1, 511, 513, 1000] {
        let fault = Fault::DataLength(len.into());
        assert_eq!(ask(header(IN, 0), &[], &[(BUFFER, len), status]).refused(), (fault, 1, 0));
        assert_eq!(ask(header(OUT, 0), &[(BUFFER, len)], &[status]).refused(), (fault, 1, 1));
    }
    for (sector, count) in [(999_u64, 2_u64), (1001, 0), (u64::MAX, 2), (u64::MAX / 512, 1)] {
        let fault = Fault::Capacity { sector, count, capacity: CAPACITY };
        let len = u32::try_from(count * 512).unwrap();
        let data: &[_] = if len == 0 { &[] } else { &[(BUFFER, len)] };
        assert_eq!(ask(header(OUT, sector), data, &[status]).refused(), (fault, 1, 1));
    }
}

#[test]
fn headers_and_status_bytes_that_are_missing() {
    let short =
        |readable: &[(u64, u32)]| ask_with(&limits(), Guest::new(16, 0), readable, &[(STATUS, 1)]);
    assert_eq!(short(&[]).refused(), (Fault::Header { found: 0 }, 1, 1));
    assert_eq!(short(&[(HEADER, 8), (HEADER, 7)]).refused(), (Fault::Header { found: 15 }, 1, 1));

    let none = ask(header(OUT, 0), &[(BUFFER, 512)], &[]);
    assert_eq!(none.refused(), (Fault::NoStatus, UNTOUCHED, 0));
    let outside = OutsideMemory { address: END, len: 1 };
    assert_eq!(
        ask(header(FLUSH, 0), &[], &[(END, 1)]).refused(),
        (Fault::Outside(outside), UNTOUCHED, 0)
    );
    let top = OutsideMemory { address: u64::MAX, len: 2 };
    assert_eq!(
        ask(header(FLUSH, 0), &[], &[(u64::MAX, 2)]).refused(),
        (Fault::Outside(top), UNTOUCHED, 0)
    );
    let empty = ask(header(FLUSH, 0), &[], &[(STATUS, 0)]);
    assert_eq!(empty.refused(), (Fault::EmptyDescriptor, UNTOUCHED, 0));
}

#[test]
fn a_faulty_buffer_still_gets_its_status() {
    let outside = |address, len| Fault::Outside(OutsideMemory { address, len });
    let status = (STATUS, 1);
    for (address, len) in
        [(END - 1, 512), (END, 512), (0, 512), (u64::MAX - 100, 512), (DATA, u32::MAX)]
    {
        let fault = outside(address, len.into());
        assert_eq!(ask(header(IN, 0), &[], &[(address, len), status]).refused(), (fault, 1, 0));
        assert_eq!(ask(header(OUT, 0), &[(address, len)], &[status]).refused(), (fault, 1, 1));
    }
    // The header itself.
    let asked = ask_with(&limits(), Guest::new(16, 0), &[(END - 8, 16)], &[status]);
    assert_eq!(asked.refused(), (outside(END - 8, 16), 1, 1));
    let asked = ask(header(IN, 0), &[], &[(BUFFER, 512), (BUFFER, 0), status]);
    assert_eq!(asked.refused(), (Fault::EmptyDescriptor, 1, 0));
}

/// A read with `count` buffers of `len` bytes at `address` and the status, in an indirect table.
fn ask_many(end: u64, address: u64, len: u32, count: u16) -> Asked {
    let mut guest = Guest::with_end(2, 0, end);
    guest.write(HEADER, &header(IN, 0));
    guest.write(STATUS, &[UNTOUCHED]);
    let mut table = vec![Desc { address: HEADER, len: 16, flags: NEXT, next: 1 }];
    table.extend((2..count + 2).map(|next| Desc { address, len, flags: WRITE | NEXT, next }));
    table.push(Desc { address: STATUS, len: 1, flags: WRITE, next: 0 });
    guest.set_table(BORDER, &table);
    let len = u32::try_from(table.len() * 16).unwrap();
    guest.set_desc(0, Desc { address: BORDER, len, flags: INDIRECT, next: 0 });
    let limits = ParseLimits { capacity: SectorCount::new(1 << 40), ..limits() };
    let mut queue = guest.queue(false);
    guest.offer(0);
    let head = queue.pop().unwrap().unwrap();
    let mut iovecs = IoVecs::new();
    let parsed = parse(&guest.memory, queue.chain(&head), &limits, &mut iovecs);
    Asked { guest, iovecs, parsed }
}

#[test]
fn limits_of_one_request() {
    // Buffers that go over a border are two pieces each.
    assert_eq!(ask_many(END, BORDER - 512, 1024, 511).accepted().3.data().len(), 1022);
    assert_eq!(ask_many(END, BORDER - 512, 1024, 512).refused(), (Fault::Pieces, 1, 0));
    // The same memory again and again: up to 2^32 bytes with header and status, and beyond.
    const LEN: u32 = 1 << 25;
    let end = BORDER + u64::from(LEN);
    let (operation, pending, guest, _) = ask_many(end, BORDER, LEN, 127).accepted();
    let bytes = 127 * LEN;
    assert_eq!(operation, Operation::In(range(0, u64::from(bytes / 512))));
    assert_eq!(pending.done().finish(&guest.memory), bytes + 1);
    let too_long = Fault::Length((1 << 32) + 17);
    assert_eq!(ask_many(end, BORDER, LEN, 128).refused(), (too_long, 1, 0));
}
