//! The messages that create a session, so that a successor can receive the same messages
//! (docs/architecture.md, "Upgrade").

use vhost::vhost_user::message::FrontendReq;

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

impl<F> Message<F> {
    /// As it is on the wire, without its descriptors.
    pub fn bytes(&self) -> Vec<u8> {
        let len = u32::try_from(self.body.len()).unwrap_or(u32::MAX);
        let header = [self.request, VERSION, len].map(u32::to_ne_bytes).concat();
        [header, self.body.clone()].concat()
    }
}
