//! Every golden UML file: geometry, present sectors and merged image as in the manifest; every bad
//! one refused by name.

use cow_format::header::{Field, Part, UmlHeader};
use cow_format::identity::{ActualIdentity, IdentityError, Timestamp};
use cow_format::{BITMAP_PAGE_LEN, Bitmap, HEADER_PREFIX_LEN, Header, HeaderError, SECTOR_SIZE};
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::Path;

const BASE_MTIME: i64 = 1_700_000_000;

fn vector(name: &str) -> Vec<u8> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(format!("{name}.zst"));
    let file =
        std::fs::File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(file).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// As `gen-base.sh` makes it.
fn base(path: &[u8]) -> Option<Vec<u8>> {
    let (sectors, len) = match path {
        b"/umlvec/base-1m.img" => (2048, 1 << 20),
        b"/umlvec/base-odd.img" => (1954, 1_000_001),
        b"/umlvec/base-512.img" => (1, 512),
        _ => return None,
    };
    let mut image: Vec<u8> =
        (0..sectors).flat_map(|n| format!("B{n:014}\n").repeat(32).into_bytes()).collect();
    image.truncate(len);
    Some(image)
}

fn open(file: &[u8]) -> Result<UmlHeader, HeaderError> {
    match Header::check(&file[..file.len().min(HEADER_PREFIX_LEN)], file.len() as u64)? {
        Header::Uml(header) => Ok(header),
        other => panic!("{other:?}"),
    }
}

fn load(file: &[u8], header: &UmlHeader) -> Bitmap {
    let geometry = header.geometry();
    let bitmap = Bitmap::new(geometry.sectors());
    for page in 0..geometry.bitmap_pages() {
        let at = usize::try_from(geometry.page_at(page).get()).unwrap();
        bitmap.load_durable(page, &file[at..at + geometry.bitmap_page_len(page)]);
    }
    bitmap
}

fn merge(file: &[u8], header: &UmlHeader, bitmap: &Bitmap, base: &[u8]) -> Vec<u8> {
    let geometry = header.geometry();
    let mut image = base.to_vec();
    image.resize(usize::try_from(geometry.sectors().get() * SECTOR_SIZE).unwrap(), 0);
    for run in bitmap.runs(geometry.all()).filter(|run| run.present) {
        let from = usize::try_from(geometry.sector_at(run.range.start()).get()).unwrap();
        let to = usize::try_from(run.range.start_bytes().get()).unwrap();
        let len = usize::try_from(run.range.len_bytes()).unwrap();
        image[to..to + len].copy_from_slice(&file[from..from + len]);
    }
    image.truncate(usize::try_from(geometry.virtual_size()).unwrap());
    image
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn found_base(len: usize) -> ActualIdentity {
    ActualIdentity {
        device: false,
        inode: None,
        size: len as u64,
        mtime: Timestamp::new(BASE_MTIME, 123).unwrap(),
        layer: None,
    }
}

fn check_good(name: &str, columns: &[&str]) {
    let file = vector(name);
    assert_eq!(
        (file.len().to_string().as_str(), sha256(&file).as_str()),
        (columns[1], columns[2]),
        "{name}"
    );
    let header = open(&file).unwrap_or_else(|error| panic!("{name}: {error}"));
    let geometry = header.geometry();
    let version = format!("{:?}", header.version());
    let expected = match columns[3] {
        "3b" => "V3Padded".to_owned(),
        number => format!("V{number}"),
    };
    assert_eq!(version, expected, "{name}");
    let found =
        [geometry.bitmap_offset().get(), geometry.bitmap_len(), geometry.data_offset().get()];
    assert_eq!(found.map(|n| n.to_string()), [columns[6], columns[7], columns[8]], "{name}");

    let bitmap = load(&file, &header);
    geometry.check_data(&bitmap, file.len() as u64).unwrap();
    let runs: Vec<String> = bitmap
        .runs(geometry.all())
        .filter(|run| run.present)
        .map(|run| format!("({},{})", run.range.start(), run.range.count().get()))
        .collect();
    assert_eq!(format!("[{}]", runs.join(",")), columns[9], "{name}");

    let base = base(header.backing_path()).unwrap();
    let verdict = header.backing_identity().verify(&found_base(base.len())).unwrap();
    assert_eq!((verdict.sample, verdict.doubt), (None, None), "{name}");
    assert_eq!(sha256(&merge(&file, &header, &bitmap, &base)), columns[10], "{name}");

    // Written again it is the same header, apart from what UML left after the path's NUL.
    if !header.is_read_only() {
        let bytes = header.encode().unwrap();
        assert_eq!(open(&[&bytes, &file[bytes.len()..]].concat()).as_ref(), Ok(&header), "{name}");
        let path_at = if columns[3] == "3b" { 36 } else { 32 };
        let path_end = path_at + header.backing_path().len() + 1;
        assert_eq!(bytes[..path_end], file[..path_end], "{name}");
    }
}

fn field_of(name: &str) -> (Field, String, String) {
    match open(&vector(name)) {
        Err(HeaderError::Field { field, found, expected }) => (field, found, expected),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn good_and_odd_vectors_are_read_as_the_manifest_says() {
    let manifest = include_str!("../vectors/manifest.tsv");
    let mut seen = 0;
    for line in manifest.lines().skip(1) {
        let columns: Vec<&str> = line.split('\t').collect();
        if !columns[0].starts_with("bad-") {
            check_good(columns[0], &columns);
            seen += 1;
        }
    }
    assert_eq!(seen, 11);
}

#[test]
fn bad_fields_are_refused_by_name() {
    for (name, field, found) in [
        ("bad-align-0.cow", Field::Alignment, "0"),
        ("bad-path-empty.cow", Field::BackingPath, "an empty path"),
        ("bad-sectorsize-0.cow", Field::SectorSize, "0"),
        ("bad-sectorsize-4096.cow", Field::SectorSize, "4096"),
        ("bad-version-0.cow", Field::Version, "0"),
        ("bad-version-4.cow", Field::Version, "4"),
    ] {
        let (got, value, expected) = field_of(name);
        assert_eq!((got, value.as_str()), (field, found), "{name}");
        assert!(!expected.is_empty());
    }
}

#[test]
fn short_files_are_refused_with_both_lengths() {
    for (name, part, found, expected) in [
        ("bad-empty.cow", Part::Header, 0, 8),
        ("bad-short-header-4.cow", Part::Header, 4, 8),
        ("bad-short-header-100.cow", Part::Header, 100, 4128),
        ("bad-bitmap-truncated.cow", Part::Bitmap, 8292, 8192 + 256),
    ] {
        assert_eq!(
            open(&vector(name)),
            Err(HeaderError::Truncated { part, found, expected }),
            "{name}"
        );
    }
    assert!(matches!(open(&vector("bad-magic.cow")), Err(HeaderError::NotCow { .. })));
}

#[test]
fn a_base_that_does_not_match_is_refused() {
    let header = open(&vector("bad-size.cow")).unwrap();
    let Err(IdentityError::Size { stored, actual }) =
        header.backing_identity().verify(&found_base(1 << 20))
    else {
        panic!("bad-size: taken");
    };
    assert_eq!((stored, actual), (header.geometry().virtual_size(), 1 << 20));
    assert_ne!(stored, actual);

    let header = open(&vector("bad-mtime.cow")).unwrap();
    let result = header.backing_identity().verify(&found_base(1 << 20));
    assert!(matches!(result, Err(IdentityError::Mtime { .. })), "{result:?}");

    // The missing path is found out when it is opened; here, that it is not one of the bases.
    let header = open(&vector("bad-path-missing.cow")).unwrap();
    assert_eq!(header.backing_path(), b"/xmlvec/base-1m.img");
    assert_eq!(base(header.backing_path()), None);
}

#[test]
fn a_new_header_is_byte_for_byte_what_uml_mkcow_writes() {
    for (name, path, size) in [
        ("mkcow-1m.cow", "/umlvec/base-1m.img", 1 << 20),
        ("mkcow-512.cow", "/umlvec/base-512.img", 512),
        ("mkcow-odd.cow", "/umlvec/base-odd.img", 1_000_001),
    ] {
        let mtime = Timestamp::new(BASE_MTIME, 0).unwrap();
        let header = UmlHeader::create(path.as_bytes(), size, mtime).unwrap();
        let mut file = header.encode().unwrap();
        assert_eq!(file.len(), 4128);
        file.resize(usize::try_from(header.geometry().full_len()).unwrap(), 0);
        assert!(file == vector(name), "{name}");
    }
}

#[test]
fn a_new_backing_path_keeps_the_layout() {
    for name in [
        "uml-1m.cow",
        "v3broken-1m.cow",
        "v3-align512-1m.cow",
        "odd-le-magic.cow",
        "odd-cow-format-1.cow",
    ] {
        let mut file = vector(name);
        let old = open(&file).unwrap();
        let new = old.with_backing(b"/elsewhere", Timestamp::new(7, 0).unwrap()).unwrap();
        let bytes = new.encode().unwrap();
        file[..bytes.len()].copy_from_slice(&bytes);
        let read = open(&file).unwrap();
        assert_eq!((read.geometry(), read.version()), (old.geometry(), old.version()), "{name}");
        assert_eq!(read.backing_path(), b"/elsewhere");
        assert_eq!(read, new);
    }
    for name in ["v1-1m.cow", "v2-1m.cow"] {
        let header = open(&vector(name)).unwrap();
        assert!(header.is_read_only());
        assert!(matches!(header.encode(), Err(HeaderError::ReadOnlyVersion { .. })));
    }
}

#[test]
fn data_past_the_end_of_the_file_is_truncated_data() {
    let file = vector("uml-1m.cow");
    let header = open(&file).unwrap();
    let bitmap = load(&file, &header);
    assert_eq!(bitmap.last_present().map(|sector| sector.get()), Some(2047));
    let error = header.geometry().check_data(&bitmap, file.len() as u64 - 1).unwrap_err();
    assert_eq!((error.sector.get(), error.expected_len), (2047, file.len() as u64));
    // Without a present sector there, the file may end after the bitmap.
    let empty = Bitmap::new(header.geometry().sectors());
    assert_eq!(header.geometry().check_data(&empty, 8192 + 256), Ok(()));
    assert!(open(&file[..8192 + 256]).is_ok());
}

#[test]
fn every_truncation_of_every_vector_is_refused_or_read() {
    for name in ["uml-1m.cow", "v1-1m.cow", "v2-1m.cow", "v3broken-1m.cow", "odd-le-magic.cow"] {
        let file = vector(name);
        let geometry = *open(&file).unwrap().geometry();
        let bitmap_end =
            usize::try_from(geometry.bitmap_offset().get() + geometry.bitmap_len()).unwrap();
        for len in 0..=bitmap_end + BITMAP_PAGE_LEN {
            assert_eq!(
                open(&file[..len.min(file.len())]).is_ok(),
                len >= bitmap_end,
                "{name}: {len}"
            );
        }
    }
}
