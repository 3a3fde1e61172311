//! What this crate's driver wrote is read back through another one: the `virtio-driver` crate,
//! libblkio's.

use std::path::Path;

use crate::common::{SECTORS, mixed_job, options};
use blk_bench::driver::memory::SharedMemory;
use blk_bench::driver::queue::SECTOR_SIZE;
use blk_bench::load::model::Content;
use blk_bench::null;
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

/// Bytes of one read; the disk is a multiple of it.
const READ_LEN: usize = 1 << 20;

/// Reads the whole disk behind a socket.
fn read_all(socket: &Path) -> Vec<u8> {
    let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    let path = socket.to_str().unwrap();
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(path, features.bits()).unwrap());
    let memory = SharedMemory::new(READ_LEN, false).unwrap();
    let mut queues = VirtioBlkQueue::<()>::setup_queues(transport.as_mut(), 1, 128).unwrap();
    let address = usize::try_from(memory.user_address(0)).unwrap();
    transport.map_mem_region(address, memory.len(), memory.fd(), 0).unwrap();
    let (kick, call) = (transport.get_submission_notifier(0), transport.get_completion_fd(0));
    queues[0].set_used_notif_enabled(true);
    let mut disk = Vec::new();
    let len = usize::try_from(SECTORS).unwrap() * SECTOR_SIZE;
    while disk.len() < len {
        let at = disk.len() as u64;
        // SAFETY: the memory outlives the request, which is waited for below; nothing else uses it.
        unsafe { queues[0].read_raw(at, address as *mut u8, READ_LEN, ()) }.unwrap();
        kick.notify().unwrap();
        let completion = loop {
            if let Some(completion) = queues[0].completions().next() {
                break completion;
            }
            call.read().unwrap();
        };
        assert_eq!(completion.ret, 0);
        // SAFETY: no request is in flight.
        disk.extend_from_slice(unsafe { memory.bytes(0, READ_LEN) });
    }
    disk
}

#[test]
fn the_virtio_driver_crate_reads_what_this_driver_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("ram.sock");
    let listener = null::listen(&socket).unwrap();
    let options_of_disk = null::Options {
        sectors: SECTORS,
        queues: 4,
        ram: true,
        poll_time: std::time::Duration::from_micros(20),
        fault: None,
    };
    let disk = null::Content::new(&options_of_disk).unwrap();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            null::serve_one(&listener, &options_of_disk, &disk).unwrap();
        }
    });
    let expected = crate::common::run_and_read_back(
        &options(&socket),
        &mixed_job(SECTORS),
        Path::new("/dev/null"),
    )
    .unwrap();
    let found = read_all(&socket);
    server.join().unwrap();
    let mut written = 0;
    for (sector, data) in (0..).zip(found.chunks(SECTOR_SIZE)) {
        let (owner, content) = expected.lookup(sector);
        written += u64::from(matches!(content, Content::Write(_)));
        let mut wanted = [0; SECTOR_SIZE];
        assert!(expected.expectation.fill(sector, owner, content, &mut wanted).unwrap());
        assert!(data == wanted, "sector {sector}: {}", blk_bench::load::stamp::describe(data));
    }
    assert!(written > SECTORS / 4, "only {written} sectors were written");
}
