//! Restarts under a frontend that does with its connection what cloud-hypervisor 53 does: it
//! connects again the moment the connection ends. Where it cannot connect it tries again; where it
//! is connected and then fails it gives the disk up.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

use super::{End, PATIENCE, Soak, start};
use crate::common::{outcome, upgrade, with_fd_as};

/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(100);
/// Lower than any number that a connection gets.
const LOW_FD: i32 = 3;

/// How a daemon gets its listening socket.
pub enum Way {
    /// It makes it.
    Path,
    /// From a parent that keeps nothing of it.
    Fd,
    /// From a service manager, which keeps it.
    Held(UnixListener),
}

impl Way {
    /// The command, with such a socket.
    pub fn listen(&self, mut command: Command, socket: &Path) -> Command {
        let listener = match self {
            Way::Path => {
                command.arg("--socket-path").arg(socket);
                return command;
            }
            Way::Fd => {
                // The last one's.
                _ = std::fs::remove_file(socket);
                UnixListener::bind(socket).unwrap()
            }
            Way::Held(listener) => listener.try_clone().unwrap(),
        };
        with_fd_as(LOW_FD, command, OwnedFd::from(listener))
    }
}

impl Soak {
    /// Goes on with a daemon that gets its socket in this way, as do all that follow.
    pub fn go_on_with(&mut self, way: fn(&Path) -> Way) {
        self.way = way(&self.daemon.socket);
        self.kill(&[]);
    }

    /// Upgrades the daemon under load.
    pub fn upgrade(&mut self) {
        let mut command = upgrade(&self.directory, &[]);
        self.load_while(|_| command.try_wait().unwrap().is_none());
        let (status, said) = outcome(command);
        assert_eq!(status, Some(0), "{said}");
    }

    /// Ends the daemon under load by `signal` after so many answers, and starts the next. Whether
    /// the frontend would have lost its disk.
    pub fn restart_by(&mut self, args: &[&str], signal: Signal, answers: u64) -> bool {
        self.load(answers);
        let (connection, socket) = (self.device.connection().unwrap(), self.daemon.socket.clone());
        let frontend = std::thread::spawn(move || connect_at_the_end_of(connection, &socket));
        self.interrupted += self.in_flight();
        self.daemon.signal(signal);
        let status = self.daemon.reap();
        if signal == Signal::SIGTERM {
            assert_eq!(status.code(), Some(0), "{}", self.daemon.said());
        }
        self.daemon = start(&self.directory, &self.way, args, &End::Killed { after: 0 });
        let stream = frontend.join().unwrap();
        let lost = match self.device.resume(stream, &self.options) {
            Ok(()) => false,
            Err(e) => {
                println!("lost: {e}");
                self.device.reconnect(&self.options).unwrap();
                true
            }
        };
        self.load_until_each_queue_answers();
        lost
    }
}

fn connect_at_the_end_of(connection: OwnedFd, socket: &Path) -> UnixStream {
    let mut fds = [PollFd::new(connection.as_fd(), PollFlags::empty())];
    let timeout = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut fds, timeout), Ok(1), "the connection does not end");
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
        std::thread::sleep(RETRY);
    }
}
