//! A file system that does not answer: a FUSE server that opens its one file, and then answers
//! nothing any more. It is mounted nowhere.
//!
//! It says first that nobody need ask it when a file is closed. Else every process that has the
//! file would wait for ever at its end: this one too, and whatever it starts.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The one file's name.
const NAME: &CStr = c"memory";
/// The one file's inode; the root's is 1.
const FILE_INODE: u64 = 2;
/// Bytes of a request's header and of an answer's.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;

// Operations (linux/fuse.h).
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;

/// A file of such a file system. All that waits for an answer goes on with an error when it is
/// dropped.
pub struct DeafFile {
    /// The file.
    pub file: File,
    _server: File,
}

impl DeafFile {
    /// Makes it, with `len` bytes.
    ///
    /// # Errors
    /// What keeps the test from having such a file: the rights, or the kernel.
    pub fn new(len: u64) -> io::Result<Self> {
        let server = File::options().read(true).write(true).open("/dev/fuse")?;
        let mount = mount(&server)?;
        let other = server.try_clone()?;
        // It ends when the file was opened twice.
        let answering = std::thread::spawn(move || answer(other, len));
        let open = || {
            let flags = libc::O_RDWR | libc::O_CLOEXEC;
            // SAFETY: the name is a string.
            checked(unsafe { libc::openat(mount.as_raw_fd(), NAME.as_ptr(), flags) }.into())
        };
        drop(open()?);
        let file = File::from(open()?);
        answering.join().map_err(|_| io::Error::other("the server has failed"))??;
        Ok(DeafFile { file, _server: server })
    }
}

fn checked(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it.
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { OwnedFd::from_raw_fd(fd) }) }
}

/// The mounted file system, as a descriptor.
fn mount(server: &File) -> io::Result<OwnedFd> {
    const SET_STRING: libc::c_uint = 1;
    const CREATE: libc::c_uint = 6;
    // SAFETY: the name is a string.
    let context = checked(unsafe { libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), 1) })?;
    let configure = |command: libc::c_uint, key: Option<&CStr>, value: &str| {
        let value = std::ffi::CString::new(value)?;
        let key = key.map_or(std::ptr::null(), CStr::as_ptr);
        let value = if key.is_null() { std::ptr::null() } else { value.as_ptr() };
        let fd = context.as_raw_fd();
        // SAFETY: key and value are strings, or null where the command has none.
        let result = unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key, value, 0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    configure(SET_STRING, Some(c"fd"), &server.as_raw_fd().to_string())?;
    for (key, value) in [(c"rootmode", "40000"), (c"user_id", "0"), (c"group_id", "0")] {
        configure(SET_STRING, Some(key), value)?;
    }
    configure(CREATE, None, "")?;
    // SAFETY: no memory is involved.
    checked(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0) })
}

/// Answers until the file was opened twice.
fn answer(mut server: File, len: u64) -> io::Result<()> {
    let mut request = vec![0; 1 << 17];
    let mut opened = 0;
    loop {
        let got = server.read(&mut request)?;
        assert!(got >= IN_HEADER);
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let unique = u64::from_ne_bytes(request[8..16].try_into().unwrap());
        let node = u64::from_ne_bytes(request[16..24].try_into().unwrap());
        let operation = word(4);
        let body = match operation {
            // Version 7.31, no special wishes, and writes of a page.
            INIT => words(&[7, 31, 0, 0, 0, 4096, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            LOOKUP => {
                [longs(&[FILE_INODE, 0, 1000, 1000]), words(&[0; 2]), attributes(2, len)].concat()
            }
            GETATTR => [longs(&[1000]), words(&[0; 2]), attributes(node, len)].concat(),
            OPEN => longs(&[0, 0]),
            _ => Vec::new(),
        };
        if operation == FORGET {
            continue;
        }
        let error = if body.is_empty() { -libc::ENOSYS } else { 0 };
        let size = u32::try_from(OUT_HEADER + body.len()).unwrap();
        let head = [words(&[size, error.cast_unsigned()]), longs(&[unique])].concat();
        server.write_all(&[head, body].concat())?;
        opened += u32::from(operation == OPEN);
        if opened == 2 {
            return Ok(());
        }
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

/// `struct fuse_attr` of the root or of the file.
fn attributes(node: u64, len: u64) -> Vec<u8> {
    let (mode, len) = if node == FILE_INODE { (0o100_600, len) } else { (0o40_700, 0) };
    // Inode, size, blocks, three times; their nanoseconds, mode, links, user, group, device, block.
    let sizes = longs(&[node, len, 0, 0, 0, 0]);
    [sizes, words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat()
}
