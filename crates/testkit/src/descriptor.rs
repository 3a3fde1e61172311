//! Descriptors of a split ring (virtio 1.3, 2.7.5).

/// `VIRTQ_DESC_F_NEXT`: the chain continues at `next`.
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes the buffer.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Bytes of a descriptor.
pub const DESC_LEN: u64 = 16;

/// A descriptor as the guest writes it, valid or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// Guest address of the buffer.
    pub address: u64,
    /// Bytes of the buffer.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Where the chain continues.
    pub next: u16,
}

impl Desc {
    /// A buffer on its own.
    pub fn buffer(address: u64, len: u32, writable: bool) -> Self {
        Desc { address, len, flags: if writable { WRITE } else { 0 }, next: 0 }
    }

    /// The table of `count` descriptors at `address`.
    pub fn indirect(address: u64, count: usize) -> Self {
        let len = u32::try_from(DESC_LEN * count as u64).unwrap();
        Desc { address, len, flags: INDIRECT, next: 0 }
    }

    /// The bytes in guest memory.
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A chain in the slots from `first` on, one after the other: each but the last leads to the next.
pub fn linked(first: u16, descs: impl IntoIterator<Item = Desc>) -> Vec<Desc> {
    let link = |(next, desc): (u16, Desc)| Desc { flags: desc.flags | NEXT, next, ..desc };
    let mut chain: Vec<Desc> = (first + 1..).zip(descs).map(link).collect();
    if let Some(last) = chain.last_mut() {
        last.flags &= !NEXT;
    }
    chain
}

/// Descriptors one after the other, as they are in a table.
pub fn table(descs: &[Desc]) -> Vec<u8> {
    descs.iter().flat_map(Desc::bytes).collect()
}
