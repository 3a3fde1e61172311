//! Against qemu-storage-daemon: an independent backend. Skipped, with a message, if it is not
//! installed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{Process, SEED, mixed_job, options, run_and_read_back};
use blk_bench::driver::device::Device;
use blk_bench::driver::queue::SECTOR_SIZE;
use blk_bench::load;
use blk_bench::load::job::{Job, Mix};
use blk_bench::load::model::{Base, Expectation, Expected};
use blk_bench::load::rng::Rng;

/// Bytes of the base image; no multiple of a cluster.
const BASE_LEN: usize = (8 << 20) + 4096 + 512;

fn installed(program: &str) -> bool {
    let status = Command::new(program).arg("--version").stdout(Stdio::null()).status();
    if !status.is_ok_and(|status| status.success()) {
        eprintln!(
            "skipped: {program} is not installed (apt install qemu-utils qemu-system-common)"
        );
        return false;
    }
    true
}

fn shell(program: &str, arguments: &[&OsStr]) {
    let status = Command::new(program).args(arguments).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

fn write_base(path: &Path) {
    let mut rng = Rng::new(SEED);
    let words = std::iter::repeat_with(|| rng.next_u64().to_le_bytes());
    let bytes: Vec<u8> = words.flatten().take(BASE_LEN).collect();
    fs::write(path, bytes).unwrap();
}

/// Starts the daemon on an image; returns it with its socket.
fn serve(dir: &Path, image: &Path, format: &str) -> (Process, PathBuf) {
    let socket = dir.join("qsd.sock");
    let file = format!("driver=file,node-name=file,filename={},aio=threads", image.display());
    let export = format!(
        "type=vhost-user-blk,id=export,addr.type=unix,addr.path={},node-name=disk,writable=on,num-queues=3",
        socket.display()
    );
    let mut command = Command::new("qemu-storage-daemon");
    command.args([
        "--blockdev",
        &file,
        "--blockdev",
        &format!("driver={format},node-name=disk,file=file"),
    ]);
    command.args(["--export", &export]);
    (Process::spawn(&mut command), socket)
}

#[test]
fn a_qcow2_overlay_holds_what_several_queues_wrote() {
    if !installed("qemu-storage-daemon") || !installed("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (base, overlay, merged, expected_image) =
        (path("base"), path("qcow2"), path("merged"), path("expected"));
    write_base(&base);
    let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(OsStr::new);
    shell("qemu-img", &[&create[..], &[base.as_os_str(), overlay.as_os_str()]].concat());

    let (daemon, socket) = serve(dir.path(), &overlay, "qcow2");
    let capacity = (BASE_LEN / SECTOR_SIZE) as u64;
    let expected = run_and_read_back(&options(&socket), &mixed_job(capacity), &base).unwrap();
    daemon.terminate();
    expected.write_image(&expected_image, capacity).unwrap();

    let convert = ["convert", "-f", "qcow2", "-O", "raw"].map(OsStr::new);
    shell("qemu-img", &[&convert[..], &[overlay.as_os_str(), merged.as_os_str()]].concat());
    assert!(
        fs::read(&merged).unwrap() == fs::read(&expected_image).unwrap(),
        "merged and expected image differ"
    );
}

#[test]
fn a_sector_changed_behind_the_daemons_back_is_found() {
    if !installed("qemu-storage-daemon") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("raw");
    write_base(&image);
    let (_daemon, socket) = serve(dir.path(), &image, "raw");
    let mut device = Device::connect(&options(&socket)).unwrap();
    let region = mixed_job((BASE_LEN / SECTOR_SIZE) as u64).region;
    let job = Job {
        mix: Mix::WRITE,
        partitioned: true,
        once: true,
        verify: true,
        seed: SEED,
        ..Job::new(region)
    };
    let expectation =
        Expectation { base: Some(Base::open(Path::new("/dev/null")).unwrap()), seed: SEED };
    let mut outcome = load::run(device.take_queues(), &job, &expectation, None).unwrap();
    let models = std::mem::take(&mut outcome.models);
    let expected = Expected { region, models, expectation };
    let mut read_back =
        || load::read_back(&mut outcome.queues, &expected, 0..region.end(), job.wait);
    assert_eq!(read_back().unwrap(), region.sectors());

    let changed = 4321;
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(b"?", changed * SECTOR_SIZE as u64 + 300).unwrap();
    match read_back().unwrap_err() {
        load::RunError::Mismatch { mismatch, .. } => {
            assert_eq!(mismatch.sector, changed);
            assert!(mismatch.found.contains("torn or damaged"), "{mismatch}");
        }
        other => panic!("{other}"),
    }
}
