//! virtio-blk requests (virtio 1.3, 5.2.6): a chain of descriptors in, a status byte out. Knows
//! nothing of disks.
//!
//! A request is a stream of bytes: a 16-byte header and data that the device reads, data that the
//! device writes, and the status as the very last byte. How the driver spreads the stream over
//! descriptors is its own affair (VERSION_1 implies any layout). Each request is answered once, by
//! types that are consumed: [`parse`] gives a [`Request`], which turns into a [`Pending`] when its
//! work begins and into a [`Reply`] when that is done; what is malformed is a `Reply` at once.

mod stream;

use cow_format::{SectorCount, SectorRange};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    virtio_blk_outhdr,
};

use self::stream::Stream;
use crate::guest_memory::memory::{GuestAddress, Memory, NotWritable, OutsideMemory};
use crate::virtio::config;
use crate::virtio::device_queue::{ChainError, Descriptor};

/// Data iovecs of one request: what one system call takes (IOV_MAX).
pub(crate) const IOVECS_MAX: usize = 1024;

/// Length of the answer to GET_ID, the serial number, in bytes (virtio 1.3, 5.2.6).
pub(crate) const ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Type, reserved, sector: what comes before the data.
const HEADER_LEN: usize = size_of::<virtio_blk_outhdr>();

/// Segments of one DISCARD or WRITE_ZEROES.
const RANGES_MAX: usize = config::RANGES_MAX as usize;

/// What a request is checked against, besides the limits that the `config` module offers.
#[derive(Clone, Copy, Debug)]
pub struct ParseLimits {
    /// Size of the disk.
    pub capacity: SectorCount,
    /// Writing requests fail.
    pub read_only: bool,
}

/// What a request asks for. The [`IoVecs`] that it was parsed into say where its data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read these sectors into the iovecs, whose lengths add up to them.
    In(SectorRange),
    /// Write these sectors from the iovecs, whose lengths add up to them.
    Out(SectorRange),
    /// Make what was written durable.
    Flush,
    /// The guest no longer needs the sectors of `IoVecs::segments`.
    Discard,
    /// Make the sectors of `IoVecs::segments` read as zeros.
    WriteZeroes,
    /// Put the serial number into the iovecs: `Pending::answer_id`.
    GetId,
}

/// One range of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Its sectors; there may be none.
    pub(crate) range: SectorRange,
    /// The space may be given back (write-zeroes only).
    pub(crate) unmap: bool,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The chain breaks off, so where its status byte would be is unknown.
    #[error("broken chain: {0}")]
    Chain(ChainError),
    /// No device-writable byte.
    #[error("no status byte")]
    NoStatus,
    /// The header breaks off.
    #[error("header of {found} bytes, {HEADER_LEN} are needed")]
    Header {
        /// Device-readable bytes there are.
        found: u64,
    },
    /// A descriptor of length 0.
    #[error("descriptor of length 0")]
    EmptyDescriptor,
    /// A device-readable descriptor behind a device-writable one.
    #[error("device-readable descriptor behind a device-writable one")]
    Order,
    /// A buffer that is not in guest memory.
    #[error(transparent)]
    Outside(#[from] OutsideMemory),
    /// A buffer for the device to write that it cannot write.
    #[error(transparent)]
    NotWritable(#[from] NotWritable),
    /// More than `IOVECS_MAX` pieces of memory.
    #[error("more than {IOVECS_MAX} pieces of memory")]
    Pieces,
    /// More bytes than 2^32 - 1.
    #[error("buffers of {0} bytes")]
    Length(u64),
    /// Data to read in a request that only writes data, or the other way round.
    #[error("data in the wrong direction")]
    Direction,
    /// The data of IN or OUT is no multiple of 512 bytes, a segment list no multiple of 16.
    #[error("data of {0} bytes")]
    DataLength(u64),
    /// Sectors behind the end of the disk.
    #[error("sector {sector}, {count} sectors: behind the end of the disk at {capacity}")]
    Capacity {
        /// The first sector.
        sector: u64,
        /// How many.
        count: u64,
        /// Size of the disk in sectors.
        capacity: u64,
    },
    /// A writing request for a read-only disk.
    #[error("disk is read-only")]
    ReadOnly,
    /// A request type this device does not know.
    #[error("request type {0}")]
    Type(u32),
    /// Too many discard or write-zeroes segments.
    #[error("{found} segments, {RANGES_MAX} are allowed")]
    Segments {
        /// How many there are.
        found: u64,
    },
    /// A segment is too long.
    #[error("segment of {found} sectors, {max} are allowed")]
    SegmentLength {
        /// Its sectors.
        found: u32,
        /// The limit for this kind of request.
        max: u32,
    },
    /// A segment has a flag this device does not know, or that does not go with the request.
    #[error("segment flags {0:#x}")]
    SegmentFlags(u32),
}

impl Fault {
    fn status(self) -> Status {
        match self {
            Self::Type(_) | Self::SegmentFlags(_) => Status::Unsupported,
            _ => Status::IoError,
        }
    }

    /// Whether the guest may have done nothing wrong: it has memory that the frontend does not
    /// share, or not for writing.
    pub(crate) fn is_of_shared_memory(self) -> bool {
        matches!(
            self,
            Self::Outside(_) | Self::NotWritable(_) | Self::Chain(ChainError::IndirectOutside(_))
        )
    }
}

/// The status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// VIRTIO_BLK_S_OK
    Ok = byte(VIRTIO_BLK_S_OK),
    /// VIRTIO_BLK_S_IOERR
    IoError = byte(VIRTIO_BLK_S_IOERR),
    /// VIRTIO_BLK_S_UNSUPP
    Unsupported = byte(VIRTIO_BLK_S_UNSUPP),
}

/// A constant for a field of 8 bits. The bindings have 32 for all of them.
const fn byte(constant: u32) -> u8 {
    let [byte, 0, 0, 0] = constant.to_le_bytes() else {
        panic!("the field has 8 bits");
    };
    byte
}

/// Where the memory of one request is. Used again for one request after the other, so that nothing
/// is allocated once it has grown to what the guest uses.
#[derive(Debug, Default)]
pub struct IoVecs {
    iovecs: Vec<libc::iovec>,
    segments: Vec<Segment>,
}

// SAFETY: the pointers are addresses of guest memory, which belong to no thread; using them is
// unsafe anyway.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// Room for a request of as many segments as the device offers. A status in a buffer of its own
    /// takes one more.
    pub fn new() -> Self {
        Self {
            iovecs: Vec::with_capacity(usize::from(config::SEGMENTS_MAX) + 1),
            segments: Vec::new(),
        }
    }

    /// Host memory of the data of IN, OUT and GET_ID, in order, without header and status; none of
    /// them is empty. Good for as long as the [`Memory`] it was parsed with lives.
    pub fn data(&self) -> &[libc::iovec] {
        &self.iovecs
    }

    /// The ranges of DISCARD and WRITE_ZEROES.
    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    fn clear(&mut self) {
        self.iovecs.clear();
        self.segments.clear();
    }

    /// Appends the memory of one buffer.
    #[inline]
    fn append(&mut self, memory: &Memory, address: GuestAddress, len: u64) -> Result<(), Fault> {
        let mut full = false;
        memory.host_ranges(address, len, &mut |host, len| {
            if self.iovecs.len() < IOVECS_MAX {
                self.iovecs.push(libc::iovec { iov_base: host.cast(), iov_len: len });
            } else {
                full = true;
            }
        })?;
        if full { Err(Fault::Pieces) } else { Ok(()) }
    }

    /// Takes the last byte, the status, out of the data.
    #[inline]
    fn drop_last_byte(&mut self) {
        if let Some(last) = self.iovecs.last_mut() {
            last.iov_len -= 1;
            if last.iov_len == 0 {
                self.iovecs.pop();
            }
        }
    }
}

/// What [`parse`] makes of a chain.
#[derive(Debug)]
#[must_use]
pub enum Parsed {
    /// Well-formed and to be carried out.
    Request(Request),
    /// Refused.
    Reply(Reply),
}

/// A well-formed request that was not begun.
#[derive(Debug)]
#[must_use = "the guest waits for an answer"]
pub struct Request {
    operation: Operation,
    pending: Pending,
}

impl Request {
    /// Begins it.
    #[inline]
    pub fn start(self) -> (Operation, Pending) {
        (self.operation, self.pending)
    }
}

/// A request that is being carried out.
#[derive(Debug)]
#[must_use = "the guest waits for an answer"]
pub struct Pending {
    status_at: GuestAddress,
    /// Device-writable bytes before the status byte.
    room: u32,
    /// How many of them are written when it succeeds, counted from the first.
    fills: u32,
}

impl Pending {
    /// It was carried out, all of it.
    #[inline]
    pub fn done(self) -> Reply {
        self.reply(Status::Ok, self.fills)
    }

    /// It failed. What was written of its data is not said, since it is not known.
    pub(crate) fn failed(self) -> Reply {
        self.reply(Status::IoError, 0)
    }

    /// Carries out GET_ID: as much of `id` as there is room for. `iovecs` and `memory` are the ones
    /// it was parsed with.
    pub(crate) fn answer_id(self, memory: &Memory, iovecs: &IoVecs, id: &[u8; ID_LEN]) -> Reply {
        let mut rest = id.as_slice();
        let mut filled = 0;
        for iovec in iovecs.data() {
            let (now, later) = rest.split_at(rest.len().min(iovec.iov_len));
            if !memory.write_host(iovec.iov_base.cast(), now) {
                return self.failed();
            }
            filled += now.len();
            rest = later;
        }
        self.reply(Status::Ok, u32::try_from(filled).unwrap_or(0))
    }

    #[inline]
    fn reply(&self, status: Status, filled: u32) -> Reply {
        Reply { status_at: Some(self.status_at), status, room: self.room, filled, fault: None }
    }
}

/// An answer that the guest has not got yet.
#[derive(Debug)]
#[must_use = "the guest waits for an answer"]
pub struct Reply {
    status_at: Option<GuestAddress>,
    status: Status,
    room: u32,
    filled: u32,
    fault: Option<Fault>,
}

impl Reply {
    fn refuse(fault: Fault, status_at: Option<GuestAddress>, room: u32) -> Self {
        Self { status_at, status: fault.status(), room, filled: 0, fault: Some(fault) }
    }

    /// Where the status byte goes; `None` if it has no place.
    #[inline]
    pub(crate) fn status_at(&self) -> Option<GuestAddress> {
        self.status_at
    }

    /// Why the request was refused, if it never was a [`Request`].
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// Writes the status byte and gives the length for the used ring: bytes that were written for
    /// sure, counted from the first device-writable one without a gap (2.7.8.2). So the status byte
    /// counts when all before it was written, and a failed IN says 0: a driver must not take what
    /// its buffer held before for data.
    #[inline]
    pub fn finish(self, memory: &Memory) -> u32 {
        let Some(status_at) = self.status_at else { return 0 };
        let written = memory.write(status_at, &[self.status as u8]).is_ok();
        if written && self.filled == self.room { self.room.saturating_add(1) } else { self.filled }
    }
}

/// Makes a request of a chain, or the reply that refuses it. What `iovecs` held before is gone;
/// after a `Reply` it holds nothing of use.
#[inline]
pub fn parse(
    memory: &Memory,
    chain: impl Iterator<Item = Result<Descriptor, ChainError>>,
    limits: &ParseLimits,
    iovecs: &mut IoVecs,
) -> Parsed {
    iovecs.clear();
    let stream = match Stream::gather(memory, chain, iovecs) {
        Ok(stream) => stream,
        Err(broken) => return Parsed::Reply(Reply::refuse(Fault::Chain(broken), None, 0)),
    };
    match stream.request(limits, iovecs) {
        Ok(request) => Parsed::Request(request),
        Err(fault) => Parsed::Reply(Reply::refuse(fault, stream.status_at(), stream.room())),
    }
}

#[cfg(test)]
mod tests;
