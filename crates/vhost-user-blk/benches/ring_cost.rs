//! What the ring and the parser cost: nanoseconds per request for pop, parse, answer and push,
//! without any disk.
//!
//! Driver and device take turns on one processor, so that only the device's part is on the clock
//! and memory is warm.
//!
//! `cargo bench -p vhost-user-blk --bench ring_cost`; without cargo's `--bench`, as `cargo test`
//! runs it, each case is only tried.

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cow_format::SectorCount;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user_blk::memory::{GuestAddress, Memory, RegionInfo};
use vhost_user_blk::request::{IoVecs, ParseLimits, Parsed, parse};
use vhost_user_blk::virtqueue::SplitQueue;
use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT as INDIRECT, VRING_DESC_F_NEXT as NEXT, VRING_DESC_F_WRITE as WRITE,
};
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

/// A guest whose requests are written once and offered again and again.
struct Driver {
    memory: Arc<Memory>,
    avail_idx: u16,
}

impl Driver {
    fn new() -> Result<Self, Box<dyn Error>> {
        let size = REQUESTS + REQUEST_LEN * u64::from(REQUEST_COUNT);
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(2 * size)?;
        // Two regions, as a guest with memory above 4 GiB has.
        let low = RegionInfo { guest_address: 0, size, vmm_address: 1 << 40, file_offset: 0 };
        let high =
            RegionInfo { guest_address: 1 << 32, vmm_address: 1 << 41, file_offset: size, ..low };
        let memory = Memory::from_regions([(low, file.try_clone()?), (high, file)])?;
        Ok(Self { memory: Arc::new(memory), avail_idx: 0 })
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
        Ok(self.memory.write(GuestAddress(address), bytes)?)
    }

    fn descriptor(
        &self,
        at: u64,
        address: u64,
        len: u64,
        flags: u32,
        next: u16,
    ) -> Result<(), Box<dyn Error>> {
        self.write(at, &address.to_le_bytes())?;
        let rest = len | u64::from(flags) << 32 | u64::from(next) << 48;
        self.write(at + 8, &rest.to_le_bytes())
    }

    /// Reads of `buffers` buffers: header, data, status, as Linux lays them out; with an indirect
    /// table if the ring has no room for them all.
    fn prepare(&self, buffers: u16, indirect: bool) -> Result<(), Box<dyn Error>> {
        let each = buffers + 2;
        for request in 0..REQUEST_COUNT {
            let at = REQUESTS + REQUEST_LEN * u64::from(request);
            self.write(at, &[0; 8])?;
            self.write(at + 8, &u64::from(request).to_le_bytes())?;
            let first = if indirect { 0 } else { request * each };
            let table = if indirect { at + 0x100 } else { DESC };
            let slot = |index: u16| table + 16 * u64::from(first + index);
            self.descriptor(slot(0), at, 16, NEXT, first + 1)?;
            for buffer in 1..=buffers {
                let data = at + 0x1000 * u64::from(buffer);
                self.descriptor(slot(buffer), data, 4096, NEXT | WRITE, first + buffer + 1)?;
            }
            self.descriptor(slot(buffers + 1), at + 16, 1, WRITE, 0)?;
            if indirect {
                self.descriptor(
                    DESC + 16 * u64::from(request),
                    table,
                    16 * u64::from(each),
                    INDIRECT,
                    0,
                )?;
            }
        }
        Ok(())
    }

    /// Offers every request once.
    fn offer(&mut self, heads_apart: u16) -> Result<(), Box<dyn Error>> {
        for request in 0..REQUEST_COUNT {
            let entry = u64::from(self.avail_idx % QUEUE_SIZE);
            self.write(AVAIL + 4 + 2 * entry, &(request * heads_apart).to_le_bytes())?;
            self.avail_idx = self.avail_idx.wrapping_add(1);
        }
        self.write(AVAIL + 2, &self.avail_idx.to_le_bytes())
    }
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
    let mut driver = Driver::new()?;
    driver.prepare(buffers, indirect)?;
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
    let mut queue = SplitQueue::new(driver.memory.clone(), state)?;
    let mut iovecs = IoVecs::new();
    let apart = if indirect { 1 } else { buffers + 2 };
    let mut best = Duration::MAX;
    let mut total = Duration::ZERO;
    for _ in 0..rounds {
        driver.offer(apart)?;
        let start = Instant::now();
        serve(&driver.memory, &mut queue, &mut iovecs)?;
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
