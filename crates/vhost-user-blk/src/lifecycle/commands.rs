//! The commands of the control socket, one function for each.
//!
//! They run on the main thread, between two messages of the frontend, which waits meanwhile.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use log::Level;

use crate::lifecycle::disk_slot::DiskSlot;
use crate::lifecycle::upgrade::{Handoff, UpgradeError};
use crate::process::control::{Reply, Request, Upgrade};
use crate::process::log_limit::CONTROL;
use crate::process::peer::{Admission, Peer};
use crate::process::socket::Listener;
use crate::session::Session;
use crate::session::connection::Commands;

/// The control socket, and what its commands act on.
pub struct ControlSocket<'a> {
    /// Where commands come from.
    pub control: &'a Listener,
    /// Where frontends come from, unless there is only one.
    pub listener: Option<&'a Listener>,
    /// The disk.
    pub slot: &'a DiskSlot,
    /// What the frontend has set up.
    pub session: &'a Mutex<Session<Arc<DiskSlot>>>,
    /// The file that the running program was started from.
    pub program: &'a Path,
    /// `--upgrade-dir`.
    pub upgrade_dir: Option<&'a Path>,
    /// Whose frontends are let in.
    pub admission: &'a Admission,
}

impl Commands for ControlSocket<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    fn handle(&self, frontend: Option<BorrowedFd<'_>>) {
        let Ok(client) = self.control.accept() else { return };
        let peer = match Peer::of(&client) {
            Ok(peer) if peer.is_root_or_own() => peer,
            Ok(peer) => {
                CONTROL.say(Level::Warn, format_args!("control socket: refused {peer}"));
                let why = "only root and the daemon's user may give commands";
                return Reply::Failed(why.to_owned()).send(&client);
            }
            Err(e) => return CONTROL.say(Level::Warn, format_args!("control socket: {e}")),
        };
        let request = match Request::receive(&client) {
            Ok(request) => request,
            Err(e) => {
                CONTROL.say(Level::Warn, format_args!("control socket: {e}"));
                // A newer client asks for what this daemon does not have.
                return Reply::Failed(e.to_string()).send(&client);
            }
        };
        let reply = match request {
            Request::Upgrade(upgrade) => {
                CONTROL.say(Level::Info, format_args!("upgrade asked for by {peer}"));
                self.upgrade(&upgrade, frontend, &client)
            }
        };
        reply.send(&client);
    }
}

impl ControlSocket<'_> {
    /// Returns only if the upgrade failed: otherwise this program ends here, and the new one
    /// answers `client`.
    fn upgrade(
        &self,
        upgrade: &Upgrade,
        frontend: Option<BorrowedFd<'_>>,
        client: &UnixStream,
    ) -> Reply {
        let why = match self.slot.disk() {
            Some(disk) => {
                let &ControlSocket { control, listener, program, upgrade_dir, admission, .. } =
                    self;
                let disk = &disk;
                let handoff = Handoff { disk, listener, control, program, upgrade_dir, admission };
                handoff.hand_over(upgrade, self.session, frontend, client.as_fd())
            }
            None => UpgradeError::DiskElsewhere,
        };
        CONTROL.say(Level::Warn, format_args!("upgrade failed: {why}"));
        Reply::Failed(format!("{why}; the daemon continues unchanged"))
    }
}
