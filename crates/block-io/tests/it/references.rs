//! What a header may name, and what is opened of it.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use block_io::image::{
    BaseOptions, CreateOptions, Outside, Proof, create_cow, rebind, resize, snapshot,
};
use block_io::ops::inspect::{inspect, refers_to};
use block_io::ops::signature::signature_of;
use block_io::ops::{Output, check_target, rebase};
use block_io::storage::{Access, Env, Storage};
use block_io::{CowFormat, Disk, DiskOptions, GivenFiles, Host, ImageError};
use cow_format::header::{Backing, BackingFormat, Header, NativeHeader};
use cow_format::{Sector, SectorCount, SectorRange};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::Mode;

const SECTORS: u64 = 64;
const FORMATS: [CowFormat; 2] = [CowFormat::Native, CowFormat::Uml];

fn options() -> DiskOptions {
    DiskOptions { lock_wait: Duration::ZERO, ..DiskOptions::default() }
}

fn open(cow: &Path) -> Result<Disk, ImageError> {
    Disk::open_cow(cow, None, &options())
}

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(Sector::new(start), SectorCount::new(count)).unwrap()
}

fn first_byte(disk: &Disk) -> u8 {
    let mut sector = [0; 512];
    disk.read(range(0, 1), &mut sector).unwrap();
    sector[0]
}

/// The directories `vms`, with COW files, and `bases`, with the image `base` that is full of 0xbb.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        for dir in ["vms", "bases"] {
            fs::create_dir(place.path(dir)).unwrap();
        }
        place.image("bases/base");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn image(&self, name: &str) -> PathBuf {
        fs::write(self.path(name), vec![0xbb; usize::try_from(SECTORS * 512).unwrap()]).unwrap();
        self.path(name)
    }

    fn create(&self, name: &str, format: CowFormat, base: &Path) -> PathBuf {
        create_cow(&Host, &self.path(name), &CreateOptions::over(format, base)).unwrap();
        self.path(name)
    }
}

/// Writes another path into a native header, as its author could.
fn point(cow: &Path, to: &Path) {
    let bytes = fs::read(cow).unwrap();
    let header: Header = Header::check(&bytes[..8192], bytes.len() as u64).unwrap();
    let Header::Native(mut header) = header else { panic!("not native") };
    let old: &Backing = header.backing().unwrap();
    let (path, digest) = (to.as_os_str().as_bytes(), old.digest().copied());
    let new = Backing::new(path, old.format(), *old.identity(), digest).unwrap();
    NativeHeader::set_backing(&mut header, Some(new));
    let file = File::options().write(true).open(cow).unwrap();
    for _ in 0..2 {
        let write = header.next_write().unwrap();
        file.write_all_at(&write.bytes[..], write.at.get()).unwrap();
    }
}

/// Tells how often files are opened.
struct Opens(Inotify);

impl Opens {
    fn of(path: &Path) -> Self {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        // The others too, because equal events in a row are one.
        let others = AddWatchFlags::IN_CLOSE | AddWatchFlags::IN_ACCESS;
        inotify.add_watch(path, AddWatchFlags::IN_OPEN | others).unwrap();
        Opens(inotify)
    }

    /// How often since the last call; of those in a watched directory, of files called `name`.
    fn count(&self, name: Option<&str>) -> usize {
        let events = self.0.read_events().unwrap_or_default();
        let opens = events.iter().filter(|event| event.mask.contains(AddWatchFlags::IN_OPEN));
        opens.filter(|event| event.name.as_deref() == name.map(AsRef::as_ref)).count()
    }
}

fn is_outside(err: &ImageError, expected: Outside) -> bool {
    matches!(err, ImageError::NotAllowed { why, .. } if *why == expected)
}

#[test]
fn a_header_names_files_beside_it_and_in_allowed_directories_only() {
    let place = Place::new();
    let base = place.path("bases/base");
    let opens = Opens::of(&base);
    for (format, name) in FORMATS.into_iter().zip(["vms/native", "vms/uml"]) {
        let cow = place.create(name, format, &base);
        opens.count(None);
        let err = open(&cow).err().unwrap();
        assert!(is_outside(&err, Outside::Elsewhere), "{err}");
        let found = inspect(&Host, &cow, None).unwrap();
        assert!(is_outside(&found.problem.unwrap(), Outside::Elsewhere));
        let backing = found.files[0].backing.as_ref().unwrap();
        assert_eq!((&backing.path, backing.found), (&base, None));
        let err = rebind(&Host, &cow, None, Proof::Trust).unwrap_err().to_string();
        assert!(err.contains("outside of"), "{err}");
        assert_eq!(opens.count(None), 0, "{name}: what a header names was opened");
        // The user may name it.
        let disk = Disk::open_cow(&cow, Some(&base), &options()).unwrap();
        assert_eq!(first_byte(&disk), 0xbb);
        disk.close().unwrap();
    }
    // Neither a way up nor a link leads out, but both may stay inside.
    let cow = place.path("vms/native");
    symlink("../bases/base", place.path("vms/out")).unwrap();
    symlink(&base, place.path("vms/absolute")).unwrap();
    symlink(place.path("bases"), place.path("vms/dir")).unwrap();
    opens.count(None);
    for (to, why) in [
        ("../bases/base", Outside::Elsewhere),
        ("x/../../bases/base", Outside::Elsewhere),
        ("out", Outside::LeadsOut),
        ("absolute", Outside::LeadsOut),
        ("dir/base", Outside::LeadsOut),
    ] {
        point(&cow, Path::new(to));
        let err = open(&cow).err().unwrap();
        assert!(is_outside(&err, why), "{to}: {err}");
    }
    assert_eq!(opens.count(None), 0);
    fs::copy(&base, place.path("vms/inside")).unwrap();
    let inside = File::options().write(true).open(place.path("vms/inside")).unwrap();
    inside.set_modified(fs::metadata(&base).unwrap().modified().unwrap()).unwrap();
    symlink("inside", place.path("vms/link")).unwrap();
    for to in ["inside", "link", "./x/../link"] {
        point(&cow, Path::new(to));
        open(&cow).unwrap().close().unwrap();
    }
    Host::allow_backing_dir(&place.path("bases")).unwrap();
    open(&place.path("vms/uml")).unwrap().close().unwrap();
    for to in ["../bases/base", "out", "absolute"] {
        point(&cow, Path::new(to));
        open(&cow).unwrap().close().unwrap();
    }
    symlink("round", place.path("vms/round")).unwrap();
    symlink(place.path("vms/round-2"), place.path("vms/round-2")).unwrap();
    for to in ["dir/base", "round-2"] {
        point(&cow, Path::new(to));
        let err = open(&cow).err().unwrap();
        assert!(is_outside(&err, Outside::LeadsOut), "{to}: {err}");
    }
    point(&cow, Path::new("round"));
    assert!(matches!(open(&cow), Err(ImageError::Backing { .. })));
    assert!(Host::allow_backing_dir(&base).is_err());
}

#[test]
fn a_chain_that_is_named_is_the_whole_chain() {
    let place = Place::new();
    let (base, other) = (place.image("vms/base"), place.path("bases/base"));
    fs::write(&other, [0; 512]).unwrap();
    let layer = place.create("vms/layer", CowFormat::Native, &base);
    let top = place.path("vms/top");
    snapshot(&Host, &layer, &top).unwrap();
    open(&top).unwrap().close().unwrap();
    let named = |below: &[&Path]| {
        let below: Vec<_> = below.iter().map(|path| path.to_path_buf()).collect();
        Disk::open_named(&top, &below, &options())
    };
    assert_eq!(first_byte(&named(&[&layer, &base]).unwrap()), 0xbb);
    let err = named(&[&layer]).err().unwrap();
    assert!(is_outside(&err, Outside::NotNamed), "{err}");
    let err = named(&[&layer, &base, &other]).err().unwrap();
    assert!(matches!(err, ImageError::NoBacking { .. }), "{err}");
    assert!(err.to_string().contains(other.to_str().unwrap()), "{err}");
    // Each has to be the right one.
    let err = named(&[&layer, &other]).err().unwrap();
    assert!(matches!(err, ImageError::Identity { .. }), "{err}");
    // What is beside a layer that is named for a new file counts as well.
    let base = BaseOptions { path: layer, format: BackingFormat::Native, digest: None };
    let over = CreateOptions::over(CowFormat::Native, Path::new(""));
    let create = CreateOptions { base: Some(base), ..over };
    create_cow(&Host, &place.path("bases/new"), &create).unwrap();
    // From the new file the layer's base is elsewhere.
    let err = open(&place.path("bases/new")).err().unwrap();
    assert!(is_outside(&err, Outside::Elsewhere), "{err}");
}

/// Goes through everything that opens what a header or a user names.
fn try_all(place: &Place, special: &Path) {
    let base = place.image("vms/base");
    let cow = place.create("vms/cow", CowFormat::Native, &base);
    let kind = |err: &ImageError| assert!(matches!(err, ImageError::Kind { .. }), "{err}");
    // The base is named, so its path in the header is only compared.
    point(&cow, special);
    Disk::open_cow(&cow, Some(&base), &options()).unwrap().close().unwrap();
    // Named by the user.
    kind(&open(special).err().unwrap());
    kind(&Disk::open_cow(&cow, Some(special), &options()).err().unwrap());
    kind(&Disk::open_raw(special, &options()).err().unwrap());
    kind(&inspect(&Host, special, None).unwrap_err());
    let over = |base: &Path| CreateOptions::over(CowFormat::Native, base);
    kind(&create_cow(&Host, &place.path("vms/new"), &over(special)).unwrap_err());
    assert_eq!(signature_of(&Host, special), None);
    check_target(&Host, special, true, &[special]).unwrap_err();
    assert!(Output::create(&Host, &place.path("vms/new"), true, &[special]).is_ok());
    let raw = BaseOptions { path: special.to_owned(), format: BackingFormat::Raw, digest: None };
    rebase(&Host, &cow, Some(&raw), &|_| ()).unwrap_err();
    // Named by the header.
    point(&cow, special);
    kind(&open(&cow).err().unwrap());
    kind(&inspect(&Host, &cow, None).unwrap().problem.unwrap());
    rebind(&Host, &cow, None, Proof::Trust).unwrap_err();
    resize(&Host, &cow, 1 << 20, false).unwrap_err();
    snapshot(&Host, &cow, &place.path("vms/new")).unwrap_err();
    assert!(refers_to(&Host, &cow, Host.id(special).unwrap()));
}

#[test]
fn what_is_no_file_is_never_opened() {
    let place = Place::new();
    let fifo = place.path("vms/fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let opens = Opens::of(&fifo);
    try_all(&place, &fifo);
    assert_eq!(opens.count(None), 0);
    // The watch works.
    drop(File::options().read(true).write(true).open(&fifo).unwrap());
    assert_eq!(opens.count(None), 1);
}

#[test]
fn a_terminal_is_never_opened() {
    let place = Place::new();
    let Ok(pty) = nix::pty::openpty(None, None) else {
        println!("skipped: no pseudo-terminals");
        return;
    };
    let slave = fs::read_link(format!("/proc/self/fd/{}", pty.slave.as_raw_fd())).unwrap();
    Host::allow_backing_dir(slave.parent().unwrap()).unwrap();
    let opens = Opens::of(&slave);
    try_all(&place, &slave);
    assert_eq!(opens.count(None), 0);
    drop(File::open(&slave).unwrap());
    assert_eq!(opens.count(None), 1);
}

/// A UML COW file whose daemon has died, with its side file.
fn left_open(place: &Place) -> (PathBuf, PathBuf) {
    let cow = place.create("vms/uml", CowFormat::Uml, &place.image("vms/uml-base"));
    let disk = open(&cow).unwrap();
    disk.write(range(0, 1), &[7; 512]).unwrap();
    drop(disk);
    (cow, place.path("vms/uml.live"))
}

#[test]
fn a_side_file_that_somebody_else_may_have_made_is_refused() {
    let place = Place::new();
    let (cow, live) = left_open(&place);
    let victim = place.path("bases/victim");
    fs::rename(&live, &victim).unwrap();
    let before = fs::read(&victim).unwrap();
    let refused = |expected: &str| {
        for read_only in [false, true] {
            let err = Disk::open_cow(&cow, None, &DiskOptions { read_only, ..options() });
            let err = err.err().unwrap();
            assert!(matches!(err, ImageError::ForeignSideFile { .. }), "{err}");
            assert!(err.to_string().contains(expected), "{err}");
        }
        fs::remove_file(&live).unwrap();
        assert!(fs::read(&victim).unwrap() == before);
    };
    symlink(&victim, &live).unwrap();
    refused("symbolic link");
    fs::hard_link(&victim, &live).unwrap();
    refused("hard link");
    fs::copy(&victim, &live).unwrap();
    fs::set_permissions(&live, fs::Permissions::from_mode(0o622)).unwrap();
    refused("can be written");
    fs::copy(&victim, &live).unwrap();
    let owned = std::os::unix::fs::chown(&live, Some(65534), None);
    match owned {
        Ok(()) if nix::unistd::geteuid().is_root() => refused("belongs"),
        _ => println!("skipped: cannot give a file to another user"),
    }
    // The right one still counts.
    _ = fs::remove_file(&live);
    fs::rename(&victim, &live).unwrap();
    let disk = open(&cow).unwrap();
    assert_eq!(first_byte(&disk), 7);
    disk.close().unwrap();
}

#[test]
fn the_side_file_that_was_checked_is_the_one_that_is_written() {
    let place = Place::new();
    let (cow, _) = left_open(&place);
    let opens = Opens::of(&place.path("vms"));
    let disk = open(&cow).unwrap();
    // Once for what the kernel failed to write, and once, checked, for the life of the disk.
    assert_eq!(opens.count(Some("uml.live")), 2);
    disk.write(range(1, 1), &[8; 512]).unwrap();
    disk.flush().unwrap();
    assert_eq!(opens.count(Some("uml.live")), 0);
    disk.close().unwrap();
}

#[test]
fn new_files_are_for_their_owner_only() {
    let place = Place::new();
    let base = place.image("vms/base");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    let native = place.create("vms/native", CowFormat::Native, &base);
    let (uml, live) = left_open(&place);
    let (out, target) = (place.path("vms/out"), place.path("vms/target"));
    Output::create(&Host, &out, false, &[]).unwrap().place().unwrap();
    drop(Host.create_new(&target).unwrap());
    for path in [&native, &uml, &live, &out, &target] {
        assert_eq!(mode(path), 0o600, "{}", path.display());
    }
    // Who could use the disk still can.
    fs::set_permissions(&native, fs::Permissions::from_mode(0o640)).unwrap();
    snapshot(&Host, &native, &place.path("vms/next")).unwrap();
    assert_eq!(mode(&place.path("vms/next")), 0o640);
    open(&uml).unwrap().close().unwrap();
    fs::set_permissions(&uml, fs::Permissions::from_mode(0o664)).unwrap();
    drop(open(&uml).unwrap());
    assert_eq!(mode(&live), 0o664);
    let options =
        CreateOptions { mode: Some(0o644), ..CreateOptions::over(CowFormat::Native, &base) };
    create_cow(&Host, &place.path("vms/shared"), &options).unwrap();
    assert_eq!(mode(&place.path("vms/shared")), 0o644);
}

fn fd(path: &Path, options: &mut fs::OpenOptions) -> OwnedFd {
    options.open(path).unwrap().into()
}

fn given(top: &Path, below: &[&Path]) -> GivenFiles {
    let top_file = fd(top, File::options().read(true).write(true));
    let below = below.iter().map(|path| {
        let file = block_io::storage::file::File::given_base(fd(path, File::options().read(true)));
        (file.unwrap(), path.to_path_buf())
    });
    GivenFiles {
        top: block_io::storage::file::File::given(top_file, None, Access::ReadWrite).unwrap(),
        name: top.to_owned(),
        below: below.collect(),
    }
}

#[test]
fn a_chain_of_open_files_needs_no_path() {
    let place = Place::new();
    let base = place.path("bases/base");
    let layer = place.create("vms/layer", CowFormat::Native, &base);
    let disk = Disk::open_cow(&layer, Some(&base), &options()).unwrap();
    disk.write(range(0, 1), &[1; 512]).unwrap();
    disk.close().unwrap();
    drop(disk);
    Host::allow_backing_dir(&place.path("bases")).unwrap();
    let top = place.path("vms/top");
    snapshot(&Host, &layer, &top).unwrap();
    let files = given(&top, &[&layer, &base]);
    let short = given(&top, &[&layer]);
    let wrong = given(&top, &[&base, &layer]);
    let busy = given(&top, &[&layer, &base]);
    // Nothing has its name any more.
    let gone = place.path("gone");
    fs::rename(place.path("vms"), &gone).unwrap();
    fs::rename(place.path("bases"), gone.join("bases")).unwrap();
    let open = |files| Disk::open_cow_files(files, false, &options());
    let err = open(short).err().unwrap();
    assert!(is_outside(&err, Outside::NotNamed), "{err}");
    open(wrong).err().unwrap();
    let again = files.again().unwrap();
    let disk = open(files).unwrap();
    assert!(matches!(open(busy), Err(ImageError::Locked { .. })));
    assert_eq!(first_byte(&disk), 1);
    disk.write(range(1, 1), &[2; 512]).unwrap();
    disk.close().unwrap();
    disk.layers().iter().for_each(|layer| layer.file().unlock().unwrap());
    drop(disk);
    let disk = open(again).unwrap();
    let mut sector = [0; 512];
    disk.read(range(1, 1), &mut sector).unwrap();
    assert_eq!(sector, [2; 512]);
    disk.close().unwrap();
}

#[test]
fn a_description_that_does_not_do_is_refused() {
    use block_io::storage::file::File as Given;
    let place = Place::new();
    let base = place.path("bases/base");
    let read = || fd(&base, File::options().read(true));
    let write = || fd(&base, File::options().read(true).write(true));
    let with = |flags| {
        use std::os::unix::fs::OpenOptionsExt;
        fd(&base, File::options().read(true).write(true).custom_flags(flags))
    };
    let refused = |given: std::io::Result<Given>, expected: &str| {
        let err = given.unwrap_err();
        assert!(err.to_string().contains(expected), "{err}");
    };
    refused(Given::given(read(), None, Access::ReadWrite), "reading only");
    refused(
        Given::given(fd(&base, File::options().write(true)), None, Access::Read),
        "writing only",
    );
    refused(Given::given(with(libc::O_APPEND), None, Access::ReadWrite), "O_APPEND");
    refused(Given::given(with(libc::O_PATH), None, Access::ReadWrite), "O_PATH");
    refused(Given::given_base(write()), "for writing too");
    refused(Given::given(write(), Some(write()), Access::ReadWrite), "O_DIRECT");
    refused(Given::given(with(libc::O_DIRECT), None, Access::ReadWrite), "O_DIRECT");
    let other = place.image("bases/other");
    let direct = with(libc::O_DIRECT);
    let other = fd(&other, File::options().read(true).write(true));
    refused(Given::given(other, Some(direct), Access::ReadWrite), "another file");
    let file = Given::given(with(libc::O_NONBLOCK), Some(with(libc::O_DIRECT)), Access::ReadWrite);
    assert!(file.unwrap().direct().is_some());
    // A UML file has another beside it.
    let uml = place.create("vms/uml", CowFormat::Uml, &base);
    let opened = Disk::open_cow_files(given(&uml, &[&base]), false, &options());
    assert!(matches!(opened, Err(ImageError::UmlCannot { .. })));
    assert!(Host.open(&uml, Access::Read).unwrap().stat().unwrap().links == 1);
}
