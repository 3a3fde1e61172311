//! vhost-user messages as bytes (vhost-user specification, "Message Specification").

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Flags of a header: protocol version 1.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// In the number of a queue: no descriptor comes with it.
pub const NO_FD: u64 = 0x100;

/// `VIRTIO_F_VERSION_1`
pub const F_VERSION_1: u64 = 1 << 32;
/// `VHOST_USER_F_PROTOCOL_FEATURES`
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VHOST_F_LOG_ALL`
pub const F_LOG_ALL: u64 = 1 << 26;
/// `VIRTIO_F_EVENT_IDX`
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_INDIRECT_DESC`
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_BLK_F_SEG_MAX`
pub const F_SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_FLUSH`
pub const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_BLK_F_CONFIG_WCE`
pub const F_CONFIG_WCE: u64 = 1 << 11;

/// `VHOST_USER_PROTOCOL_F_MQ`
pub const P_MQ: u64 = 1 << 0;
/// `VHOST_USER_PROTOCOL_F_LOG_SHMFD`
pub const P_LOG_SHMFD: u64 = 1 << 1;
/// `VHOST_USER_PROTOCOL_F_REPLY_ACK`
pub const P_REPLY_ACK: u64 = 1 << 3;
/// `VHOST_USER_PROTOCOL_F_BACKEND_REQ`
pub const P_BACKEND_REQ: u64 = 1 << 5;
/// `VHOST_USER_PROTOCOL_F_CONFIG`
pub const P_CONFIG: u64 = 1 << 9;
/// `VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`
pub const P_INFLIGHT_SHMFD: u64 = 1 << 12;
/// `VHOST_USER_PROTOCOL_F_DEVICE_STATE`
pub const P_DEVICE_STATE: u64 = 1 << 19;
/// `VHOST_USER_PROTOCOL_F_RESET_DEVICE`
pub const P_RESET_DEVICE: u64 = 1 << 13;
/// `VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS`
pub const P_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
/// All features that the daemon offers.
pub const PROTOCOL_FEATURES: u64 = P_MQ
    | P_LOG_SHMFD
    | P_REPLY_ACK
    | P_BACKEND_REQ
    | P_CONFIG
    | P_INFLIGHT_SHMFD
    | P_DEVICE_STATE
    | P_RESET_DEVICE
    | P_CONFIGURE_MEM_SLOTS;

/// A frontend that sends whatever the test asks for.
pub struct RawFrontend {
    /// The connection.
    pub stream: UnixStream,
    /// Ask for an acknowledgement with every message that has no reply of its own.
    pub need_reply: bool,
}

impl RawFrontend {
    /// A frontend on a new connection, which has sent nothing.
    pub fn new(stream: UnixStream) -> Self {
        RawFrontend { stream, need_reply: false }
    }

    /// Sends a message, and takes its acknowledgement if it asked for one.
    pub fn send(&mut self, request: FrontendReq, body: &[u8], fds: &[RawFd]) {
        let flags = VERSION | if self.need_reply { NEED_REPLY } else { 0 };
        self.send_raw(&message(request.into(), flags, body), fds);
        if self.need_reply {
            assert_eq!(self.reply_u64(request), 0, "{request:?} was not acknowledged");
        }
    }

    /// Sends any bytes.
    pub fn send_raw(&mut self, bytes: &[u8], fds: &[RawFd]) {
        assert_eq!(self.stream.send_with_fds(&[bytes], fds).unwrap(), bytes.len());
    }

    /// Sends bytes to a daemon that may have hung up.
    pub fn try_send(
        &mut self,
        bytes: &[u8],
        fds: &[RawFd],
    ) -> Result<(), vmm_sys_util::errno::Error> {
        self.stream.send_with_fds(&[bytes], fds).map(|_| ())
    }

    /// A message whose body is a number.
    pub fn send_u64(&mut self, request: FrontendReq, value: u64) {
        self.send(request, &value.to_ne_bytes(), &[]);
    }

    /// A message about a queue: its number, and a number.
    pub fn send_state(&mut self, request: FrontendReq, queue: u32, value: u32) {
        self.send(request, &state(queue, value), &[]);
    }

    /// A message that passes the descriptor of a queue.
    pub fn send_fd(&mut self, request: FrontendReq, queue: u64, fd: &impl AsRawFd) {
        self.send(request, &queue.to_ne_bytes(), &[fd.as_raw_fd()]);
    }

    /// Asks for a number.
    pub fn get_u64(&mut self, request: FrontendReq) -> u64 {
        self.send_raw(&message(request.into(), VERSION, &[]), &[]);
        self.reply_u64(request)
    }

    /// Stops a queue; returns where its ring is.
    pub fn get_vring_base(&mut self, queue: u32) -> u32 {
        let request = FrontendReq::GET_VRING_BASE;
        self.send_raw(&message(request.into(), VERSION, &state(queue, 0)), &[]);
        let body = self.reply(request);
        assert_eq!(body[..4], queue.to_ne_bytes());
        u32::from_ne_bytes(body[4..].try_into().unwrap())
    }

    /// The configuration space; `None` if the daemon answers with a size of 0, as for an error.
    pub fn get_config(&mut self, offset: u32, size: u32) -> Option<Vec<u8>> {
        let request = FrontendReq::GET_CONFIG;
        let mut body = [offset, size, 0].map(u32::to_ne_bytes).concat();
        body.resize(12 + size as usize, 0);
        self.send_raw(&message(request.into(), VERSION, &body), &[]);
        let reply = self.reply(request);
        assert_eq!(reply[..4], offset.to_ne_bytes());
        let found = u32::from_ne_bytes(reply[4..8].try_into().unwrap());
        assert_eq!(reply.len(), 12 + found as usize);
        (found == size).then(|| reply[12..].to_vec())
    }

    /// Writes into the configuration space.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) {
        let size = u32::try_from(data.len()).unwrap();
        let body = [&[offset, size, 0].map(u32::to_ne_bytes).concat(), data].concat();
        self.send(FrontendReq::SET_CONFIG, &body, &[]);
    }

    /// The number in the reply that must come next.
    pub fn reply_u64(&mut self, request: FrontendReq) -> u64 {
        u64::from_ne_bytes(self.reply(request).try_into().unwrap())
    }

    /// The body of the reply that must come next.
    pub fn reply(&mut self, request: FrontendReq) -> Vec<u8> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request.into(), VERSION | REPLY));
        let mut body = vec![0; word(8) as usize];
        self.stream.read_exact(&mut body).unwrap();
        body
    }

    /// Gives the dirty log: `len` bytes of a file at `offset`. The daemon answers that by itself.
    pub fn set_log_base(&mut self, len: u64, offset: u64, file: &impl AsRawFd) {
        self.send_log_base(len, offset, &[file.as_raw_fd()]);
        self.reply(FrontendReq::SET_LOG_BASE);
    }

    /// The same without the answer.
    pub fn send_log_base(&mut self, len: u64, offset: u64, fds: &[RawFd]) {
        let body = [len, offset].map(u64::to_ne_bytes).concat();
        self.send_raw(&message(FrontendReq::SET_LOG_BASE.into(), VERSION, &body), fds);
    }

    /// Waits for the daemon to close the connection. What it still sent is skipped.
    pub fn wait_closed(mut self) {
        let end = self.stream.read_to_end(&mut Vec::new());
        // A reset: it closed with something unread.
        assert!(end.is_ok() || end.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset);
    }

    /// The usual beginning: owner, features, protocol features.
    pub fn negotiate(&mut self, features: u64, protocol_features: u64) {
        self.send(FrontendReq::SET_OWNER, &[], &[]);
        let offered = self.get_u64(FrontendReq::GET_FEATURES);
        assert_eq!(features & !offered, 0);
        assert_eq!(self.get_u64(FrontendReq::GET_PROTOCOL_FEATURES), PROTOCOL_FEATURES);
        self.send_u64(FrontendReq::SET_PROTOCOL_FEATURES, protocol_features);
        self.send_u64(FrontendReq::SET_FEATURES, features);
        self.need_reply = protocol_features & P_REPLY_ACK != 0;
    }

    /// Half a message.
    pub fn send_half(&mut self, request: FrontendReq) {
        let whole = message(request.into(), VERSION, &[0; 8]);
        self.stream.write_all(&whole[..14]).unwrap();
    }
}

/// A message in one piece.
pub fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    [&[request, flags, size].map(u32::to_ne_bytes).concat(), body].concat()
}

/// A body about a queue: its number, and a number.
pub fn state(queue: u32, value: u32) -> Vec<u8> {
    [queue, value].map(u32::to_ne_bytes).concat()
}
