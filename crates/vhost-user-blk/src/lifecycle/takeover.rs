//! The new program's side of an upgrade (docs/architecture.md, "Upgrade").

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use block_io::storage::adopt_boot_id;
use log::LevelFilter;
use vhost::vhost_user::message::FrontendReq;

use crate::cli::Options;
use crate::lifecycle::confinement;
use crate::lifecycle::daemon::{self, Daemon, Guest};
use crate::lifecycle::disk_slot::DiskSlot;
use crate::lifecycle::error::DaemonError;
use crate::lifecycle::handover::{Handover, Listening, inherit};
use crate::lifecycle::upgrade;
use crate::process::control::Reply;
use crate::process::sandbox;
use crate::process::socket::{Endpoint, Listener, Socket};
use crate::process::{signals, systemd};
use crate::session::replay::Message;
use crate::virtio::device_state::DeviceState;

/// This program's version.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Continues where the predecessor stopped or, in a rehearsal, answers whether it could.
pub fn run(options: &Options, handover_fd: RawFd) -> Result<(), DaemonError> {
    let handover = Handover::fetch(handover_fd)?;
    handover.boot.into_iter().for_each(adopt_boot_id);
    if handover.sandbox {
        sandbox::resume(options.sandbox)?;
    }
    if let Some(pipe) = handover.rehearsal {
        // The takeover itself logs the rest, once.
        log::set_max_level(options.log_level.min(LevelFilter::Warn));
        let outcome = take_over(options, &handover, true);
        let line = match &outcome {
            Ok(_) => format!("ready {VERSION}\n"),
            Err(e) => format!("refused {}\n", e.to_string().replace('\n', " ")),
        };
        let answered = File::from(inherit(pipe)?).write_all(line.as_bytes());
        // Nothing that is shared is cleaned up here: it belongs to the predecessor.
        return answered.map_err(DaemonError::system("answer"));
    }
    systemd::install();
    let wake = handover.wake.map(inherit).transpose()?;
    signals::install(wake).map_err(DaemonError::system("take over signals"))?;
    let client = handover.reply.map(inherit).transpose()?.map(UnixStream::from);
    let taken = take_over(options, &handover, false);
    let reply = match &taken {
        Ok(_) => {
            Reply::Done(format!("upgraded from {} to {VERSION}{}", handover.from, pause(&handover)))
        }
        Err(e) => Reply::Failed(format!("{e}; the daemon has exited")),
    };
    // The inherited descriptors have been duplicated, or are not needed any more. If the takeover
    // has failed, the listening socket must close before the connection; it has the highest number.
    let fds = handover.fds().into_iter().chain([handover_fd]).collect::<BTreeSet<_>>();
    // SAFETY: nothing else in this program uses these numbers. Closing one that is not open fails.
    fds.into_iter().rev().for_each(|fd| drop(unsafe { OwnedFd::from_raw_fd(fd) }));
    if let Some(client) = client {
        reply.send(&client);
    }
    let (daemon, connection) = taken?;
    if let Reply::Done(text) = reply {
        log::info!("{text}");
    }
    daemon::live(daemon, connection)
}

/// The time during which no request was served, as a part of a sentence.
fn pause(handover: &Handover) -> String {
    match (handover.connection, handover.paused, upgrade::now()) {
        (Some(_), Some(from), Some(to)) => {
            format!("; the guest waited {:.1} ms", to.saturating_sub(from).as_secs_f64() * 1e3)
        }
        _ => String::new(),
    }
}

/// Makes a daemon of what is handed over. In a `rehearsal` nothing is changed that the predecessor
/// uses, and no ring starts.
fn take_over(
    options: &Options,
    handover: &Handover,
    rehearsal: bool,
) -> Result<(Daemon, Option<Guest>), DaemonError> {
    let listen = |listening: Listening, path| {
        // The last program removes the file; a rehearsal must not.
        let file = listening.file.filter(|_| !rehearsal).zip(path);
        let listener = Listener::inherit(inherit(listening.fd)?, file);
        listener.map_err(DaemonError::system("use the socket"))
    };
    let path = match &options.endpoint {
        Endpoint::Path(path) => Some(path.clone()),
        Endpoint::Fd(_) => None,
    };
    let stream = handover.connection.map(inherit).transpose()?.map(UnixStream::from);
    let io = DaemonError::system("use the socket");
    let socket = match (handover.listener, &stream) {
        (Some(listening), _) => Socket::Listening(listen(listening, path)?.placed_high()),
        (None, Some(stream)) => Socket::Connected(stream.try_clone().map_err(io)?),
        // A rehearsal gets no listening socket, and ends before it needs one.
        (None, None) => Socket::Connected(UnixStream::pair().map_err(io)?.0),
    };
    let control = handover.control.map(|it| listen(it, options.control.clone())).transpose()?;
    daemon::raise_fd_limit();
    let (slot, disk) = DiskSlot::inherit(options, &handover.top, rehearsal)?;
    // The predecessor has become the user.
    confinement::enter(options, None, &slot, Some(&disk), handover.sandbox)?;
    if !rehearsal {
        slot.begin(Some(disk))?;
    }
    let daemon = Daemon::new(options, socket, control, slot, handover.admission.clone());
    let Some(stream) = stream else { return Ok((daemon, None)) };
    let state = DeviceState { write_cache: handover.write_cache };
    let messages = handover.messages.iter().filter(|message| !(rehearsal && starts(message)));
    let mut connection =
        daemon.connection(stream).map_err(DaemonError::system("use the socket"))?;
    connection.resume(state, messages)?;
    Ok((daemon, Some(connection)))
}

/// Whether this message starts a ring.
fn starts(message: &Message<RawFd>) -> bool {
    message.request == u32::from(FrontendReq::SET_VRING_KICK)
}
