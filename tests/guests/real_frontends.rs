//! The real frontends, where they are installed, with a guest of this project's own
//! (`c/payload.c`): it needs no kernel, and so runs also where KVM is too slow or too strange for
//! one.
//!
//! A frontend is named by a variable (CLOUD_HYPERVISOR, FIRECRACKER, CROSVM), or found in PATH.

use std::env;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use system_tests::{CowDisk, Process, available, require, run_ok};

/// Sectors of the disk. The payload needs some ten thousand.
const SECTORS: u32 = 32768;

/// Long enough for a machine that emulates and has other work; only a hang gets there.
const TIMEOUT: Duration = Duration::from_secs(240);

/// Options for a static program.
const FREESTANDING: [&str; 14] = [
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-fno-pic",
    "-fno-pie",
    "-no-pie",
    "-mgeneral-regs-only",
    "-mno-red-zone",
    "-O1",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
    "-Wl,--build-id=none",
    "-Wl,--no-warn-rwx-segments",
];

/// Requests of the load.
const LOAD: u32 = 2000;

/// The disk as the payload expects it.
fn content() -> Vec<u8> {
    let words = (0..SECTORS).flat_map(|sector| {
        (0..128).map(move |word| sector.wrapping_mul(0x9e37_79b9).wrapping_add(word))
    });
    words.flat_map(u32::to_le_bytes).collect()
}

/// Compiles the payload.
fn payload(out: &Path) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("c");
    let mut script = std::ffi::OsString::from("-Wl,-T,");
    script.push(dir.join("payload.ld"));
    let mut cc = Command::new("cc");
    cc.args(FREESTANDING).arg(script).arg("-o").arg(out);
    cc.arg(dir.join("payload-start.S")).arg(dir.join("payload.c"));
    run_ok(cc);
}

/// The paths that a frontend gets.
struct Setup {
    payload: PathBuf,
    socket: PathBuf,
    /// For a configuration file.
    config: PathBuf,
    queues: u16,
}

/// Has the payload try a disk in the virtual machine that `machine` gives the command for.
fn try_disk(name: &str, queues: u16, machine: impl FnOnce(&Setup) -> Command) {
    let disk = CowDisk::over(&content());
    let path = disk.dir.path("payload");
    payload(&path);
    let daemon = disk.serve(&[&format!("--num-queues={queues}")]);
    let socket = daemon.socket().to_owned();
    let setup = Setup { payload: path, socket, config: disk.dir.path("config"), queues };
    let process = Process::spawn(name, machine(&setup));
    process.wait_for("payload: ok", TIMEOUT);
    let (_status, output) = process.wait(TIMEOUT);
    assert!(output.contains(" fail 0"), "{output}");
    assert!(output.contains("ok load"), "{output}");
    let log = daemon.stop();
    assert!(!log.contains("connection closed"), "{log}");
}

/// The program that `variable` names, or `name` in PATH.
fn find(variable: &str, name: &str) -> Result<PathBuf, String> {
    if let Some(path) = env::var_os(variable) {
        return Ok(path.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| format!("no {name} in PATH, and {variable} names none"))
}

fn kvm() -> Result<(), String> {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map(drop).map_err(|e| format!("/dev/kvm: {e}"))
}

#[test]
fn qemu() {
    require!(available(&["qemu-system-x86_64", "cc"]));
    try_disk("QEMU", 2, |setup| {
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg", "-nodefaults", "-display", "none", "-serial", "stdio"]);
        qemu.args(["-m", "128", "-object", "memory-backend-memfd,id=mem,size=128M,share=on"]);
        qemu.args(["-machine", "q35,memory-backend=mem", "-no-reboot", "-chardev"]);
        qemu.arg(format!("socket,id=disk,path={}", setup.socket.display())).arg("-device");
        qemu.arg(format!("vhost-user-blk-pci,chardev=disk,num-queues={}", setup.queues));
        qemu.arg("-kernel").arg(&setup.payload);
        qemu.arg("-append").arg(format!("queues={} load={LOAD}", setup.queues));
        qemu
    });
}

#[test]
fn cloud_hypervisor() {
    let program = find("CLOUD_HYPERVISOR", "cloud-hypervisor");
    require!(program.as_ref().map(drop).map_err(String::clone));
    require!(available(&["cc"]).and(kvm()));
    try_disk("cloud-hypervisor", 2, |setup| {
        let mut machine = Command::new(program.expect("it was found"));
        // As many processors as queues, or it refuses.
        machine.arg("--cpus").arg(format!("boot={}", setup.queues));
        machine.args(["--memory", "size=128M,shared=on", "--serial", "tty", "--console", "off"]);
        machine.arg("--disk").arg(format!(
            "vhost_user=on,socket={},num_queues={},queue_size=128",
            setup.socket.display(),
            setup.queues
        ));
        machine.arg("--kernel").arg(&setup.payload);
        machine.arg("--cmdline").arg(format!("queues={} load={LOAD}", setup.queues));
        machine
    });
}

#[test]
fn firecracker() {
    let program = find("FIRECRACKER", "firecracker");
    require!(program.as_ref().map(drop).map_err(String::clone));
    require!(available(&["cc"]).and(kvm()));
    try_disk("Firecracker", 1, |setup| {
        let config = json!({
            "boot-source": {
                "kernel_image_path": setup.payload,
                "boot_args": format!("mmio=1 load={LOAD}"),
            },
            "drives": [{
                "drive_id": "disk",
                "socket": setup.socket,
                "is_root_device": false,
                "cache_type": "Writeback",
            }],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        });
        fs::write(&setup.config, config.to_string()).expect("writing a configuration");
        let mut machine = Command::new(program.expect("it was found"));
        machine.args(["--no-api", "--config-file"]).arg(&setup.config);
        machine
    });
}

#[test]
fn crosvm() {
    let program = find("CROSVM", "crosvm");
    require!(program.as_ref().map(drop).map_err(String::clone));
    require!(available(&["cc"]).and(kvm()));
    try_disk("crosvm", 1, |setup| {
        let mut machine = Command::new(program.expect("it was found"));
        machine.args(["run", "--disable-sandbox", "--mem", "128", "--cpus", "1"]);
        machine.args(["--serial", "type=stdout,hardware=serial,num=1", "--vhost-user"]);
        // Without a limit its rings have 32768 entries.
        machine.arg(format!("block,socket={},max-queue-size=256", setup.socket.display()));
        machine.arg("-p").arg(format!("load={LOAD}")).arg(&setup.payload);
        machine
    });
}
