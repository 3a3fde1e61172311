//! The way from a chain of descriptors to a checked request: the chain as a stream of bytes, the
//! header, and the segment lists.

use cow_format::{SECTOR_SIZE, Sector, SectorCount, SectorRange};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP as FLAG_UNMAP,
    virtio_blk_discard_write_zeroes,
};

use super::{
    Fault, HEADER_LEN, IoVecs, Operation, ParseLimits, Pending, RANGES_MAX, Request, Segment,
};
use crate::guest_memory::memory::{GuestAddress, Memory, volatile_read};
use crate::virtio::config;
use crate::virtio::device_queue::{ChainError, Descriptor};

/// Bytes of a segment of a discard or write-zeroes request.
const SEGMENT_LEN: usize = size_of::<virtio_blk_discard_write_zeroes>();

/// A whole chain as a stream of bytes.
#[derive(Debug, Default)]
pub(super) struct Stream {
    header: [u8; HEADER_LEN],
    /// Device-readable bytes, the header included.
    readable: u64,
    /// Device-writable bytes, the status included.
    writable: u64,
    /// The last device-writable byte.
    status_at: Option<GuestAddress>,
    /// The first thing that is wrong. The rest of the chain is walked all the same, for its status
    /// byte.
    fault: Option<Fault>,
}

impl Stream {
    /// Walks the chain to its end: the header is copied, the memory of the rest goes to `iovecs`.
    #[inline]
    pub(super) fn gather(
        memory: &Memory,
        chain: impl Iterator<Item = Result<Descriptor, ChainError>>,
        iovecs: &mut IoVecs,
    ) -> Result<Self, ChainError> {
        let mut stream = Self::default();
        for descriptor in chain {
            let descriptor = descriptor?;
            if let Err(fault) = stream.add(memory, descriptor, iovecs) {
                stream.fault.get_or_insert(fault);
            }
        }
        if stream.fault.is_none() && stream.writable > 0 {
            iovecs.drop_last_byte();
        }
        Ok(stream)
    }

    pub(super) fn status_at(&self) -> Option<GuestAddress> {
        self.status_at
    }

    /// Device-writable bytes before the status. So many that 32 bits do not hold them are never all
    /// filled.
    pub(super) fn room(&self) -> u32 {
        u32::try_from(self.writable.saturating_sub(1)).unwrap_or(u32::MAX)
    }

    #[inline]
    fn add(
        &mut self,
        memory: &Memory,
        descriptor: Descriptor,
        iovecs: &mut IoVecs,
    ) -> Result<(), Fault> {
        let Descriptor { address, len, writable } = descriptor;
        let len = u64::from(len);
        if len == 0 {
            return Err(Fault::EmptyDescriptor);
        }
        if writable {
            // No overflow: fewer than 2^16 lengths of 32 bits.
            self.writable += len;
            self.status_at = address.0.checked_add(len - 1).map(GuestAddress);
            memory.check_writable(address, len)?;
            return iovecs.append(memory, address, len);
        }
        if self.writable > 0 {
            return Err(Fault::Order);
        }
        // What of the header is still missing comes first, the rest is data.
        let have = usize::try_from(self.readable).unwrap_or(HEADER_LEN).min(HEADER_LEN);
        self.readable += len;
        let missing = &mut self.header[have..];
        let take = usize::try_from(len).unwrap_or(HEADER_LEN).min(missing.len());
        memory.read(address, &mut missing[..take])?;
        let take = take as u64;
        if take == len {
            return Ok(());
        }
        // No overflow: the header's part is inside memory, which ends below 2^63.
        iovecs.append(memory, GuestAddress(address.0 + take), len - take)
    }

    /// Checks the stream as a whole.
    #[inline]
    pub(super) fn request(
        &self,
        limits: &ParseLimits,
        iovecs: &mut IoVecs,
    ) -> Result<Request, Fault> {
        let status_at = match (self.fault, self.status_at) {
            (Some(fault), _) => return Err(fault),
            (None, None) => return Err(Fault::NoStatus),
            (None, Some(status_at)) => status_at,
        };
        let read = self.readable.checked_sub(HEADER_LEN as u64);
        let read = read.ok_or(Fault::Header { found: self.readable })?;
        // The length in the used ring has 32 bits, and a driver must not go beyond (2.7.5.2).
        let total = self.readable + self.writable;
        u32::try_from(total).map_err(|_| Fault::Length(total))?;
        let room = self.room();
        let (operation, fills) = self.operation(limits, iovecs, read, room)?;
        Ok(Request { operation, pending: Pending { status_at, room, fills } })
    }
}

impl Stream {
    /// What the header asks for, with `read` bytes of data behind it and `write` bytes before the
    /// status. Also how many of the latter it fills when it succeeds.
    #[inline]
    fn operation(
        &self,
        limits: &ParseLimits,
        iovecs: &mut IoVecs,
        read: u64,
        write: u32,
    ) -> Result<(Operation, u32), Fault> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = self.header;
        let sector = u64::from_le_bytes(sector);
        let towards_guest = if read == 0 { Ok(()) } else { Err(Fault::Direction) };
        let towards_disk = if write == 0 { Ok(()) } else { Err(Fault::Direction) };
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => {
                towards_guest?;
                Ok((Operation::In(limits.data(sector, u64::from(write))?), write))
            }
            VIRTIO_BLK_T_OUT => {
                limits.writable()?;
                towards_disk?;
                Ok((Operation::Out(limits.data(sector, read)?), 0))
            }
            // A driver should not add data (5.2.6.1); it is ignored.
            VIRTIO_BLK_T_FLUSH => Ok((Operation::Flush, 0)),
            VIRTIO_BLK_T_GET_ID => {
                towards_guest?;
                // How much is filled is known when it was.
                Ok((Operation::GetId, 0))
            }
            VIRTIO_BLK_T_DISCARD => {
                limits.writable()?;
                towards_disk?;
                limits.discards().list(iovecs, read)?;
                Ok((Operation::Discard, 0))
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                limits.writable()?;
                towards_disk?;
                limits.zeroes().list(iovecs, read)?;
                Ok((Operation::WriteZeroes, 0))
            }
            unknown => Err(Fault::Type(unknown)),
        }
    }
}

impl ParseLimits {
    /// The sectors of `len` bytes of data at `sector`.
    #[inline]
    fn data(&self, sector: u64, len: u64) -> Result<SectorRange, Fault> {
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(Fault::DataLength(len));
        }
        self.range(sector, len / SECTOR_SIZE)
    }

    #[inline]
    fn range(&self, sector: u64, count: u64) -> Result<SectorRange, Fault> {
        let capacity = self.capacity.get();
        let inside = sector.checked_add(count).is_some_and(|end| end <= capacity);
        inside
            .then(|| SectorRange::new(Sector::new(sector), SectorCount::new(count)))
            .flatten()
            .ok_or(Fault::Capacity { sector, count, capacity })
    }

    #[inline]
    fn writable(&self) -> Result<(), Fault> {
        if self.read_only { Err(Fault::ReadOnly) } else { Ok(()) }
    }

    fn discards(&self) -> SegmentRules<'_> {
        // "MUST set UNSUPP for discard commands if the unmap flag is set" (5.2.6.2).
        SegmentRules { limits: self, sectors_max: config::DISCARD_SECTORS_MAX, flags: 0 }
    }

    fn zeroes(&self) -> SegmentRules<'_> {
        SegmentRules {
            limits: self,
            sectors_max: config::WRITE_ZEROES_SECTORS_MAX,
            flags: FLAG_UNMAP,
        }
    }
}

/// What holds for the segments of one kind of request.
struct SegmentRules<'a> {
    limits: &'a ParseLimits,
    /// For one segment.
    sectors_max: u32,
    /// Flags that a segment may have.
    flags: u32,
}

impl SegmentRules<'_> {
    /// Copies a list of `len` bytes out of the data and checks it; the outcome is in
    /// [`IoVecs::segments`].
    fn list(&self, iovecs: &mut IoVecs, len: u64) -> Result<(), Fault> {
        if !len.is_multiple_of(SEGMENT_LEN as u64) {
            return Err(Fault::DataLength(len));
        }
        let found = len / SEGMENT_LEN as u64;
        if found > RANGES_MAX as u64 {
            return Err(Fault::Segments { found });
        }
        let mut list = [[0; SEGMENT_LEN]; RANGES_MAX];
        let mut rest = list.as_flattened_mut();
        for iovec in &iovecs.iovecs {
            let (now, later) = rest.split_at_mut(iovec.iov_len);
            // SAFETY: `gather` got the pointer from the memory that `parse` borrows, valid for
            // `iov_len` bytes.
            unsafe { volatile_read(iovec.iov_base.cast(), now) };
            rest = later;
        }
        let left = rest.len();
        let used = RANGES_MAX - left / SEGMENT_LEN;
        let raw = list[..used].iter().map(RawSegment::from_bytes);
        // First of all: any unknown flag makes it UNSUPP, whatever else is wrong (5.2.6.2).
        if let Some(odd) = raw.clone().find(|raw| raw.flags & !self.flags != 0) {
            return Err(Fault::SegmentFlags(odd.flags));
        }
        for raw in raw {
            if raw.sectors > self.sectors_max {
                return Err(Fault::SegmentLength { found: raw.sectors, max: self.sectors_max });
            }
            let range = self.limits.range(raw.sector, u64::from(raw.sectors))?;
            iovecs.segments.push(Segment { range, unmap: raw.flags & FLAG_UNMAP != 0 });
        }
        Ok(())
    }
}

/// `struct virtio_blk_discard_write_zeroes`, a copy.
struct RawSegment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl RawSegment {
    fn from_bytes(bytes: &[u8; SEGMENT_LEN]) -> Self {
        let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = *bytes;
        Self {
            sector: u64::from_le_bytes(sector),
            sectors: u32::from_le_bytes([n0, n1, n2, n3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
        }
    }
}
