//! Chains of native COW files on real files, and what is refused about them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block_io::image::{
    BaseOptions, CHAIN_DEPTH_MAX, ChangeError, CreateOptions, Proof, create_cow, rebind, resize,
    snapshot,
};
use block_io::storage::file::Host;
use block_io::{CowFormat, Disk, DiskOptions, ImageError};
use cow_format::header::{Backing, BackingFormat, NativeHeader};
use cow_format::{Header, Sector, SectorCount, SectorRange};

const SECTORS: u64 = 300;

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn options() -> DiskOptions {
    DiskOptions { lock_wait: Duration::ZERO, ..DiskOptions::default() }
}

fn read_only() -> DiskOptions {
    DiskOptions { read_only: true, ..options() }
}

fn open(path: &Path) -> Result<Disk, ImageError> {
    Disk::open_cow(path, None, &options())
}

fn content(disk: &Disk) -> Vec<u8> {
    let all = range(0, disk.capacity().get());
    let mut buf = vec![0xaa; usize::try_from(all.len_bytes()).unwrap()];
    disk.read(all, &mut buf).unwrap();
    buf
}

/// A directory with `base`, filled with 0xbb, and the native `0` over it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        fs::write(place.base(), vec![0xbb; usize::try_from(SECTORS * 512).unwrap()]).unwrap();
        create_cow(&Host, &place.cow(0), &CreateOptions::over(CowFormat::Native, &place.base()))
            .unwrap();
        place
    }

    fn base(&self) -> PathBuf {
        self.0.path().join("base")
    }

    fn cow(&self, number: usize) -> PathBuf {
        self.0.path().join(number.to_string())
    }

    fn snapshot(&self, number: usize) {
        snapshot(&Host, &self.cow(number), &self.cow(number + 1)).unwrap();
    }

    /// Changes the header of `0`, `1` … as a hostile writer could.
    fn edit(&self, number: usize, change: impl FnOnce(&mut NativeHeader)) {
        use std::os::unix::fs::FileExt;
        let path = self.cow(number);
        let bytes = fs::read(&path).unwrap();
        let Header::Native(mut header) = Header::check(&bytes[..8192], bytes.len() as u64).unwrap()
        else {
            panic!("not native")
        };
        change(&mut header);
        let file = fs::File::options().write(true).open(&path).unwrap();
        for _ in 0..2 {
            let write = header.next_write().unwrap();
            file.write_all_at(&write.bytes[..], write.at.get()).unwrap();
        }
    }

    fn header(&self, number: usize) -> NativeHeader {
        let bytes = fs::read(self.cow(number)).unwrap();
        match Header::check(&bytes[..8192], bytes.len() as u64).unwrap() {
            Header::Native(header) => *header,
            Header::Uml(_) => panic!("not native"),
        }
    }
}

#[test]
fn each_layer_keeps_its_own() {
    let place = Place::new();
    let mut expected = fs::read(place.base()).unwrap();
    for layer in 0..10usize {
        let disk = open(&place.cow(layer)).unwrap();
        let (start, fill) = (layer * 7, u8::try_from(layer).unwrap() + 1);
        disk.write(range(start as u64, 20), &[fill; 20 * 512]).unwrap();
        disk.discard(range(start as u64 + 15, 1)).unwrap();
        expected[start * 512..(start + 20) * 512].fill(fill);
        expected[(start + 15) * 512..(start + 16) * 512].fill(0);
        assert_eq!(content(&disk), expected);
        if layer % 2 == 0 {
            disk.close().unwrap();
        }
        drop(disk);
        place.snapshot(layer);
        assert!(matches!(open(&place.cow(layer)), Err(ImageError::Frozen { .. })));
        // A layer can still be looked at, together with the one on top of it.
        let top = Disk::open_cow(&place.cow(layer + 1), None, &options()).unwrap();
        let below = Disk::open_cow(&place.cow(layer), None, &read_only()).unwrap();
        assert_eq!((content(&top), content(&below)), (expected.clone(), expected.clone()));
        assert_eq!(top.layers().len(), layer + 3);
    }
    // All files are in one directory, so it can be moved as a whole.
    let moved = place.0.path().with_extension("moved");
    fs::rename(place.0.path(), &moved).unwrap();
    let link = moved.with_extension("link");
    std::os::unix::fs::symlink(moved.join("10"), &link).unwrap();
    assert_eq!(content(&open(&link).unwrap()), expected);
    fs::remove_file(&link).unwrap();
    fs::rename(&moved, place.0.path()).unwrap();
}

#[test]
fn a_chain_has_an_end() {
    let place = Place::new();
    let last = CHAIN_DEPTH_MAX - 2;
    (0..last).for_each(|layer| place.snapshot(layer));
    assert_eq!(open(&place.cow(last)).unwrap().layers().len(), CHAIN_DEPTH_MAX);
    let err = snapshot(&Host, &place.cow(last), &place.cow(last + 1)).unwrap_err();
    assert!(matches!(err, ChangeError::Open(ImageError::TooDeep { .. })), "{err}");
    // Refused before anything was frozen.
    open(&place.cow(last)).unwrap().close().unwrap();
    assert!(!place.cow(last + 1).exists());
}

#[test]
fn cycles_are_refused() {
    let place = Place::new();
    (0..3).for_each(|layer| place.snapshot(layer));
    let identity = *place.header(2).backing().unwrap().identity();
    for target in ["1", "3", "./3"] {
        place.edit(1, |header| {
            header.set_backing(Some(
                Backing::new(target.as_bytes(), BackingFormat::Native, identity, None).unwrap(),
            ));
        });
        let err = open(&place.cow(3)).err().unwrap();
        assert!(matches!(err, ImageError::Repeated { .. }), "{err}");
    }
}

#[test]
fn a_header_puts_no_control_characters_into_a_message() {
    let place = Place::new();
    let identity = *place.header(0).backing().unwrap().identity();
    place.edit(0, |header| {
        let path = b"gone\nERROR: all is lost\x1b]0;x\x07";
        let backing = Backing::new(path, BackingFormat::Raw, identity, None).unwrap();
        header.set_backing(Some(backing));
    });
    let said = open(&place.cow(0)).err().unwrap().to_string();
    assert!(said.contains("gone\\nERROR: all is lost\\u{1b}]0;x\\u{7}"), "{said}");
    assert!(!said.contains(char::is_control), "{said}");
}

#[test]
fn a_broken_middle_is_named() {
    let broken = |number: usize, harm: &dyn Fn(&Place)| {
        let place = Place::new();
        (0..3).for_each(|layer| place.snapshot(layer));
        let before = fs::read(place.cow(3)).unwrap();
        harm(&place);
        let err = open(&place.cow(3)).err().unwrap();
        assert!(err.to_string().contains(place.cow(number).to_str().unwrap()), "{err}");
        assert_eq!(fs::read(place.cow(3)).unwrap(), before);
        err
    };
    let err = broken(1, &|place| fs::remove_file(place.cow(1)).unwrap());
    assert!(matches!(err, ImageError::Backing { .. }), "{err}");
    let err = broken(1, &|place| fs::write(place.cow(1), [0; 9000]).unwrap());
    assert!(matches!(err, ImageError::Header { .. }), "{err}");
    let err = broken(1, &|place| _ = fs::copy(place.cow(2), place.cow(1)).unwrap());
    assert!(matches!(err, ImageError::Identity { .. }), "{err}");
    // Another disk of the same name.
    let err = broken(1, &|place| {
        fs::remove_file(place.cow(1)).unwrap();
        create_cow(&Host, &place.cow(1), &CreateOptions::over(CowFormat::Native, &place.base()))
            .unwrap();
    });
    assert!(matches!(err, ImageError::Identity { .. }), "{err}");
    let err = broken(1, &|place| {
        fs::remove_file(place.cow(1)).unwrap();
        create_cow(&Host, &place.cow(1), &CreateOptions::over(CowFormat::Uml, &place.base()))
            .unwrap();
    });
    assert!(matches!(err, ImageError::Format { .. }), "{err}");
}

#[test]
fn only_frozen_layers_and_raw_images_are_built_on() {
    let place = Place::new();
    let over = |format, path: PathBuf| CreateOptions {
        base: Some(BaseOptions { path, format, digest: None }),
        ..CreateOptions::over(CowFormat::Native, Path::new(""))
    };
    let create = |options: &CreateOptions| create_cow(&Host, &place.cow(1), options);
    let err = create(&over(BackingFormat::Native, place.cow(0))).unwrap_err();
    assert!(matches!(err, ImageError::NotFrozen { .. }), "{err}");
    let err = create(&over(BackingFormat::Uml, place.cow(0))).unwrap_err();
    assert!(matches!(err, ImageError::Format { .. }), "{err}");
    let err = create(&over(BackingFormat::Native, place.base())).unwrap_err();
    assert!(matches!(err, ImageError::Header { .. }), "{err}");
    assert!(!place.cow(1).exists());
    place.snapshot(0);
    create_cow(&Host, &place.cow(2), &over(BackingFormat::Native, place.cow(0))).unwrap();
    assert_eq!(content(&open(&place.cow(2)).unwrap()), fs::read(place.base()).unwrap());
    // What begins like a COW file is raw where the reference says so: its bytes are the disk.
    create_cow(&Host, &place.cow(3), &over(BackingFormat::Raw, place.cow(2))).unwrap();
    assert_eq!(content(&open(&place.cow(3)).unwrap()), fs::read(place.cow(2)).unwrap());
}

#[test]
fn a_uml_file_can_be_built_on() {
    let place = Place::new();
    let uml = place.cow(7);
    let disk = Disk::open_cow(
        &uml,
        Some(&place.base()),
        &DiskOptions { format: CowFormat::Uml, ..options() },
    )
    .unwrap();
    disk.write(range(5, 5), &[1; 5 * 512]).unwrap();
    let expected = content(&disk);
    // As if its daemon had died: the side file counts.
    drop(disk);
    let base = BaseOptions { path: uml, format: BackingFormat::Uml, digest: None };
    let create =
        CreateOptions { base: Some(base), ..CreateOptions::over(CowFormat::Native, Path::new("")) };
    create_cow(&Host, &place.cow(8), &create).unwrap();
    assert_eq!(content(&open(&place.cow(8)).unwrap()), expected);
}

#[test]
fn without_a_base_there_are_zeros() {
    let place = Place::new();
    let create = CreateOptions {
        base: None,
        size: Some(1 << 20),
        ..CreateOptions::over(CowFormat::Native, Path::new(""))
    };
    create_cow(&Host, &place.cow(1), &create).unwrap();
    let err = create_cow(&Host, &place.cow(2), &CreateOptions { size: None, ..create.clone() })
        .unwrap_err();
    assert!(matches!(err, ImageError::NoSize { .. }), "{err}");
    let disk = open(&place.cow(1)).unwrap();
    assert_eq!(content(&disk), vec![0; 1 << 20]);
    drop(disk);
    let err = Disk::open_cow(&place.cow(1), Some(&place.base()), &options()).err().unwrap();
    assert!(matches!(err, ImageError::NoBacking { .. }), "{err}");
}

#[test]
fn a_larger_or_smaller_disk_than_its_base() {
    let place = Place::new();
    let size = |size| CreateOptions {
        size: Some(size),
        ..CreateOptions::over(CowFormat::Native, &place.base())
    };
    let base = fs::read(place.base()).unwrap();
    create_cow(&Host, &place.cow(1), &size(1 << 20)).unwrap();
    let disk = open(&place.cow(1)).unwrap();
    let all = content(&disk);
    assert!(all[..base.len()] == base && all[base.len()..].iter().all(|byte| *byte == 0));
    create_cow(&Host, &place.cow(2), &size(1024)).unwrap();
    assert_eq!(content(&open(&place.cow(2)).unwrap()), base[..1024]);
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    let place = Place::new();
    let disk = open(&place.cow(0)).unwrap();
    disk.write(range(200, 100), &[1; 100 * 512]).unwrap();
    disk.close().unwrap();
    drop(disk);
    let resize = |size, shrink| resize(&Host, &place.cow(0), size, shrink);
    assert!(matches!(resize(100 * 512, false), Err(ChangeError::Shrink { .. })));
    assert!(matches!(resize(1000, true), Err(ChangeError::Size { .. })));
    assert!(matches!(resize(1 << 62, false), Err(ChangeError::Open(ImageError::Header { .. }))));
    resize(250 * 512, true).unwrap();
    let disk = open(&place.cow(0)).unwrap();
    assert_eq!(disk.capacity(), SectorCount::new(250));
    drop(disk);
    resize(100_000 * 512, false).unwrap();
    let disk = open(&place.cow(0)).unwrap();
    let all = content(&disk);
    assert!(all[..200 * 512].iter().all(|byte| *byte == 0xbb));
    assert!(all[200 * 512..250 * 512].iter().all(|byte| *byte == 1));
    // Neither the own data nor the base's.
    assert!(all[250 * 512..].iter().all(|byte| *byte == 0));
    drop(disk);
    place.snapshot(0);
    assert!(matches!(resize(1 << 20, true), Err(ChangeError::Open(ImageError::Frozen { .. }))));
}

#[test]
fn uml_files_are_neither_frozen_nor_resized() {
    let place = Place::new();
    create_cow(&Host, &place.cow(1), &CreateOptions::over(CowFormat::Uml, &place.base())).unwrap();
    let before = fs::read(place.cow(1)).unwrap();
    let err = snapshot(&Host, &place.cow(1), &place.cow(2)).unwrap_err();
    assert!(matches!(err, ChangeError::Open(ImageError::UmlCannot { .. })), "{err}");
    let err = resize(&Host, &place.cow(1), 1 << 20, false).unwrap_err();
    assert!(matches!(err, ChangeError::Open(ImageError::UmlCannot { .. })), "{err}");
    assert_eq!(fs::read(place.cow(1)).unwrap(), before);
}

#[test]
fn a_touched_base_is_taken_when_its_content_is_proved() {
    let place = Place::new();
    let (kept, lacking) = (place.cow(1), place.cow(2));
    let mut options = CreateOptions::over(CowFormat::Native, &place.base());
    create_cow(&Host, &lacking, &options).unwrap();
    options.base.as_mut().unwrap().digest = Some([1; 32]);
    create_cow(&Host, &kept, &options).unwrap();
    let copy = place.0.path().join("copy");
    fs::copy(place.base(), &copy).unwrap();
    fs::remove_file(place.base()).unwrap();
    let digest = |cow: &Path, digest: [u8; 32]| {
        rebind(&Host, cow, Some(&copy), Proof::Digest(&mut |_| Ok(digest)))
    };
    assert!(matches!(open(&kept), Err(ImageError::Backing { .. })));
    assert!(matches!(
        Disk::open_cow(&kept, Some(&copy), &self::options()),
        Err(ImageError::Identity { .. })
    ));
    assert!(matches!(digest(&kept, [2; 32]), Err(ChangeError::OtherContent { .. })));
    assert!(matches!(digest(&lacking, [1; 32]), Err(ChangeError::NoDigest { .. })));
    digest(&kept, [1; 32]).unwrap();
    open(&kept).unwrap();
    rebind(&Host, &lacking, Some(&copy), Proof::Trust).unwrap();
    open(&lacking).unwrap();
    fs::write(&copy, [0; 512]).unwrap();
    let err = rebind(&Host, &lacking, None, Proof::Trust).unwrap_err();
    assert!(matches!(err, ChangeError::OtherSize { .. }), "{err}");
}

#[test]
fn a_layer_that_moved_is_known_by_its_uuid() {
    let place = Place::new();
    place.snapshot(0);
    fs::rename(place.cow(0), place.cow(5)).unwrap();
    rebind(&Host, &place.cow(1), Some(&place.cow(5)), Proof::Digest(&mut |_| unreachable!()))
        .unwrap();
    open(&place.cow(1)).unwrap();
    let other = Place::new();
    other.snapshot(0);
    let err = rebind(&Host, &place.cow(1), Some(&other.cow(0)), Proof::Trust).unwrap_err();
    assert!(matches!(err, ChangeError::OtherLayer { .. }), "{err}");
}
