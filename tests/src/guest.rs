//! Guests: a kernel, disks, a script; and the script's output on the console.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::backend::Backend;
use crate::boot_disk::{Firmware, OVMF_CODE, OVMF_VARS, boot_disk};
use crate::files::TestDir;
use crate::monitor::Monitor;
use crate::process::Process;
use crate::programs::{available, run_ok};

/// Long enough for the slowest script under TCG on a busy machine; only a hang gets there.
const GUEST_TIMEOUT: Duration = Duration::from_secs(240);

/// QEMU guests' kernels are started with this.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

/// What UML prints last.
const UML_HALTED: &str = "reboot: System halted";

/// Which kernel runs, and so which vhost-user frontend is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian's cloud kernel in QEMU.
    Qemu,
    /// That of Debian 11, 5.10, to run the daemon in the guest: its initrd knows no virtio.
    Bullseye,
    /// User Mode Linux: `virtio_uml`, and its own `ubd` driver.
    Uml,
}

impl Kernel {
    /// Ok if guests of this kernel can be booted here, else why not.
    pub fn available(self) -> Result<(), String> {
        available(&[match self {
            Self::Qemu | Self::Bullseye => "qemu-system-x86_64",
            Self::Uml => "linux.uml",
        }])?;
        let needed = match self {
            Self::Qemu => vec!["kernel/vmlinuz", "guest/initrd"],
            Self::Bullseye => {
                vec!["kernel-bullseye/vmlinuz", "guest/bullseye.cpio", "guest/initrd"]
            }
            Self::Uml => vec!["guest/initrd"],
        };
        let mut needed = needed.into_iter().map(|name| cache().join(name));
        match needed.find(|path| !path.exists()) {
            None => Ok(()),
            Some(path) => Err(format!("{} is missing (ci/setup makes it)", path.display())),
        }
    }
}

impl Kernel {
    /// Ok if this kernel can go over to another one, else why not.
    pub fn can_kexec(self) -> Result<(), String> {
        let boot = cache().join("kernel/boot");
        let files = fs::read_dir(&boot).into_iter().flatten().flatten();
        let config = files.map(|file| file.path()).find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("config-"))
        });
        let config = config.and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        if self == Self::Qemu && config.contains("\nCONFIG_KEXEC_FILE=y\n") {
            Ok(())
        } else {
            Err(format!("the {self:?} guests' kernel has no CONFIG_KEXEC_FILE"))
        }
    }
}

/// A guest to be booted.
#[derive(Clone)]
pub struct Guest {
    kernel: Kernel,
    sockets: Vec<PathBuf>,
    ubd: Vec<String>,
    script: String,
    files: Vec<(String, Vec<u8>)>,
    own_kernel: bool,
    queues: u16,
    drives: Vec<String>,
    debug_port: Option<PathBuf>,
    host: bool,
    fio: bool,
    reconnect: bool,
    control: bool,
    incoming: Option<PathBuf>,
    firmware: Option<Firmware>,
    machine: &'static str,
    disk_options: String,
    slots: bool,
    timeout: Duration,
}

impl Guest {
    /// A guest that runs `script`, a shell script with the helpers of `ci/guest-lib.sh`.
    pub fn new(kernel: Kernel, script: &str) -> Self {
        let script = script.to_owned();
        Self {
            kernel,
            sockets: vec![],
            ubd: vec![],
            script,
            files: vec![],
            own_kernel: false,
            queues: 1,
            drives: vec![],
            debug_port: None,
            host: false,
            fio: false,
            reconnect: false,
            control: false,
            incoming: None,
            firmware: None,
            machine: "q35",
            disk_options: String::new(),
            slots: false,
            timeout: GUEST_TIMEOUT,
        }
    }

    /// Gives it another script.
    pub fn with_script(mut self, script: &str) -> Self {
        script.clone_into(&mut self.script);
        self
    }

    /// Attaches a vhost-user disk: `/dev/vda`, the next `/dev/vdb`, ...
    pub fn disk(self, backend: &Backend) -> Self {
        self.socket(backend.socket())
    }

    /// Attaches the vhost-user disk of a backend that listens on `socket`.
    pub fn socket(mut self, socket: &Path) -> Self {
        self.sockets.push(socket.to_owned());
        self
    }

    /// Attaches a disk of UML's own driver, `COW[,BASE]`: `/dev/ubda`, the next `/dev/ubdb`, ...
    pub fn ubd(mut self, spec: &str) -> Self {
        assert_eq!(self.kernel, Kernel::Uml, "ubd is UML's driver");
        self.ubd.push(spec.to_owned());
        self
    }

    /// Gives each disk this many queues, and the guest as many CPUs (QEMU only).
    pub fn queues(mut self, queues: u16) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "virtio_uml has one queue");
        self.queues = queues;
        self
    }

    /// Puts a file into the guest, at a path that does not begin with `/`. Its directory must be
    /// there.
    pub fn with_file(mut self, path: &str, content: Vec<u8>) -> Self {
        self.files.push((path.to_owned(), content));
        self
    }

    /// Attaches a disk of QEMU's own, after those of vhost-user; `options` are `-drive`'s (QEMU
    /// only).
    pub fn drive(mut self, options: &str) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "a drive is QEMU's");
        self.drives.push(options.to_owned());
        self
    }

    /// Gives it a port (0xe9) at which each byte that it writes is in `file` at once (QEMU only).
    pub fn debug_port(mut self, file: &Path) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "a debug port is QEMU's");
        self.debug_port = Some(file.to_owned());
        self
    }

    /// Puts more file systems and the device mapper into the guest (`load_modules`; QEMU only).
    pub fn as_host(mut self) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "UML's modules have no device mapper");
        self.host = true;
        self
    }

    /// Puts its own kernel and initrd into the guest, as `/kernel` and `/second` (QEMU only).
    pub fn with_kernel(mut self) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "UML runs as a program");
        self.own_kernel = true;
        self
    }

    /// Puts a program of this machine into the guest's `/bin`, without symbols, and the libraries
    /// that it names.
    pub fn with_program(mut self, program: &Path) -> Self {
        let name = program.file_name().expect("a program's name").to_string_lossy();
        let mut ldd = Command::new("ldd");
        ldd.arg(program);
        let output = run_ok(ldd);
        // The initrd has the loader and its directory.
        let libraries = output.split_ascii_whitespace().filter(|word| word.starts_with("/lib/"));
        for library in libraries {
            let path = library.trim_start_matches('/').to_owned();
            let content = fs::read(library).unwrap_or_else(|e| panic!("{library}: {e}"));
            self.files.push((path, content));
        }
        self.with_file(&format!("bin/{name}"), without_symbols(program))
    }

    /// Puts fio into the guest.
    pub fn with_fio(mut self) -> Self {
        self.fio = true;
        self
    }

    /// Has it connect again when a daemon has gone (QEMU only).
    pub fn reconnecting(mut self) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "virtio_uml connects once");
        self.reconnect = true;
        self
    }

    /// Gives it a monitor and a second serial port, `/dev/ttyS1`, which the test can use (QEMU
    /// only).
    pub fn controlled(mut self) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "a monitor is QEMU's");
        self.control = true;
        self
    }

    /// Has it wait for a guest that is migrated to this socket, in place of booting (QEMU only).
    pub fn incoming(mut self, socket: &Path) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "UML cannot migrate");
        self.incoming = Some(socket.to_owned());
        self
    }

    /// Has it boot from its first disk, which must be a [`Guest::boot_disk`] (QEMU only).
    pub fn from_firmware(mut self, firmware: Firmware) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "UML runs as a program");
        self.firmware = Some(firmware);
        self
    }

    /// The disk that it boots from: GRUB, its kernel, its script. GRUB obeys `commands` first, and
    /// the disk has `files`, (name, content), as well.
    pub fn boot_disk(&self, commands: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
        let path = cache().join("kernel/vmlinuz");
        let kernel = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let initrd = self.initrd();
        let own = [("vmlinuz", kernel.as_slice()), ("initrd", initrd.as_slice())];
        let commands = format!("{commands}\nlinux /vmlinuz {CMDLINE}\ninitrd /initrd\nboot\n");
        boot_disk(&commands, &[&own, files].concat())
    }

    /// Gives it a machine other than "q35" (QEMU only).
    pub fn machine(mut self, machine: &'static str) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "machines are QEMU's");
        self.machine = machine;
        self
    }

    /// Further properties of its disks, each with a comma before it (QEMU only).
    pub fn disk_options(mut self, options: &str) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "properties are QEMU's");
        self.disk_options = options.to_owned();
        self
    }

    /// Gives it room for memory that is plugged later, which its kernel uses at once and in such a
    /// way that it can be taken away (QEMU only).
    pub fn with_memory_slots(mut self) -> Self {
        assert_eq!(self.kernel, Kernel::Qemu, "UML's memory is what it is");
        self.slots = true;
        self
    }

    /// Gives it more time than other guests.
    pub fn with_time(mut self, more: Duration) -> Self {
        self.timeout += more;
        self
    }

    /// Boots it. Its files are in `dir` under names that begin with `name`.
    pub fn boot(&self, dir: &TestDir, name: &str) -> Running {
        let initrd = dir.path(&format!("{name}.initrd"));
        fs::write(&initrd, self.initrd()).expect("writing the initrd");
        let command = match self.kernel {
            Kernel::Qemu | Kernel::Bullseye => self.qemu(&initrd, dir, name),
            Kernel::Uml => self.uml(&initrd, &dir.path(&format!("{name}.uml"))),
        };
        let process = Process::spawn(&format!("{:?} guest {name}", self.kernel), command);
        let control = control_sockets(dir, name);
        Running { process, timeout: self.timeout, control, serial: OnceCell::new() }
    }

    /// Boots it and waits until its script has ended, with status 0, and it has powered off.
    pub fn run(&self, dir: &TestDir, name: &str) -> Console {
        self.boot(dir, name).finish()
    }

    fn initrd(&self) -> Vec<u8> {
        let read = |name: &str| {
            let path = cache().join(name);
            fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let mut initrd = read("guest/initrd");
        if self.kernel == Kernel::Bullseye {
            initrd.extend(read("guest/bullseye.cpio"));
        }
        if self.fio {
            initrd.extend(read("guest/fio.cpio"));
        }
        if self.host {
            initrd.extend(read("guest/host.cpio"));
        }
        let files = self.files.iter().map(|(path, content)| (path.as_str(), content.as_slice()));
        let files: Vec<_> = files.chain([("script", self.script.as_bytes())]).collect();
        initrd.extend(cpio(&files));
        if self.own_kernel {
            let kernel = read("kernel/vmlinuz");
            let more = cpio(&[("kernel", &kernel), ("second", &initrd)]);
            initrd.extend(more);
        }
        initrd
    }

    fn qemu(&self, initrd: &Path, dir: &TestDir, name: &str) -> Command {
        let memory = if self.fio || self.kernel == Kernel::Bullseye { "768M" } else { "256M" };
        let kernel = match self.kernel {
            Kernel::Bullseye => "kernel-bullseye/vmlinuz",
            _ => "kernel/vmlinuz",
        };
        let accel = if accel() == "kvm" { "kvm" } else { "tcg,thread=multi" };
        let mut command = Command::new("qemu-system-x86_64");
        let slots = if self.slots { ",slots=4,maxmem=4G" } else { "" };
        command.args(["-accel", accel, "-cpu", "max", "-m"]).arg(format!("{memory}{slots}"));
        command.args(["-smp", &self.queues.to_string()]);
        // vhost-user needs guest memory that can be shared.
        command.arg("-object").arg(format!("memory-backend-memfd,id=mem,size={memory},share=on"));
        command.arg("-machine").arg(format!("{},memory-backend=mem", self.machine));
        command.args(["-nodefaults", "-display", "none"]);
        command.args(["-serial", "stdio"]);
        if self.control {
            let [monitor, serial] = control_sockets(dir, name);
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor.display()));
            command.arg("-serial").arg(format!("unix:{},server=on,wait=off", serial.display()));
        }
        if let Some(socket) = &self.incoming {
            command.arg("-incoming").arg(format!("unix:{}", socket.display()));
        }
        for (index, socket) in self.sockets.iter().enumerate() {
            command.arg("-chardev");
            let reconnect = if self.reconnect { reconnect_option() } else { "" };
            command.arg(format!("socket,id=c{index},path={}{reconnect}", socket.display()));
            command.arg("-device");
            let boots =
                self.firmware.map_or(String::new(), |_| format!(",bootindex={}", index + 1));
            command.arg(format!(
                "vhost-user-blk-pci,id=disk{index},chardev=c{index},num-queues={}{}{boots}",
                self.queues, self.disk_options,
            ));
        }
        match self.firmware {
            None => {
                command.arg("-kernel").arg(cache().join(kernel));
                let movable = if self.slots { " memhp_default_state=online_movable" } else { "" };
                command.arg("-initrd").arg(initrd);
                command.arg("-append").arg(format!("{CMDLINE}{movable}"));
            }
            Some(Firmware::SeaBios) => {}
            Some(Firmware::Ovmf) => {
                let variables = dir.path(&format!("{name}.variables"));
                fs::copy(OVMF_VARS, &variables).expect("copying UEFI's variables");
                let flash = "if=pflash,format=raw";
                command.arg("-drive").arg(format!("{flash},unit=0,readonly=on,file={OVMF_CODE}"));
                command.arg("-drive");
                command.arg(format!("{flash},unit=1,file={}", variables.display()));
            }
        }
        for (index, options) in self.drives.iter().enumerate() {
            command.arg("-drive").arg(format!("if=none,id=d{index},{options}"));
            command.arg("-device").arg(format!("virtio-blk-pci,drive=d{index}"));
        }
        if let Some(file) = &self.debug_port {
            command.arg("-chardev").arg(format!("file,id=debug,path={}", file.display()));
            command.args(["-device", "isa-debugcon,iobase=0xe9,chardev=debug"]);
        }
        command
    }

    fn uml(&self, initrd: &Path, state: &Path) -> Command {
        let memory = if self.fio { "mem=512M" } else { "mem=192M" };
        let mut command = Command::new("linux.uml");
        command.arg(memory).arg(format!("initrd={}", initrd.display()));
        // Else it would leave a directory in the home directory.
        command.arg(format!("uml_dir={}/", state.display()));
        command.args(["con0=fd:0,fd:1", "con=none", "quiet", "panic=-1"]);
        for socket in &self.sockets {
            /// VIRTIO_ID_BLOCK
            const BLOCK: u32 = 2;
            command.arg(format!("virtio_uml.device={}:{BLOCK}", socket.display()));
        }
        for (index, spec) in self.ubd.iter().enumerate() {
            command.arg(format!("ubd{index}={spec}"));
        }
        command
    }
}

/// A guest that was booted.
pub struct Running {
    process: Process,
    timeout: Duration,
    /// Of the monitor and the second serial port, if it has them.
    control: [PathBuf; 2],
    serial: OnceCell<UnixStream>,
}

/// Where a guest's monitor and its second serial port are.
fn control_sockets(dir: &TestDir, name: &str) -> [PathBuf; 2] {
    ["monitor", "serial"].map(|what| dir.path(&format!("{name}.{what}")))
}

impl Running {
    /// Waits until the console shows `text`.
    pub fn wait_for(&self, text: &str) {
        self.process.wait_for(text, self.timeout);
    }

    /// Waits until the console shows `text` this many times.
    pub fn wait_for_times(&self, text: &str, times: usize) {
        self.process.wait_for_times(text, times, self.timeout);
    }

    /// Whether it has powered off, or died.
    pub fn has_ended(&mut self) -> bool {
        self.process.ended().is_some()
    }

    /// Whether QEMU itself has died of a signal. Its version 10.0 sometimes does while a guest of
    /// two CPUs boots under TCG ("iotlb_to_section: Assertion").
    pub fn has_crashed(&mut self) -> bool {
        self.process.ended().is_some_and(|status| status.signal().is_some())
    }

    /// Kills it, if it has not ended: its memory is gone.
    pub fn kill(mut self) {
        if self.process.ended().is_none() {
            self.process.signal(Signal::SIGKILL);
            self.process.wait(self.timeout);
        }
    }

    /// Whether the console shows `text` already.
    pub fn shows(&self, text: &str) -> bool {
        self.process.output().contains(text)
    }

    /// Its monitor.
    pub fn monitor(&self) -> Monitor {
        Monitor::connect(&self.control[0], self.timeout)
    }

    /// Writes a line to its second serial port.
    pub fn tell(&self, line: &str) {
        // Kept: QEMU forgets what came before the end of a connection and was not read yet.
        let connect = || UnixStream::connect(&self.control[1]).expect("a serial port");
        let mut serial = self.serial.get_or_init(connect);
        writeln!(serial, "{line}").expect("writing to a serial port");
    }

    /// The number that it has given as the result `key`, the first of them.
    pub fn number(&self, key: &str) -> usize {
        let line = format!("@@{key}=");
        self.wait_for(&line);
        loop {
            let output = self.output();
            let rest = output.split_once(&line).map_or("", |(_, rest)| rest);
            // The rest of the line may be on its way.
            if let Some((number, _)) = rest.split_once(['\r', '\n']) {
                return number.parse().unwrap_or_else(|e| panic!("result {key}: {number:?}: {e}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// What it has written to the console so far.
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// Waits until its script has ended, with status 0, and it has powered off.
    pub fn finish(self) -> Console {
        self.finish_after("")
    }

    /// The same for a guest that was migrated here, after it had written `before` elsewhere.
    pub fn finish_after(self, before: &str) -> Console {
        let (status, text) = self.process.wait(self.timeout);
        let console = Console::parse(before.to_owned() + &text);
        console.expect("END", "0");
        // UML's process sometimes aborts when its kernel has come to its end already.
        let halted =
            console.text.contains(UML_HALTED) && status.signal() == Some(Signal::SIGABRT as i32);
        assert!(status.success() || halted, "the guest's process: {status}\n{}", console.text);
        console
    }
}

/// What a guest wrote to its console.
pub struct Console {
    text: String,
    results: BTreeMap<String, String>,
}

impl Console {
    /// Results are the lines `@@KEY=VALUE`; of several with one key the last counts.
    fn parse(text: String) -> Self {
        let result = |line: &str| {
            // GRUB puts the carriage return behind the newline.
            let (key, value) = line.trim().strip_prefix("@@")?.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        };
        let results = text.lines().filter_map(result).collect();
        Self { text, results }
    }

    /// All of it.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The result `key`; panics with the whole console if there is none.
    pub fn get(&self, key: &str) -> &str {
        match self.results.get(key) {
            Some(value) => value,
            None => panic!("no result {key} on the console:\n{}", self.text),
        }
    }

    /// Panics with the whole console unless the result `key` is `value`.
    pub fn expect(&self, key: &str, value: &str) {
        let found = self.get(key);
        assert_eq!(found, value, "result {key} on the console:\n{}", self.text);
    }

    /// Panics with the whole console unless each of the results is "ok".
    pub fn expect_ok(&self, keys: &[&str]) {
        for key in keys {
            self.expect(key, "ok");
        }
    }
}

/// A program without what only a debugger needs, of which a small guest has no room for much.
fn without_symbols(program: &Path) -> Vec<u8> {
    let stripped = tempfile::NamedTempFile::new().expect("a temporary file");
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(stripped.path()).arg(program);
    run_ok(strip);
    fs::read(stripped.path()).expect("reading a program")
}

/// What `ci/setup` made: CACHE_DIR, else `.cache` in the checkout.
fn cache() -> PathBuf {
    match env::var_os("CACHE_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache"),
    }
}

/// The option for QEMU's socket to reconnect: in milliseconds since 9.2, in seconds before.
fn reconnect_option() -> &'static str {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.arg("--version");
    let output = run_ok(qemu);
    let version = output.split_ascii_whitespace().skip_while(|word| *word != "version").nth(1);
    let mut numbers = version.unwrap_or("").split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (9, 2) { ",reconnect-ms=20" } else { ",reconnect=1" }
}

/// The accelerator under which `ci/setup` saw a guest boot since the host did: "kvm" or "tcg".
fn accel() -> &'static str {
    let verdict = fs::read_to_string(cache().join("guest/accel")).unwrap_or_default();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    match verdict.trim().split_once(' ') {
        Some(("kvm", seen_in)) if seen_in == boot.trim() => "kvm",
        _ => "tcg",
    }
}

/// A cpio archive in the format "newc" (Linux: Documentation/driver-api/early-userspace/
/// buffer-format.rst), which the kernel unpacks over those before it.
fn cpio(files: &[(&str, &[u8])]) -> Vec<u8> {
    const REGULAR_FILE: usize = 0o100_755;
    let mut archive = Vec::new();
    for (name, content) in files.iter().chain(&[("TRAILER!!!", [].as_slice())]) {
        let [inode, owner, group, links, mtime] = [0, 0, 0, 1, 0];
        let [device_major, device_minor, rdev_major, rdev_minor, checksum] = [0; 5];
        let fields = [
            inode,
            REGULAR_FILE,
            owner,
            group,
            links,
            mtime,
            content.len(),
            device_major,
            device_minor,
            rdev_major,
            rdev_minor,
            name.len() + 1,
            checksum,
        ];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes().chain([0]));
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(*content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
