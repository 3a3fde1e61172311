//! Descriptor chains and requests in memory that the guest changes meanwhile.
//!
//! Input: the ring; descriptors; offered heads; other bytes of memory; then the changes. One of
//! those is made whenever the device has looked at something.

#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use cow_format::{SECTOR_SIZE, SectorCount};
use fuzz::{Input, memfd};
use libfuzzer_sys::fuzz_target;
use vhost_user_blk::guest_memory::memory::{GuestAddress, Memory, RegionInfo};
use vhost_user_blk::virtio::device_queue::DeviceQueue;
use vhost_user_blk::virtio::request::{IoVecs, Operation, ParseLimits, Parsed, parse};
use vhost_user_blk::virtio::split_queue::{RingError, SplitQueue};
use virtio_queue::QueueState;

/// Guest addresses. Ring and data are in two regions that adjoin for the guest only; then comes one
/// that may only be read.
const DESC: u64 = 0x1_0000;
const AVAIL: u64 = DESC + 0x1000;
const USED: u64 = DESC + 0x2000;
const BORDER: u64 = 0x1_4000;
const READ_ONLY: u64 = 0x1_8000;
const END: u64 = 0x1_9000;

const CAPACITY: u64 = 1000;
const HEADS_MAX: usize = 48;

fuzz_target!(|data: &[u8]| {
    thread_local!(static MEMORY: Arc<Memory> = Arc::new(memory()));
    MEMORY.with(|memory| serve(memory, &mut Input::new(data)));
});

fn memory() -> Memory {
    let (low, high) = (BORDER - DESC, READ_ONLY - BORDER);
    let file = memfd(low + high);
    let read_only = read_only_file();
    let region = |guest_address, size, file_offset| RegionInfo {
        guest_address,
        size,
        vmm_address: 1 << 40 | guest_address,
        file_offset,
    };
    let regions = [
        (region(DESC, low, high), file.try_clone().unwrap()),
        (region(BORDER, high, 0), file),
        (region(READ_ONLY, END - READ_ONLY, 0), read_only),
    ];
    Memory::from_regions(regions).unwrap()
}

/// Full of what can be a header: a read of sector 0.
fn read_only_file() -> File {
    let mut file = memfd(END - READ_ONLY);
    file.write_all(&[0; 16]).unwrap();
    fuzz::reopen_read_only(&file)
}

struct Guest<'a, 'b> {
    memory: &'a Memory,
    input: RefCell<&'a mut Input<'b>>,
}

impl Guest<'_, '_> {
    fn write(&self, address: u64, bytes: &[u8]) {
        // What is outside is left alone.
        _ = self.memory.write(GuestAddress(address), bytes);
    }

    /// A guest address: anywhere, mostly inside.
    fn address(input: &mut Input) -> u64 {
        match input.u16() {
            // Beside what a descriptor's address cannot be by two bytes.
            0xffff => input.u64(),
            place => DESC + u64::from(place) % (END + 0x200 - DESC),
        }
    }

    fn len(input: &mut Input) -> u32 {
        match input.u8() {
            kind @ 0..8 => [0, 1, 16, 17, 512, 4096, 0x8000, u32::MAX][usize::from(kind)],
            kind @ 8..128 => u32::from(kind) * 16,
            _ => input.u16().into(),
        }
    }

    /// A descriptor with any content, into one of the first slots of the table at `table`.
    fn set_descriptor(&self, table: u64, input: &mut Input) {
        let slot = input.u8();
        let (address, len) = (Self::address(input), Self::len(input));
        let (flags, next) = (input.u8(), input.u8());
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&u16::from(flags & 7).to_le_bytes());
        bytes[14..].copy_from_slice(&u16::from(next).to_le_bytes());
        self.write(table.wrapping_add(16 * u64::from(slot)), &bytes);
    }

    /// Another byte, field or descriptor than before.
    fn change(&self) {
        let input = &mut **self.input.borrow_mut();
        match input.u8() % 8 {
            // Rather seldom, so that something is also served.
            0..4 => {}
            4 => self.set_descriptor(DESC, input),
            5 => self.write(AVAIL + 2, &input.array::<2>()),
            6 => self.write(AVAIL + 4 + u64::from(input.u8()), &input.array::<2>()),
            _ => {
                let address = Self::address(input);
                self.write(address, input.short());
            }
        }
    }
}

fn serve(memory: &Arc<Memory>, input: &mut Input) {
    let size = 1 << (input.u8() % 9);
    let (event_idx, start) = (input.u8() & 1 != 0, input.u16());
    let guest = Guest { memory, input: RefCell::new(input) };
    guest.write(DESC, &[0; (READ_ONLY - DESC) as usize]);
    guest.write(USED + 2, &start.to_le_bytes());
    {
        let input = &mut **guest.input.borrow_mut();
        for _ in 0..input.u8() % 48 {
            guest.set_descriptor(DESC, input);
        }
        for _ in 0..input.u8() % 4 {
            // A table of descriptors, or headers.
            let table = Guest::address(input);
            match input.u8() % 48 {
                0 => guest.write(table, input.short()),
                count => (0..count).for_each(|_| guest.set_descriptor(table, input)),
            }
        }
        let heads = input.u8() % 16;
        for index in 0..u16::from(heads) {
            let entry = u64::from(start.wrapping_add(index) % size);
            guest.write(AVAIL + 4 + 2 * entry, &u16::from(input.u8()).to_le_bytes());
        }
        guest.write(AVAIL + 2, &start.wrapping_add(heads.into()).to_le_bytes());
    }
    let state = QueueState {
        size,
        max_size: 256,
        next_avail: start,
        next_used: start,
        ready: true,
        desc_table: DESC,
        avail_ring: AVAIL,
        used_ring: USED,
        event_idx_enabled: event_idx,
    };
    let mut queue = SplitQueue::new(Arc::clone(memory), state).unwrap();
    let mut iovecs = IoVecs::new();
    for _ in 0..HEADS_MAX {
        match queue.pop() {
            Ok(Some(head)) => answer(&guest, &mut queue, head, &mut iovecs),
            Ok(None) if !queue.enable_notifications() => break,
            Ok(None) => {}
            // The ring is left alone from here on.
            Err(error) => {
                check_error(error, size);
                break;
            }
        }
        assert_eq!(queue.in_flight(), 0);
        guest.change();
        _ = queue.publish();
    }
    assert!(!queue.poisoned());
}

fn answer(
    guest: &Guest,
    queue: &mut SplitQueue,
    head: <SplitQueue as DeviceQueue>::Head,
    iovecs: &mut IoVecs,
) {
    let limits = ParseLimits { capacity: SectorCount::new(CAPACITY), read_only: false };
    let chain = queue.chain(&head).inspect(|_| guest.change());
    let reply = match parse(guest.memory, chain, &limits, iovecs) {
        Parsed::Reply(reply) => reply,
        Parsed::Request(request) => {
            let (operation, pending) = request.start();
            let bytes: u64 = iovecs.data().iter().map(|iovec| iovec.iov_len as u64).sum();
            match operation {
                Operation::In(range) | Operation::Out(range) => {
                    assert_eq!(bytes, range.len_bytes());
                    assert!(range.end().get() <= CAPACITY && bytes.is_multiple_of(SECTOR_SIZE));
                    touch(iovecs, matches!(operation, Operation::In(_)));
                }
                Operation::Flush
                | Operation::Discard
                | Operation::WriteZeroes
                | Operation::GetId => {}
            }
            pending.done()
        }
    };
    guest.change();
    let written = reply.finish(guest.memory);
    queue.mark_buffers(&head, None);
    queue.push(head, written);
}

/// The memory of a request is there, and may be written if the request says so.
fn touch(iovecs: &IoVecs, write: bool) {
    for iovec in iovecs.data() {
        assert_ne!(iovec.iov_len, 0);
        for at in [0, iovec.iov_len - 1] {
            // SAFETY: that it is memory which the guest shares is what is tested here; nobody in
            // this process has a reference to it.
            unsafe {
                let byte = iovec.iov_base.cast::<u8>().add(at);
                let value = byte.read_volatile();
                if write {
                    byte.write_volatile(value);
                }
            }
        }
    }
}

fn check_error(error: RingError, size: u16) {
    match error {
        RingError::AvailIndex { found, next, .. } => assert!(found.wrapping_sub(next) > size),
        RingError::Head { found, .. } => assert!(found >= size),
        other => panic!("{other}"),
    }
}
