//! Disks that a guest boots from by itself: GRUB, for both kinds of firmware, in front of a kernel.
//!
//! The disk has a partition table of the old kind and one partition, a FAT file system of the type
//! that UEFI looks for. There are GRUB for UEFI, under the name that is tried by itself, the
//! kernel, the initrd and GRUB's commands. GRUB for the BIOS is in its usual place, the first
//! sector and the gap behind it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::files::TestDir;
use crate::programs::{available, run_ok};

/// What runs before the boot loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Firmware {
    /// The BIOS that QEMU brings.
    SeaBios,
    /// UEFI.
    Ovmf,
}

/// UEFI's code, and its variables as they are at first (Debian: ovmf).
pub(crate) const OVMF_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
pub(crate) const OVMF_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// GRUB's first sector for the BIOS (Debian: grub-pc-bin).
const BOOT_SECTOR: &str = "/usr/lib/grub/i386-pc/boot.img";
/// Something of GRUB for UEFI (Debian: grub-efi-amd64-bin).
const EFI_KERNEL: &str = "/usr/lib/grub/x86_64-efi/kernel.img";

/// The modules built into GRUB.
const MODULES: [&str; 10] = [
    "part_msdos",
    "fat",
    "normal",
    "configfile",
    "serial",
    "terminal",
    "echo",
    "linux",
    "hashsum",
    "gcry_sha256",
];

/// What GRUB does first. The screen is the serial port, as the guest has no other.
const EARLY: &str = "serial --unit=0 --speed=115200\nterminal_output serial\n\
    set root=(hd0,msdos1)\nconfigfile /grub.cfg\n";

const SECTOR: usize = 512;
/// First sector of the partition: GRUB is before it.
const PARTITION: u16 = 2048;
/// Where the partition table begins in the first sector; the code ends at the disk's signature.
const TABLE: usize = 446;
const CODE_LEN: usize = 440;
/// Type of an EFI system partition.
const EFI_SYSTEM: u8 = 0xef;
/// Room in the file system for its own tables, in bytes.
const FAT_SLACK: usize = 4 << 20;

impl Firmware {
    /// Ok if disks can be made for it and guests can boot from them here, else why not.
    pub fn available(self) -> Result<(), String> {
        available(&["grub-mkimage", "mcopy", "mmd"])?;
        let all = [OVMF_CODE, OVMF_VARS, BOOT_SECTOR, EFI_KERNEL, MKFS];
        match all.into_iter().find(|file| !Path::new(file).exists()) {
            None => Ok(()),
            Some(file) => Err(format!("{file} is missing (ci/setup installs it)")),
        }
    }
}

/// Debian's path of a user does not hold it.
const MKFS: &str = "/usr/sbin/mkfs.vfat";

/// A disk whose GRUB obeys `commands` and that holds `files`, (name, content), at the top of its
/// file system. The disk's first sectors up to [`PARTITION`] are free behind some hundred.
pub(crate) fn boot_disk(commands: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let dir = TestDir::new();
    let early = dir.path("early.cfg");
    fs::write(&early, EARLY).expect("writing GRUB's first commands");
    let bios = grub(&dir, &early, "i386-pc", &["biosdisk"]);
    let efi = grub(&dir, &early, "x86_64-efi", &[]);
    let read = |path: &Path| fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (core, efi) = (read(&bios), read(&efi));
    let own = [("EFI/BOOT/BOOTX64.EFI", efi.as_slice()), ("grub.cfg", commands.as_bytes())];
    let fat = read(&fat(&dir, &[&own, files].concat()));

    let mut disk = vec![0; usize::from(PARTITION) * SECTOR];
    disk[..CODE_LEN].copy_from_slice(&read(Path::new(BOOT_SECTOR))[..CODE_LEN]);
    disk[TABLE..TABLE + 16].copy_from_slice(&partition(fat.len() / SECTOR));
    disk[SECTOR - 2..SECTOR].copy_from_slice(&[0x55, 0xaa]);
    // The first sector loads the next ones, which contain their own length.
    disk[SECTOR..SECTOR + core.len()].copy_from_slice(&core);
    disk.extend(fat);
    disk
}

/// The entry of the partition, active, of `sectors` sectors.
fn partition(sectors: usize) -> [u8; 16] {
    // Too far for cylinders, heads and sectors.
    const FAR: [u8; 3] = [0xfe, 0xff, 0xff];
    let sectors = u32::try_from(sectors).expect("a small disk");
    let mut entry = [0; 16];
    entry[0] = 0x80;
    entry[1..4].copy_from_slice(&FAR);
    entry[4] = EFI_SYSTEM;
    entry[5..8].copy_from_slice(&FAR);
    entry[8..12].copy_from_slice(&u32::from(PARTITION).to_le_bytes());
    entry[12..].copy_from_slice(&sectors.to_le_bytes());
    entry
}

/// GRUB for a platform.
fn grub(dir: &TestDir, early: &Path, platform: &str, more: &[&str]) -> PathBuf {
    let out = dir.path(platform);
    let mut command = Command::new("grub-mkimage");
    command.args(["-O", platform, "-p", "/", "-c"]).arg(early).arg("-o").arg(&out);
    command.args(MODULES).args(more);
    run_ok(command);
    out
}

/// A FAT file system with these files.
fn fat(dir: &TestDir, files: &[(&str, &[u8])]) -> PathBuf {
    let image = dir.path("fat");
    let len: usize = files.iter().map(|(_, content)| content.len()).sum();
    let len = (len + FAT_SLACK).next_multiple_of(1 << 20);
    let file = fs::File::create(&image).expect("an image");
    file.set_len(len as u64).expect("its length");
    let mut mkfs = Command::new(MKFS);
    mkfs.args(["-F", "16"]).arg(&image);
    run_ok(mkfs);
    let mut mmd = Command::new("mmd");
    mmd.arg("-i").arg(&image).args(["::EFI", "::EFI/BOOT"]);
    run_ok(mmd);
    for (number, (name, content)) in files.iter().enumerate() {
        let from = dir.path(&format!("file{number}"));
        fs::write(&from, content).expect("writing a file");
        let mut mcopy = Command::new("mcopy");
        mcopy.arg("-i").arg(&image).arg(&from).arg(format!("::{name}"));
        run_ok(mcopy);
    }
    image
}
