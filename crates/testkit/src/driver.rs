//! The driver's end of a split ring (virtio 1.3, 2.7), in any guest memory. It writes what a test
//! asks for, valid or not.

use crate::descriptor::{DESC_LEN, Desc, table};

/// Guest memory as a driver reads and writes it: by guest address. An address outside is a mistake
/// of the test, and panics.
pub trait GuestMemory {
    /// Writes all of `bytes`.
    fn write_guest(&self, address: u64, bytes: &[u8]);

    /// Fills `bytes`.
    fn read_guest(&self, address: u64, bytes: &mut [u8]);
}

fn read_u16(memory: &impl GuestMemory, address: u64) -> u16 {
    let mut bytes = [0; 2];
    memory.read_guest(address, &mut bytes);
    u16::from_le_bytes(bytes)
}

/// Where the parts of a ring are: guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Number of entries.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring: flags, idx, 2 bytes an entry, used_event.
    pub avail: u64,
    /// Used ring: flags, idx, 8 bytes an entry, avail_event.
    pub used: u64,
}

impl Layout {
    /// Bytes of the descriptor table.
    pub fn desc_len(size: u16) -> u64 {
        DESC_LEN * u64::from(size)
    }

    /// Bytes of the available ring.
    pub fn avail_len(size: u16) -> u64 {
        6 + 2 * u64::from(size)
    }

    /// Bytes of the used ring.
    pub fn used_len(size: u16) -> u64 {
        6 + 8 * u64::from(size)
    }

    /// Address of a descriptor.
    pub fn desc_at(&self, index: u16) -> u64 {
        self.desc + DESC_LEN * u64::from(index)
    }

    /// Address of `avail.flags`.
    pub fn avail_flags(&self) -> u64 {
        self.avail
    }

    /// Address of `avail.idx`.
    pub fn avail_idx(&self) -> u64 {
        self.avail + 2
    }

    /// Address of the available entry that is written when `avail.idx` is `index`.
    pub fn avail_entry(&self, index: u16) -> u64 {
        self.avail + 4 + 2 * u64::from(index % self.size)
    }

    /// Address of `used_event`.
    pub fn used_event(&self) -> u64 {
        self.avail + 4 + 2 * u64::from(self.size)
    }

    /// Address of `used.flags`.
    pub fn used_flags(&self) -> u64 {
        self.used
    }

    /// Address of `used.idx`.
    pub fn used_idx(&self) -> u64 {
        self.used + 2
    }

    /// Address of the used element that is written when `used.idx` is `index`.
    pub fn used_entry(&self, index: u16) -> u64 {
        self.used + 4 + 8 * u64::from(index % self.size)
    }

    /// Address of `avail_event`.
    pub fn avail_event(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }
}

/// A driver of one ring. It remembers only what it made available last.
#[derive(Clone, Copy, Debug)]
pub struct Driver {
    /// Where its ring is.
    pub layout: Layout,
    /// `avail.idx` as it was last written.
    pub avail_idx: u16,
}

impl Driver {
    /// For a ring in which nothing is available and all indices are `start`. It writes nothing yet.
    pub fn new(layout: Layout, start: u16) -> Self {
        Driver { layout, avail_idx: start }
    }

    /// Writes a descriptor.
    pub fn set_desc(&self, memory: &impl GuestMemory, index: u16, desc: Desc) {
        memory.write_guest(self.layout.desc_at(index), &desc.bytes());
    }

    /// Writes descriptors from slot `first` on.
    pub fn set_descs(&self, memory: &impl GuestMemory, first: u16, descs: &[Desc]) {
        memory.write_guest(self.layout.desc_at(first), &table(descs));
    }

    /// Makes heads available, all at once.
    pub fn offer(&mut self, memory: &impl GuestMemory, heads: &[u16]) {
        let mut index = self.avail_idx;
        for head in heads {
            memory.write_guest(self.layout.avail_entry(index), &head.to_le_bytes());
            index = index.wrapping_add(1);
        }
        self.set_avail_idx(memory, index);
    }

    /// Writes `avail.idx`.
    pub fn set_avail_idx(&mut self, memory: &impl GuestMemory, index: u16) {
        self.avail_idx = index;
        memory.write_guest(self.layout.avail_idx(), &index.to_le_bytes());
    }

    /// Writes `avail.flags`.
    pub fn set_avail_flags(&self, memory: &impl GuestMemory, flags: u16) {
        memory.write_guest(self.layout.avail_flags(), &flags.to_le_bytes());
    }

    /// Writes `used_event`.
    pub fn set_used_event(&self, memory: &impl GuestMemory, event: u16) {
        memory.write_guest(self.layout.used_event(), &event.to_le_bytes());
    }

    /// `used.flags`
    pub fn used_flags(&self, memory: &impl GuestMemory) -> u16 {
        read_u16(memory, self.layout.used_flags())
    }

    /// `used.idx`
    pub fn used_idx(&self, memory: &impl GuestMemory) -> u16 {
        read_u16(memory, self.layout.used_idx())
    }

    /// The used element that was written when `used.idx` was `index`: id and length.
    pub fn used(&self, memory: &impl GuestMemory, index: u16) -> (u32, u32) {
        let mut bytes = [0; 8];
        memory.read_guest(self.layout.used_entry(index), &mut bytes);
        let [a, b, c, d, e, f, g, h] = bytes;
        (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
    }

    /// `avail_event`
    pub fn avail_event(&self, memory: &impl GuestMemory) -> u16 {
        read_u16(memory, self.layout.avail_event())
    }

    /// Heads that are available and not answered.
    pub fn in_flight(&self, memory: &impl GuestMemory) -> u16 {
        self.avail_idx.wrapping_sub(self.used_idx(memory))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::descriptor::{NEXT, WRITE, linked};

    /// Memory from address 0 on.
    struct Bytes(RefCell<Vec<u8>>);

    impl GuestMemory for Bytes {
        fn write_guest(&self, address: u64, bytes: &[u8]) {
            let at = usize::try_from(address).unwrap();
            self.0.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn read_guest(&self, address: u64, bytes: &mut [u8]) {
            let at = usize::try_from(address).unwrap();
            bytes.copy_from_slice(&self.0.borrow()[at..at + bytes.len()]);
        }
    }

    /// The bytes of virtio 1.3, 2.7.5, 2.7.6 and 2.7.8, written out.
    #[test]
    fn a_ring_in_memory() {
        let memory = Bytes(RefCell::new(vec![0; 88]));
        let layout = Layout { size: 2, desc: 0, avail: 32, used: 44 };
        assert_eq!((Layout::desc_len(2), Layout::avail_len(2), Layout::used_len(2)), (32, 10, 22));
        let mut driver = Driver::new(layout, 65535);
        let buffers = [Desc::buffer(0x1122, 0x33, false), Desc::buffer(0x44, 0x5566, true)];
        let chain = linked(0, buffers);
        driver.set_descs(&memory, 0, &chain);
        driver.set_avail_flags(&memory, 1);
        driver.set_used_event(&memory, 0x0708);
        driver.offer(&memory, &[0, 1]);
        let (desc, rest) = (&memory.0.borrow()[..32].to_vec(), memory.0.borrow()[32..42].to_vec());
        assert_eq!(desc[..16], [0x22, 0x11, 0, 0, 0, 0, 0, 0, 0x33, 0, 0, 0, 1, 0, 1, 0]);
        assert_eq!(desc[16..], [0x44, 0, 0, 0, 0, 0, 0, 0, 0x66, 0x55, 0, 0, 2, 0, 2, 0]);
        assert_eq!((chain[0].flags, chain[1].flags), (NEXT, WRITE));
        // flags, idx, the entries of 0 and of 65535, used_event.
        assert_eq!(rest, [1, 0, 1, 0, 1, 0, 0, 0, 8, 7]);
        assert_eq!(driver.in_flight(&memory), 1);

        let used = [1, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0, 0, 0x0b, 1, 0, 0];
        memory.write_guest(44, &[&[5, 0, 1, 0], used.as_slice(), &[0x0d, 0x0c]].concat());
        assert_eq!((driver.used_flags(&memory), driver.used_idx(&memory)), (5, 1));
        assert_eq!((driver.used(&memory, 0), driver.used(&memory, 65535)), ((1, 9), (2, 0x10b)));
        assert_eq!((driver.avail_event(&memory), driver.in_flight(&memory)), (0x0c0d, 0));
    }
}
