//! The daemon's life: socket, disk, one frontend after the other, a clean end.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use log::Level;
use nix::poll::PollTimeout;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::cli::Options;
use crate::lifecycle::commands::ControlSocket;
use crate::lifecycle::confinement;
use crate::lifecycle::disk_slot::DiskSlot;
use crate::lifecycle::error::DaemonError;
use crate::lifecycle::upgrade::running_program;
use crate::process::log_limit::{self, CONNECTIONS};
use crate::process::socket::{Listener, Socket};
use crate::process::{signals, systemd};
use crate::session::Session;
use crate::session::connection::{Commands, Connection, Readable, wait_readable};

/// How long to wait after a failed accept, in milliseconds. What is short then (descriptors,
/// memory) is short in the whole system.
const ACCEPT_RETRY_MS: u16 = 1000;

/// Serves until a signal ends the daemon or, with a connected socket, until the frontend
/// disconnects.
///
/// # Errors
/// In any case the socket file is removed, and the disk is closed as far as that is possible.
pub fn run(options: &Options) -> Result<(), DaemonError> {
    systemd::install();
    signals::install(None).map_err(DaemonError::system("take over signals"))?;
    let account = confinement::account(options)?;
    // Before the disk: a command line with a bad socket must not create a COW file.
    options.endpoint.check()?;
    let control = options.control.as_deref().map(Listener::control).transpose()?;
    raise_fd_limit();
    let (slot, disk) = DiskSlot::open(options)?;
    let opened = Socket::open(&options.endpoint).map_err(DaemonError::from).and_then(|socket| {
        confinement::enter(options, account, disk.as_ref())?;
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
    live(Daemon::new(options, socket, control, slot), None)
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
}

impl Daemon {
    /// A daemon to which no frontend has sent anything yet.
    pub fn new(
        options: &Options,
        socket: Socket,
        control: Option<Listener>,
        slot: DiskSlot,
    ) -> Self {
        let slot = Arc::new(slot);
        let session = Arc::new(Mutex::new(Session::new(Arc::clone(&slot), &slot.shape())));
        let upgrade_dir = options.upgrade_dir.clone();
        Daemon { socket, control, slot, session, program: running_program(), upgrade_dir }
    }

    pub fn session(&self) -> &Arc<Mutex<Session<Arc<DiskSlot>>>> {
        &self.session
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
        })
    }
}

/// Serves until the end, beginning with the frontend that is already connected.
pub(crate) fn live(daemon: Daemon, connected: Option<Guest>) -> Result<(), DaemonError> {
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
    let was_connected = connected.is_some();
    if let Some(connection) = connected {
        connection.serve(commands)?;
    }
    match &daemon.socket {
        Socket::Connected(_) if was_connected => Ok(()),
        Socket::Connected(stream) => {
            Connection::new(stream.try_clone()?, &daemon.session)?.serve(commands)
        }
        Socket::Listening(listener) => {
            log::info!("listening");
            while let Some(stream) = next_frontend(listener, commands)? {
                CONNECTIONS.say(Level::Info, format_args!("frontend connected"));
                Connection::new(stream, &daemon.session)?.serve(commands)?;
            }
            Ok(())
        }
    }
}

/// Waits for the next connection. `None` if the daemon should end.
fn next_frontend(
    listener: &Listener,
    commands: Option<&dyn Commands>,
) -> io::Result<Option<UnixStream>> {
    let fds: Vec<_> = [listener.as_fd()].into_iter().chain(commands.map(Commands::fd)).collect();
    loop {
        match wait_readable(&fds, PollTimeout::NONE)? {
            Readable::Stop => return Ok(None),
            Readable::Fd(1) => {
                commands.inspect(|commands| commands.handle(None));
                continue;
            }
            _ => {}
        }
        match listener.accept() {
            Ok(stream) => return Ok(Some(stream)),
            // The frontend is gone already, or another process that shares the socket accepted it.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::ConnectionAborted
                        | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => {
                CONNECTIONS.say(Level::Error, format_args!("cannot accept a connection: {e}"));
                if wait_readable(&[], ACCEPT_RETRY_MS.into())? == Readable::Stop {
                    return Ok(None);
                }
            }
        }
    }
}
