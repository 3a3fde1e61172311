//! What the ring and the parser cost: nanoseconds per request for pop, parse, answer and push,
//! without any disk.
//!
//! Driver and device take turns on one processor, so that only the device's part is on the clock
//! and memory is warm.
//!
//! `cargo bench -p vhost-user-blk --bench ring_cost`; without cargo's `--bench`, as `cargo test`
//! runs it, each case is only tried.

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cow_format::SectorCount;
use testkit::descriptor::{Desc, linked, table};
use testkit::driver::{Driver, GuestMemory, Layout};
use testkit::memory::memfd;
use testkit::request::{HEADER_LEN, IN, header};
use vhost_user_blk::guest_memory::memory::{GuestAddress, Memory, RegionInfo};
use vhost_user_blk::virtio::device_queue::DeviceQueue;
use vhost_user_blk::virtio::request::{IoVecs, ParseLimits, Parsed, parse};
use vhost_user_blk::virtio::split_queue::SplitQueue;
use virtio_queue::QueueState;

const QUEUE_SIZE: u16 = 128;
const ROUNDS: u32 = 20_000;
const ROUNDS_TRIED: u32 = 1;
/// Guest addresses: descriptor table, available ring, used ring, requests of 64 KiB each.
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUESTS: u64 = 0x10_0000;
const REQUEST_LEN: u64 = 0x1_0000;
const REQUEST_COUNT: u16 = 32;

/// The daemon's memory as the driver's.
struct Guest(Arc<Memory>);

impl GuestMemory for Guest {
    fn write_guest(&self, address: u64, bytes: &[u8]) {
        self.0.write(GuestAddress(address), bytes).expect("in guest memory");
    }

    fn read_guest(&self, address: u64, bytes: &mut [u8]) {
        self.0.read(GuestAddress(address), bytes).expect("in guest memory");
    }
}

fn guest() -> Result<Guest, Box<dyn Error>> {
    let size = REQUESTS + REQUEST_LEN * u64::from(REQUEST_COUNT);
    let file = memfd(2 * size);
    // Two regions, as a guest with memory above 4 GiB has.
    let low = RegionInfo { guest_address: 0, size, vmm_address: 1 << 40, file_offset: 0 };
    let high =
        RegionInfo { guest_address: 1 << 32, vmm_address: 1 << 41, file_offset: size, ..low };
    let memory = Memory::from_regions([(low, file.try_clone()?), (high, file)])?;
    Ok(Guest(Arc::new(memory)))
}

/// Writes reads of `buffers` buffers: header, data, status, as Linux lays them out. They are
/// written once and offered again and again. Gives their heads.
fn prepare(guest: &Guest, driver: &Driver, buffers: u16, indirect: bool) -> Vec<u16> {
    let request = |number: u16| {
        let at = REQUESTS + REQUEST_LEN * u64::from(number);
        guest.write_guest(at, &header(IN, number.into()));
        let mut descs = vec![Desc::buffer(at, HEADER_LEN, false)];
        let data = (1..=u64::from(buffers)).map(|buffer| at + 0x1000 * buffer);
        descs.extend(data.map(|address| Desc::buffer(address, 4096, true)));
        descs.push(Desc::buffer(at + 16, 1, true));
        if indirect {
            let address = at + 0x100;
            guest.write_guest(address, &table(&linked(0, descs.iter().copied())));
            driver.set_desc(guest, number, Desc::indirect(address, descs.len()));
            return number;
        }
        let head = number * (buffers + 2);
        driver.set_descs(guest, head, &linked(head, descs));
        head
    };
    (0..REQUEST_COUNT).map(request).collect()
}

/// The device's part of a batch.
fn serve(
    memory: &Memory,
    queue: &mut SplitQueue,
    iovecs: &mut IoVecs,
) -> Result<(), Box<dyn Error>> {
    let limits = ParseLimits { capacity: SectorCount::new(1 << 30), read_only: false };
    while let Some(head) = queue.pop()? {
        let written = match parse(memory, queue.chain(&head), &limits, iovecs) {
            Parsed::Request(request) => {
                let (operation, pending) = request.start();
                black_box((operation, iovecs.data()));
                pending.done().finish(memory)
            }
            Parsed::Reply(reply) => return Err(format!("refused: {:?}", reply.fault()).into()),
        };
        queue.push(head, written);
    }
    black_box(queue.publish());
    Ok(())
}

fn measure(rounds: u32, name: &str, buffers: u16, indirect: bool) -> Result<(), Box<dyn Error>> {
    let guest = guest()?;
    let mut driver =
        Driver::new(Layout { size: QUEUE_SIZE, desc: DESC, avail: AVAIL, used: USED }, 0);
    let heads = prepare(&guest, &driver, buffers, indirect);
    let state = QueueState {
        max_size: QUEUE_SIZE,
        size: QUEUE_SIZE,
        event_idx_enabled: true,
        ready: true,
        desc_table: DESC,
        avail_ring: AVAIL,
        used_ring: USED,
        ..QueueState::default()
    };
    let mut queue = SplitQueue::new(guest.0.clone(), state)?;
    let mut iovecs = IoVecs::new();
    let mut best = Duration::MAX;
    let mut total = Duration::ZERO;
    for _ in 0..rounds {
        driver.offer(&guest, &heads);
        let start = Instant::now();
        serve(&guest.0, &mut queue, &mut iovecs)?;
        let taken = start.elapsed();
        best = best.min(taken);
        total += taken;
    }
    let per_request = |time: Duration| time.as_secs_f64() * 1e9 / f64::from(REQUEST_COUNT);
    println!("{name:<28} {:>6.1} {:>6.1}", per_request(total / rounds), per_request(best));
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let rounds = if std::env::args().any(|arg| arg == "--bench") { ROUNDS } else { ROUNDS_TRIED };
    println!("{:<28} {:>6} {:>6}   ns per request, batches of {REQUEST_COUNT}", "", "mean", "best");
    measure(rounds, "1 buffer, direct", 1, false)?;
    measure(rounds, "1 buffer, indirect", 1, true)?;
    measure(rounds, "2 buffers, direct", 2, false)?;
    measure(rounds, "14 buffers, indirect", 14, true)
}
