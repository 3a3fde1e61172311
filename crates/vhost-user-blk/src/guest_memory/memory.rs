//! Guest memory: an immutable snapshot of the memory table, from guest addresses to host pointers.
//!
//! A snapshot never changes: adding or removing a region gives a new one. Whatever is in flight
//! holds the `Arc` of the snapshot its pointers came from, and with it the mappings.
//!
//! The guest, the frontend and the kernel write this memory while it is looked at. So it is only
//! touched through raw pointers, by volatile or atomic accesses or by system calls; no reference to
//! it ever exists, and what is read once is checked in the copy.
//!
//! A snapshot is also `GuestMemory` of the `vm-memory` crate, through which the `virtio-queue`
//! crate checks and reads a ring while it is being set up.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use vm_memory::guest_memory::{
    Error as AccessError, GuestMemorySliceIterator, Result as AccessResult,
};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestRegionCollectionError, MemoryRegionAddress, MmapRegion,
    Permissions, VolatileMemory, VolatileSlice,
};

pub use vm_memory::GuestAddress;

use crate::guest_memory::PAGE_SIZE;
use crate::guest_memory::sigbus::{Registration, SigbusError};
use crate::process::descriptor::Dax;

/// Regions that one snapshot may hold. What QEMU calls memory slots: 509 is what the Linux kernel's
/// KVM gives an x86 guest for its own use (512 less 3), and what vhost-user backends commonly
/// answer to GET_MAX_MEM_SLOTS.
pub(crate) const REGIONS_MAX: usize = 509;

/// A range of guest memory as the frontend describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest-physical address of its first byte.
    pub guest_address: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address of its first byte in the frontend's own address space; ring addresses come in these
    /// terms.
    pub vmm_address: u64,
    /// Where it begins in its file, in bytes.
    pub file_offset: u64,
}

impl fmt::Display for RegionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest address {:#x}, size {:#x}", self.guest_address, self.size)
    }
}

/// Why a new snapshot could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More regions than `REGIONS_MAX`.
    #[error("memory table is full: {REGIONS_MAX} regions are the limit")]
    TooManyRegions,
    /// A size of 0.
    #[error("memory region ({0}): size is 0")]
    Empty(RegionInfo),
    /// `field` plus the size does not fit.
    #[error("memory region ({region}): {field} plus size overflows")]
    Overflow {
        /// The region that was to be added.
        region: RegionInfo,
        /// Which of its addresses.
        field: &'static str,
    },
    /// Two regions share guest addresses. (The frontend's own addresses may alias.)
    #[error("memory region ({new}) overlaps the region at ({old})")]
    Overlap {
        /// The region that was to be added.
        new: RegionInfo,
        /// The one that is there.
        old: RegionInfo,
    },
    /// The file ends before the region does. Touching the rest would be SIGBUS.
    #[error("memory region ({region}): its file has {found} bytes, the region needs {needed}")]
    FileTooShort {
        /// The region that was to be added.
        region: RegionInfo,
        /// Length of the file in bytes.
        found: u64,
        /// Offset plus size in bytes.
        needed: u64,
    },
    /// The fd is nothing that memory can be mapped from.
    #[error("memory region ({0}): its file descriptor is neither a file nor a DAX device")]
    NotMappable(RegionInfo),
    /// `fstat` failed.
    #[error("memory region ({region}): cannot inspect its file: {source}")]
    Inspect {
        /// The region that was to be added.
        region: RegionInfo,
        /// What `fstat` said.
        source: io::Error,
    },
    /// `mmap` failed.
    #[error("memory region ({region}): cannot map its file at offset {:#x}: {source}", region.file_offset)]
    Map {
        /// The region that was to be added.
        region: RegionInfo,
        /// What `mmap` said.
        source: MmapRegionError,
    },
    /// The regions make no table. What can be wrong was looked for before, so it is never seen.
    #[error("memory table: {0}")]
    Table(#[from] GuestRegionCollectionError),
    /// The mapping could not be guarded against SIGBUS.
    #[error(transparent)]
    Sigbus(#[from] SigbusError),
    /// It has to be written, and the frontend shares it for reading only.
    #[error(transparent)]
    NotWritable(#[from] NotWritable),
    /// The region to be removed is not there.
    #[error("no memory region ({0}) to remove")]
    NoSuchRegion(RegionInfo),
}

/// A range of guest addresses that is not wholly inside the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest address {address:#x}, {len} bytes: outside of the memory that the frontend shares")]
pub struct OutsideMemory {
    /// First byte of the range.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// Why a range of guest addresses cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotWritable {
    /// It is not wholly inside the memory.
    #[error(transparent)]
    Outside(#[from] OutsideMemory),
    /// Some of it is in a region that the frontend shares for reading only.
    #[error(
        "guest address {address:#x}, {len} bytes: in memory that the frontend shares for reading only"
    )]
    ReadOnly {
        /// First byte of the range.
        address: u64,
        /// Its length in bytes.
        len: u64,
    },
}

/// What became of a page of a mapped file that could not be touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The frontend has shortened the file.
    Shortened {
        /// The region that the file is behind.
        region: RegionInfo,
        /// Length of the file in bytes.
        found: u64,
    },
    /// The file is as long as it was.
    NoPage {
        /// The region that the file is behind.
        region: RegionInfo,
    },
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shortened { region, found } => write!(
                f,
                "the frontend has shortened the file of its memory region ({region}): it has \
                 {found} bytes, the region needs {}",
                region.file_offset.saturating_add(region.size)
            ),
            Self::NoPage { region } => write!(
                f,
                "the system has no page for the memory region ({region}), whose file is as long as \
                 it was: a tmpfs that is full, no free huge page, or broken memory; make room or \
                 have the frontend allocate its memory at the start (QEMU: prealloc=on)"
            ),
        }
    }
}

/// One mapped region. The fields drop in this order: the handler forgets the mapping before it
/// goes.
pub struct Region {
    info: RegionInfo,
    /// Host address of the region's first byte, inside `mapping`.
    host: *mut u8,
    /// None for memory that is no file (tests).
    registration: Option<Registration>,
    /// A store to it would be a fault: its file may only be read.
    read_only: bool,
    mapping: MmapRegion,
}

// SAFETY: `host` points into a mapping that the region owns; it is only handed out as a raw
// pointer, and the accesses made through it are the ones the module comment allows from any thread.
unsafe impl Send for Region {}
// SAFETY: as above; nothing in a region changes after it was made.
unsafe impl Sync for Region {}

/// What a lookup needs of a region, side by side for all of them.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    len: u64,
    host: *mut u8,
    read_only: bool,
}

/// A snapshot of guest memory.
pub struct Memory {
    /// Ordered by guest address, like `spans`; kept for their mappings.
    regions: GuestRegionCollection<Region>,
    spans: Box<[Span]>,
    /// Some of the spans are read-only. That is rare, and without any the spans need not be
    /// checked.
    has_read_only: bool,
}

// SAFETY: the pointers in `spans` point into the mappings of `regions`, which are Send and Sync for
// the same reason.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|region| region.info)).finish()
    }
}

impl Memory {
    /// A snapshot without any memory.
    pub(crate) fn empty() -> Self {
        Self::new(GuestRegionCollection::default())
    }

    /// A snapshot of exactly these regions, each mapped from its file (SET_MEM_TABLE).
    pub fn from_regions(
        regions: impl IntoIterator<Item = (RegionInfo, File)>,
    ) -> Result<Self, MemoryError> {
        regions
            .into_iter()
            .try_fold(Self::empty(), |memory, (info, file)| memory.with_region(info, file))
    }

    /// Not the guest's memory but `len` bytes of `file` at `file_offset`, which the frontend shares
    /// as well (the in-flight area, the dirty log). Addresses count from their first byte, and all
    /// of them can be written.
    pub(crate) fn of_file(file: File, file_offset: u64, len: u64) -> Result<Self, MemoryError> {
        let region = RegionInfo { guest_address: 0, size: len, vmm_address: 0, file_offset };
        let memory = Self::empty().with_region(region, file)?;
        memory.check_writable(GuestAddress(0), len)?;
        Ok(memory)
    }

    /// This snapshot and one more region (ADD_MEM_REG). What is mapped already stays where it is.
    pub(crate) fn with_region(&self, info: RegionInfo, file: File) -> Result<Self, MemoryError> {
        self.check(info)?;
        self.insert(Region::map(info, file)?)
    }

    /// This snapshot without the region of this guest address, size and frontend address
    /// (REM_MEM_REG; the offset is not compared, since frontends leave it out).
    pub(crate) fn without_region(&self, info: RegionInfo) -> Result<Self, MemoryError> {
        let RegionInfo { guest_address, size, vmm_address, .. } = info;
        let removed = self.regions.remove_region(GuestAddress(guest_address), size).ok();
        let (regions, _) = removed
            .filter(|(_, region)| region.info.vmm_address == vmm_address)
            .ok_or(MemoryError::NoSuchRegion(info))?;
        Ok(Self::new(regions))
    }

    /// The regions, ordered by guest address.
    pub(crate) fn regions(&self) -> impl Iterator<Item = RegionInfo> + '_ {
        self.regions.iter().map(|region| region.info)
    }

    /// The regions and their files.
    pub(crate) fn files(&self) -> impl Iterator<Item = (RegionInfo, &File)> + '_ {
        self.regions
            .iter()
            .filter_map(|region| Some((region.info, region.mapping.file_offset()?.file())))
    }

    /// Whether a page of this memory was lost, as [`Memory::loss`] says: nothing read from it since
    /// then may be trusted, and the session must end.
    #[inline]
    pub(crate) fn poisoned(&self) -> bool {
        self.regions
            .iter()
            .any(|region| region.registration.as_ref().is_some_and(Registration::poisoned))
    }

    /// What became of the page, if this memory is [`Memory::poisoned`].
    pub(crate) fn loss(&self) -> Option<Loss> {
        let lost =
            |region: &&Region| region.registration.as_ref().is_some_and(Registration::poisoned);
        self.regions.iter().find(lost).map(|region| region.loss())
    }

    /// Where an address of the frontend's own address space is in the guest's (SET_VRING_ADDR).
    pub(crate) fn vmm_va_to_gpa(&self, vmm_address: u64) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let offset = vmm_address.checked_sub(region.info.vmm_address)?;
            (offset < region.info.size).then(|| GuestAddress(region.info.guest_address + offset))
        })
    }

    /// Gives `each` the host memory behind `len` bytes at `address`, piece by piece in order: one
    /// piece for each region that the range touches, none if it is empty. On an error some pieces
    /// may have been given already.
    ///
    /// The pointers are good for as long as this snapshot lives.
    #[inline]
    pub(crate) fn host_ranges(
        &self,
        address: GuestAddress,
        len: u64,
        each: &mut impl FnMut(*mut u8, usize),
    ) -> Result<(), OutsideMemory> {
        let outside = OutsideMemory { address: address.0, len };
        let (mut at, mut left) = (address.0, len);
        while left > 0 {
            let (host, available) = self.lookup(at).ok_or(outside)?;
            let piece = left.min(available);
            // A piece lies inside a mapping, so it fits.
            each(host, usize::try_from(piece).map_err(|_| outside)?);
            left -= piece;
            // No overflow: regions end below 2^63.
            at += piece;
        }
        Ok(())
    }

    /// Whether `len` bytes at `address` may be written, as far as they are inside at all.
    ///
    /// # Errors
    /// [`NotWritable::ReadOnly`]
    #[inline]
    pub(crate) fn check_writable(
        &self,
        address: GuestAddress,
        len: u64,
    ) -> Result<(), NotWritable> {
        if self.has_read_only { self.look_for_read_only(address.0, len) } else { Ok(()) }
    }

    #[cold]
    fn look_for_read_only(&self, address: u64, len: u64) -> Result<(), NotWritable> {
        let end = address.saturating_add(len);
        let touched = |span: &Span| span.start < end && address < span.start + span.len;
        if self.spans.iter().any(|span| span.read_only && touched(span)) {
            return Err(NotWritable::ReadOnly { address, len });
        }
        Ok(())
    }

    /// The host memory behind `len` bytes at `address`, if one region holds them all. It may be
    /// such that can only be read.
    #[inline]
    pub(crate) fn contiguous(&self, address: GuestAddress, len: u64) -> Option<*const u8> {
        let (host, available) = self.lookup(address.0)?;
        (len <= available).then_some(host.cast_const())
    }

    /// The same, to be written.
    #[inline]
    pub(crate) fn contiguous_mut(&self, address: GuestAddress, len: u64) -> Option<*mut u8> {
        self.check_writable(address, len).ok()?;
        let (host, available) = self.lookup(address.0)?;
        (len <= available).then_some(host)
    }

    /// Copies guest memory at `address` into `to`, reading each byte once.
    #[inline]
    pub fn read(&self, address: GuestAddress, to: &mut [u8]) -> Result<(), OutsideMemory> {
        let mut rest = &mut *to;
        let len = rest.len() as u64;
        self.host_ranges(address, len, &mut |host, len| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
            // SAFETY: host_ranges gives memory inside a mapping that `self` keeps.
            unsafe { volatile_read(host, now) };
            rest = later;
        })
    }

    /// Copies `from` into guest memory at `address`. All or nothing: a range that cannot be written
    /// as a whole stays untouched.
    ///
    /// All that the processor, not the kernel, writes into buffers goes through this and
    /// `Memory::write_host`.
    #[inline]
    pub fn write(&self, address: GuestAddress, from: &[u8]) -> Result<(), NotWritable> {
        let len = from.len() as u64;
        self.check_writable(address, len)?;
        if self.contiguous(address, len).is_none() {
            self.host_ranges(address, len, &mut |_, _| ())?;
        }
        let mut rest = from;
        self.host_ranges(address, len, &mut |host, len| {
            let (now, later) = rest.split_at(len);
            // SAFETY: as in `read`; it may be written, as was checked.
            unsafe { volatile_write(host, now) };
            rest = later;
        })?;
        Ok(())
    }

    /// Copies `from` to host memory that came from [`Memory::host_ranges`] of this snapshot. False,
    /// and nothing is written, if it is not inside it or may only be read.
    pub(crate) fn write_host(&self, host: *mut u8, from: &[u8]) -> bool {
        let place = self.inside(host, from.len());
        if let Some(place) = place {
            // SAFETY: as many bytes are left of the region, whose mapping `self` keeps.
            unsafe { volatile_write(place, from) };
        }
        place.is_some()
    }

    /// Fills `len` bytes of host memory that came from [`Memory::host_ranges`] of this snapshot
    /// with zeros. False, and nothing is written, if they are not inside it or may only be read.
    pub(crate) fn zero_host(&self, host: *mut u8, len: usize) -> bool {
        let place = self.inside(host, len);
        if let Some(place) = place {
            // SAFETY: as in `write_host`. Not volatile, as it may be long and its order is of no
            // concern.
            unsafe { place.write_bytes(0, len) };
        }
        place.is_some()
    }

    /// Copies `len` bytes from `from` to host memory that came from [`Memory::host_ranges`] of this
    /// snapshot. False, and nothing is written, if they are not inside it or may only be read.
    ///
    /// # Safety
    /// `from` is valid for reads of `len` bytes and lies outside of guest memory. Others may write
    /// the bytes meanwhile.
    #[inline]
    pub(crate) unsafe fn copy_to_host(&self, host: *mut u8, from: *const u8, len: usize) -> bool {
        let place = self.inside(host, len);
        if let Some(place) = place {
            // SAFETY: as in `zero_host`, and the caller's promise.
            unsafe { place.copy_from_nonoverlapping(from, len) };
        }
        place.is_some()
    }

    /// The place `host` again, if `len` bytes from there lie inside one region that may be written.
    fn inside(&self, host: *mut u8, len: usize) -> Option<*mut u8> {
        self.spans.iter().filter(|span| !span.read_only).find_map(|span| {
            let offset = host.addr().checked_sub(span.host.addr())?;
            let left = span.len.checked_sub(offset as u64)?;
            // SAFETY: the offset is inside the region's mapping.
            (len as u64 <= left).then(|| unsafe { span.host.add(offset) })
        })
    }

    /// Host address of a guest address, and how many bytes of its region follow there.
    #[inline]
    fn lookup(&self, address: u64) -> Option<(*mut u8, u64)> {
        let after = self.spans.partition_point(|span| span.start <= address);
        let span = self.spans.get(after.checked_sub(1)?)?;
        let offset = address - span.start;
        if offset >= span.len {
            return None;
        }
        // SAFETY: the offset is inside the region, whose mapping is `len` bytes long from `host`
        // on.
        let host = unsafe { span.host.add(usize::try_from(offset).ok()?) };
        Some((host, span.len - offset))
    }

    /// Whether a region can join this snapshot.
    fn check(&self, new: RegionInfo) -> Result<(), MemoryError> {
        if new.size == 0 {
            return Err(MemoryError::Empty(new));
        }
        if self.regions.num_regions() >= REGIONS_MAX {
            return Err(MemoryError::TooManyRegions);
        }
        let fields = [
            ("guest address", new.guest_address),
            ("frontend address", new.vmm_address),
            ("file offset", new.file_offset),
        ];
        for (field, start) in fields {
            // Half of the address space is room enough, and leaves every later sum without
            // overflow.
            if start.checked_add(new.size).is_none_or(|end| i64::try_from(end).is_err()) {
                return Err(MemoryError::Overflow { region: new, field });
            }
        }
        for old in self.regions() {
            let (start, end) = (new.guest_address, new.guest_address + new.size);
            if start < old.guest_address + old.size && old.guest_address < end {
                return Err(MemoryError::Overlap { new, old });
            }
        }
        Ok(())
    }

    fn insert(&self, region: Region) -> Result<Self, MemoryError> {
        Ok(Self::new(self.regions.insert_region(Arc::new(region))?))
    }

    fn new(regions: GuestRegionCollection<Region>) -> Self {
        let span = |region: &Region| Span {
            start: region.info.guest_address,
            len: region.info.size,
            host: region.host,
            read_only: region.read_only,
        };
        let spans = regions.iter().map(span).collect();
        let has_read_only = regions.iter().any(|region| region.read_only);
        Self { regions, spans, has_read_only }
    }

    /// Zeroed memory of this process only, for tests: no file, and so it runs under miri.
    #[cfg(test)]
    pub(crate) fn anonymous(ranges: &[(u64, usize)]) -> Self {
        ranges.iter().fold(Self::empty(), |memory, &(guest_address, len)| {
            let size = len as u64;
            let info = RegionInfo {
                guest_address,
                size,
                vmm_address: 1 << 40 | guest_address,
                file_offset: 0,
            };
            memory.check(info).unwrap();
            let mapping = MmapRegion::new(len).unwrap();
            let host = mapping.as_ptr();
            let region = Region { info, host, registration: None, read_only: false, mapping };
            memory.insert(region).unwrap()
        })
    }
}

impl Memory {
    /// Whether memory that may only be read is not asked for to be written.
    fn allows(&self, address: GuestAddress, len: usize, access: Permissions) -> bool {
        let writes = matches!(access, Permissions::Write | Permissions::ReadWrite);
        !writes || self.check_writable(address, len as u64).is_ok()
    }
}

/// For the `virtio-queue` crate, which looks at rings while they are set up; requests take the way
/// of `Memory::host_ranges`.
impl GuestMemory for Memory {
    type PhysicalMemory = GuestRegionCollection<Region>;
    type Bitmap = ();

    fn check_range(&self, address: GuestAddress, len: usize, access: Permissions) -> bool {
        let inside = self.host_ranges(address, len as u64, &mut |_, _| ()).is_ok();
        inside && self.allows(address, len, access)
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> AccessResult<impl GuestMemorySliceIterator<'a, ()>> {
        if !self.allows(address, len, access) {
            return Err(AccessError::InvalidGuestAddress(address));
        }
        Ok(GuestMemoryBackend::get_slices(&self.regions, address, len))
    }

    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        Some(&self.regions)
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> u64 {
        self.info.size
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.info.guest_address)
    }

    fn bitmap(&self) {}

    /// The mapping may begin before the region and end behind it, in whole pages.
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        len: usize,
    ) -> AccessResult<VolatileSlice<'_, ()>> {
        let end = offset.0.checked_add(len as u64);
        if end.is_none_or(|end| end > self.info.size) {
            return Err(AccessError::InvalidBackendAddress);
        }
        let skipped = self.host.addr() - self.mapping.as_ptr().addr();
        let offset = usize::try_from(offset.0).map_err(|_| AccessError::InvalidBackendAddress)?;
        Ok(self.mapping.get_slice(skipped + offset, len)?)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// A core dump of the daemon must not hold what its guest has in memory. It would by default: the
/// kernel dumps shared mappings of files without a name, as a memfd is.
fn leave_out_of_core_dumps(mapping: &MmapRegion) {
    // SAFETY: the range is a mapping of this process; the advice changes only what a dump holds.
    let result =
        unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_DONTDUMP) };
    if result != 0 {
        // Kernels know it since 3.4.
        log::debug!("guest memory stays in core dumps: {}", io::Error::last_os_error());
    }
}

impl Region {
    /// Maps a checked region from its file; for reading only if the file cannot be written.
    fn map(info: RegionInfo, file: File) -> Result<Self, MemoryError> {
        let page = Self::page_size(info, &file)?;
        // mmap wants the offset, and munmap of huge pages the length as well, in whole pages.
        let skipped = info.file_offset % page;
        let start = info.file_offset - skipped;
        let len = (skipped + info.size).next_multiple_of(page);
        let too_large = |_| MemoryError::Overflow { region: info, field: "file offset" };
        let len = usize::try_from(len).map_err(too_large)?;
        let file = Arc::new(file);
        let map = |protection| {
            MmapRegionBuilder::new(len)
                .with_mmap_prot(protection)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&file), start))
                .build()
        };
        let (mapping, read_only) = match map(libc::PROT_READ | libc::PROT_WRITE) {
            Err(e) if may_only_be_read(&e) => (map(libc::PROT_READ), true),
            mapping => (mapping, false),
        };
        let mapping = mapping.map_err(|source| MemoryError::Map { region: info, source })?;
        leave_out_of_core_dumps(&mapping);
        let page = usize::try_from(page).map_err(too_large)?;
        // SAFETY: the mapping is a file's, whole pages long, made here, and outlives the
        // registration by the order of the fields; what guest memory holds is never relied on.
        let registration = unsafe { Registration::new(mapping.as_ptr(), len, page)? };
        let skipped = usize::try_from(skipped).map_err(too_large)?;
        // SAFETY: less than the mapping's length.
        let host = unsafe { mapping.as_ptr().add(skipped) };
        Ok(Self { info, host, registration: Some(registration), read_only, mapping })
    }

    /// Why a page was lost, by the length of the file.
    fn loss(&self) -> Loss {
        let region = self.info;
        let file = self.mapping.file_offset().map(FileOffset::file);
        let needed = region.file_offset + region.size;
        match file.and_then(|file| file.metadata().ok()) {
            // Not of a character device (DAX), which has no length.
            Some(metadata) if metadata.is_file() && metadata.len() < needed => {
                Loss::Shortened { region, found: metadata.len() }
            }
            _ => Loss::NoPage { region },
        }
    }

    /// The size of the file's pages, after the check that it is long enough for the region.
    fn page_size(info: RegionInfo, file: &File) -> Result<u64, MemoryError> {
        let metadata =
            file.metadata().map_err(|source| MemoryError::Inspect { region: info, source })?;
        let kind = metadata.file_type();
        // A character device (DAX) has no length to compare with.
        if !kind.is_file() && !kind.is_char_device() {
            return Err(MemoryError::NotMappable(info));
        }
        let needed = info.file_offset + info.size;
        if kind.is_file() && metadata.len() < needed {
            return Err(MemoryError::FileTooShort { region: info, found: metadata.len(), needed });
        }
        let system = fstatfs(file)
            .map_err(|errno| MemoryError::Inspect { region: info, source: errno.into() })?;
        if system.filesystem_type() == HUGETLBFS_MAGIC {
            return Ok(u64::try_from(system.block_size()).unwrap_or(PAGE_SIZE));
        }
        if kind.is_char_device() {
            let size = Dax::of(file.as_fd()).and_then(|dax| dax.page_size());
            return size.ok_or(MemoryError::NotMappable(info));
        }
        Ok(PAGE_SIZE)
    }
}

/// Whether it was the right to write that was missing: a descriptor that may only be read, or a
/// file that is sealed.
fn may_only_be_read(error: &MmapRegionError) -> bool {
    match error {
        MmapRegionError::Mmap(e) => matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM)),
        _ => false,
    }
}

/// Eight bytes at any alignment.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned(u64);

/// Reads a little-endian number at any alignment, each byte once.
///
/// # Safety
/// `from` must be valid for eight bytes of volatile reads.
#[inline]
pub(crate) unsafe fn volatile_read_u64(from: *const u8) -> u64 {
    // SAFETY: the caller's promise; the type has alignment 1.
    u64::from_le(unsafe { from.cast::<Unaligned>().read_volatile() }.0)
}

/// Fills `to` from memory that others may write, reading each byte once.
///
/// # Safety
/// `from` must be valid for `to.len()` bytes of volatile reads.
// Inlined it makes the walk over a chain so large that that is not: 43 against 33 ns for a request.
#[inline(never)]
pub(crate) unsafe fn volatile_read(from: *const u8, to: &mut [u8]) {
    let (words, bytes) = to.as_chunks_mut();
    let tail = words.len() * 8;
    for (index, word) in words.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *word = unsafe { volatile_read_u64(from.add(8 * index)) }.to_le_bytes();
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *byte = unsafe { from.add(tail + index).read_volatile() };
    }
}

/// Writes `from` into memory that others may read.
///
/// # Safety
/// `to` must be valid for `from.len()` bytes of volatile writes.
unsafe fn volatile_write(to: *mut u8, from: &[u8]) {
    for (offset, &byte) in from.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { to.add(offset).write_volatile(byte) };
    }
}

#[cfg(test)]
mod tests;
