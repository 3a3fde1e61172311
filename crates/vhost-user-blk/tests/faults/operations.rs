//! What the kernel refuses to the io_uring of a queue's thread in a running daemon.

use std::process::Command;

use block_io::ring::IoEngine;
use testkit::frontend::{F_PROTOCOL_FEATURES, F_VERSION_1};
use testkit::ring::running;

use crate::common::{Daemon, PROGRAM, image, sector};

/// By their numbers in `<linux/io_uring.h>`: READV, WRITEV, POLL_ADD, POLL_REMOVE, FALLOCATE, READ,
/// WRITE.
const OPERATIONS: [u8; 7] = [1, 2, 6, 7, 17, 22, 23];
/// REGISTER_FILES_UPDATE.
const REGISTRATIONS: [u32; 1] = [6];

/// The numbers in a list as `{:?}` shows it.
fn numbers(list: &str) -> Vec<u32> {
    list.split(", ").filter(|text| !text.is_empty()).map(|text| text.parse().unwrap()).collect()
}

#[test]
fn seven_operations_on_registered_files_are_left() {
    if let Err(why) = IoEngine::IoUring.probe() {
        println!("skipped: no io_uring here: {why}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let mut command = Command::new(PROGRAM);
    command.env("VHOST_USER_BLK_TRY_OPERATIONS", "1");
    command.arg("--socket-path").arg(&socket).arg("--io-engine=io_uring").arg("--format=raw");
    command.arg("--blk-file").arg(image(directory.path()));
    // Its filter would refuse the registrations before the io_uring does.
    command.arg("--sandbox=off");
    let mut daemon = Daemon::spawn(command, socket);
    daemon.wait_line("listening");
    let (_frontend, memory, mut ring) =
        running(daemon.connect(), F_VERSION_1 | F_PROTOCOL_FEATURES);
    let line = daemon.wait_line("not refused");
    let lists: Vec<_> = line.split(['[', ']']).skip(1).step_by(2).map(numbers).collect();
    let [fixed, others, registrations] = &lists[..] else { panic!("{line}") };
    // Numbers that the kernel does not know are refused as well, as unknown.
    let unknown_from = others.first().copied().unwrap_or(256);
    assert!(unknown_from >= 40 && *others == (unknown_from..256).collect::<Vec<_>>(), "{line}");
    let known = |list: &[u32], end| list.iter().filter(|code| **code < end).copied().collect();
    let found: Vec<u32> = known(fixed, unknown_from);
    assert_eq!(found, OPERATIONS.map(u32::from), "{line}");
    let first_registrations: Vec<u32> = known(registrations, 20);
    assert_eq!(first_registrations, REGISTRATIONS, "{line}");
    // The ring works, and nothing that happened meanwhile was lost.
    assert_eq!(ring.read_sector(&memory, 3), sector(3));
    daemon.terminate();
}
