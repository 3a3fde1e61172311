//! The checks see what they are there for: a backend that is right passes in every mode of the
//! driver, and one that is wrong in one single request is found out.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use crate::common::{RamDisk, SECTORS, mixed_job, options, run_and_read_back};
use blk_bench::driver::device::{Device, Options};
use blk_bench::driver::queue::{Status, Wait};
use blk_bench::error::Error;
use blk_bench::load::job::{Job, Mix};
use blk_bench::load::model::Expectation;
use blk_bench::load::{self, RunError};
use blk_bench::null::Fault;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

const NO_BASE: &str = "/dev/null";

fn run(fault: Option<Fault>, job: &Job, change: impl FnOnce(&mut Options)) -> Result<(), RunError> {
    let disk = RamDisk::new(fault);
    let mut options = options(&disk.socket);
    change(&mut options);
    run_and_read_back(&options, job, Path::new(NO_BASE)).map(drop)
}

#[test]
fn a_correct_backend_passes_in_every_mode() {
    for wait in [Wait::Eventfd, Wait::Adaptive(Duration::from_micros(20)), Wait::Poll] {
        for refuse in [0, 1 << VIRTIO_RING_F_EVENT_IDX, 1 << VIRTIO_RING_F_INDIRECT_DESC] {
            for segment in [None, Some(4096), Some(1000)] {
                let job = Job { wait, count: Some(2_000), ..mixed_job(SECTORS) };
                let result = run(None, &job, |options| {
                    options.refuse_features = refuse;
                    options.segment = segment;
                });
                result
                    .unwrap_or_else(|e| panic!("{wait:?}, without {refuse:#x}, {segment:?}: {e}"));
            }
        }
    }
}

/// Each block is written once, so that no later write hides a wrong one.
fn write_once() -> Job {
    let mix = Mix::WRITE;
    let job = mixed_job(SECTORS);
    Job { mix, once: true, count: None, min_sectors: job.region.granule, flush_every: None, ..job }
}

fn mismatch(fault: Fault) -> (String, String) {
    match run(Some(fault), &write_once(), |_| {}) {
        Err(RunError::Mismatch { mismatch, .. }) => (mismatch.found, mismatch.expected),
        other => panic!("{fault:?}: {other:?}"),
    }
}

#[test]
fn a_lost_write_is_found() {
    let (found, expected) = mismatch(Fault::LoseWrite(77));
    assert_eq!(found, "zeros");
    assert!(expected.starts_with("write "), "{expected}");
}

#[test]
fn a_torn_write_is_found() {
    let (found, _) = mismatch(Fault::TearWrite(5));
    assert!(found.contains("torn or damaged"), "{found}");
}

#[test]
fn a_misplaced_write_is_found() {
    let (found, expected) = mismatch(Fault::MisplaceWrite(50));
    assert_ne!(found, expected);
}

#[test]
fn a_request_answered_twice_is_found() {
    let result = run(Some(Fault::AnswerTwice(1234)), &mixed_job(SECTORS), |_| {});
    assert!(matches!(result, Err(RunError::Device(Error::BadHead { .. }))), "{result:?}");
}

#[test]
fn a_request_that_is_never_answered_is_found() {
    for wait in [Wait::Eventfd, Wait::Poll] {
        let job = Job { wait, ..mixed_job(SECTORS) };
        let result = run(Some(Fault::NoAnswer(99)), &job, |options| {
            options.stall_after = Duration::from_millis(100)
        });
        assert!(
            matches!(result, Err(RunError::Device(Error::Stalled { .. }))),
            "{wait:?}: {result:?}"
        );
    }
}

#[test]
fn a_failed_request_ends_the_run_or_is_counted() {
    let result = run(Some(Fault::IoError(300)), &mixed_job(SECTORS), |_| {});
    assert!(matches!(result, Err(RunError::Request { status: Status::IoError, .. })), "{result:?}");

    let disk = RamDisk::new(Some(Fault::IoError(300)));
    let mut device = Device::connect(&options(&disk.socket)).unwrap();
    let job = Job { tolerate_errors: true, ..mixed_job(SECTORS) };
    let expectation = Expectation { base: None, seed: job.seed };
    let outcome = load::run(device.take_queues(), &job, &expectation, None).unwrap();
    assert_eq!(outcome.errors(), 1);
}

#[test]
fn a_wrong_length_in_the_used_ring_is_found() {
    let result = run(Some(Fault::ShortUsedLen(300)), &mixed_job(SECTORS), |_| {});
    assert!(matches!(result, Err(RunError::UsedLen { .. })), "{result:?}");
}

#[test]
fn the_end_of_the_backend_is_noticed_while_asleep_and_while_polling() {
    for wait in [Wait::Eventfd, Wait::Poll] {
        let job = Job { wait, ..mixed_job(SECTORS) };
        let result = run(Some(Fault::Disconnect(300)), &job, |_| {});
        assert!(
            matches!(result, Err(RunError::Device(Error::Disconnected { .. }))),
            "{wait:?}: {result:?}"
        );
    }
}

fn blk_bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_blk-bench")).args(arguments).output().unwrap()
}

#[test]
fn the_exit_status_tells_wrong_options_from_failures() {
    let usage = [
        ["run", "--socket-path=/nonexistent", "--block-size=100"],
        ["run", "--socket-path=/nonexistent", "--ops=trim"],
        ["run", "--socket-path=/nonexistent", "--read-back"],
    ];
    for arguments in usage {
        let output = blk_bench(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
    let output = blk_bench(&["run", "--socket-path=/nonexistent/s", "--connect-for=0s"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("cannot connect to /nonexistent/s"),
        "{output:?}"
    );
}

#[test]
fn a_base_is_not_overwritten_with_what_is_expected() {
    let base = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&base, [1; 512]).unwrap();
    let path = base.path().display();
    let (base_is, expected) = (format!("--base={path}"), format!("--write-expected={path}"));
    let output = blk_bench(&["run", "--socket-path=/nonexistent", "--verify", &base_is, &expected]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("--base and --write-expected are one file"), "{text}");
    assert_eq!(std::fs::read(&base).unwrap(), [1; 512]);
}

#[test]
fn options_that_the_device_cannot_meet_are_wrong_options() {
    let cases: [&[&str]; 4] =
        [&["--queues=5"], &["--region=1G"], &["--offset=8M"], &["--depth=200", "--queue-size=128"]];
    for arguments in cases {
        let disk = RamDisk::new(None);
        let socket = format!("--socket-path={}", disk.socket.display());
        let output = blk_bench(&[&["run", &socket, "--count=1"], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
}

#[test]
fn a_failed_verification_names_the_sector_and_the_seed() {
    let disk = RamDisk::new(Some(Fault::LoseWrite(3)));
    let socket = format!("--socket-path={}", disk.socket.display());
    let output = blk_bench(&[
        "run",
        &socket,
        "--ops=write",
        "--once",
        "--verify",
        "--read-back",
        "--seed=42",
    ]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    for part in
        ["verification failed: sector ", "found zeros; expected write 3 of queue 0", "(seed 42)"]
    {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn json_has_the_figures() {
    let disk = RamDisk::new(None);
    let socket = format!("--socket-path={}", disk.socket.display());
    let output =
        blk_bench(&["run", &socket, "--count=1000", "--depth=8", "--queues=2", "--output=json"]);
    assert!(output.status.success(), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["requests"], 1000);
    assert_eq!(report["ops"][0]["op"], "read");
    assert!(report["iops"].as_f64().unwrap() > 0.0);
    assert!(
        report["ops"][0]["latency_us"]["p99"].as_f64()
            >= report["ops"][0]["latency_us"]["p50"].as_f64()
    );
    assert!(report["server"]["memory_after"]["rss_kib"].as_u64().unwrap() > 0);
}
