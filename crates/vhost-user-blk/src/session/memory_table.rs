//! SET_MEM_TABLE with room for more regions than it holds.
//!
//! User Mode Linux sends room for two regions even if it has only one (Linux 6.1,
//! `vhost_user_set_mem_table`). The `vhost` crate treats such a message as malformed.

use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES};
use zerocopy::native_endian::U32;
use zerocopy::{FromBytes, IntoBytes, KnownLayout, Unaligned};

use crate::session::message::{Header, Message};

/// The header, and the beginning of "Multiple Memory regions description".
#[derive(FromBytes, IntoBytes, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    header: Header,
    num_regions: U32,
    padding: U32,
}
const _: () = assert!(size_of::<Head>() == 20);

/// Bytes of a "Memory region description".
const REGION_LEN: usize = 32;

/// Cuts off the spare room of a memory table. Any other message stays as it is.
pub fn trim(message: &mut Message) {
    let Ok((head, regions)) = Head::mut_from_prefix(&mut message.bytes) else { return };
    let count = head.num_regions.get() as usize;
    let used = count.saturating_mul(REGION_LEN);
    if !head.header.is(FrontendReq::SET_MEM_TABLE)
        || !(1..=MAX_ATTACHED_FD_ENTRIES).contains(&count)
        || used >= regions.len()
    {
        return;
    }
    head.header.set_size(size_of::<Head>() - size_of::<Header>() + used);
    message.bytes.truncate(size_of::<Head>() + used);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A memory table as it is on the wire: `count` in its head, then these words.
    fn table(request: FrontendReq, count: u32, words: &[u64]) -> Vec<u8> {
        let size = u32::try_from(8 + 8 * words.len()).unwrap();
        let head = [u32::from(request), 1, size, count, 0];
        let mut bytes: Vec<u8> = head.iter().flat_map(|field| field.to_ne_bytes()).collect();
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    fn trimmed(bytes: Vec<u8>) -> Vec<u8> {
        let mut message = Message { bytes, fds: Vec::new() };
        trim(&mut message);
        message.bytes
    }

    const WORDS: [u64; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0];

    #[test]
    fn room_for_another_region_is_cut_off() {
        let request = FrontendReq::SET_MEM_TABLE;
        for (count, words) in [(1, &WORDS[..8]), (2, &WORDS[..]), (1, &WORDS[..5])] {
            let exact = table(request, count, &words[..4 * count as usize]);
            assert_eq!(trimmed(table(request, count, words)), exact);
            assert_eq!(trimmed(exact.clone()), exact);
        }
    }

    #[test]
    fn other_messages_stay_as_they_are() {
        let short = table(FrontendReq::SET_MEM_TABLE, 3, &WORDS[..8]);
        let none = table(FrontendReq::SET_MEM_TABLE, 0, &WORDS);
        let many = table(FrontendReq::SET_MEM_TABLE, u32::MAX, &WORDS);
        let other = table(FrontendReq::SET_VRING_ADDR, 1, &WORDS);
        for message in [short, none, many, other[..12].to_vec(), other, Vec::new()] {
            assert_eq!(trimmed(message.clone()), message);
        }
    }
}
