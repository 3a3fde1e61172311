//! The page cache that holds a live bitmap (`docs/spec/format-native.md` section 6).

use uuid::Uuid;
use zerocopy::FromZeros;

use super::native_raw::{RawCacheWitness, cache_witness};

/// The host's boot, as `/proc/sys/kernel/random/boot_id` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(Uuid);

impl BootId {
    /// From that file's text; `None` if it is no UUID or the nil one.
    pub fn parse(text: &str) -> Option<Self> {
        Uuid::try_parse(text.trim()).ok().and_then(Self::new)
    }

    /// `None` for the nil UUID, which stands for no boot.
    pub fn new(uuid: Uuid) -> Option<Self> {
        (!uuid.is_nil()).then_some(Self(uuid))
    }

    /// The bytes, in the order of the text form.
    pub(super) fn to_bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }
}

/// Identifies one lifetime of a file system's page cache within a boot. Equal witnesses are the
/// same lifetime; different ones prove nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheWitness {
    /// The file system is memory (tmpfs, ramfs): a file that is there has never lost anything.
    Memory,
    /// The inode number of the superblock's directory in `/sys/fs`: each mount of the superblock
    /// gets another.
    Superblock(u64),
    /// The unique id of a mount (statx, STATX_MNT_ID_UNIQUE). Another mount can be of the same
    /// superblock.
    Mount(u64),
}

impl CacheWitness {
    /// `None` if the bytes hold no witness, or one of an unknown kind.
    pub fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        let raw: RawCacheWitness = zerocopy::transmute!(bytes);
        let id = raw.id.get();
        match raw.kind.get() {
            cache_witness::MEMORY => Some(CacheWitness::Memory),
            cache_witness::SUPERBLOCK => Some(CacheWitness::Superblock(id)),
            cache_witness::MOUNT => Some(CacheWitness::Mount(id)),
            _ => None,
        }
    }

    /// As stored in headers.
    pub fn to_bytes(self) -> [u8; 16] {
        zerocopy::transmute!(self.to_raw())
    }

    fn to_raw(self) -> RawCacheWitness {
        let mut raw = RawCacheWitness::new_zeroed();
        let (kind, id) = match self {
            CacheWitness::Memory => (cache_witness::MEMORY, 0),
            CacheWitness::Superblock(id) => (cache_witness::SUPERBLOCK, id),
            CacheWitness::Mount(id) => (cache_witness::MOUNT, id),
        };
        (raw.kind, raw.id) = (kind.into(), id.into());
        raw
    }
}

/// The page cache that holds a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCache {
    /// The boot; no page cache outlives it.
    pub boot: BootId,
    /// The lifetime within the boot, if it can be determined.
    pub witness: Option<CacheWitness>,
}

impl PageCache {
    /// Whether the two are certainly the same.
    pub fn is(&self, other: &PageCache) -> bool {
        self.witness.is_some() && self == other
    }
}
