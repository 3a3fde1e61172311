//! The delta stream (`docs/spec/format-delta.md`): the content of a COW file in transit to another
//! host.

use std::io::{self, Read, Write};

use cow_format::identity::{BackingIdentity, Timestamp, Witness};
use cow_format::{SECTOR_SIZE, VIRTUAL_SIZE_MAX};
use uuid::Uuid;
use zerocopy::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"COWDELTA";
const VERSION: u32 = 1;
/// The most bytes of data in a record: the buffer that a reader needs.
pub const RECORD_MAX: usize = 1 << 20;
/// Level of compression: the one that zstd itself takes for the best trade.
const LEVEL: i32 = 3;

/// Section 2: the header, uncompressed.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    /// CRC32C of everything after it.
    crc: U32,
    virtual_size: U64,
    base_kind: U32,
    base_mtime_nanos: U32,
    base_size: U64,
    base_mtime_secs: I64,
    base_content_generation: U64,
    base_uuid: [u8; 16],
    digest_kind: U32,
    reserved: U32,
    digest: [u8; 32],
}

const HEADER_LEN: usize = 112;
const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);
const CRC_END: usize = 16;

/// Section 3: a record, compressed like all that follows the header.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    kind: U32,
    /// CRC32C of the record with this field as zeros, and of the data behind it.
    crc: U32,
    at: U64,
    len: U64,
}

const RECORD_LEN: usize = 24;
const _: () = assert!(size_of::<RawRecord>() == RECORD_LEN);

mod kind {
    pub const END: u32 = 0;
    pub const DATA: u32 = 1;
    pub const ZERO: u32 = 2;
    pub const BASE_NONE: u32 = 0;
    pub const BASE_IMAGE: u32 = 1;
    pub const BASE_LAYER: u32 = 2;
    pub const DIGEST_NONE: u32 = 0;
    pub const DIGEST_BLAKE3: u32 = 1;
}

/// The disk and base that a delta belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The size of the disk in bytes, a multiple of 512 unless its base's is not.
    pub virtual_size: u64,
    /// The file that it changes; `None`: zeros.
    pub base: Option<BackingIdentity>,
    /// BLAKE3 of the base's content.
    pub digest: Option<[u8; 32]>,
}

/// A part of a delta.
#[derive(Debug)]
pub enum Record<'a> {
    /// These bytes from byte `at` of the disk on.
    Data {
        /// In bytes, the beginning of a sector.
        at: u64,
        /// Up to [`RECORD_MAX`]: whole sectors.
        bytes: &'a [u8],
    },
    /// So many zeros.
    Zero {
        /// In bytes, the beginning of a sector.
        at: u64,
        /// In bytes, whole sectors.
        len: u64,
    },
}

/// An invalid stream.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// It could not be read or written.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It does not begin with the magic.
    #[error("not a delta: it does not begin with COWDELTA")]
    NotADelta,
    /// Of a newer program.
    #[error(
        "version {0}, expected 1: the stream was written by a newer program, which has to read it"
    )]
    Version(u32),
    /// A field has an invalid value.
    #[error("{what} at byte {at} of the stream: found {found}, expected {expected}")]
    Corrupt {
        /// The field.
        what: &'static str,
        /// Of the uncompressed stream.
        at: u64,
        /// What is there.
        found: String,
        /// What should be.
        expected: String,
    },
}

impl DeltaError {
    fn corrupt(what: &'static str, at: u64, found: impl ToString, expected: impl ToString) -> Self {
        DeltaError::Corrupt { what, at, found: found.to_string(), expected: expected.to_string() }
    }
}

impl Header {
    fn encode(&self) -> RawHeader {
        let mut raw = RawHeader::new_zeroed();
        (raw.magic, raw.version) = (MAGIC, VERSION.into());
        raw.virtual_size = self.virtual_size.into();
        match self.base {
            None => raw.base_kind = kind::BASE_NONE.into(),
            Some(BackingIdentity::ImageSeconds { size, mtime_secs }) => {
                raw.base_kind = kind::BASE_IMAGE.into();
                raw.base_size = size.into();
                raw.base_mtime_secs = i64::from(mtime_secs).into();
                // Marks an unknown value: no file has as many.
                raw.base_mtime_nanos = u32::MAX.into();
            }
            Some(BackingIdentity::Image { size, mtime, .. }) => {
                raw.base_kind = kind::BASE_IMAGE.into();
                raw.base_size = size.into();
                raw.base_mtime_secs = mtime.secs().into();
                raw.base_mtime_nanos = mtime.nanos().into();
            }
            Some(BackingIdentity::Layer { uuid, content_generation }) => {
                raw.base_kind = kind::BASE_LAYER.into();
                raw.base_uuid = uuid.into_bytes();
                raw.base_content_generation = content_generation.into();
            }
        }
        if let Some(digest) = self.digest {
            raw.digest_kind = kind::DIGEST_BLAKE3.into();
            raw.digest = digest;
        }
        raw.crc = crc32c::crc32c(&raw.as_bytes()[CRC_END..]).into();
        raw
    }

    fn check(raw: &RawHeader) -> Result<Self, DeltaError> {
        if raw.magic != MAGIC {
            return Err(DeltaError::NotADelta);
        }
        if raw.version.get() != VERSION {
            return Err(DeltaError::Version(raw.version.get()));
        }
        let crc = crc32c::crc32c(&raw.as_bytes()[CRC_END..]);
        if raw.crc.get() != crc {
            return Err(DeltaError::corrupt("checksum of the header", 12, raw.crc, crc));
        }
        let virtual_size = raw.virtual_size.get();
        if virtual_size > VIRTUAL_SIZE_MAX {
            let expected = format!("at most {VIRTUAL_SIZE_MAX} bytes (256 TiB)");
            return Err(DeltaError::corrupt("size of the disk", 16, virtual_size, expected));
        }
        let base = match raw.base_kind.get() {
            kind::BASE_NONE => None,
            kind::BASE_IMAGE => Some(check_image(raw)?),
            kind::BASE_LAYER => Some(BackingIdentity::Layer {
                uuid: Uuid::from_bytes(raw.base_uuid),
                content_generation: raw.base_content_generation.get(),
            }),
            found => return Err(DeltaError::corrupt("kind of the base", 24, found, "0, 1 or 2")),
        };
        let digest = match raw.digest_kind.get() {
            kind::DIGEST_NONE => None,
            kind::DIGEST_BLAKE3 => Some(raw.digest),
            found => return Err(DeltaError::corrupt("kind of the digest", 72, found, "0 or 1")),
        };
        Ok(Header { virtual_size, base, digest })
    }
}

fn check_image(raw: &RawHeader) -> Result<BackingIdentity, DeltaError> {
    let (size, secs) = (raw.base_size.get(), raw.base_mtime_secs.get());
    if raw.base_mtime_nanos.get() == u32::MAX {
        return match u32::try_from(secs) {
            Ok(mtime_secs) => Ok(BackingIdentity::ImageSeconds { size, mtime_secs }),
            Err(_) => Err(DeltaError::corrupt("mtime of the base", 40, secs, "below 2^32 seconds")),
        };
    }
    match Timestamp::new(secs, raw.base_mtime_nanos.get()) {
        // The exporting host's inodes mean nothing on this one.
        Some(mtime) => Ok(BackingIdentity::Image { size, mtime, witness: Witness::NONE }),
        None => {
            let nanos = raw.base_mtime_nanos;
            Err(DeltaError::corrupt("mtime of the base", 28, nanos, "below 1000000000 nanoseconds"))
        }
    }
}

/// Writes a delta.
pub struct Writer<W: Write> {
    out: zstd::Encoder<'static, W>,
    hasher: blake3::Hasher,
    records: u64,
    bytes: u64,
}

impl<W: Write> Writer<W> {
    /// Begins a delta.
    pub fn new(mut out: W, header: &Header, threads: u32) -> io::Result<Self> {
        let raw = header.encode();
        out.write_all(raw.as_bytes())?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(raw.as_bytes());
        let mut out = zstd::Encoder::new(out, LEVEL)?;
        out.multithread(threads)?;
        Ok(Writer { out, hasher, records: 0, bytes: 0 })
    }

    /// Adds a record.
    pub fn record(&mut self, record: &Record<'_>) -> io::Result<()> {
        let (kind, at, len, bytes) = match *record {
            Record::Data { at, bytes } => (kind::DATA, at, bytes.len() as u64, bytes),
            Record::Zero { at, len } => (kind::ZERO, at, len, &[][..]),
        };
        self.records += 1;
        self.bytes += len;
        self.put(kind, at, len, bytes)
    }

    fn put(&mut self, kind: u32, at: u64, len: u64, bytes: &[u8]) -> io::Result<()> {
        let mut raw =
            RawRecord { kind: kind.into(), crc: U32::ZERO, at: at.into(), len: len.into() };
        raw.crc = checksum(&raw, bytes).into();
        for part in [raw.as_bytes(), bytes] {
            self.hasher.update(part);
            self.out.write_all(part)?;
        }
        Ok(())
    }

    /// Ends the delta.
    pub fn finish(mut self) -> io::Result<W> {
        self.put(kind::END, self.records, self.bytes, &[])?;
        self.out.write_all(self.hasher.finalize().as_bytes())?;
        self.out.finish()
    }
}

/// CRC32C of a record with its own field as zeros, and of its data.
fn checksum(raw: &RawRecord, bytes: &[u8]) -> u32 {
    let raw = RawRecord { crc: U32::ZERO, ..*raw };
    crc32c::crc32c_append(crc32c::crc32c(raw.as_bytes()), bytes)
}

/// Reads a delta.
pub struct Reader<R: Read> {
    header: Header,
    input: zstd::Decoder<'static, io::BufReader<R>>,
    hasher: blake3::Hasher,
    /// Of the uncompressed stream.
    at: u64,
    /// Records come in rising order.
    end: u64,
    records: u64,
    bytes: u64,
    buf: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads and checks the header.
    pub fn new(mut input: R) -> Result<Self, DeltaError> {
        let mut raw = RawHeader::new_zeroed();
        match input.read_exact(raw.as_mut_bytes()) {
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(DeltaError::NotADelta);
            }
            read => read?,
        }
        let header = Header::check(&raw)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(raw.as_bytes());
        let (input, at) = (zstd::Decoder::new(input)?, HEADER_LEN as u64);
        Ok(Reader { header, input, hasher, at, end: 0, records: 0, bytes: 0, buf: Vec::new() })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next record; `None` after the last one, when the stream is proved to be whole and right.
    pub fn record(&mut self) -> Result<Option<Record<'_>>, DeltaError> {
        let start = self.at;
        let mut raw = RawRecord::new_zeroed();
        self.input.read_exact(raw.as_mut_bytes())?;
        self.at += RECORD_LEN as u64;
        let (kind, at, len) = (raw.kind.get(), raw.at.get(), raw.len.get());
        self.buf.clear();
        if kind == kind::DATA {
            let room = usize::try_from(len).ok().filter(|len| *len <= RECORD_MAX);
            let Some(room) = room else {
                let expected = format!("at most {RECORD_MAX}");
                return Err(DeltaError::corrupt("length of a record", start, len, expected));
            };
            self.buf.resize(room, 0);
            self.input.read_exact(&mut self.buf)?;
            self.at += len;
        }
        let crc = checksum(&raw, &self.buf);
        if raw.crc.get() != crc {
            return Err(DeltaError::corrupt("checksum of a record", start, raw.crc, crc));
        }
        if kind == kind::END {
            return self.finish(&raw, start).map(|()| None);
        }
        self.check_place(start, at, len)?;
        self.hasher.update(raw.as_bytes());
        self.hasher.update(&self.buf);
        self.records += 1;
        self.bytes += len;
        self.end = at + len;
        match kind {
            kind::DATA => Ok(Some(Record::Data { at, bytes: &self.buf })),
            kind::ZERO => Ok(Some(Record::Zero { at, len })),
            found => Err(DeltaError::corrupt("kind of a record", start, found, "0, 1 or 2")),
        }
    }

    /// Refuses a record that is not of whole sectors of the disk, behind the one before it.
    fn check_place(&self, start: u64, at: u64, len: u64) -> Result<(), DeltaError> {
        let size = self.header.virtual_size.next_multiple_of(SECTOR_SIZE);
        let inside = at.checked_add(len).is_some_and(|end| end <= size);
        let whole = at.is_multiple_of(SECTOR_SIZE) && len.is_multiple_of(SECTOR_SIZE) && len > 0;
        if at >= self.end && inside && whole {
            return Ok(());
        }
        let found = format!("{len} bytes at {at}");
        let expected = format!("whole sectors between {} and {size}", self.end);
        Err(DeltaError::corrupt("place of a record", start, found, expected))
    }

    fn finish(&mut self, raw: &RawRecord, start: u64) -> Result<(), DeltaError> {
        let (records, bytes) = (raw.at.get(), raw.len.get());
        if (records, bytes) != (self.records, self.bytes) {
            let found = format!("{} records of {} bytes", self.records, self.bytes);
            let expected = format!("{records} records of {bytes} bytes");
            return Err(DeltaError::corrupt("end", start, found, expected));
        }
        self.hasher.update(raw.as_bytes());
        let mut digest = [0; 32];
        self.input.read_exact(&mut digest)?;
        let expected = self.hasher.finalize();
        if expected != digest {
            let found = blake3::Hash::from_bytes(digest).to_hex();
            return Err(DeltaError::corrupt("digest", self.at, found, expected.to_hex()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let mtime = Timestamp::new(1_700_000_000, 5).unwrap();
        let witness = Witness::NONE;
        let base = Some(BackingIdentity::Image { size: 1 << 20, mtime, witness });
        Header { virtual_size: 1 << 20, base, digest: Some([7; 32]) }
    }

    fn stream() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), &header(), 0).unwrap();
        writer.record(&Record::Data { at: 512, bytes: &[1; 1024] }).unwrap();
        writer.record(&Record::Zero { at: 4096, len: 512 << 10 }).unwrap();
        writer.finish().unwrap()
    }

    fn read_all(stream: &[u8]) -> Result<Vec<(u64, u64, bool)>, DeltaError> {
        let mut reader = Reader::new(stream)?;
        assert_eq!(*reader.header(), header());
        let mut records = Vec::new();
        while let Some(record) = reader.record()? {
            records.push(match record {
                Record::Data { at, bytes } => (at, bytes.len() as u64, bytes == [1; 1024]),
                Record::Zero { at, len } => (at, len, false),
            });
        }
        Ok(records)
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(read_all(&stream()).unwrap(), [(512, 1024, true), (4096, 512 << 10, false)]);
        for base in [
            None,
            Some(BackingIdentity::ImageSeconds { size: 5, mtime_secs: u32::MAX }),
            Some(BackingIdentity::Layer { uuid: Uuid::from_u128(3), content_generation: 9 }),
        ] {
            let header = Header { virtual_size: 512, base, digest: None };
            let stream = Writer::new(Vec::new(), &header, 0).unwrap().finish().unwrap();
            let mut reader = Reader::new(&stream[..]).unwrap();
            assert_eq!(*reader.header(), header);
            assert!(reader.record().unwrap().is_none());
        }
    }

    #[test]
    fn a_disk_that_no_cow_file_can_have_is_refused() {
        for virtual_size in [VIRTUAL_SIZE_MAX + 1, u64::MAX - 100, u64::MAX] {
            let header = Header { virtual_size, base: None, digest: None };
            let mut writer = Writer::new(Vec::new(), &header, 0).unwrap();
            writer.record(&Record::Zero { at: 0, len: 512 }).unwrap();
            let refused = Reader::new(&writer.finish().unwrap()[..]).err().unwrap();
            assert!(refused.to_string().contains("size of the disk"), "{refused}");
        }
    }

    #[test]
    fn no_broken_stream_is_taken() {
        let whole = stream();
        for len in 0..whole.len() {
            assert!(read_all(&whole[..len]).is_err(), "{len} of {} bytes", whole.len());
        }
        // A few bits of zstd's frame do not affect the content; every other change is detected.
        let records = read_all(&whole).unwrap();
        let mut taken = 0;
        for at in 0..whole.len() {
            let mut broken = whole.clone();
            broken[at] ^= 0x55;
            let found = std::panic::catch_unwind(|| read_all(&broken).ok()).ok().flatten();
            taken += usize::from(found.is_some());
            assert!(found.is_none_or(|found| found == records), "byte {at} of {}", whole.len());
        }
        assert!(taken <= 2, "{taken} of {} bytes do not count", whole.len());
    }

    #[test]
    fn records_outside_the_disk_or_out_of_order_are_refused() {
        for records in [
            &[(0, 2 << 20)][..],
            &[(1 << 20, 512)],
            &[(u64::MAX - 511, 512)],
            &[(100, 512)],
            &[(0, 100)],
            &[(0, 0)],
            &[(512, 512), (0, 512)],
            &[(0, 1024), (512, 512)],
        ] {
            let mut writer = Writer::new(Vec::new(), &header(), 0).unwrap();
            for (at, len) in records {
                writer.record(&Record::Zero { at: *at, len: *len }).unwrap();
            }
            let err = read_all(&writer.finish().unwrap()).unwrap_err();
            assert!(err.to_string().contains("place of a record"), "{records:?}: {err}");
        }
    }
}
