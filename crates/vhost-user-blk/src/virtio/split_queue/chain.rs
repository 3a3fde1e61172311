//! The descriptor chain of a request (virtio 1.3, 2.7.5), direct or indirect: each descriptor is
//! copied once, and only the copy is looked at.

use virtio_queue::desc::split::Descriptor as RawDescriptor;

use crate::guest_memory::memory::{GuestAddress, Memory, OutsideMemory, volatile_read_u64};
use crate::virtio::device_queue::{CHAIN_DESCRIPTORS_MAX, ChainError, Descriptor};

/// Bytes of a descriptor in its table.
pub(super) const DESCRIPTOR_SIZE: u32 = 16;
const _: () = assert!(size_of::<RawDescriptor>() == DESCRIPTOR_SIZE as usize);

/// A table of descriptors.
#[derive(Clone, Copy, Debug)]
enum Table {
    /// All of it inside one mapping.
    Host(*const u8),
    /// An indirect table that goes over the border of two regions.
    Guest(GuestAddress),
}

/// Walks the descriptors of a request, copying each once. Ends after the last one or after an
/// error.
#[derive(Debug)]
pub(crate) struct Chain<'a> {
    memory: &'a Memory,
    table: Table,
    /// Entries of `table`.
    len: u32,
    next: Option<u16>,
    /// Descriptors that may still come, direct and indirect ones together. What ends a loop.
    left: u16,
    indirect: bool,
}

impl Iterator for Chain<'_> {
    type Item = Result<Descriptor, ChainError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next.take()?;
        Some(self.step(index))
    }
}

impl<'a> Chain<'a> {
    /// The chain that begins with descriptor `head` of a table of `len`.
    ///
    /// # Safety
    /// All of the table is inside of a mapping that `memory` keeps.
    #[inline]
    pub(super) unsafe fn new(memory: &'a Memory, table: *const u8, len: u16, head: u16) -> Self {
        Self {
            memory,
            table: Table::Host(table),
            len: len.into(),
            next: Some(head),
            left: CHAIN_DESCRIPTORS_MAX,
            indirect: false,
        }
    }
}

impl Chain<'_> {
    /// Descriptor `index`, or the first one of the indirect table it refers to.
    #[inline]
    fn step(&mut self, index: u16) -> Result<Descriptor, ChainError> {
        let mut raw = self.read(index)?;
        if raw.refers_to_indirect_table() {
            self.enter(&raw)?;
            raw = self.read(0)?;
            if raw.refers_to_indirect_table() {
                return Err(ChainError::NestedIndirect);
            }
        }
        self.next = raw.has_next().then_some(raw.next());
        Ok(Descriptor { address: raw.addr(), len: raw.len(), writable: raw.is_write_only() })
    }

    /// Goes over to the indirect table that `raw` refers to. Its WRITE flag says nothing
    /// (2.7.5.3.2).
    fn enter(&mut self, raw: &RawDescriptor) -> Result<(), ChainError> {
        if self.indirect {
            return Err(ChainError::NestedIndirect);
        }
        if raw.has_next() {
            return Err(ChainError::IndirectNext);
        }
        let (start, len) = (raw.addr(), raw.len());
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(ChainError::IndirectLength { len });
        }
        let host = self.memory.contiguous(start, u64::from(len));
        self.table = host.map_or(Table::Guest(start), Table::Host);
        self.len = len / DESCRIPTOR_SIZE;
        self.indirect = true;
        Ok(())
    }

    /// Copies descriptor `index` of the table.
    #[inline]
    fn read(&mut self, index: u16) -> Result<RawDescriptor, ChainError> {
        if u32::from(index) >= self.len {
            return Err(ChainError::Next { next: index, len: self.len });
        }
        self.left = self.left.checked_sub(1).ok_or(ChainError::TooLong)?;
        let offset = u32::from(index) * DESCRIPTOR_SIZE;
        let words = match self.table {
            // SAFETY: the table has `len` entries of 16 bytes inside a mapping of `memory`.
            Table::Host(host) => unsafe {
                let at = host.add(offset as usize);
                [volatile_read_u64(at), volatile_read_u64(at.add(8))]
            },
            Table::Guest(start) => {
                let len = u64::from(self.len * DESCRIPTOR_SIZE);
                let outside = OutsideMemory { address: start.0, len };
                let address = start.0.checked_add(u64::from(offset)).map(GuestAddress);
                let mut words = [[0; 8]; 2];
                address
                    .ok_or(outside)
                    .and_then(|address| self.memory.read(address, words.as_flattened_mut()))
                    .map_err(ChainError::IndirectOutside)?;
                words.map(u64::from_le_bytes)
            }
        };
        Ok(descriptor(words))
    }
}

/// A descriptor out of its two words. (The crate's own way is through a copy of its bytes in
/// memory.)
#[inline]
fn descriptor([address, rest]: [u64; 2]) -> RawDescriptor {
    let [l0, l1, l2, l3, f0, f1, n0, n1] = rest.to_le_bytes();
    RawDescriptor::new(
        address,
        u32::from_le_bytes([l0, l1, l2, l3]),
        u16::from_le_bytes([f0, f1]),
        u16::from_le_bytes([n0, n1]),
    )
}
