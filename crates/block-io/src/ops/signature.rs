//! Recognising a file by its first bytes. This is only good for a hint: a guest can write anything
//! to the start of its disk, so a format is never guessed. But if the user has not given a format,
//! a raw image that begins like another format is probably that.

use std::path::Path;

use cow_format::{ByteOffset, HEADER_PREFIX_LEN, Header, HeaderError};

use crate::storage::{Access, Env, Storage};

/// The first bytes of a qcow2 image (docs/interop/qcow2.txt of QEMU).
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// Length of a COW file's magic in bytes.
const MAGIC_LEN: usize = 8;

/// What a file begins like, unless it looks like raw data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signature {
    /// A qcow2 image.
    Qcow2,
    /// A COW file of User Mode Linux.
    Uml,
    /// A COW file of this project.
    Native,
    /// A COW file with an invalid header.
    BrokenCow,
}

/// What the file at `path` begins like. Also `None` if it cannot be read: opening it reports the
/// error.
pub fn signature_of<E: Env>(env: &E, path: &Path) -> Option<Signature> {
    let file = env.open(path, Access::Read).ok()?;
    let len = file.len().ok()?;
    let mut prefix = vec![0; HEADER_PREFIX_LEN];
    let read = file.read_at(&mut prefix, ByteOffset::new(0)).ok()?;
    // A file too short for a magic has none.
    match Header::check(&prefix[..read.max(MAGIC_LEN)], len) {
        Ok(Header::Uml(_)) => Some(Signature::Uml),
        Ok(Header::Native(_)) => Some(Signature::Native),
        Err(HeaderError::NotCow { .. }) => {
            prefix.starts_with(QCOW2_MAGIC).then_some(Signature::Qcow2)
        }
        Err(_) => Some(Signature::BrokenCow),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CowFormat;
    use crate::image::{CreateOptions, create_cow};
    use crate::testing::sim::Sim;

    #[test]
    fn what_begins_like_something_is_told() {
        let sim = Sim::new();
        let write = |path: &str, bytes: &[u8]| {
            let file = sim.create_new(Path::new(path)).unwrap();
            file.write_all_at(bytes, ByteOffset::new(0)).unwrap();
        };
        write("/disk", &[7; 65536]);
        write("/empty", &[]);
        write("/qcow2", b"QFI\xfb and more");
        write("/magic", b"QFI\xfb");
        write("/broken", &[b"\x89COW\r\n\x1a\n".as_slice(), &[0; 4096]].concat());
        let disk = Path::new("/disk");
        for (path, format) in [("/native", CowFormat::Native), ("/uml", CowFormat::Uml)] {
            create_cow(&sim, Path::new(path), &CreateOptions::over(format, disk)).unwrap();
        }
        for (path, expected) in [
            ("/disk", None),
            ("/empty", None),
            ("/missing", None),
            ("/qcow2", Some(Signature::Qcow2)),
            ("/magic", Some(Signature::Qcow2)),
            ("/broken", Some(Signature::BrokenCow)),
            ("/native", Some(Signature::Native)),
            ("/uml", Some(Signature::Uml)),
        ] {
            assert_eq!(signature_of(&sim, Path::new(path)), expected, "{path}");
        }
    }
}
