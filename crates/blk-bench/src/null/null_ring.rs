//! The device's side of a split virtqueue, and the requests on it, for the null backend.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use std::time::Instant;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::queue::SECTOR_SIZE;
use crate::driver::ring::{DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_WRITE, Descriptor};
use crate::null::{Disk, Fault};

/// Descriptors in a chain; more means a loop.
const MAX_CHAIN: usize = 1024;

/// A mapped region of the frontend's memory.
pub(crate) struct Mapping {
    host: NonNull<u8>,
    len: usize,
    guest: u64,
    user: u64,
    mapped: usize,
}

// SAFETY: raw pointers and atomics only; the mapping lives as long as the value.
unsafe impl Send for Mapping {}
// SAFETY: as above; what races in it is the frontend's business.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub fn new(region: &VhostUserMemoryRegion, file: &File) -> io::Result<Self> {
        let part = |value| usize::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
        let (offset, len) = (part(region.mmap_offset)?, part(region.memory_size)?);
        let size = offset
            .checked_add(len)
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, 0) }?;
        // SAFETY: the offset is less than the size just mapped.
        let host = unsafe { start.cast::<u8>().byte_add(offset) };
        Ok(Self {
            host,
            len,
            guest: region.guest_phys_addr,
            user: region.user_addr,
            mapped: size.get(),
        })
    }

    fn host(&self, base: u64, address: u64, len: usize) -> Option<*mut u8> {
        let offset = usize::try_from(address.checked_sub(base)?).ok()?;
        let fits = offset.checked_add(len)? <= self.len;
        // SAFETY: inside the mapping, as just checked.
        fits.then(|| unsafe { self.host.as_ptr().byte_add(offset) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let before = self.mapped - self.len;
        // SAFETY: what `new` mapped: the region ends where the mapping does.
        let _ = unsafe { munmap(self.host.byte_sub(before).cast(), self.mapped) };
    }
}

/// A ring whose three parts were found inside the frontend's memory.
pub(crate) struct DeviceRing {
    mappings: Arc<Vec<Mapping>>,
    size: u16,
    desc: *mut u8,
    avail: *mut u8,
    used: *mut u8,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// The value of used.idx.
    published: u16,
}

// SAFETY: the pointers point into `mappings`, which the ring keeps alive.
unsafe impl Send for DeviceRing {}

/// One piece of a chain.
type Piece = (*mut u8, usize, bool);

impl DeviceRing {
    /// `parts` are the userspace addresses of descriptor table, avail and used ring.
    pub fn new(
        mappings: Arc<Vec<Mapping>>,
        size: u16,
        parts: [u64; 3],
        next_avail: u16,
        event_idx: bool,
    ) -> Option<Self> {
        let entries = usize::from(size);
        let lens = [DESC_SIZE as usize * entries, 6 + 2 * entries, 6 + 8 * entries];
        let mut hosts = parts.into_iter().zip(lens).map(|(address, len)| {
            let host =
                mappings.iter().find_map(|mapping| mapping.host(mapping.user, address, len))?;
            (size.is_power_of_two() && host.cast::<u64>().is_aligned()).then_some(host)
        });
        let (desc, avail, used) = (hosts.next()??, hosts.next()??, hosts.next()??);
        let mut ring = Self {
            size,
            desc,
            avail,
            used,
            event_idx,
            next_avail,
            next_used: 0,
            published: 0,
            mappings: Arc::clone(&mappings),
        };
        ring.next_used = ring.field(ring.used, 2).load(Ordering::Acquire);
        ring.published = ring.next_used;
        Some(ring)
    }

    /// The 16-bit field at an even offset of the avail or used ring, at most its event field.
    fn field(&self, part: *mut u8, offset: usize) -> &AtomicU16 {
        // SAFETY: `new` checked that the parts lie in the mapping; the offsets used here do not
        // pass their ends.
        unsafe { AtomicU16::from_ptr(part.byte_add(offset).cast()) }
    }

    /// Answers requests until the session stops it; gives where it would go on.
    pub fn serve(mut self, disk: &Disk, kick: &EventFd, call: &EventFd, stop: &AtomicBool) -> u16 {
        let mut pieces = Vec::new();
        let mut idle_since: Option<Instant> = None;
        while !stop.load(Ordering::Relaxed) {
            let mut worked = false;
            while self.field(self.avail, 2).load(Ordering::Acquire) != self.next_avail {
                let slot = usize::from(self.next_avail % self.size);
                let head = self.field(self.avail, 4 + 2 * slot).load(Ordering::Relaxed);
                self.next_avail = self.next_avail.wrapping_add(1);
                if !self.collect(head, &mut pieces) {
                    // A frontend that hands over nonsense gets no answer.
                    continue;
                }
                for written in answer(disk, &pieces) {
                    self.push_used(head, written);
                }
                worked = true;
            }
            if worked {
                idle_since = None;
                if self.publish() {
                    let _ = call.write(1);
                }
            } else if idle_since.get_or_insert_with(Instant::now).elapsed()
                >= disk.options.poll_time
            {
                self.sleep(kick);
            } else {
                std::hint::spin_loop();
            }
        }
        self.next_avail
    }

    fn sleep(&self, kick: &EventFd) {
        let wake_at = 4 + 8 * usize::from(self.size);
        if self.event_idx {
            self.field(self.used, wake_at).store(self.next_avail, Ordering::Relaxed);
        } else {
            self.field(self.used, 0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        if self.field(self.avail, 2).load(Ordering::Acquire) == self.next_avail {
            let _ = kick.read();
        }
        if self.event_idx {
            // Half a round away, so that the frontend does not kick while there is work.
            self.field(self.used, wake_at)
                .store(self.next_avail.wrapping_sub(1), Ordering::Relaxed);
        } else {
            self.field(self.used, 0).store(1, Ordering::Relaxed);
        }
    }

    /// Gathers a chain's pieces; false if it is malformed.
    fn collect(&self, head: u16, pieces: &mut Vec<Piece>) -> bool {
        pieces.clear();
        let (mut table, mut len, mut index) = (self.desc, self.size, head);
        for _ in 0..MAX_CHAIN {
            if index >= len {
                return false;
            }
            // SAFETY: `table` has `len` descriptors inside a mapping.
            let descriptor = unsafe {
                table
                    .byte_add(DESC_SIZE as usize * usize::from(index))
                    .cast::<Descriptor>()
                    .read_unaligned()
            };
            let Some(host) = self.guest(descriptor.address, descriptor.len) else { return false };
            if descriptor.flags & DESC_INDIRECT != 0 {
                let Ok(count) = u16::try_from(descriptor.len / DESC_SIZE) else {
                    return false;
                };
                (table, len, index) = (host, count, 0);
                continue;
            }
            pieces.push((host, descriptor.len as usize, descriptor.flags & DESC_WRITE != 0));
            if descriptor.flags & DESC_NEXT == 0 {
                return true;
            }
            index = descriptor.next;
        }
        false
    }

    fn guest(&self, address: u64, len: u32) -> Option<*mut u8> {
        self.mappings.iter().find_map(|mapping| mapping.host(mapping.guest, address, len as usize))
    }

    fn push_used(&mut self, head: u16, written: u32) {
        let at = 4 + 8 * usize::from(self.next_used % self.size);
        // SAFETY: inside the used ring, 4-byte aligned because the ring is and every entry has 8
        // bytes.
        unsafe {
            self.used.byte_add(at).cast::<u32>().write_volatile(u32::from(head));
            self.used.byte_add(at + 4).cast::<u32>().write_volatile(written);
        }
        self.next_used = self.next_used.wrapping_add(1);
    }

    fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published, self.next_used);
        self.field(self.used, 2).store(self.next_used, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event =
                self.field(self.avail, 4 + 2 * usize::from(self.size)).load(Ordering::Relaxed);
            self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(old)
        } else {
            self.field(self.avail, 0).load(Ordering::Relaxed) & 1 == 0
        }
    }
}

/// Does a request; gives the lengths for the used ring: one, unless a fault wants none or two.
fn answer(disk: &Disk, pieces: &[Piece]) -> impl Iterator<Item = u32> {
    let request = disk.requests.fetch_add(1, Ordering::Relaxed) + 1;
    let fault = disk.options.fault;
    let mut status = VIRTIO_BLK_S_OK;
    let mut written = 1;
    if fault == Some(Fault::IoError(request)) {
        status = VIRTIO_BLK_S_IOERR;
    } else if disk.options.ram {
        written = transfer(disk, pieces).unwrap_or_else(|| {
            status = VIRTIO_BLK_S_IOERR;
            1
        });
    }
    if let Some(&(at, 1.., true)) = pieces.last() {
        // SAFETY: a piece of at least one byte inside a mapping.
        unsafe { at.write_volatile(u8::try_from(status).unwrap_or(u8::MAX)) };
    }
    let answers = match fault {
        Some(Fault::AnswerTwice(nth)) if nth == request => 2,
        Some(Fault::NoAnswer(nth)) if nth == request => 0,
        Some(Fault::Disconnect(nth)) if nth == request => {
            let _ = disk.connection.shutdown(Shutdown::Both);
            0
        }
        Some(Fault::ShortUsedLen(nth)) if nth == request => {
            written -= 1;
            1
        }
        _ => 1,
    };
    std::iter::repeat_n(written, answers)
}

/// Moves data between the disk in memory and the pieces; gives the bytes written to the frontend,
/// the status included.
fn transfer(disk: &Disk, pieces: &[Piece]) -> Option<u32> {
    let (&(header, 16, false), rest) = pieces.split_first()? else { return None };
    let (_, data) = rest.split_last()?;
    // SAFETY: the header piece has 16 bytes.
    let (kind, sector) = unsafe {
        (header.cast::<u32>().read_unaligned(), header.add(8).cast::<u64>().read_unaligned())
    };
    let mut content = disk.content.0.lock().ok()?;
    if kind == VIRTIO_BLK_T_DISCARD || kind == VIRTIO_BLK_T_WRITE_ZEROES {
        let &(range, 16, false) = data.first()? else { return None };
        // SAFETY: the range piece has 16 bytes.
        let (sector, sectors) = unsafe {
            (range.cast::<u64>().read_unaligned(), range.add(8).cast::<u32>().read_unaligned())
        };
        let start = usize::try_from(sector).ok()?.checked_mul(SECTOR_SIZE)?;
        content.get_mut(start..start.checked_add(sectors as usize * SECTOR_SIZE)?)?.fill(0);
        return Some(1);
    }
    if kind != VIRTIO_BLK_T_IN && kind != VIRTIO_BLK_T_OUT {
        return Some(1);
    }
    let mut at = usize::try_from(sector).ok()?.checked_mul(SECTOR_SIZE)?;
    let len: usize = data.iter().map(|&(_, len, _)| len).sum();
    content.get(at..at.checked_add(len)?)?;
    let write = (kind == VIRTIO_BLK_T_OUT).then(|| disk.writes.fetch_add(1, Ordering::Relaxed) + 1);
    match (disk.options.fault, write) {
        (Some(Fault::LoseWrite(nth)), Some(write)) if nth == write => return Some(1),
        (Some(Fault::MisplaceWrite(nth)), Some(write))
            if nth == write && at + len < content.len() =>
        {
            at += SECTOR_SIZE;
        }
        _ => {}
    }
    let torn = write.is_some()
        && disk.options.fault.is_some_and(|f| write.is_some_and(|w| f == Fault::TearWrite(w)));
    for &(host, len, _) in data {
        // SAFETY: the piece lies inside a mapping; the frontend leaves it alone while the request
        // is in flight.
        let piece = unsafe { std::slice::from_raw_parts_mut(host, len) };
        let sectors = &mut content[at..at + len];
        match (write, torn) {
            (None, _) => piece.copy_from_slice(sectors),
            (Some(_), false) => sectors.copy_from_slice(piece),
            (Some(_), true) => {
                for (to, from) in sectors.chunks_mut(SECTOR_SIZE).zip(piece.chunks(SECTOR_SIZE)) {
                    let half = from.len() / 2;
                    to[..half].copy_from_slice(&from[..half]);
                }
            }
        }
        at += len;
    }
    let read = if write.is_none() { u32::try_from(len).ok()? } else { 0 };
    Some(read + 1)
}
