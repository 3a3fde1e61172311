//! The daemon's life: socket, disk, one frontend after the other, a clean end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use log::Level;
use nix::poll::PollTimeout;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::cli::Options;
use crate::fault;
use crate::lifecycle::commands::ControlSocket;
use crate::lifecycle::confinement;
use crate::lifecycle::disk_slot::DiskSlot;
use crate::lifecycle::error::DaemonError;
use crate::lifecycle::upgrade::running_program;
use crate::process::log_limit::{self, CONNECTIONS};
use crate::process::peer::{Admission, Peer};
use crate::process::socket::{Listener, Socket};
use crate::process::{signals, systemd};
use crate::session::Session;
use crate::session::connection::{Commands, Connection, Readable, Rivals, Waiting, wait_readable};

/// How long to wait after a failed accept, in milliseconds. What is short then (descriptors,
/// memory) is short in the whole system.
const ACCEPT_RETRY_MS: u16 = 1000;

/// How long a frontend that has replaced a silent one may be silent itself while others wait. It
/// has waited before, so its first message should be there. Many silent ones together thus hold the
/// place not much longer than one.
const CONTESTED_PATIENCE: Duration = Duration::from_millis(200);

/// Serves until a signal ends the daemon or, with a connected socket, until the frontend
/// disconnects.
///
/// # Errors
/// In any case the socket file is removed, and the disk is closed as far as that is possible.
pub fn run(options: &Options) -> Result<(), DaemonError> {
    systemd::install();
    signals::install(None).map_err(DaemonError::system("take over signals"))?;
    let admission = Admission::find(&options.allow_uid, &options.allow_gid)?;
    let account = confinement::account(options)?;
    // Before the disk: a command line with a bad socket must not create a COW file.
    options.endpoint.check(admission.is_selective())?;
    let control = options.control.as_deref().map(Listener::control).transpose()?;
    raise_fd_limit();
    let (slot, disk) = DiskSlot::open(options)?;
    let opened = Socket::open(&options.endpoint).map_err(DaemonError::from).and_then(|socket| {
        confinement::enter(options, account, &slot, disk.as_ref(), false)?;
        Ok(socket)
    });
    let socket = match (opened, &disk) {
        (Ok(socket), _) => socket,
        (Err(e), None) => return Err(e),
        (Err(e), Some(disk)) => {
            disk.close()?;
            return Err(e);
        }
    };
    slot.begin(disk)?;
    live(Daemon::new(options, socket, control, slot, admission), None)
}

/// A frontend that is connected to the disk.
pub(crate) type Guest = Connection<Arc<DiskSlot>>;

/// A daemon: its sockets, its disk, and the session with its frontend.
pub(crate) struct Daemon {
    socket: Socket,
    control: Option<Listener>,
    slot: Arc<DiskSlot>,
    session: Arc<Mutex<Session<Arc<DiskSlot>>>>,
    /// The file that this program was started from.
    program: PathBuf,
    /// `--upgrade-dir`.
    upgrade_dir: Option<PathBuf>,
    /// Whose frontends are let in.
    admission: Admission,
}

impl Daemon {
    /// A daemon to which no frontend has sent anything yet.
    pub fn new(
        options: &Options,
        socket: Socket,
        control: Option<Listener>,
        slot: DiskSlot,
        admission: Admission,
    ) -> Self {
        let slot = Arc::new(slot);
        let session = Arc::new(Mutex::new(Session::new(Arc::clone(&slot), &slot.shape())));
        let upgrade_dir = options.upgrade_dir.clone();
        let program = running_program();
        Daemon { socket, control, slot, session, program, upgrade_dir, admission }
    }

    /// A connection with the frontend at the other end of `stream`.
    pub fn connection(&self, stream: UnixStream) -> io::Result<Guest> {
        Connection::new(stream, &self.session, self.slot.allows_file_memory())
    }

    /// The socket on which frontends connect, unless there is only one frontend.
    fn listener(&self) -> Option<&Listener> {
        match &self.socket {
            Socket::Listening(listener) => Some(listener),
            Socket::Connected(_) => None,
        }
    }

    fn control_socket(&self) -> Option<ControlSocket<'_>> {
        self.control.as_ref().map(|control| ControlSocket {
            control,
            listener: self.listener(),
            slot: &self.slot,
            session: &self.session,
            program: &self.program,
            upgrade_dir: self.upgrade_dir.as_deref(),
            admission: &self.admission,
        })
    }
}

/// Serves until the end, beginning with the frontend that is already connected.
pub(crate) fn live(daemon: Daemon, connected: Option<Guest>) -> Result<(), DaemonError> {
    fault::foreign_code();
    let entrance = daemon.listener().map(signals::Entrance::new);
    systemd::ready();
    let served = serve(&daemon, connected).map_err(DaemonError::system("use the socket"));
    systemd::stopping();
    drop(entrance);
    log_limit::report_suppressed();
    // The workers have ended with the last connection.
    daemon.slot.close()?;
    served
}

/// Raises the limit of open files: a frontend can pass three descriptors for each queue and one for
/// each memory region.
pub(crate) fn raise_fd_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        log::warn!("cannot raise the limit of open files: {e}");
    }
}

fn serve(daemon: &Daemon, connected: Option<Guest>) -> io::Result<()> {
    let commands = daemon.control_socket();
    let commands = commands.as_ref().map(|commands| commands as &dyn Commands);
    let listener = match &daemon.socket {
        Socket::Connected(stream) => {
            let connection = match connected {
                Some(connection) => connection,
                None => {
                    let peer = Peer::of(stream)?;
                    let line = format_args!("frontend connected by {peer}, before the start");
                    CONNECTIONS.say(Level::Info, line);
                    daemon.connection(stream.try_clone()?)?
                }
            };
            return connection.serve(commands, None).map(|_| ());
        }
        Socket::Listening(listener) => listener,
    };
    let door = Door { listener, admission: &daemon.admission };
    let mut rival = match connected {
        Some(connection) => connection.serve(commands, Some(Rivals::new(&door)))?,
        None => None,
    };
    log::info!("listening");
    loop {
        let mut rivals = Rivals::new(&door);
        let stream = match rival.take() {
            Some(stream) => {
                rivals.patience = CONTESTED_PATIENCE;
                stream
            }
            None => match next_frontend(&door, commands)? {
                Some(stream) => stream,
                None => return Ok(()),
            },
        };
        rival = daemon.connection(stream)?.serve(commands, Some(rivals))?;
    }
}

/// Where frontends come in.
struct Door<'a> {
    listener: &'a Listener,
    admission: &'a Admission,
}

impl Door<'_> {
    /// Accepts a connection; `None` if it is refused, or gone already.
    fn accept(&self) -> io::Result<Option<UnixStream>> {
        let stream = match self.listener.accept() {
            Ok(stream) => stream,
            // The frontend is gone already, or another process that shares the socket accepted it.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::ConnectionAborted
                        | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let peer = Peer::of(&stream)?;
        if !self.admission.admits(peer, &stream)? {
            let line = format_args!("frontend refused: {peer}: not in --allow-uid or --allow-gid");
            CONNECTIONS.say(Level::Warn, line);
            return Ok(None);
        }
        CONNECTIONS.say(Level::Info, format_args!("frontend connected: {peer}"));
        Ok(Some(stream))
    }
}

impl Waiting for Door<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    fn next(&self) -> Option<UnixStream> {
        // The one that is connected keeps its place if nobody can take it.
        self.accept().ok().flatten()
    }
}

/// Waits for the next connection. `None` if the daemon should end.
fn next_frontend(
    door: &Door<'_>,
    commands: Option<&dyn Commands>,
) -> io::Result<Option<UnixStream>> {
    let fds: Vec<_> = [door.fd()].into_iter().chain(commands.map(Commands::fd)).collect();
    loop {
        match wait_readable(&fds, PollTimeout::NONE)? {
            Readable::Stop => return Ok(None),
            Readable::Fd(1) => {
                commands.inspect(|commands| commands.handle(None));
                continue;
            }
            _ => {}
        }
        match door.accept() {
            Ok(None) => {}
            Ok(accepted) => return Ok(accepted),
            Err(e) => {
                CONNECTIONS.say(Level::Error, format_args!("cannot accept a connection: {e}"));
                if wait_readable(&[], ACCEPT_RETRY_MS.into())? == Readable::Stop {
                    return Ok(None);
                }
            }
        }
    }
}
