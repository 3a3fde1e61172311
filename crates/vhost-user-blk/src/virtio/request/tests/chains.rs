//! Generated requests: any kind, laid out in any way, sound or with one defect, together with what
//! must come of them.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::guest::RING;
use crate::guest_memory::memory::volatile_read;
use crate::virtio::split_queue::SplitQueue;

const QUEUE_SIZE: u16 = 64;
/// Where indirect tables are put; buffers end below.
const TABLE: u64 = END - 0x1000;

/// A request before it is laid out.
#[derive(Clone, Debug)]
struct Plan {
    kind: u32,
    sector: u64,
    /// Behind the header.
    payload: Vec<u8>,
    /// Device-writable bytes before the status.
    room: usize,
    read_only: bool,
}

/// How the two streams of a request are spread over memory and descriptors.
#[derive(Clone, Debug)]
struct Layout {
    readable_cuts: Vec<Index>,
    writable_cuts: Vec<Index>,
    /// Bytes between one buffer and the next.
    gap: u64,
    /// Put the data across the border of two regions.
    across: bool,
    /// Descriptors before the indirect table.
    direct: Index,
    /// The first descriptor and the step to the next one (odd, so that none comes twice).
    slots: (u16, u16),
}

/// What is wrong with a chain.
#[derive(Clone, Debug)]
enum Defect {
    /// A descriptor of length 0 at this place.
    EmptyBuffer(Index, bool),
    /// A device-readable descriptor at the end.
    ReadableLast,
    /// A buffer outside guest memory.
    Outside(Index, u64),
    /// The last descriptor leads back to another one.
    Loop,
    /// The last descriptor leads out of the table.
    NextOutside(u16),
    /// No device-writable byte.
    NoStatus,
    /// Fewer than 16 device-readable bytes.
    ShortHeader(usize),
    /// The indirect table's length is no multiple of 16.
    TableLength(u32),
    /// The indirect descriptor has a next one.
    IndirectNext,
    /// The table's first descriptor is indirect as well.
    Nested,
}

#[derive(Clone, Copy, Debug)]
struct Buffer {
    address: u64,
    len: u32,
    writable: bool,
}

fn plan() -> impl Strategy<Value = Plan> {
    // Mostly inside the disk.
    let sector = prop_oneof![8 => 0..CAPACITY, 1 => CAPACITY - 8..CAPACITY + 8, 1 => any::<u64>()];
    // Mostly whole sectors.
    let data = prop_oneof![8 => (0..9_usize).prop_map(|sectors| sectors * 512), 1 => 0..2000_usize];
    let flags = prop_oneof![6 => Just(0), 3 => Just(1), 1 => any::<u32>()];
    let count = prop_oneof![8 => 0..64_u32, 1 => any::<u32>()];
    let list = vec((sector.clone(), count, flags), 0..34).prop_map(|list| {
        list.iter()
            .flat_map(|&(sector, count, flags)| segment(sector, count, flags))
            .collect::<Vec<u8>>()
    });
    let bytes = |len: usize| (0..=250).cycle().take(len).collect::<Vec<u8>>();
    let body = prop_oneof![
        data.clone().prop_map(|len| (IN, Vec::new(), len)),
        data.clone().prop_map(move |len| (OUT, bytes(len), 0)),
        Just((FLUSH, Vec::new(), 0)),
        (0..40_usize).prop_map(|room| (GET_ID, Vec::new(), room)),
        list.clone().prop_map(|list| (DISCARD, list, 0)),
        list.prop_map(|list| (WRITE_ZEROES, list, 0)),
        // Anything goes, which is mostly the wrong direction or an unknown type.
        (0..20_u32, data.clone(), data).prop_map(move |(kind, out, room)| (kind, bytes(out), room)),
        any::<u32>().prop_map(|kind| (kind, Vec::new(), 0)),
    ];
    (body, sector, prop::bool::weighted(0.1)).prop_map(
        |((kind, payload, room), sector, read_only)| Plan {
            kind,
            sector,
            payload,
            room,
            read_only,
        },
    )
}

fn layout() -> impl Strategy<Value = Layout> {
    let cuts = || vec(any::<Index>(), 0..6);
    (cuts(), cuts(), 0..40_u64, any::<bool>(), any::<Index>(), (0..QUEUE_SIZE, 0..QUEUE_SIZE))
        .prop_map(|(readable_cuts, writable_cuts, gap, across, direct, (first, step))| Layout {
            readable_cuts,
            writable_cuts,
            gap,
            across,
            direct,
            slots: (first, step | 1),
        })
}

fn defect() -> impl Strategy<Value = Defect> {
    let outside = prop_oneof![Just(0), Just(END), Just(u64::MAX - 5), any::<u64>()]
        .prop_filter("outside", |address| !(RING..END).contains(address));
    prop_oneof![
        (any::<Index>(), any::<bool>())
            .prop_map(|(at, writable)| Defect::EmptyBuffer(at, writable)),
        Just(Defect::ReadableLast),
        (any::<Index>(), outside).prop_map(|(at, address)| Defect::Outside(at, address)),
        Just(Defect::Loop),
        (QUEUE_SIZE..).prop_map(Defect::NextOutside),
        Just(Defect::NoStatus),
        (0..16_usize).prop_map(Defect::ShortHeader),
        (1..16_u32).prop_map(Defect::TableLength),
        Just(Defect::IndirectNext),
        Just(Defect::Nested),
    ]
}

impl Plan {
    fn readable(&self) -> Vec<u8> {
        [&header(self.kind, self.sector), self.payload.as_slice()].concat()
    }

    /// What must come of the request if nothing is wrong with its chain: the operation with its
    /// segments, or the status byte. Written down from section 5.2.6, apart from the parser.
    fn outcome(&self) -> Result<(Operation, Vec<Segment>), Status> {
        let range = |sector: u64, count: u64| {
            let fits = u128::from(sector) + u128::from(count) <= u128::from(CAPACITY);
            if fits { Ok(range(sector, count)) } else { Err(Status::IoError) }
        };
        let changes = matches!(self.kind, OUT | DISCARD | WRITE_ZEROES);
        if changes && (self.read_only || self.room > 0) {
            return Err(Status::IoError);
        }
        if matches!(self.kind, IN | GET_ID) && !self.payload.is_empty() {
            return Err(Status::IoError);
        }
        let sectors = |len: usize| {
            if len.is_multiple_of(512) { Ok(len as u64 / 512) } else { Err(Status::IoError) }
        };
        match self.kind {
            IN => Ok((Operation::In(range(self.sector, sectors(self.room)?)?), vec![])),
            OUT => Ok((Operation::Out(range(self.sector, sectors(self.payload.len())?)?), vec![])),
            FLUSH => Ok((Operation::Flush, vec![])),
            GET_ID => Ok((Operation::GetId, vec![])),
            DISCARD | WRITE_ZEROES => self.segments(range).map(|segments| {
                let discard = self.kind == DISCARD;
                (if discard { Operation::Discard } else { Operation::WriteZeroes }, segments)
            }),
            _ => Err(Status::Unsupported),
        }
    }

    fn segments(
        &self,
        range: impl Fn(u64, u64) -> Result<SectorRange, Status>,
    ) -> Result<Vec<Segment>, Status> {
        let (list, rest) = self.payload.as_chunks::<16>();
        if !rest.is_empty() || list.len() > config::RANGES_MAX as usize {
            return Err(Status::IoError);
        }
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let known = u32::from(self.kind == WRITE_ZEROES);
        if list.iter().any(|raw| number(&raw[12..]) & !known != 0) {
            return Err(Status::Unsupported);
        }
        let segment = |raw: &[u8; 16]| {
            let sector = u64::from_le_bytes(raw[..8].try_into().unwrap());
            let range = range(sector, number(&raw[8..12]).into())?;
            Ok(Segment { range, unmap: number(&raw[12..]) == 1 })
        };
        list.iter().map(segment).collect()
    }
}

/// Cuts a stream of `len` bytes into buffers, one after the other from `at`.
fn cut(len: usize, cuts: &[Index], at: &mut u64, gap: u64, writable: bool) -> Vec<Buffer> {
    let mut ends: Vec<usize> =
        cuts.iter().filter(|_| len > 1).map(|cut| 1 + cut.index(len - 1)).collect();
    ends.push(len);
    ends.sort_unstable();
    ends.dedup();
    let starts = [0].into_iter().chain(ends.iter().copied());
    let buffer = |(start, &end): (usize, &usize)| {
        let buffer = Buffer { address: *at, len: u32::try_from(end - start).unwrap(), writable };
        *at += u64::from(buffer.len) + gap;
        buffer
    };
    starts.zip(&ends).map(buffer).collect()
}

impl Layout {
    /// The buffers of a request, with the readable bytes already in memory.
    fn place(&self, guest: &Guest, readable: &[u8], writable: usize) -> Vec<Buffer> {
        let mut at = if self.across { BORDER - 700 } else { DATA + 1 };
        let mut buffers = Vec::new();
        if !readable.is_empty() {
            buffers = cut(readable.len(), &self.readable_cuts, &mut at, self.gap, false);
            let mut rest = readable;
            for buffer in &buffers {
                let (now, later) = rest.split_at(buffer.len as usize);
                guest.write(buffer.address, now);
                rest = later;
            }
        }
        if writable > 0 {
            buffers.extend(cut(writable, &self.writable_cuts, &mut at, self.gap, true));
        }
        assert!(at < TABLE);
        buffers
    }

    /// Writes the descriptors, and gives the head.
    fn write(&self, guest: &Guest, buffers: &[Buffer], defect: Option<&Defect>) -> u16 {
        let slot = |index: usize| {
            let (first, step) = self.slots;
            let index = u16::try_from(index).unwrap();
            (first + index * step) % QUEUE_SIZE
        };
        // A defect of the table needs one.
        let indirect =
            matches!(defect, Some(Defect::TableLength(_) | Defect::IndirectNext | Defect::Nested));
        let direct = self.direct.index(buffers.len() + usize::from(!indirect));
        let descriptor = |buffer: &Buffer, next: Option<u16>| Desc {
            address: buffer.address,
            len: buffer.len,
            flags: if buffer.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 },
            next: next.unwrap_or(0x5555),
        };
        let leads_to = |back: u16| match defect {
            Some(Defect::Loop) => Some(back),
            Some(Defect::NextOutside(next)) => Some(*next),
            _ => None,
        };
        for (index, buffer) in buffers[..direct].iter().enumerate() {
            let last = index + 1 == buffers.len();
            let next = if last { leads_to(slot(0)) } else { Some(slot(index + 1)) };
            guest.set_desc(slot(index), descriptor(buffer, next));
        }
        if direct < buffers.len() {
            let table = &buffers[direct..];
            let count = u16::try_from(table.len()).unwrap();
            let mut table: Vec<Desc> = (1..)
                .zip(table)
                .map(|(next, buffer)| {
                    descriptor(buffer, if next < count { Some(next) } else { leads_to(0) })
                })
                .collect();
            let mut len = 16 * u32::from(count);
            let mut flags = INDIRECT;
            match defect {
                Some(Defect::TableLength(odd)) => len = len - 16 + odd,
                Some(Defect::IndirectNext) => flags |= NEXT,
                Some(Defect::Nested) => table[0].flags |= INDIRECT,
                _ => {}
            }
            guest.set_table(TABLE + 1, &table);
            guest.set_desc(
                slot(direct),
                Desc { address: TABLE + 1, len, flags, next: slot(direct + 1) },
            );
        }
        slot(0)
    }
}

/// Everything buffers can be in.
fn contents(guest: &Guest) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(TABLE - DATA).unwrap()];
    guest.memory.read(GuestAddress(DATA), &mut bytes).unwrap();
    bytes
}

/// What the guest sees change: these bytes, one after the other over the writable buffers from byte
/// `from` of them on.
fn overwrite(contents: &mut [u8], buffers: &[Buffer], from: usize, bytes: &[u8]) {
    let places = buffers
        .iter()
        .filter(|buffer| buffer.writable && buffer.address < TABLE)
        .flat_map(|buffer| {
            let start = usize::try_from(buffer.address - DATA).unwrap();
            start..start + buffer.len as usize
        });
    for (place, &byte) in places.skip(from).zip(bytes) {
        contents[place] = byte;
    }
}

/// A ring with one request in it, popped.
struct Taken {
    guest: Guest,
    queue: SplitQueue,
    head: crate::virtio::split_queue::Head,
    iovecs: IoVecs,
    parsed: Parsed,
}

fn take(guest: Guest, head: u16, read_only: bool) -> Taken {
    let mut guest = guest;
    let mut queue = guest.queue(true);
    guest.offer(head);
    let head = queue.pop().unwrap().unwrap();
    let mut iovecs = IoVecs::new();
    let limits = ParseLimits { read_only, ..limits() };
    let parsed = parse(&guest.memory, queue.chain(&head), &limits, &mut iovecs);
    Taken { guest, queue, head, iovecs, parsed }
}

/// Answers the head and checks that the guest sees that, once.
fn answer(
    mut queue: SplitQueue,
    head: crate::virtio::split_queue::Head,
    guest: &Guest,
    written: u32,
) {
    let id = u32::from(head.index());
    queue.push(head, written);
    assert!(queue.publish());
    assert_eq!((guest.used_idx(), guest.used(0)), (1, (id, written)));
    assert_eq!(queue.pop(), Ok(None));
}

/// Carries an accepted request out, and checks every byte of memory after it.
fn carry_out(taken: Taken, plan: &Plan, buffers: &[Buffer], expected: &(Operation, Vec<Segment>)) {
    let Taken { guest, queue, head, iovecs, parsed } = taken;
    let Parsed::Request(request) = parsed else { panic!("refused: {parsed:?}") };
    let mut after = contents(&guest);
    let (operation, pending) = request.start();
    assert_eq!((operation, iovecs.segments()), (expected.0, expected.1.as_slice()));
    let mut filled = 0;
    let reply = match operation {
        Operation::In(range) => {
            let data: Vec<u8> = (1..=249).cycle().take(plan.room).collect();
            assert_eq!(range.len_bytes(), data.len() as u64);
            let mut rest = data.as_slice();
            for iovec in iovecs.data() {
                let (now, later) = rest.split_at(iovec.iov_len);
                assert!(guest.memory.write_host(iovec.iov_base.cast(), now));
                rest = later;
            }
            assert!(rest.is_empty());
            overwrite(&mut after, buffers, 0, &data);
            filled = data.len();
            pending.done()
        }
        Operation::Out(range) => {
            let mut data = Vec::new();
            for iovec in iovecs.data() {
                let mut piece = vec![0; iovec.iov_len];
                // SAFETY: it was parsed from memory that `guest` keeps.
                unsafe { volatile_read(iovec.iov_base.cast(), &mut piece) };
                data.extend(piece);
            }
            assert_eq!(range.len_bytes(), data.len() as u64);
            assert_eq!(data, plan.payload);
            pending.done()
        }
        Operation::GetId => {
            let id = b"abcdefghijklmnopqrst";
            filled = plan.room.min(id.len());
            overwrite(&mut after, buffers, 0, &id[..filled]);
            pending.answer_id(&guest.memory, &iovecs, id)
        }
        Operation::Flush | Operation::Discard | Operation::WriteZeroes => pending.done(),
    };
    overwrite(&mut after, buffers, plan.room, &[Status::Ok as u8]);
    let written = reply.finish(&guest.memory) as usize;
    assert_eq!(written, if filled == plan.room { filled + 1 } else { filled });
    assert!(contents(&guest) == after, "other bytes have changed than the request says");
    answer(queue, head, &guest, u32::try_from(written).unwrap());
}

/// Checks a refusal: the status byte, if the chain has one, and nothing else.
fn refuse(taken: Taken, buffers: &[Buffer], status: Option<Status>) -> Fault {
    let Taken { guest, queue, head, parsed, .. } = taken;
    let Parsed::Reply(reply) = parsed else { panic!("accepted: {parsed:?}") };
    let fault = reply.fault().unwrap();
    let mut after = contents(&guest);
    let writable: usize =
        buffers.iter().filter(|buffer| buffer.writable).map(|buffer| buffer.len as usize).sum();
    if let Some(status) = status {
        // Only buffers inside memory count for `overwrite`, so the last byte is found from the end.
        let last = buffers.iter().rev().find(|buffer| buffer.writable && buffer.len > 0).unwrap();
        after[usize::try_from(last.address - DATA).unwrap() + last.len as usize - 1] = status as u8;
    }
    let written = reply.finish(&guest.memory);
    assert_eq!(written, u32::from(status.is_some() && writable == 1));
    assert!(contents(&guest) == after, "other bytes have changed than the status");
    answer(queue, head, &guest, written);
    fault
}

proptest! {
    #![proptest_config(crate::guest::proptest_config(512))]

    #[test]
    fn sound_chains(plan in plan(), layout in layout()) {
        let guest = Guest::new(QUEUE_SIZE, 0);
        let buffers = layout.place(&guest, &plan.readable(), plan.room + 1);
        let head = layout.write(&guest, &buffers, None);
        let taken = take(guest, head, plan.read_only);
        match plan.outcome() {
            Ok(expected) => carry_out(taken, &plan, &buffers, &expected),
            Err(status) => {
                refuse(taken, &buffers, Some(status));
            }
        }
    }

    #[test]
    fn chains_with_a_defect(plan in plan(), layout in layout(), defect in defect()) {
        let guest = Guest::new(QUEUE_SIZE, 0);
        let mut readable = plan.readable();
        let mut room = plan.room + 1;
        match defect {
            Defect::NoStatus => room = 0,
            Defect::ShortHeader(len) => readable.truncate(len),
            _ => {}
        }
        let mut buffers = layout.place(&guest, &readable, room);
        let mut status = Some(Status::IoError);
        let last = buffers.len() - 1;
        match defect {
            Defect::EmptyBuffer(at, writable) => {
                buffers.insert(at.index(last + 2), Buffer { address: DATA, len: 0, writable });
            }
            Defect::ReadableLast => buffers.push(Buffer { address: DATA, len: 16, writable: false }),
            Defect::Outside(at, address) => {
                buffers[at.index(last + 1)].address = address;
                if at.index(last + 1) == last {
                    status = None;
                }
            }
            Defect::NoStatus
            | Defect::Loop
            | Defect::NextOutside(_)
            | Defect::TableLength(_)
            | Defect::IndirectNext
            | Defect::Nested => status = None,
            Defect::ShortHeader(_) => {}
        }
        let head = layout.write(&guest, &buffers, Some(&defect));
        let fault = refuse(take(guest, head, plan.read_only), &buffers, status);
        let as_expected = match defect {
            Defect::EmptyBuffer(..) => matches!(fault, Fault::EmptyDescriptor),
            Defect::ReadableLast => matches!(fault, Fault::Order),
            Defect::Outside(..) => matches!(fault, Fault::Outside(_)),
            Defect::Loop => matches!(fault, Fault::Chain(ChainError::TooLong)),
            Defect::NextOutside(_) => matches!(fault, Fault::Chain(ChainError::Next { .. })),
            Defect::NoStatus => matches!(fault, Fault::NoStatus),
            Defect::ShortHeader(_) => matches!(fault, Fault::Header { .. }),
            Defect::TableLength(_) => matches!(fault, Fault::Chain(ChainError::IndirectLength { .. })),
            Defect::IndirectNext => matches!(fault, Fault::Chain(ChainError::IndirectNext)),
            Defect::Nested => matches!(fault, Fault::Chain(ChainError::NestedIndirect)),
        };
        assert!(as_expected, "{fault:?}");
    }
}
