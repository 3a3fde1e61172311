//! Boots a guest of the tests on a disk that another program serves, runs a script in it, and
//! prints the guest's output: `guest qemu|uml SOCKET|COW,BASE SCRIPT`. Used by `ci/bench`.
//!
//! A disk that is not a socket is given to UML's own driver.

use std::error::Error;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use system_tests::{Guest, Kernel, TestDir};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, disk, script] = args.as_slice() else {
        return Err("usage: guest qemu|uml SOCKET|COW,BASE SCRIPT".into());
    };
    let kernel = match kernel.as_str() {
        "qemu" => Kernel::Qemu,
        "uml" => Kernel::Uml,
        other => return Err(format!("no kernel {other:?}; there are qemu and uml").into()),
    };
    kernel.available()?;
    let guest = Guest::new(kernel, &std::fs::read_to_string(script)?).with_fio();
    let is_socket = Path::new(disk).metadata().is_ok_and(|it| it.file_type().is_socket());
    let guest = if is_socket { guest.socket(Path::new(disk)) } else { guest.ubd(disk) };
    print!("{}", guest.run(&TestDir::new(), "bench").text());
    Ok(())
}
