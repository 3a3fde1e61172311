//! Sockets that behave oddly.

use std::os::fd::AsRawFd;

/// Makes a receive wait for so many bytes (SO_RCVLOWAT), while poll(2) is content with one.
pub fn set_low_water(socket: &impl AsRawFd, bytes: libc::c_int) {
    let len = size_of_val(&bytes).try_into().unwrap();
    let value = (&raw const bytes).cast();
    // SAFETY: `value` points to `len` bytes.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, len)
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}
