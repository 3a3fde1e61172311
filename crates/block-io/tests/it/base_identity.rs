//! How a native file knows its base: size and time, then inode, then a sample of the content; and
//! who writes that down.

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use block_io::image::{BaseOptions, CreateOptions, Proof, create_cow, rebind, resize, snapshot};
use block_io::ops::inspect::inspect;
use block_io::ops::{Copying, merge_in_place, rebase, rebase_unsafe};
use block_io::storage::file::Host;
use block_io::{CowFormat, Disk, DiskOptions, ImageError};
use cow_format::Header;
use cow_format::header::{Backing, BackingFormat, NativeHeader};
use cow_format::identity::{BackingIdentity, Doubt, IdentityError, Witness};
use testkit::loop_device::LoopDevice;

const LEN: usize = 4 << 20;
const COPYING: Copying<'static> = Copying { detect_zeroes: true, progress: &|_| () };

/// A directory with the base `base`, whose mtime is the one of all files in a Nix store.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        place.image("base", 1);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An image of [`LEN`] bytes; all have the same time.
    fn image(&self, name: &str, fill: u8) -> PathBuf {
        fs::write(self.path(name), vec![fill; LEN]).unwrap();
        set_mtime(&self.path(name), Duration::from_secs(1));
        self.path(name)
    }

    fn create(&self, cow: &str, base: &str) {
        let options = CreateOptions::over(CowFormat::Native, &self.path(base));
        create_cow(&Host, &self.path(cow), &options).unwrap();
    }

    fn open(&self, cow: &str, read_only: bool) -> Result<Disk, ImageError> {
        // A program that another test starts has the locks for a moment.
        let (lock_wait, how) = (Duration::from_secs(60), DiskOptions::default());
        Disk::open_cow(&self.path(cow), None, &DiskOptions { read_only, lock_wait, ..how })
    }

    fn header(&self, cow: &str) -> NativeHeader {
        let bytes = fs::read(self.path(cow)).unwrap();
        match Header::check(&bytes[..8192], bytes.len() as u64).unwrap() {
            Header::Native(header) => *header,
            Header::Uml(_) => panic!("not native"),
        }
    }

    fn witness(&self, cow: &str) -> Witness {
        match *self.header(cow).backing().unwrap().identity() {
            BackingIdentity::Image { witness, .. } => witness,
            other => panic!("{other:?}"),
        }
    }

    /// As an older program would have written the header.
    fn forget_witness(&self, cow: &str) {
        let mut header = self.header(cow);
        let old = header.backing().unwrap();
        let BackingIdentity::Image { size, mtime, .. } = *old.identity() else { panic!() };
        let identity = BackingIdentity::Image { size, mtime, witness: Witness::NONE };
        let new = Backing::new(old.path(), old.format(), identity, None).unwrap();
        header.set_backing(Some(new));
        let file = File::options().write(true).open(self.path(cow)).unwrap();
        for _ in 0..2 {
            let write = header.next_write().unwrap();
            file.write_all_at(&write.bytes[..], write.at.get()).unwrap();
        }
    }

    /// Puts another image in the place of `base`, with the same size and time, and back.
    fn is_noticed_when_replaced(&self, cow: &str, base: &str) {
        let (base, kept) = (self.path(base), self.path("kept"));
        let mtime = fs::metadata(&base).unwrap().modified().unwrap();
        fs::rename(&base, &kept).unwrap();
        let mut bytes = fs::read(&kept).unwrap();
        bytes[0] ^= 1;
        fs::write(&base, &bytes).unwrap();
        File::options().write(true).open(&base).unwrap().set_modified(mtime).unwrap();
        let refused = self.open(cow, true);
        assert!(is_replaced(&refused), "{cow}: {:?}", refused.err());
        fs::rename(&kept, &base).unwrap();
        self.open(cow, true).unwrap();
    }
}

fn is_replaced(opened: &Result<Disk, ImageError>) -> bool {
    let Err(ImageError::Identity { source, .. }) = opened else { return false };
    matches!(source, IdentityError::Replaced { .. })
}

fn set_mtime(path: &Path, since: Duration) {
    let time = SystemTime::UNIX_EPOCH + since;
    File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

fn doubt(cow: &Path) -> Option<Doubt> {
    inspect(&Host, cow, None).unwrap().files[0].backing.as_ref().unwrap().doubt
}

fn base(path: PathBuf) -> BaseOptions {
    BaseOptions { path, format: BackingFormat::Raw, digest: None }
}

#[test]
fn a_base_that_was_replaced_is_refused_and_a_copy_is_taken() {
    let place = Place::new();
    place.create("cow", "base");
    place.is_noticed_when_replaced("cow", "base");
    let before = place.witness("cow");
    assert!(before.sample.is_some());
    // The same content in another inode, as after a restore.
    fs::copy(place.path("base"), place.path("copy")).unwrap();
    set_mtime(&place.path("copy"), Duration::from_secs(1));
    fs::rename(place.path("copy"), place.path("base")).unwrap();
    place.open("cow", true).unwrap();
    assert_eq!(place.witness("cow"), before, "reading changes nothing");
    drop(place.open("cow", false).unwrap());
    let now = place.witness("cow");
    assert_eq!(now.sample, before.sample);
    if let Some(inode) = now.inode {
        assert_eq!(inode.number, fs::metadata(place.path("base")).unwrap().ino());
        assert_ne!(now.inode, before.inode, "known again");
    } else {
        println!("skipped: this file system knows no time of birth");
    }
    place.is_noticed_when_replaced("cow", "base");
}

#[test]
fn every_writer_of_a_reference_writes_the_witness() {
    let place = Place::new();
    place.image("other", 2);
    place.create("created", "base");
    for cow in ["rebased", "unsafely", "rebound", "merged", "resized"] {
        place.create(cow, "base");
    }
    let other = base(place.path("other"));
    rebase(&Host, &place.path("rebased"), Some(&other), &|_| ()).unwrap();
    rebase_unsafe(&Host, &place.path("unsafely"), Some(&other)).unwrap();
    rebind(&Host, &place.path("rebound"), Some(&place.path("other")), Proof::Trust).unwrap();
    for cow in ["rebased", "unsafely", "rebound"] {
        place.is_noticed_when_replaced(cow, "other");
    }
    resize(&Host, &place.path("resized"), 8 << 20, false).unwrap();
    for cow in ["created", "resized"] {
        place.is_noticed_when_replaced(cow, "base");
    }
    // A layer is identified by its UUID; the file below it, by its witness.
    snapshot(&Host, &place.path("resized"), &place.path("above")).unwrap();
    place.is_noticed_when_replaced("above", "base");
    let disk = place.open("merged", false).unwrap();
    let first =
        cow_format::SectorRange::new(cow_format::Sector::new(0), cow_format::SectorCount::new(1));
    disk.write(first.unwrap(), &[9; 512]).unwrap();
    disk.close().unwrap();
    drop(disk);
    merge_in_place(&Host, &place.path("merged"), None, NonZeroUsize::MIN, COPYING).unwrap();
    place.is_noticed_when_replaced("merged", "base");
    assert!(place.open("created", true).is_err(), "the others find out as before");
}

#[test]
fn a_file_of_an_older_program_opens_as_before_and_gets_a_witness() {
    let place = Place::new();
    set_mtime(&place.path("base"), Duration::new(1_790_000_000, 5));
    place.create("cow", "base");
    let before = place.witness("cow");
    place.forget_witness("cow");
    // Half a match leaves it as it is, and a rebind makes a whole one of it.
    set_mtime(&place.path("base"), Duration::from_secs(1_790_000_000));
    drop(place.open("cow", false).unwrap());
    assert_eq!(place.witness("cow"), Witness::NONE);
    assert!(matches!(doubt(&place.path("cow")), Some(Doubt::WholeSeconds { .. })));
    rebind(&Host, &place.path("cow"), None, Proof::Trust).unwrap();
    assert_eq!((place.witness("cow"), doubt(&place.path("cow"))), (before, None));
    // A whole match.
    place.forget_witness("cow");
    place.open("cow", true).unwrap();
    assert_eq!(place.witness("cow"), Witness::NONE, "reading changes nothing");
    let disk = place.open("cow", false).unwrap();
    disk.close().unwrap();
    assert_eq!(place.witness("cow"), before);
}

#[test]
fn lost_nanoseconds_are_taken_if_the_sample_agrees() {
    let place = Place::new();
    set_mtime(&place.path("base"), Duration::new(1_790_000_000, 123));
    place.create("cow", "base");
    set_mtime(&place.path("base"), Duration::from_secs(1_790_000_000));
    assert!(matches!(doubt(&place.path("cow")), Some(Doubt::WholeSeconds { .. })));
    place.is_noticed_when_replaced("cow", "base");
    // Even in the same inode.
    let file = File::options().read(true).write(true).open(place.path("base")).unwrap();
    file.write_all_at(&[7], LEN as u64 - 1).unwrap();
    set_mtime(&place.path("base"), Duration::from_secs(1_790_000_000));
    assert!(is_replaced(&place.open("cow", true)));
    file.write_all_at(&[1], LEN as u64 - 1).unwrap();
    set_mtime(&place.path("base"), Duration::from_secs(1_790_000_000));
    drop(place.open("cow", false).unwrap());
    assert_eq!(doubt(&place.path("cow")), None, "the time is written down as it is now");
    set_mtime(&place.path("base"), Duration::from_secs(1_790_000_001));
    assert!(place.open("cow", true).is_err());
}

#[test]
fn a_block_device_is_known_by_size_and_sample() {
    let place = Place::new();
    let Some(device) = LoopDevice::new(&place.path("base"), 512) else { return };
    Host::allow_backing_dir(Path::new("/dev")).unwrap();
    let create = |name, format| {
        let options = CreateOptions::over(format, device.path());
        create_cow(&Host, &place.path(name), &options).unwrap();
    };
    create("cow", CowFormat::Native);
    create("uml", CowFormat::Uml);
    create("old", CowFormat::Native);
    place.forget_witness("old");
    // As a boot does, and udev.
    set_mtime(device.path(), Duration::from_secs(12_345));
    for cow in ["cow", "uml", "old"] {
        place.open(cow, true).unwrap();
    }
    assert_eq!(doubt(&place.path("cow")), None);
    assert_eq!(doubt(&place.path("uml")), Some(Doubt::SizeAlone));
    assert_eq!(doubt(&place.path("old")), Some(Doubt::SizeAlone));
    drop(place.open("old", false).unwrap());
    assert_eq!(doubt(&place.path("old")), None, "it has a sample now");
    // Its mtime changes with each write, and is not looked at.
    let file = File::options().write(true).open(device.path()).unwrap();
    file.write_all_at(&[7; 512], 1 << 20).unwrap();
    for cow in ["cow", "old"] {
        assert!(is_replaced(&place.open(cow, true)), "{cow}");
    }
    place.open("uml", true).unwrap();
    file.write_all_at(&[1; 512], 1 << 20).unwrap();
    place.open("cow", true).unwrap();
}
