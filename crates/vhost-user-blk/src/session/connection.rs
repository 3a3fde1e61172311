//! The life of one connection: from accept to the frontend's end, its error, or the daemon's.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::Level;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use vhost::vhost_user::{self, BackendReqHandler, VhostUserBackendReqHandlerMut};
use zerocopy::native_endian::U32;

use crate::process::fd::duplicate;
use crate::process::log_limit::CONNECTIONS;
use crate::process::{signals, systemd};
use crate::session::message::{SCM_FDS_MAX, is_whole, peek};
use crate::session::replay::{Message, skip_replies};
use crate::session::{Device, Session};
use crate::session::{log_fd, memory_table};
use crate::virtio::device_state::DeviceState;
use crate::virtio::notify::EventDescriptor;

/// How often a ring is looked at whose frontend has announced not to kick.
const POLLING_INTERVAL_MS: u8 = 1;

/// While a message has begun and not ended, its rest is looked for this often, in milliseconds.
const REST_INTERVAL_MS: u8 = 2;

/// So long may the rest of a message take. It takes no time in general; a frontend that is stopped between
/// two pieces of a message goes on later. One that has died may have left its own end of the connection
/// in the message, which then never ends.
const REST_PATIENCE: Duration = Duration::from_secs(60);

/// Who else may tell the daemon something while it serves.
pub trait Commands {
    /// Readable when there is something.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Takes it and does it. `frontend` is the connection, if there is one.
    fn handle(&self, frontend: Option<BorrowedFd<'_>>);
}

/// A frontend that is connected.
pub struct Connection<D: Device> {
    handler: BackendReqHandler<Mutex<Session<D>>>,
    session: Arc<Mutex<Session<D>>>,
}

/// Why a successor cannot go on with the frontend of its predecessor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// The session refuses what the frontend has said.
    #[error("{}{}", request.map(|code| request_name(Some(code)) + ": ").unwrap_or_default(), reason(source))]
    Refused {
        /// The type of the message; `None` for what the guest had set.
        request: Option<u32>,
        /// Why.
        source: vhost_user::Error,
    },
    /// A descriptor that was handed over.
    #[error("descriptor {fd} of the handover: {source}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// The system's reason.
        source: io::Error,
    },
    /// The socket cannot be used.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl<D: Device> Connection<D> {
    /// Begins to serve the frontend at the other end of `stream`.
    pub fn new(stream: UnixStream, session: &Arc<Mutex<Session<D>>>) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        receive_whole_messages(stream.as_fd())?;
        let session = Arc::clone(session);
        Ok(Connection {
            handler: BackendReqHandler::from_stream(stream, Arc::clone(&session)),
            session,
        })
    }

    /// Goes on with a frontend that a predecessor served and that has said `messages`.
    pub fn resume<'a>(
        stream: UnixStream,
        session: &Arc<Mutex<Session<D>>>,
        state: DeviceState,
        messages: impl Iterator<Item = &'a Message<RawFd>>,
    ) -> Result<Self, ResumeError> {
        let refused = |request, source| ResumeError::Refused { request, source };
        lock(session).inherit_state(state).map_err(|e| refused(None, e))?;
        let (mut frontend, backend) = UnixStream::pair()?;
        let mut connection = Self::new(backend, session)?;
        for message in messages {
            let fds = message
                .fds
                .iter()
                .map(|&fd| duplicate(fd).map_err(|source| ResumeError::Descriptor { fd, source }));
            let fds = fds.collect::<Result<_, _>>()?;
            Message { request: message.request, body: message.body.clone(), fds }
                .send(&frontend)?;
            connection.take_message().map_err(|e| refused(Some(message.request), e))?;
            skip_replies(&mut frontend)?;
        }
        // What the crate knows of the session is in its handler, which cannot be given another
        // socket: so the socket's descriptor becomes another's.
        // SAFETY: the number is the handler's, stays open, and nobody else has it.
        let result = unsafe {
            libc::dup3(stream.as_raw_fd(), connection.handler.as_raw_fd(), libc::O_CLOEXEC)
        };
        if result < 0 { Err(io::Error::last_os_error().into()) } else { Ok(connection) }
    }

    /// Serves the frontend until it goes, sends what cannot be accepted, or a signal asks the daemon
    /// to end. When this returns nothing is in flight and the connection is closed.
    ///
    /// # Errors
    /// If the socket cannot be used at all. What the frontend does wrong is logged and is no error of
    /// the daemon.
    pub fn serve(mut self, commands: Option<&dyn Commands>) -> io::Result<()> {
        let result = self.converse(commands);
        lock(&self.session).disconnect();
        drop(self.handler);
        log::debug!("connection ended");
        result
    }

    fn converse(&mut self, commands: Option<&dyn Commands>) -> io::Result<()> {
        // SAFETY: the socket stays open as long as the handler, which the caller keeps.
        let socket = unsafe { BorrowedFd::borrow_raw(self.handler.as_raw_fd()) };
        let _interruptible = signals::Connection::new(socket);
        let say = |level, line: fmt::Arguments<'_>| CONNECTIONS.say(level, line);
        loop {
            match wait(socket, &self.session, commands)? {
                Event::Message => {
                    let request = next_request(socket);
                    match self.take_message() {
                        Ok(()) => continue,
                        Err(vhost_user::Error::Disconnected) => {
                            say(Level::Info, format_args!("frontend disconnected"))
                        }
                        // What a signal cut off is nobody's fault.
                        Err(_) if signals::stopping() => {}
                        Err(error) => {
                            let (name, reason) = (request_name(request), reason(&error));
                            say(Level::Warn, format_args!("connection closed: {name}: {reason}"));
                        }
                    }
                }
                Event::RingFailed => match lock(&self.session).check() {
                    Ok(()) => continue,
                    Err(reason) => say(Level::Warn, format_args!("connection closed: {reason}")),
                },
                Event::Command => {
                    commands.inspect(|commands| commands.handle(Some(socket)));
                    continue;
                }
                Event::Stalled => {
                    let name = request_name(next_request(socket));
                    say(
                        Level::Warn,
                        format_args!("connection closed: {name}: its end has not come"),
                    );
                }
                Event::Stop => {}
            }
            return Ok(());
        }
    }

    /// Takes the next message and does what it asks for.
    fn take_message(&mut self) -> vhost_user::Result<()> {
        let session = &self.session;
        // SAFETY: as in `converse`.
        let socket = unsafe { BorrowedFd::borrow_raw(self.handler.as_raw_fd()) };
        let padded_table = memory_table::handle_padded(socket, |regions, files| {
            lock(session).set_mem_table(regions, files, None).map(|_| ())
        });
        if let Some(result) = padded_table {
            return result;
        }
        if let Some(result) = log_fd::handle(socket, |call| lock(session).set_log_call(call)) {
            return result;
        }
        let channel = request_channel(socket);
        self.handler.handle_request()?;
        if let Some(channel) = channel {
            lock(session).keep_requests(channel);
        }
        Ok(())
    }
}

/// A duplicate of the descriptor that comes with the next message, if that is SET_BACKEND_REQ_FD;
/// the message is not taken.
fn request_channel(socket: BorrowedFd<'_>) -> Option<OwnedFd> {
    if next_request(socket)? != u32::from(FrontendReq::SET_BACKEND_REQ_FD) {
        return None;
    }
    let (mut bytes, mut control) = ([0; 4], nix::cmsg_space!([RawFd; SCM_FDS_MAX]));
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let peeked = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags).ok()?;
    let mut channels = Vec::new();
    for control in peeked.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made them.
            channels.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    channels.pop()
}

/// Has a receive of n bytes wait for all n, as long as that is not more than a message can have.
/// The `vhost` crate takes a message whose body comes in two pieces for a malformed one.
fn receive_whole_messages(socket: BorrowedFd<'_>) -> io::Result<()> {
    let low_water = libc::c_int::try_from(MAX_MSG_SIZE).unwrap_or(libc::c_int::MAX);
    let len = libc::socklen_t::try_from(size_of_val(&low_water)).unwrap_or_default();
    // SAFETY: `low_water` is valid for reads of `len` bytes.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const low_water).cast(),
            len,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the main thread has to do next.
enum Event {
    /// A message has come, or the frontend has gone.
    Message,
    /// The beginning of a message has come, and too long nothing more.
    Stalled,
    /// A worker has given up its ring.
    RingFailed,
    /// There is a command.
    Command,
    /// A signal has asked for the end.
    Stop,
}

fn wait<D: Device>(
    socket: BorrowedFd<'_>,
    session: &Mutex<Session<D>>,
    commands: Option<&dyn Commands>,
) -> io::Result<Event> {
    // Since when there is half a message.
    let mut begun: Option<Instant> = None;
    loop {
        let session = lock(session);
        let timeout = match begun {
            _ if session.poll_rings() => POLLING_INTERVAL_MS.into(),
            Some(_) => REST_INTERVAL_MS.into(),
            None => PollTimeout::NONE,
        };
        let fds = [(session.failure().fd(), Event::RingFailed)].into_iter();
        let fds = fds.chain(commands.map(|commands| (commands.fd(), Event::Command)));
        // The frontend last: it could always have something to say. And with half a message it would be
        // readable all the time.
        let frontend = begun.is_none().then_some((socket, Event::Message));
        let (fds, mut events): (Vec<_>, Vec<_>) = fds.chain(frontend).unzip();
        match wait_readable(&fds, timeout)? {
            Readable::Fd(at) => match events.swap_remove(at) {
                Event::Message => {}
                other => return Ok(other),
            },
            Readable::Stop => return Ok(Event::Stop),
            Readable::Timeout if begun.is_none() => continue,
            Readable::Timeout => {}
        }
        if is_whole(socket) {
            return Ok(Event::Message);
        }
        if begun.get_or_insert_with(Instant::now).elapsed() >= REST_PATIENCE {
            return Ok(Event::Stalled);
        }
    }
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readable {
    /// The descriptor at this place has something to read, or its other end is gone.
    Fd(usize),
    /// The time is over.
    Timeout,
    /// A signal has asked the daemon to end.
    Stop,
}

/// Waits until one of `fds` has something to read or its other end is gone, or until the daemon is
/// to end.
pub fn wait_readable(fds: &[BorrowedFd<'_>], timeout: PollTimeout) -> io::Result<Readable> {
    let all = fds.iter().copied().chain(signals::wake_fd());
    let mut all: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        // Shorter than the caller asks if the service manager wants a sign of life before.
        let (timeout, watched) = match systemd::alive().map(PollTimeout::try_from) {
            Some(Ok(watch)) if timeout.is_none() || watch < timeout => (watch, true),
            _ => (timeout, false),
        };
        let result = poll(&mut all, timeout);
        if signals::stopping() {
            return Ok(Readable::Stop);
        }
        match result {
            Ok(0) if watched => {}
            Ok(0) => return Ok(Readable::Timeout),
            // The wake descriptor comes last, and was dealt with above.
            Ok(_) => {
                if let Some(at) = all.iter().position(|fd| fd.any() != Some(false)) {
                    return Ok(Readable::Fd(at));
                }
            }
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The session.
pub fn lock<D: Device>(session: &Mutex<Session<D>>) -> MutexGuard<'_, Session<D>> {
    // Only the main thread uses it; the mutex is what the `vhost` crate asks for.
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The type of the message that comes next, without taking it.
fn next_request(socket: BorrowedFd<'_>) -> Option<u32> {
    peek::<U32>(socket).map(U32::get)
}

fn request_name(code: Option<u32>) -> String {
    match code.map(|code| (code, FrontendReq::try_from(code))) {
        Some((_, Ok(request))) => format!("{request:?}"),
        Some((code, Err(()))) => format!("unknown request {code}"),
        None => "message".to_owned(),
    }
}

/// What to tell about an error: a refusal says it all itself.
fn reason(error: &vhost_user::Error) -> String {
    match error {
        vhost_user::Error::ReqHandlerError(refusal) => refusal.to_string(),
        other => other.to_string(),
    }
}
