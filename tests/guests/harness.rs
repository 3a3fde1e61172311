//! The harness itself, proved with qemu-storage-daemon as the backend: if these tests fail, the
//! others prove nothing about this project's daemon.

use system_tests::{
    Backend, Guest, Kernel, TestDir, available, patterned, require, sha256, write_image,
};

const LEN: usize = 8 << 20;

fn reads_and_writes(kernel: Kernel) {
    require!(kernel.available().and_then(|()| available(&["qemu-storage-daemon"])));
    let dir = TestDir::new();
    let image = dir.path("image");
    write_image(&image, &patterned(LEN, 1));
    let backend = Backend::storage_daemon(&dir.path("s"), &image, 1);
    let script = "
        result size $(cat /sys/block/vda/size)
        result before $(digest /dev/vda)
        check write dd if=/dev/zero of=/dev/vda bs=512 count=3 seek=5 conv=fsync
        check fails false
        result after $(digest /dev/vda)
    ";
    let before = sha256(&image);
    let console = Guest::new(kernel, script).disk(&backend).run(&dir, "guest");
    backend.stop();
    console.expect("size", &(LEN / 512).to_string());
    console.expect("before", &before);
    console.expect_ok(&["write"]);
    console.expect("fails", "failed: 1");
    console.expect("after", &sha256(&image));
    assert_ne!(before, sha256(&image));
}

#[test]
fn qemu_guest_on_qemu_storage_daemon() {
    reads_and_writes(Kernel::Qemu);
}

#[test]
fn uml_guest_on_qemu_storage_daemon() {
    reads_and_writes(Kernel::Uml);
}

#[test]
#[should_panic(expected = "result END")]
fn a_script_that_fails_is_seen() {
    if let Err(why) = Kernel::Uml.available() {
        println!("skipped: {why}");
        panic!("result END"); // what the test expects
    }
    Guest::new(Kernel::Uml, "false").run(&TestDir::new(), "guest");
}
