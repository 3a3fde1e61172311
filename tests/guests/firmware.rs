//! Guests that boot from the disk as users' guests do: firmware, GRUB, kernel. Each kind of
//! firmware on each kind of machine, with small and large rings, with one and several queues.

use serde_json::json;
use system_tests::{
    Backend, Console, CowDisk, Firmware, Guest, Kernel, patterned, require, sha256,
};

const MIB: usize = 1 << 20;

/// Counts the boots in a sector that nothing else uses, in the gap before the partition. Reboots by
/// itself, then waits for a reset, then ends.
const LIFE: &str = "
    boot=$(dd if=/dev/vda bs=512 skip=2000 count=1 2>/dev/null | tr -d '\\0')
    boot=$((${boot:-0} + 1))
    printf %0512d $boot | sed 's/^0*//' | dd of=/dev/vda bs=512 seek=2000 conv=fsync,sync 2>/dev/null
    result boot $boot
    case $boot in
    1) reboot -f ;;
    2) while :; do sleep 1; done ;;
    esac
";

/// What the guest has at last.
const FACTS: &str = "
    result uefi $(test -d /sys/firmware/efi && echo yes || echo no)
    result queues $(ls /sys/block/vda/mq | wc -l)
    result errors $(dmesg | grep -ciE 'i/o error|not a head')
    result digest $(digest /dev/vda)
";

/// Where a guest boots.
struct Place {
    firmware: Firmware,
    machine: &'static str,
    ring: u16,
    queues: u16,
}

impl Place {
    fn available(&self) -> Result<(), String> {
        Kernel::Qemu.available()?;
        self.firmware.available()
    }

    fn guest(&self, script: &str) -> Guest {
        let guest = Guest::new(Kernel::Qemu, &format!("{script}{FACTS}")).machine(self.machine);
        let guest = guest.queues(self.queues).disk_options(&format!(",queue-size={}", self.ring));
        guest.from_firmware(self.firmware).controlled()
    }

    /// Starts the daemon, which logs the size of each ring.
    fn serve(&self, disk: &CowDisk) -> Backend {
        disk.serve(&["--log-level=debug", &format!("--num-queues={}", self.queues)])
    }

    /// Boots three times: from firmware, again from inside, again by a reset.
    fn boots_three_times(&self) {
        require!(self.available());
        let guest = self.guest(LIFE);
        let disk = CowDisk::over(&guest.boot_disk("echo\necho @@grub=$grub_platform", &[]));
        let daemon = self.serve(&disk);
        let running = guest.disk(&daemon).boot(&disk.dir, "guest");
        running.wait_for("@@boot=2");
        running.monitor().run("system_reset", json!({}));
        let console = running.finish();
        let log = daemon.stop();
        console.expect("boot", "3");
        self.check(&console, &log);
        console.expect("digest", &sha256(&disk.merged()));
    }

    fn check(&self, console: &Console, log: &str) {
        assert!(log.contains(&format!("{} descriptors", self.ring)), "{log}");
        let uefi = self.firmware == Firmware::Ovmf;
        console.expect("grub", if uefi { "efi" } else { "pc" });
        console.expect("uefi", if uefi { "yes" } else { "no" });
        console.expect("queues", &self.queues.to_string());
        console.expect("errors", "0");
    }

    /// The daemon is killed while GRUB reads, a file each time, and started again.
    fn outlives_its_daemons_in_grub(&self) {
        require!(self.available());
        const FILES: usize = 4;
        let files: Vec<_> = (0..FILES).map(|n| (format!("file{n}"), filler(n))).collect();
        let (mut commands, mut sums) = (String::from("echo\n"), String::new());
        for (name, content) in &files {
            sums.push_str(&format!("{}  /{name}\n", digest(content)));
            commands.push_str(&format!("echo @@grub=reads-{name}\nsha256sum /{name}\n"));
        }
        commands.push_str("echo @@grub=$grub_platform\n");
        let guest = self.guest("").reconnecting();
        let contents = files.iter().map(|(name, content)| (name.as_str(), content.as_slice()));
        let image = guest.boot_disk(&commands, &contents.collect::<Vec<_>>());
        let disk = CowDisk::over(&image);
        let mut daemon = self.serve(&disk);
        let running = guest.disk(&daemon).boot(&disk.dir, "guest");
        let mut interrupted = 0;
        for (number, (name, _)) in files.iter().enumerate() {
            running.wait_for(&format!("@@grub=reads-{name}"));
            daemon.kill();
            let next = files.get(number + 1).map_or("@@grub=efi", |(next, _)| next);
            interrupted += u32::from(!running.shows(next) && !running.shows("@@grub=pc"));
            daemon = self.serve(&disk);
        }
        let console = running.finish();
        let log = daemon.stop();
        // On a very slow host a file can have been read by the time the daemon is dead.
        assert!(interrupted > 0, "no daemon was killed at work");
        for line in sums.lines() {
            assert!(console.text().contains(line), "no {line:?} in\n{}", console.text());
        }
        self.check(&console, &log);
        console.expect("digest", &sha256(&disk.merged()));
    }
}

/// Each file is read once, so GRUB has none of it in its cache.
fn filler(number: usize) -> Vec<u8> {
    patterned(8 * MIB, 10 + number as u64)
}

fn digest(content: &[u8]) -> String {
    let dir = system_tests::TestDir::new();
    let path = dir.path("content");
    system_tests::write_image(&path, content);
    sha256(&path)
}

#[test]
fn seabios_on_pc_with_small_rings() {
    Place { firmware: Firmware::SeaBios, machine: "pc", ring: 128, queues: 1 }.boots_three_times();
}

#[test]
fn seabios_on_q35_with_large_rings_and_daemons_that_die() {
    Place { firmware: Firmware::SeaBios, machine: "q35", ring: 1024, queues: 4 }
        .outlives_its_daemons_in_grub();
}

#[test]
fn ovmf_on_q35_with_large_rings() {
    Place { firmware: Firmware::Ovmf, machine: "q35", ring: 1024, queues: 4 }.boots_three_times();
}

#[test]
fn ovmf_on_pc_with_small_rings_and_daemons_that_die() {
    Place { firmware: Firmware::Ovmf, machine: "pc", ring: 128, queues: 1 }
        .outlives_its_daemons_in_grub();
}
