//! For tests: operations that no ring makes, on a ring that the kernel has restricted.

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{opcode, squeue};

use super::uring::Uring;
use super::{Completion, Ring};

/// The identifier of an attempt.
const ATTEMPT: u64 = 1 << 60;

/// Where the fields are in the 64 bytes of an entry (io_uring_enter(2)).
const OPCODE: usize = 0;
const FLAGS: usize = 1;
const FD: usize = 4;

impl<R> Ring<'_, R> {
    /// Its io_uring, if it has one.
    pub fn uring(&mut self) -> Option<&mut Uring> {
        match &mut self.engine {
            super::Engine::Uring(uring) => Some(uring),
            super::Engine::Threads(_) => None,
        }
    }
}

impl Uring {
    /// Hands over an entry with these fields, all others being 0, and returns its result: a
    /// negative errno is the kernel's refusal. Completions of other operations are not lost.
    ///
    /// # Errors
    /// Errors of io_uring_enter(2).
    pub fn attempt(&mut self, opcode: u8, flags: u8, fd: i32) -> io::Result<i32> {
        let nop = opcode::Nop::new().build().user_data(ATTEMPT);
        // SAFETY: an entry is the kernel's struct of 64 bytes, in which every bit pattern is valid.
        let mut bytes = unsafe { std::mem::transmute::<squeue::Entry, [u8; 64]>(nop) };
        (bytes[OPCODE], bytes[FLAGS]) = (opcode, flags);
        bytes[FD..FD + 4].copy_from_slice(&fd.to_ne_bytes());
        // SAFETY: as above. It names no memory: where it would have an address it has 0.
        self.queue(unsafe { std::mem::transmute::<[u8; 64], squeue::Entry>(bytes) });
        let mut others = Vec::new();
        let result = loop {
            match self.next() {
                Some(Completion { data: ATTEMPT, result, .. }) => break result,
                Some(other) => others.push(other),
                None => self.enter(true)?,
            }
        };
        self.kept.extend(others);
        Ok(result)
    }

    /// What io_uring_register(2) says to an operation without an argument.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn attempt_register(&self, opcode: u32) -> io::Result<()> {
        let fd = self.uring.as_raw_fd();
        let nothing = std::ptr::null::<libc::c_void>();
        // SAFETY: it is given no memory.
        match unsafe { libc::syscall(libc::SYS_io_uring_register, fd, opcode, nothing, 0) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
