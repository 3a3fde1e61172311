//! What the checker finds, and that it finds nothing in a sound file.

use cow_format::check::{Check, Finding, Severity, clear_beyond_end};
use cow_format::header::{NativeHeader, UmlHeader};
use cow_format::identity::Timestamp;
use cow_format::{
    BITMAP_PAGE_LEN, Bitmap, ByteOffset, HEADER_PREFIX_LEN, Header, Sector, SectorCount,
    SectorRange,
};
use uuid::Uuid;

fn uml(size: u64) -> Header {
    Header::Uml(UmlHeader::create(b"/base", size, Timestamp::new(0, 0).unwrap()).unwrap())
}

fn native(change: impl FnOnce(&mut NativeHeader, &mut Vec<u8>)) -> Header {
    let mut header = NativeHeader::create(1 << 20, Uuid::from_u128(7), None).unwrap();
    let mut prefix = Vec::new();
    prefix.extend_from_slice(&*header.next_write().unwrap().bytes);
    prefix.extend_from_slice(&*header.next_write().unwrap().bytes);
    change(&mut header, &mut prefix);
    assert_eq!(prefix.len(), HEADER_PREFIX_LEN);
    Header::check(&prefix, header.geometry().full_len()).unwrap()
}

fn with_sectors(header: &Header, ranges: &[(u64, u64)]) -> Bitmap {
    let bitmap = Bitmap::new(header.geometry().sectors());
    for &(start, count) in ranges {
        bitmap.insert(SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap());
    }
    bitmap
}

/// The leaked ranges and all findings for `allocated` ranges.
fn leaks(
    header: &Header,
    bitmap: &Bitmap,
    allocated: &[(u64, u64)],
) -> (Vec<(u64, u64)>, Vec<Finding>) {
    let mut check = Check::new(header, bitmap.last_present(), u64::MAX);
    let mut leaked = Vec::new();
    for &(at, len) in allocated {
        let found = check.allocated(bitmap, ByteOffset::new(at), len);
        leaked.extend(found.map(|(at, len)| (at.get(), len)));
    }
    (leaked, check.finish())
}

#[test]
fn a_sound_file_has_no_findings() {
    for header in [uml(1_000_001), native(|_, _| ())] {
        let bitmap = with_sectors(&header, &[(0, 8), (100, 30)]);
        let geometry = header.geometry();
        let mut check = Check::new(&header, bitmap.last_present(), geometry.full_len());
        let mut page = [0; BITMAP_PAGE_LEN];
        bitmap.render_page(0, &mut page);
        assert!(!check.bitmap_page(0, &page[..geometry.bitmap_page_len(0)]));
        // Header, bitmaps, and whole blocks round what is present.
        assert_eq!(
            check
                .allocated(&bitmap, ByteOffset::new(0), geometry.data_offset().get() + 4096)
                .count(),
            0
        );
        let block = geometry.data_offset().get() + 12 * 4096;
        assert_eq!(check.allocated(&bitmap, ByteOffset::new(block), 5 * 4096).count(), 0);
        assert_eq!(check.finish(), []);
    }
}

#[test]
fn header_states_are_found() {
    let header = native(|_, prefix| prefix[4096] ^= 1);
    let bitmap = with_sectors(&header, &[]);
    let findings = Check::new(&header, bitmap.last_present(), u64::MAX).finish();
    assert!(matches!(findings[..], [Finding::HeaderCopy(_)]));
    assert_eq!(findings[0].severity(), Severity::Corrupt);

    let header = native(|header, prefix| {
        header.set_in_use(None).unwrap();
        let write = header.next_write().unwrap();
        prefix[..4096].copy_from_slice(&*write.bytes);
    });
    let findings = Check::new(&header, bitmap.last_present(), u64::MAX).finish();
    assert_eq!(findings, [Finding::NotClosed]);
    assert_eq!(findings[0].severity(), Severity::Note);
}

#[test]
fn lost_data_is_the_worst() {
    let header = uml(1 << 20);
    let bitmap = with_sectors(&header, &[(2047, 1)]);
    let mut check = Check::new(&header, bitmap.last_present(), header.geometry().full_len() - 1);
    assert_eq!(check.allocated(&bitmap, ByteOffset::new(12288), 4096).count(), 1);
    let findings = check.finish();
    assert!(
        matches!(findings[..], [Finding::Data(lost), Finding::Leaked { bytes: 4096 }] if lost.sector.get() == 2047)
    );
    assert_eq!(findings[0].severity(), Severity::Corrupt);
}

#[test]
fn bits_past_the_end_are_found_and_cleared() {
    let header = uml(1_000_001); // 1954 sectors: two bits in byte 244
    let geometry = header.geometry();
    let bitmap = with_sectors(&header, &[]);
    let mut page = vec![0xff; BITMAP_PAGE_LEN];
    let mut check = Check::new(&header, bitmap.last_present(), u64::MAX);
    assert!(check.bitmap_page(0, &page[..246]));
    assert!(!check.bitmap_page(0, &page[..244]));
    assert!(check.bitmap_page(3, &[0, 0x10]));
    let first = Sector::new(1954);
    assert_eq!(check.finish(), [Finding::BitsBeyondEnd { first, count: 6 + 8 + 1 }]);
    assert!(clear_beyond_end(geometry, 0, &mut page));
    assert!(!clear_beyond_end(geometry, 0, &mut page));
    assert!(page[..244].iter().all(|&byte| byte == 0xff));
    assert_eq!(page[244], 3);
    assert!(page[245..].iter().all(|&byte| byte == 0));
}

#[test]
fn leaks_are_whole_blocks_without_a_present_sector() {
    let header = uml(1 << 20); // data at 12288
    let bitmap = with_sectors(&header, &[(8, 1), (31, 2)]);
    // Blocks 0 and 2 and from 5 on have no present sector; 1, 3 and 4 have one.
    let block = |n: u64| 12288 + n * 4096;
    let (leaked, findings) = leaks(&header, &bitmap, &[(0, block(7))]);
    assert_eq!(leaked, [(block(0), 4096), (block(2), 4096), (block(5), 2 * 4096)]);
    assert_eq!(findings, [Finding::Leaked { bytes: 4 * 4096 }]);
    assert_eq!(findings[0].severity(), Severity::Leak);
    // A range that begins or ends inside a block does not give that block.
    assert_eq!(leaks(&header, &bitmap, &[(block(5) + 512, 3 * 4096)]).0, [(block(6), 2 * 4096)]);
    // Data past the end of the disk belongs to no sector.
    assert_eq!(leaks(&header, &bitmap, &[(block(256), 8192)]).0, [(block(256), 8192)]);
    let (leaked, _) = leaks(&header, &bitmap, &[(u64::MAX - 10, 10), (block(256), u64::MAX)]);
    assert_eq!(leaked.len(), 1);
}
