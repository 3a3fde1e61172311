//! Headers made to hurt: any bytes give an error or a header whose places can be trusted, never a
//! panic.

use cow_format::{Bitmap, Geometry, HEADER_PREFIX_LEN, Header, PAGE_SECTORS, VIRTUAL_SIZE_MAX};
use proptest::prelude::*;

/// What everything else relies on.
fn check_places(geometry: &Geometry, file_len: u64) {
    assert!((1..=VIRTUAL_SIZE_MAX).contains(&geometry.virtual_size()));
    let bitmap_end = geometry.bitmap_offset().get().checked_add(geometry.bitmap_len()).unwrap();
    assert!(bitmap_end <= file_len);
    assert!(bitmap_end <= geometry.data_offset().get());
    if let Some(live) = geometry.live_bitmap_offset() {
        let live_end = live.get().checked_add(geometry.bitmap_len()).unwrap();
        assert!(live_end <= file_len && live_end <= geometry.data_offset().get());
        assert!(live.get() >= bitmap_end || live_end <= geometry.bitmap_offset().get());
    }
    let data_end =
        geometry.data_offset().get().checked_add(geometry.sectors().get() * 512).unwrap();
    assert!(i64::try_from(data_end).is_ok());
    assert!(geometry.bitmap_pages() <= geometry.sectors().get().div_ceil(PAGE_SECTORS));
    assert_eq!(geometry.all().count(), geometry.sectors());
    // The largest directory is 256 KiB.
    Bitmap::new(geometry.sectors()).insert(geometry.all().clipped_to(cow_format::Sector::new(9)));
}

fn check(prefix: &[u8], file_len: u64) {
    match Header::check(prefix, file_len) {
        Ok(header) => check_places(header.geometry(), file_len),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn uml(version: u8, little: bool) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_PREFIX_LEN];
    bytes[..8].copy_from_slice(&[b'O', b'O', b'O', b'M', 0, 0, 0, version]);
    if little {
        bytes[..8].reverse();
        bytes[..8].rotate_left(4);
    }
    bytes
}

fn native() -> Vec<u8> {
    let mut header =
        cow_format::header::NativeHeader::create(1 << 30, uuid::Uuid::nil(), None).unwrap();
    let mut bytes = header.next_write().unwrap().bytes.to_vec();
    bytes.extend_from_slice(&*header.next_write().unwrap().bytes);
    bytes
}

fn seal(bytes: &mut [u8]) {
    for copy in bytes.chunks_exact_mut(4096) {
        copy[16..20].fill(0);
        let crc = crc32c::crc32c(copy);
        copy[16..20].copy_from_slice(&crc.to_le_bytes());
    }
}

const EDGES: [u64; 14] = [
    0,
    1,
    511,
    4096,
    u32::MAX as u64,
    1 << 32,
    VIRTUAL_SIZE_MAX,
    VIRTUAL_SIZE_MAX + 1,
    (1 << 63) - 4096,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 4095,
    u64::MAX - 511,
    u64::MAX,
];

#[test]
fn every_field_of_every_header_at_every_edge() {
    let file_lens = [0, 280, 8192, 1 << 20, 1 << 40, i64::MAX.unsigned_abs(), u64::MAX];
    let uml = [(1, true), (2, false), (3, false), (3, true)].map(|(version, little)| {
        let mut bytes = uml(version, little);
        bytes[8..4110].fill(b'/');
        bytes[40] = 0;
        (bytes, 4140)
    });
    for (bytes, end) in uml.into_iter().chain([(native(), 256)]) {
        // Inside the path one place is like another.
        for at in (8..end).filter(|at| !(300..4090).contains(at) || at % 97 == 0) {
            for (value, width) in EDGES.iter().flat_map(|value| [(value, 4), (value, 8)]) {
                let mut little = bytes.clone();
                little[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
                let mut big = bytes.clone();
                big[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
                if bytes[0] != b'O' && bytes[0] != b'M' {
                    seal(&mut little);
                }
                // The interesting lengths with the interesting places; else one.
                let lens = if !(48..512).contains(&at) && at < 4096 {
                    &file_lens[..]
                } else {
                    &file_lens[4..5]
                };
                for &len in lens {
                    check(&little, len);
                    check(&big, len);
                }
            }
        }
    }
}

#[test]
fn every_truncation() {
    for bytes in [uml(1, true), uml(2, false), uml(3, false), native()] {
        for len in 0..bytes.len() {
            check(&bytes[..len], len as u64);
            check(&bytes[..len], u64::MAX);
        }
    }
}

/// A failure's seed goes to `hostile.regressions` beside this file, and is tried first from then
/// on.
fn config() -> ProptestConfig {
    let seeds = proptest::test_runner::FileFailurePersistence::WithSource("regressions");
    ProptestConfig {
        cases: if cfg!(miri) { 1 } else { 512 },
        failure_persistence: Some(Box::new(seeds)),
        ..ProptestConfig::default()
    }
}

fn pokes(end: usize) -> impl Strategy<Value = Vec<(usize, u64)>> {
    let value = prop_oneof![
        any::<u64>(),
        prop::sample::select(&EDGES[..]),
        (0u32..64).prop_map(|bit| 1 << bit)
    ];
    prop::collection::vec((8..end, value), 1..8)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..HEADER_PREFIX_LEN), len: u64) {
        check(&bytes, len);
    }

    #[test]
    fn random_uml(version in 0u8..5, little: bool, pokes in pokes(4200), path in 1usize..300, len: u64) {
        let mut bytes = uml(version, little);
        bytes[36..36 + path].fill(b'p');
        for (at, value) in pokes {
            bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
        check(&bytes, len);
    }

    #[test]
    fn random_native(pokes in pokes(600), len: u64) {
        let mut bytes = native();
        for (at, value) in pokes {
            bytes[4096 + at..4096 + at + 8].copy_from_slice(&value.to_le_bytes());
        }
        seal(&mut bytes);
        check(&bytes, len);
    }
}
