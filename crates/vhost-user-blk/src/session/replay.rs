//! The messages that create a session, so that a successor can receive the same messages
//! (docs/architecture.md, "Upgrade").

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Flags of a message's header: version 1 of the protocol, no reply requested.
const VERSION: u32 = 1;

/// A message of the frontend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message<F> {
    /// Its type.
    pub request: u32,
    /// What follows its header.
    pub body: Vec<u8>,
    /// The descriptors that come with it.
    pub fds: Vec<F>,
}

impl<F> Message<F> {
    /// A message without descriptors, whose body is these numbers.
    pub fn new(request: FrontendReq, body: &[u64]) -> Self {
        let body = body.iter().flat_map(|number| number.to_ne_bytes()).collect();
        Message { request: request.into(), body, fds: Vec::new() }
    }

    /// A message about a queue: the queue's number, and a value.
    pub fn state(request: FrontendReq, queue: u32, value: u32) -> Self {
        let body = [queue, value].map(u32::to_ne_bytes).concat();
        Message { request: request.into(), body, fds: Vec::new() }
    }

    /// The same with a descriptor.
    pub fn with(mut self, fd: F) -> Self {
        self.fds.push(fd);
        self
    }
}

impl<F: AsFd> Message<F> {
    /// Sends it, in one piece.
    pub fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let len = u32::try_from(self.body.len()).map_err(io::Error::other)?;
        let header = [self.request, VERSION, len].map(u32::to_ne_bytes).concat();
        let fds: Vec<_> = self.fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
        let bytes = [header.as_slice(), &self.body].concat();
        let sent = socket.send_with_fds(&[bytes.as_slice()], &fds)?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }
}

/// Reads and discards the daemon's replies, if there are any.
pub fn skip_replies(socket: &mut UnixStream) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    loop {
        match socket.read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Err(e) => return Err(e),
        }
    }
    socket.set_nonblocking(false)
}
