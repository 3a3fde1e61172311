//! One connection, from accept until the frontend disconnects, makes a mistake, or the daemon ends.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::Level;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};
use vhost::vhost_user::{self, BackendReqHandler};
use zerocopy::native_endian::U32;

use crate::process::descriptor::Foreign;
use crate::process::fd::duplicate;
use crate::process::log_limit::CONNECTIONS;
use crate::process::{signals, systemd};
use crate::session::admission::admit;
use crate::session::message::{Arrival, Header, Message, arrival, peek, receive, receive_some};
use crate::session::refusal::Refusal;
use crate::session::{Device, Session, log_fd, memory_table, replay};
use crate::virtio::device_state::DeviceState;
use crate::virtio::notify::EventDescriptor;

/// How often to look at a ring whose frontend has announced that it does not kick.
const POLLING_INTERVAL_MS: u8 = 1;

/// How often to look for the rest of an incomplete message, or for room for a reply, in
/// milliseconds.
const REST_INTERVAL_MS: u8 = 2;

/// How long the rest of a message may take, and the frontend to read its replies. Usually a message
/// is there at once, but a frontend can be stopped between two pieces of it and continue later. The
/// rest never arrives if the frontend has died and its own end of the connection is among the
/// descriptors of the message, which keeps it open.
const PATIENCE: Duration = Duration::from_secs(60);

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
    /// The frontend's socket. Nothing that sleeps is done with it.
    socket: Arc<UnixStream>,
    /// To the handler, which thinks that it is the frontend's. The `vhost` crate sends and receives
    /// with calls that sleep, but here there is always a whole message and room for the reply.
    inner: UnixStream,
    handler: BackendReqHandler<Mutex<Session<D>>>,
    session: Arc<Mutex<Session<D>>>,
    /// Memory may be in files of any file system (`--allow-file-memory`).
    any_file: bool,
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
    /// A connection with the frontend at the other end of `stream`. With `any_file`, memory may be
    /// in files of any file system, and touching or closing it may take as long as that wants.
    pub fn new(
        stream: UnixStream,
        session: &Arc<Mutex<Session<D>>>,
        any_file: bool,
    ) -> io::Result<Self> {
        let (inner, handlers) = UnixStream::pair()?;
        let session = Arc::clone(session);
        Ok(Connection {
            socket: Arc::new(stream),
            inner,
            handler: BackendReqHandler::from_stream(handlers, Arc::clone(&session)),
            session,
            any_file,
        })
    }

    /// Brings it to the state of a connection that a predecessor served and whose frontend has sent
    /// `messages`.
    pub fn resume<'a>(
        &mut self,
        state: DeviceState,
        messages: impl Iterator<Item = &'a replay::Message<RawFd>>,
    ) -> Result<(), ResumeError> {
        let refused = |request, source| ResumeError::Refused { request, source };
        lock(&self.session).inherit_state(state).map_err(|e| refused(None, e))?;
        for message in messages {
            let mut fds = Foreign::default();
            for &fd in &message.fds {
                let own = duplicate(fd).map_err(|source| ResumeError::Descriptor { fd, source });
                fds.extend([own?]);
            }
            // The predecessor has sent the reply.
            let (_, outcome) = self.handle(message.bytes(), fds);
            outcome.map_err(|e| refused(Some(message.request), e))?;
        }
        Ok(())
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
        drop(self);
        log::debug!("connection ended");
        result
    }

    fn converse(
        &mut self,
        commands: Option<&dyn Commands>,
        rivals: Option<Rivals<'_>>,
    ) -> io::Result<Option<UnixStream>> {
        let own = Arc::clone(&self.socket);
        let socket = own.as_fd();
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
                Event::Stalled(what) => {
                    let name = request_name(next_request(socket));
                    let after = PATIENCE.as_secs();
                    say(
                        Level::Warn,
                        format_args!("connection closed: {name}: {what} after {after} s"),
                    );
                }
                Event::OutOfBand => say(
                    Level::Warn,
                    format_args!("connection closed: a byte out of band, which is no message"),
                ),
                Event::Stop => {}
            }
            return Ok(None);
        }
    }

    /// Receives the next message, handles it, and sends the reply.
    fn take_message(&mut self) -> vhost_user::Result<()> {
        let (bytes, fds) = receive(self.socket.as_fd())?;
        let (reply, outcome) = self.handle(bytes, fds);
        let sent = reply.map_or(Ok(()), |reply| reply.send(self.socket.as_fd()));
        outcome.and(sent)
    }

    /// Handles a message that has come with these descriptors. Returns the reply, if there is one.
    fn handle(
        &mut self,
        bytes: Vec<u8>,
        fds: Foreign,
    ) -> (Option<Message>, vhost_user::Result<()>) {
        let mut message = Message { bytes, fds: Vec::new() };
        let request = message.header().map_or(0, |header| header.request());
        message.fds = match admit(fds, request, self.any_file) {
            Ok(fds) => fds,
            Err(unfit) => {
                let reply = message.header().and_then(|header| header.acknowledgement(false));
                return (reply, Err(Refusal::Unfit(unfit).into()));
            }
        };
        let set_log_call = |call| lock(&self.session).set_log_call(call);
        if let Some(done) = log_fd::handle(&mut message, set_log_call) {
            return done;
        }
        memory_table::trim(&mut message);
        // The crate would discard the message, and receive another one that never comes.
        let found = message.fds.len();
        if found > MAX_ATTACHED_FD_ENTRIES {
            let reply = message.header().and_then(|header| header.acknowledgement(false));
            return (reply, Err(Refusal::TooManyDescriptors { found }.into()));
        }
        let outcome = message.send(self.inner.as_fd()).and_then(|()| self.handler.handle_request());
        if outcome.is_ok()
            && request == u32::from(FrontendReq::SET_BACKEND_REQ_FD)
            && let Some(channel) = message.fds.pop()
        {
            lock(&self.session).keep_requests(channel);
        }
        (self.reply(), outcome)
    }

    /// What the handler has replied.
    fn reply(&self) -> Option<Message> {
        let mut bytes = vec![0; size_of::<Header>() + MAX_MSG_SIZE];
        let mut fds = Foreign::default();
        let len = receive_some(self.inner.as_fd(), &mut bytes, &mut fds).ok()?;
        bytes.truncate(len);
        // Its descriptors are our own.
        (len > 0).then(|| Message { bytes, fds: fds.admitted() })
    }
}

/// What the main thread has to do next.
enum Event {
    /// A message has arrived, or the frontend has gone.
    Message,
    /// The frontend has not done its part of the exchange in time.
    Stalled(&'static str),
    /// The frontend has sent a byte out of band.
    OutOfBand,
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
    // When a message was first seen that cannot be taken yet.
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
        // The frontend comes last, because it could always be readable. With a message that cannot
        // be taken it is readable all the time, so it is left out then.
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
        let what = match arrival(socket) {
            Arrival::Whole => return Ok(Event::Message),
            Arrival::OutOfBand => return Ok(Event::OutOfBand),
            Arrival::Incomplete => "message incomplete",
            Arrival::RepliesUnread => "earlier replies not read",
        };
        if begun.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
            return Ok(Event::Stalled(what));
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
