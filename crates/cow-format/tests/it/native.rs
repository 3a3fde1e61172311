//! The native header: golden files that must open for ever, both copies, states, what is refused.

use cow_format::header::{
    Backing, BackingFormat, BootId, CacheWitness, Field, HeaderWrite, NATIVE_PATH_MAX,
    NativeHeader, NativeState, PageCache, Part,
};
use cow_format::identity::{BackingIdentity, Inode, Timestamp, Witness};
use cow_format::journal::Records;
use cow_format::sample::Sample;
use cow_format::{
    Bitmap, FlushPass, HEADER_PREFIX_LEN, Header, HeaderError, Next, PAGE_SECTORS, Sector,
    SectorCount, SectorRange, VIRTUAL_SIZE_MAX,
};
use std::io::Read;
use std::path::Path;
use uuid::Uuid;

const COPY: usize = 4096;
const MIB: u64 = 1 << 20;
const OWN: Uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);

fn boot() -> BootId {
    BootId::parse("f0e0d0c0-b0a0-9080-7060-504030201000\n").unwrap()
}

/// As a header of an older program has it.
fn unknown_cache() -> PageCache {
    PageCache { boot: boot(), witness: None }
}

fn cache() -> PageCache {
    PageCache { witness: Some(CacheWitness::Superblock(0x0102_0304_0506)), ..unknown_cache() }
}

fn golden(name: &str) -> Vec<u8> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.cow.zst"));
    let file =
        std::fs::File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(file).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

fn check(prefix: &[u8], file_len: u64) -> Result<NativeHeader, HeaderError> {
    match Header::check(prefix, file_len)? {
        Header::Native(header) => Ok(*header),
        other @ Header::Uml(_) => panic!("{other:?}"),
    }
}

fn open(file: &[u8]) -> Result<NativeHeader, HeaderError> {
    check(&file[..file.len().min(HEADER_PREFIX_LEN)], file.len() as u64)
}

/// The start of a new file with both copies, and its length.
fn new_file(header: &mut NativeHeader) -> (Vec<u8>, u64) {
    let mut prefix = vec![0; HEADER_PREFIX_LEN];
    put(&mut prefix, &header.next_write().unwrap());
    put(&mut prefix, &header.next_write().unwrap());
    (prefix, header.geometry().full_len())
}

fn put(prefix: &mut [u8], write: &HeaderWrite) {
    let at = usize::try_from(write.at.get()).unwrap();
    prefix[at..at + COPY].copy_from_slice(&*write.bytes);
}

fn image(path: &[u8], size: u64, secs: i64, nanos: u32) -> Backing {
    let mtime = Timestamp::new(secs, nanos).unwrap();
    let identity = BackingIdentity::Image { size, mtime, witness: Witness::NONE };
    Backing::new(path, BackingFormat::Raw, identity, None).unwrap()
}

/// Changes the field at `at` of a copy and makes its checksum good again.
fn poke(copy: &mut [u8], at: usize, bytes: &[u8]) {
    copy[at..at + bytes.len()].copy_from_slice(bytes);
    copy[16..20].fill(0);
    let crc = crc32c::crc32c(&copy[..COPY]);
    copy[16..20].copy_from_slice(&crc.to_le_bytes());
}

fn refused(result: Result<NativeHeader, HeaderError>) -> Field {
    match result {
        Err(HeaderError::Field { field, .. }) => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn golden_empty() {
    let file = golden("v1-empty");
    let header = open(&file).unwrap();
    let geometry = header.geometry();
    assert_eq!((header.generation(), header.state(), header.uuid()), (2, NativeState::Clean, OWN));
    assert_eq!((header.backing(), header.broken_copy()), (None, None));
    let places = (geometry.bitmap_offset().get(), geometry.live_bitmap_offset().unwrap().get());
    assert_eq!(places, (8192, 8192 + (4 << 20)));
    assert_eq!((geometry.data_offset().get(), geometry.virtual_size()), (9 << 20, MIB));
    assert_eq!((geometry.bitmap_len(), header.virtual_size_max()), (4096, 16 << 30));
    // A new file without a journal is the same, byte for byte; with one, the data is still in the
    // same place.
    let mut plain = NativeHeader::create_with_journal(MIB, OWN, None, Some(0)).unwrap();
    let (prefix, len) = new_file(&mut plain);
    assert_eq!(len, file.len() as u64);
    assert!(prefix == file[..HEADER_PREFIX_LEN]);
    let new = NativeHeader::create(MIB, OWN, None).unwrap();
    assert_eq!(new.geometry(), geometry);
    let area = new.journal().unwrap();
    assert_eq!((area.at().get(), area.len()), (8192 + (8 << 20), MIB - 8192));
}

#[test]
fn golden_journal() {
    let file = golden("v1-journal");
    let header = open(&file).unwrap();
    let (area, epoch) = (header.journal().unwrap(), header.journal_epoch().unwrap());
    assert_eq!((area.at().get(), area.len()), (8192 + (8 << 20), 65536));
    let at = usize::try_from(area.at().get()).unwrap();
    let records = Records::new(&file[at..at + 65536], epoch, header.geometry().sectors());
    let records: Vec<_> = records.map(Result::unwrap).collect();
    let text = |what: &[u8]| what.repeat(32);
    let (older, two, newer) =
        (text(b"older..........."), text(b"two.............").repeat(2), text(b"newer..........."));
    let range =
        |start, count| SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap();
    let first = vec![(range(3, 1), &older[..]), (range(9, 2), &two[..])];
    assert_eq!(records, [first, vec![(range(3, 1), &newer[..])]]);
    // The next header takes it with it; a clean one does not.
    let mut header = header;
    let write = header.next_write().unwrap();
    assert_eq!(write.bytes[224..256], file[COPY + 224..COPY + 256]);
    header.set_clean().unwrap();
    let write = header.next_write().unwrap();
    assert_eq!((write.bytes[32], &write.bytes[240..256]), (0, &[0; 16][..]));
    assert_eq!(write.bytes[224..240], file[COPY + 224..COPY + 240]);
}

#[test]
fn bad_journals_are_refused_by_name() {
    let file = golden("v1-journal");
    let area = (8192u64 + (8 << 20), 65536u64);
    let cases: &[(usize, u64, usize, Field)] = &[
        (32, 0, 8, Field::JournalEpoch),
        (32, 2, 8, Field::Incompatible),
        (20, 0, 4, Field::JournalEpoch),
        (20, 2, 4, Field::JournalEpoch),
        (224, area.0 - 4096, 8, Field::JournalOffset),
        (224, area.0 + 1, 8, Field::JournalOffset),
        (224, (9 << 20) - 4096, 8, Field::JournalOffset),
        (224, u64::MAX - 4095, 8, Field::JournalOffset),
        (224, 0, 8, Field::JournalOffset),
        (232, 4095, 8, Field::JournalLen),
        (232, (64 << 20) + 4096, 8, Field::JournalLen),
        (232, MIB, 8, Field::JournalOffset),
        (232, 0, 8, Field::JournalOffset),
    ];
    for &(at, value, width, field) in cases {
        let mut bytes = file.clone();
        poke(&mut bytes[COPY..], at, &value.to_le_bytes()[..width]);
        assert_eq!(refused(open(&bytes)), field, "{value:#x} at {at}");
    }
    let mut bytes = file.clone();
    poke(&mut bytes[COPY..], 240, &[0; 16]);
    assert_eq!(refused(open(&bytes)), Field::JournalEpoch);
}

#[test]
fn golden_base() {
    let file = golden("v1-base");
    let header = open(&file).unwrap();
    assert_eq!(
        (header.generation(), header.content_generation(), header.state()),
        (5, 2, NativeState::Clean)
    );
    let backing = header.backing().unwrap();
    assert_eq!((backing.path(), backing.format()), (&b"base.img"[..], BackingFormat::Raw));
    let mtime = Timestamp::new(1_700_000_000, 123_456_789).unwrap();
    let witness = Witness::NONE;
    assert_eq!(*backing.identity(), BackingIdentity::Image { size: 1_000_001, mtime, witness });
    assert_eq!(backing.digest().unwrap()[..], (0..32).collect::<Vec<u8>>());
    let bitmap = Bitmap::new(header.geometry().sectors());
    bitmap.load_durable(0, &file[8192..8192 + 4096]);
    let present: Vec<u64> = bitmap
        .runs(header.geometry().all())
        .filter(|run| run.present)
        .map(|run| {
            assert_eq!(run.range.count().get(), 1);
            let at = usize::try_from(header.geometry().sector_at(run.range.start()).get()).unwrap();
            let sector = run.range.start().get();
            assert_eq!(file[at..at + 512], *format!("G{sector:014}\n").repeat(32).as_bytes());
            sector
        })
        .collect();
    assert_eq!(present, [0, 2, 23]);
}

#[test]
fn golden_live() {
    let file = golden("v1-live");
    let header = open(&file).unwrap();
    assert_eq!(
        (header.generation(), header.state()),
        (9, NativeState::InUse { live: Some(unknown_cache()) })
    );
    // It does not say which page cache of that boot.
    assert!(!header.live_counts(&unknown_cache()) && !header.live_counts(&cache()));
    let backing = header.backing().unwrap();
    assert_eq!(
        (backing.path(), backing.format()),
        (&b"/layers/lower.cow"[..], BackingFormat::Native)
    );
    let uuid = Uuid::from_u128(0x1234_5678_9abc_def0_0fed_cba9_8765_4321);
    assert_eq!(*backing.identity(), BackingIdentity::Layer { uuid, content_generation: 7 });

    // The second copy is what opening the file of the first one writes.
    let mut alone = file[..HEADER_PREFIX_LEN].to_vec();
    alone[COPY..].fill(0);
    let mut before = check(&alone, file.len() as u64).unwrap();
    assert_eq!((before.generation(), before.state()), (8, NativeState::Clean));
    before.set_in_use(Some(unknown_cache())).unwrap();
    let write = before.next_write().unwrap();
    assert_eq!(write.at.get(), 4096);
    assert!(write.bytes[..] == file[COPY..2 * COPY]);
}

/// Made by the second implementation: a file in use that records the page cache of its live bitmap.
#[test]
fn golden_witness() {
    let file = golden("v1-witness");
    let header = open(&file).unwrap();
    assert_eq!(header.state(), NativeState::InUse { live: Some(cache()) });
    assert!(header.live_counts(&cache()));
    let others = [
        PageCache { boot: BootId::new(OWN).unwrap(), ..cache() },
        PageCache { witness: Some(CacheWitness::Superblock(7)), ..cache() },
        PageCache { witness: Some(CacheWitness::Mount(0x0102_0304_0506)), ..cache() },
        PageCache { witness: Some(CacheWitness::Memory), ..cache() },
        unknown_cache(),
    ];
    assert!(others.iter().all(|other| !header.live_counts(other)));

    // The second copy is what opening the file of the first one writes.
    let mut alone = file[..HEADER_PREFIX_LEN].to_vec();
    alone[COPY..].fill(0);
    let mut before = check(&alone, file.len() as u64).unwrap();
    before.set_in_use(Some(cache())).unwrap();
    assert!(before.next_write().unwrap().bytes[..] == file[COPY..2 * COPY]);
}

#[test]
fn a_witness_of_an_unknown_kind_is_none() {
    for witness in [CacheWitness::Memory, CacheWitness::Superblock(9), CacheWitness::Mount(9)] {
        let mut bytes = witness.to_bytes();
        assert_eq!(CacheWitness::from_bytes(bytes), Some(witness));
        bytes[0] = 4;
        assert_eq!(CacheWitness::from_bytes(bytes), None);
    }
    assert_eq!(CacheWitness::from_bytes([0; 16]), None);
}

#[test]
fn after_a_failed_sync_the_live_bitmap_is_void_and_the_journal_counts() {
    let mut header = open(&golden("v1-journal")).unwrap();
    let epoch = header.journal_epoch();
    let (slot, generation) = (header.next_write().unwrap().at, header.generation());
    header.make_live_void();
    // The other copy is whole: the one that may not be is written again.
    let again = header.write_again().unwrap();
    assert_eq!((again.at, header.generation()), (slot, generation + 1));
    assert_eq!(header.state(), NativeState::InUse { live: None });
    assert!(epoch.is_some() && header.journal_epoch() == epoch);
    assert_ne!(header.next_write().unwrap().at, slot);
}

#[test]
fn golden_frozen_and_broken() {
    let mut header = open(&golden("v1-frozen")).unwrap();
    assert_eq!((header.generation(), header.state()), (4, NativeState::Frozen));
    assert_eq!(header.unknown_features(), 1 << 63);
    assert_eq!(header.backing().unwrap().format(), BackingFormat::Qcow2);
    assert_eq!(header.set_in_use(None), header.set_clean());
    assert!(matches!(header.set_clean(), Err(HeaderError::Field { field: Field::State, .. })));
    assert!(matches!(header.resize(MIB), Err(HeaderError::Field { field: Field::State, .. })));

    let header = open(&golden("v1-broken-first")).unwrap();
    assert_eq!(header.generation(), 10);
    assert!(matches!(header.broken_copy(), Some(HeaderError::Field { field: Field::Crc32c, .. })));
}

#[test]
fn copies_are_written_in_turn_and_one_always_serves() {
    let mut header = NativeHeader::create(MIB, OWN, Some(image(b"base", 7, -3, 9))).unwrap();
    let (mut prefix, len) = new_file(&mut header);
    for round in 3..7u64 {
        let old = prefix.clone();
        let before = check(&old, len).unwrap();
        header.set_in_use((round % 2 == 0).then(cache)).unwrap();
        let write = header.next_write().unwrap();
        assert_eq!(write.at.get(), if round % 2 == 1 { 0 } else { 4096 });
        put(&mut prefix, &write);
        assert_eq!(check(&prefix, len).as_ref(), Ok(&header));
        assert_eq!((header.generation(), header.content_generation()), (round, round - 2));
        // Torn anywhere between its sectors, the write leaves what was before, or is whole.
        let at = usize::try_from(write.at.get()).unwrap();
        for torn in 0..=255u8 {
            let mut mixed = old.clone();
            for sector in (0..8).filter(|bit| torn >> bit & 1 == 1) {
                let sector = at + sector * 512..at + (sector + 1) * 512;
                mixed[sector.clone()].copy_from_slice(&prefix[sector]);
            }
            let found = check(&mixed, len).unwrap();
            let (got, was, is) = (found.state(), before.state(), header.state());
            assert!(
                got == was && found.generation() == round - 1
                    || got == is && found.generation() == round
            );
        }
    }
}

#[test]
fn a_settled_live_bitmap_is_believed_of_a_whole_clean_file_only() {
    let mut header = NativeHeader::create(MIB, OWN, None).unwrap();
    let (mut prefix, len) = new_file(&mut header);
    let mut write = |header: &mut NativeHeader| {
        put(&mut prefix, &header.next_write().unwrap());
        let found = check(&prefix, len).unwrap();
        assert_eq!(found, *header);
        (found.live_is_settled(), found.unknown_features(), prefix.clone())
    };
    header.set_in_use(Some(cache())).unwrap();
    assert!(!write(&mut header).0);
    // Another program's end of use says nothing about the live bitmap.
    let mut other = header.clone();
    other.set_clean().unwrap();
    assert!(!write(&mut other).0);

    header = other;
    header.set_in_use(Some(cache())).unwrap();
    write(&mut header);
    header.set_clean_and_settled().unwrap();
    let (settled, unknown, clean) = write(&mut header);
    assert!(settled && unknown == 0);
    // It stays so while nothing but the header changes.
    header.resize(2 * MIB).unwrap();
    assert!(write(&mut header).0);
    header.set_in_use(Some(cache())).unwrap();
    assert!(!write(&mut header).0);
    // An older copy that replaces a broken newer one does not decide this.
    for broken in [100, COPY + 100] {
        let mut prefix = clean.clone();
        prefix[broken] ^= 1;
        let mut found = check(&prefix, len).unwrap();
        assert!(found.broken_copy().is_some() && !found.live_is_settled());
        _ = found.next_write().unwrap();
        assert!(!found.live_is_settled());
    }
}

#[test]
fn any_changed_byte_breaks_a_copy_and_two_broken_ones_are_refused() {
    let (prefix, len) = new_file(&mut NativeHeader::create(MIB, OWN, None).unwrap());
    for at in 0..2 * COPY {
        let mut bytes = prefix.clone();
        bytes[at] ^= 0x10;
        let header = check(&bytes, len).unwrap();
        assert_eq!(header.generation(), if at < COPY { 2 } else { 1 });
        assert!(header.broken_copy().is_some());
    }
    let mut bytes = prefix;
    bytes[300] ^= 1;
    bytes[COPY + 40] ^= 1;
    let Err(HeaderError::BothCopies { first, second }) = check(&bytes, len) else {
        panic!("taken")
    };
    assert!(first.to_string().contains("crc32c") && second.to_string().contains("crc32c"));
}

#[test]
fn a_broken_copy_is_written_anew_first() {
    let (mut prefix, len) = new_file(&mut NativeHeader::create(MIB, OWN, None).unwrap());
    prefix[COPY] ^= 1; // the newer copy
    let mut header = check(&prefix, len).unwrap();
    let write = header.next_write().unwrap();
    assert_eq!((write.at.get(), header.broken_copy()), (4096, None));
    put(&mut prefix, &write);
    assert_eq!(check(&prefix, len), Ok(header));
}

#[test]
fn two_different_copies_of_one_generation_are_refused() {
    let (mut prefix, len) = new_file(&mut NativeHeader::create(MIB, OWN, None).unwrap());
    poke(&mut prefix[COPY..], 24, &1u64.to_le_bytes());
    assert!(check(&prefix, len).is_ok(), "the same header twice is no conflict");
    poke(&mut prefix[COPY..], 96, &[0xee; 16]);
    assert_eq!(refused(check(&prefix, len)), Field::Generation);
}

#[test]
fn bad_fields_are_refused_by_name() {
    let backing = image(b"base", MIB, 0, 0);
    let (prefix, len) = new_file(&mut NativeHeader::create(MIB, OWN, Some(backing)).unwrap());
    let (durable, live, capacity, data) = (8192u64, 8192u64 + (4 << 20), 4u64 << 20, 9u64 << 20);
    let cases: &[(usize, u64, usize, Field)] = &[
        (8, 2, 4, Field::Version),
        (8, 0, 4, Field::Version),
        (12, 4097, 4, Field::HeaderLen),
        (20, 3, 4, Field::State),
        (24, 1 << 63, 8, Field::Generation),
        (88, u64::MAX, 8, Field::ContentGeneration),
        (32, 1, 8, Field::JournalEpoch),
        (32, 1 << 63, 8, Field::Incompatible),
        (48, 0, 8, Field::VirtualSize),
        (48, VIRTUAL_SIZE_MAX + 1, 8, Field::VirtualSize),
        (48, u64::MAX, 8, Field::VirtualSize),
        (48, 17 << 30, 8, Field::BitmapCapacity),
        (56, 0, 8, Field::BitmapOffset),
        (56, 4096, 8, Field::BitmapOffset),
        (56, durable + 512, 8, Field::BitmapOffset),
        (56, live, 8, Field::LiveBitmapOffset),
        (56, (1 << 63) - 4096, 8, Field::BitmapOffset),
        (56, data, 8, Field::DataOffset),
        (64, 4096, 8, Field::LiveBitmapOffset),
        (64, live - 4096, 8, Field::LiveBitmapOffset),
        (64, u64::MAX - 4095, 8, Field::LiveBitmapOffset),
        (64, data, 8, Field::DataOffset),
        (72, 0, 8, Field::BitmapCapacity),
        (72, capacity + 1, 8, Field::BitmapCapacity),
        (72, capacity * 2, 8, Field::LiveBitmapOffset),
        (80, live, 8, Field::DataOffset),
        (80, data + 512, 8, Field::DataOffset),
        (80, data - 4096, 8, Field::JournalOffset),
        (80, (1 << 63) - 4096, 8, Field::DataOffset),
        (128, 0, 4, Field::BackingPath),
        (128, 5, 4, Field::BackingFormat),
        (128, 3, 4, Field::BackingIdentity),
        (132, 0, 4, Field::BackingPath),
        (132, 3585, 4, Field::BackingPath),
        (132, u32::MAX as u64, 4, Field::BackingPath),
        (132, 5, 4, Field::BackingPath), // takes in a NUL
        (136, 0, 4, Field::BackingIdentity),
        (136, 2, 4, Field::BackingIdentity),
        (140, 2, 4, Field::BackingDigest),
        (160, 1_000_000_000, 4, Field::Mtime),
    ];
    for &(at, value, width, field) in cases {
        let mut bytes = prefix.clone();
        poke(&mut bytes[COPY..], at, &value.to_le_bytes()[..width]);
        // The older copy is good, but is no way round what the newer one asks for.
        assert_eq!(refused(check(&bytes, len)), field, "{value:#x} at {at}");
    }
}

#[test]
fn a_file_that_ends_in_its_bitmaps_is_refused() {
    let (prefix, _) = new_file(&mut NativeHeader::create(MIB, OWN, None).unwrap());
    let live_end = 8192 + (4 << 20) + 4096;
    assert!(check(&prefix, live_end).is_ok(), "no sector is present, so no data is missing");
    let truncated = |part, found, expected| Err(HeaderError::Truncated { part, found, expected });
    assert_eq!(check(&prefix, live_end - 1), truncated(Part::LiveBitmap, live_end - 1, live_end));
    assert_eq!(check(&prefix, 8192), truncated(Part::Bitmap, 8192, 12288));
    for len in 0..HEADER_PREFIX_LEN {
        assert!(check(&prefix[..len], len as u64).is_err(), "{len}");
    }
}

#[test]
fn growing_is_bounded_by_the_room_for_bitmaps() {
    let mut header = NativeHeader::create(MIB, OWN, None).unwrap();
    let data_offset = header.geometry().data_offset();
    header.resize(16 << 30).unwrap();
    assert_eq!(header.geometry().data_offset(), data_offset);
    assert_eq!(header.geometry().bitmap_len(), 4 << 20);
    assert!(matches!(
        header.resize((16 << 30) + 1),
        Err(HeaderError::Field { field: Field::VirtualSize, .. })
    ));
    assert!(header.resize(0).is_err());
    let (prefix, len) = new_file(&mut header);
    assert_eq!(check(&prefix, len).unwrap().geometry(), header.geometry());

    let tib = NativeHeader::create(1 << 40, OWN, None).unwrap();
    assert_eq!(tib.virtual_size_max(), 8 << 40);
    let mut largest = NativeHeader::create(VIRTUAL_SIZE_MAX, OWN, None).unwrap();
    assert_eq!(largest.virtual_size_max(), VIRTUAL_SIZE_MAX);
    let (prefix, len) = new_file(&mut largest);
    assert!(check(&prefix, len).is_ok());
    assert!(NativeHeader::create(VIRTUAL_SIZE_MAX + 1, OWN, None).is_err());
}

#[test]
fn backing_references_are_kept_or_refused() {
    let layer = BackingIdentity::Layer { uuid: OWN, content_generation: 1 };
    let seconds = BackingIdentity::ImageSeconds { size: 1, mtime_secs: 1 };
    let mtime = Timestamp::new(i64::MIN, 999_999_999).unwrap();
    let exact = BackingIdentity::Image { size: u64::MAX, mtime, witness: Witness::NONE };
    let new = |path: &[u8], format, identity| Backing::new(path, format, identity, Some([7; 32]));
    assert!(new(b"x", BackingFormat::Raw, layer).is_err());
    assert!(new(b"x", BackingFormat::Native, exact).is_err());
    assert!(new(b"x", BackingFormat::Uml, seconds).is_err());
    assert!(new(b"", BackingFormat::Raw, exact).is_err());
    assert!(new(b"a\0b", BackingFormat::Raw, exact).is_err());
    assert!(new(&[b'p'; NATIVE_PATH_MAX + 1], BackingFormat::Raw, exact).is_err());
    for backing in [
        new(&[0xff; NATIVE_PATH_MAX], BackingFormat::Uml, exact).unwrap(),
        new(b"../lower", BackingFormat::Native, layer).unwrap(),
    ] {
        let mut header = NativeHeader::create(MIB, OWN, None).unwrap();
        header.freeze();
        header.set_backing(Some(backing.clone()));
        let (prefix, len) = new_file(&mut header);
        let read = check(&prefix, len).unwrap();
        assert_eq!((read.backing(), read.state()), (Some(&backing), NativeState::Frozen));
    }
}

#[test]
fn a_flush_writes_whole_pages() {
    let header = NativeHeader::create(MIB + 1, OWN, None).unwrap();
    let bitmap = Bitmap::new(header.geometry().sectors());
    bitmap.insert(SectorRange::new(Sector::new(0), SectorCount::new(PAGE_SECTORS)).unwrap());
    assert_eq!(bitmap.present().get(), 2049);
    let Next::Write(pages) = FlushPass::begin(&bitmap, header.geometry()).synced() else {
        panic!("clean")
    };
    let lens: Vec<_> = pages.writes().map(|write| (write.at.get(), write.bytes.len())).collect();
    assert_eq!(lens, [(8192, 4096)]);
}

#[test]
fn boot_ids_are_uuids_and_not_nil() {
    assert!(BootId::parse("").is_none());
    assert!(BootId::parse("00000000-0000-0000-0000-000000000000").is_none());
    assert_eq!(BootId::parse(" f0e0d0c0-b0a0-9080-7060-504030201000\n"), Some(boot()));
}

#[test]
fn the_witness_of_a_base_stands_where_the_document_says() {
    let mtime = Timestamp::new(1_700_000_000, 5).unwrap();
    let born = Timestamp::new(-2, 7).unwrap();
    let inode = Some(Inode { number: 0x1234_5678_9abc, born });
    let sample = Some(Sample::from_bytes([9; 32]));
    for witness in [
        Witness { inode, sample },
        Witness { inode, sample: None },
        Witness { inode: None, sample },
        Witness::NONE,
    ] {
        let identity = BackingIdentity::Image { size: 1 << 20, mtime, witness };
        let backing = Backing::new(b"base", BackingFormat::Raw, identity, None).unwrap();
        let mut header = NativeHeader::create(1 << 20, OWN, Some(backing)).unwrap();
        let (mut prefix, len) = new_file(&mut header);
        let expected = [
            &u32::from(witness.sample.is_some()).to_le_bytes()[..],
            &u32::from(witness.inode.is_some()).to_le_bytes(),
            &witness.inode.map_or(0, |inode| inode.number).to_le_bytes(),
            &witness.inode.map_or(0, |inode| inode.born.secs()).to_le_bytes(),
            &witness.inode.map_or(0, |inode| inode.born.nanos()).to_le_bytes(),
            &[0; 4],
            &witness.sample.map_or([0; 32], Sample::to_bytes),
        ];
        assert_eq!(prefix[384..448], expected.concat());
        let stored = |prefix: &[u8]| *check(prefix, len).unwrap().backing().unwrap().identity();
        assert_eq!(stored(&prefix), identity);
        // Kinds of a later program are as good as none.
        for copy in 0..2 {
            poke(&mut prefix[copy * COPY..], 384, &2u32.to_le_bytes());
            poke(&mut prefix[copy * COPY..], 388, &2u32.to_le_bytes());
        }
        let none = BackingIdentity::Image { size: 1 << 20, mtime, witness: Witness::NONE };
        assert_eq!(stored(&prefix), none);
    }
}
