//! One connection, from accept until the frontend disconnects, makes a mistake, or the daemon ends.

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

/// How often to look at a ring whose frontend has announced that it does not kick.
const POLLING_INTERVAL_MS: u8 = 1;

/// How often to look for the rest of an incomplete message, in milliseconds.
const REST_INTERVAL_MS: u8 = 2;

/// How long the rest of a message may take. Usually it is there at once, but a frontend can be
/// stopped between two pieces of a message and continue later. The rest never arrives if the
/// frontend has died and its own end of the connection is among the descriptors of the message,
/// which keeps it open.
const REST_PATIENCE: Duration = Duration::from_secs(60);

/// Another source of commands while the daemon serves a frontend.
pub trait Commands {
    /// Readable when there is a command.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Receives one command and carries it out. `frontend` is the connection, if there is one.
    fn handle(&self, frontend: Option<BorrowedFd<'_>>);
}

/// Other frontends that want to be served.
pub trait Waiting {
    /// Readable when there is one.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Accepts one; `None` if it is gone, or not let in.
    fn next(&self) -> Option<UnixStream>;
}

/// The frontends that wait while one is served. It keeps its place from SET_OWNER on.
#[derive(Clone, Copy)]
pub struct Rivals<'a> {
    /// Where they wait.
    pub waiting: &'a dyn Waiting,
    /// How long the connected frontend may take for its first message. It has the whole
    /// [`SILENCE`] for SET_OWNER if there is one.
    pub patience: Duration,
}

/// How long a frontend may be connected without SET_OWNER before another one that waits replaces
/// it. Frontends send it with their first messages.
const SILENCE: Duration = Duration::from_secs(5);

impl<'a> Rivals<'a> {
    /// For a frontend that has just connected.
    pub fn new(waiting: &'a dyn Waiting) -> Self {
        Rivals { waiting, patience: SILENCE }
    }
}

/// A frontend that is connected.
pub struct Connection<D: Device> {
    handler: BackendReqHandler<Mutex<Session<D>>>,
    session: Arc<Mutex<Session<D>>>,
}

/// Why a successor cannot continue with the frontend of its predecessor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeError {
    /// The session refuses a message of the frontend.
    #[error("{}{}", request.map(|code| request_name(Some(code)) + ": ").unwrap_or_default(), reason(source))]
    Refused {
        /// The type of the message; `None` for the guest's settings.
        request: Option<u32>,
        /// Why.
        source: vhost_user::Error,
    },
    /// A descriptor of the handover is not open.
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
    /// A connection with the frontend at the other end of `stream`.
    pub fn new(stream: UnixStream, session: &Arc<Mutex<Session<D>>>) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        receive_whole_messages(stream.as_fd())?;
        let session = Arc::clone(session);
        Ok(Connection {
            handler: BackendReqHandler::from_stream(stream, Arc::clone(&session)),
            session,
        })
    }

    /// Continues with a frontend that a predecessor served and that has sent `messages`.
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
        // The crate's handler keeps state about the session and cannot be given another socket, so
        // the descriptor of its socket is replaced by the frontend's.
        // SAFETY: the number belongs to the handler alone, and stays open.
        let result = unsafe {
            libc::dup3(stream.as_raw_fd(), connection.handler.as_raw_fd(), libc::O_CLOEXEC)
        };
        if result < 0 { Err(io::Error::last_os_error().into()) } else { Ok(connection) }
    }

    /// Serves the frontend until it disconnects, sends something that is refused, is replaced by one
    /// that waits, or a signal ends the daemon. When this returns, nothing is in flight and the
    /// connection is closed. The frontend that replaces it is returned.
    ///
    /// # Errors
    /// If the socket cannot be used at all. A mistake of the frontend is logged and is not an error
    /// here.
    pub fn serve(
        mut self,
        commands: Option<&dyn Commands>,
        rivals: Option<Rivals<'_>>,
    ) -> io::Result<Option<UnixStream>> {
        let result = self.converse(commands, rivals);
        lock(&self.session).disconnect();
        drop(self.handler);
        log::debug!("connection ended");
        result
    }

    fn converse(
        &mut self,
        commands: Option<&dyn Commands>,
        rivals: Option<Rivals<'_>>,
    ) -> io::Result<Option<UnixStream>> {
        // SAFETY: the socket stays open as long as the handler, which `self` keeps.
        let socket = unsafe { BorrowedFd::borrow_raw(self.handler.as_raw_fd()) };
        let _interruptible = signals::Connection::new(socket);
        let say = |level, line: fmt::Arguments<'_>| CONNECTIONS.say(level, line);
        let begun = Instant::now();
        let mut patience = rivals.map_or(SILENCE, |rivals| rivals.patience);
        loop {
            let rivals = rivals.map(|rivals| (rivals.waiting, begun + patience));
            match wait(socket, &self.session, commands, rivals)? {
                Event::Message => {
                    let request = next_request(socket);
                    patience = SILENCE;
                    match self.take_message() {
                        Ok(()) => continue,
                        Err(vhost_user::Error::Disconnected) => {
                            say(Level::Info, format_args!("frontend disconnected"))
                        }
                        // A signal has cut the message off.
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
                Event::Rival => {
                    let Some(rival) = rivals.and_then(|(waiting, _)| waiting.next()) else {
                        continue;
                    };
                    let line = "connection closed: it has sent no SET_OWNER, and another one waits";
                    say(Level::Warn, format_args!("{line}"));
                    return Ok(Some(rival));
                }
                Event::Stalled => {
                    let name = request_name(next_request(socket));
                    say(
                        Level::Warn,
                        format_args!(
                            "connection closed: {name}: message incomplete after {} s",
                            REST_PATIENCE.as_secs()
                        ),
                    );
                }
                Event::Stop => {}
            }
            return Ok(None);
        }
    }

    /// Receives the next message and handles it.
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

/// A duplicate of the descriptor that comes with the next message, if that is SET_BACKEND_REQ_FD.
/// The message itself stays in the socket.
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

/// Makes a receive of n bytes wait for all n, up to the length of a message. The `vhost` crate
/// treats a message whose body arrives in two pieces as malformed.
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
    /// A message has arrived, or the frontend has gone.
    Message,
    /// The rest of an incomplete message has not arrived in time.
    Stalled,
    /// A worker has given up its ring.
    RingFailed,
    /// There is a command.
    Command,
    /// Another frontend waits, and this one has had its time.
    Rival,
    /// A signal has asked for the end.
    Stop,
}

fn wait<D: Device>(
    socket: BorrowedFd<'_>,
    session: &Mutex<Session<D>>,
    commands: Option<&dyn Commands>,
    rivals: Option<(&dyn Waiting, Instant)>,
) -> io::Result<Event> {
    // When an incomplete message was first seen.
    let mut begun: Option<Instant> = None;
    loop {
        let session = lock(session);
        let rivals = rivals.filter(|_| !session.is_owned());
        let left = rivals.map(|(_, from)| from.saturating_duration_since(Instant::now()));
        let timeout = match (begun, left) {
            _ if session.poll_rings() => POLLING_INTERVAL_MS.into(),
            (Some(_), _) => REST_INTERVAL_MS.into(),
            // To the next millisecond, so that it is over then.
            (None, Some(left)) if !left.is_zero() => {
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
            (None, _) => PollTimeout::NONE,
        };
        let fds = [(session.failure().fd(), Event::RingFailed)].into_iter();
        let fds = fds.chain(commands.map(|commands| (commands.fd(), Event::Command)));
        let due = rivals.filter(|_| left.is_some_and(|left| left.is_zero()));
        let fds = fds.chain(due.map(|(waiting, _)| (waiting.fd(), Event::Rival)));
        // The frontend comes last, because it could always be readable. With an incomplete message
        // it is readable all the time, so it is left out then.
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
    /// The descriptor at this index has something to read, or its other end is gone.
    Fd(usize),
    /// The time has passed.
    Timeout,
    /// A signal has asked the daemon to end.
    Stop,
}

/// Waits until one of `fds` has something to read or its other end is gone, or until a signal ends
/// the daemon.
pub fn wait_readable(fds: &[BorrowedFd<'_>], timeout: PollTimeout) -> io::Result<Readable> {
    let all = fds.iter().copied().chain(signals::wake_fd());
    let mut all: Vec<_> = all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        // Shorter than the caller's timeout if the watchdog must be pinged earlier.
        let (timeout, watched) = match systemd::ping_watchdog().map(PollTimeout::try_from) {
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
            // The wake descriptor comes last, and was handled above.
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

/// Locks the session.
pub fn lock<D: Device>(session: &Mutex<Session<D>>) -> MutexGuard<'_, Session<D>> {
    // Only the main thread uses it. The `vhost` crate requires the mutex.
    session.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Peeks at the type of the next message.
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

/// The text of an error. A refusal is complete without the crate's words around it.
fn reason(error: &vhost_user::Error) -> String {
    match error {
        vhost_user::Error::ReqHandlerError(refusal) => refusal.to_string(),
        other => other.to_string(),
    }
}
