//! QEMU's monitor (QMP): commands and answers, a line of JSON each.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// After this time a guest is asked again to give a device back.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// A connection to a monitor.
pub struct Monitor {
    lines: BufReader<UnixStream>,
    timeout: Duration,
}

impl Monitor {
    /// Connects to a monitor that may be just being made.
    pub(crate) fn connect(socket: &Path, timeout: Duration) -> Self {
        let deadline = Instant::now() + timeout;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(e) => assert!(Instant::now() < deadline, "{}: {e}", socket.display()),
            }
            thread::sleep(Duration::from_millis(10));
        };
        stream.set_read_timeout(Some(timeout)).expect("a time limit");
        let mut monitor = Self { lines: BufReader::new(stream), timeout };
        monitor.line();
        monitor.run("qmp_capabilities", json!({}));
        monitor
    }

    /// Runs a command; panics if it fails.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        match self.try_run(command, &arguments) {
            Ok(result) => result,
            Err(error) => panic!("{command} {arguments}: {error}"),
        }
    }

    /// Runs a command; its message is the error if it fails.
    fn try_run(&mut self, command: &str, arguments: &Value) -> Result<Value, Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        let line = format!("{request}\n");
        self.lines.get_mut().write_all(line.as_bytes()).expect("writing to a monitor");
        loop {
            let mut answer = self.line();
            if let Some(error) = answer.get_mut("error") {
                return Err(error.take());
            }
            // Anything else is an event.
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    /// Repeats a command until it succeeds: QEMU releases things shortly after it reports that.
    pub fn run_in_the_end(&mut self, command: &str, arguments: Value) {
        let deadline = Instant::now() + self.timeout;
        while let Err(error) = self.try_run(command, &arguments) {
            assert!(Instant::now() < deadline, "{command} {arguments}: {error}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks the guest to give a device back, and waits until it has. One that cannot at the moment
    /// is asked again.
    pub fn unplug(&mut self, id: &str) {
        let deadline = Instant::now() + self.timeout;
        let mut refused = Value::Null;
        while self.is_plugged(id) {
            assert!(Instant::now() < deadline, "{id} is not given back: {refused}");
            // An error while the guest is at it, or has done it just now.
            if let Err(error) = self.try_run("device_del", &json!({ "id": id })) {
                refused = error;
            }
            let again = Instant::now() + ASK_AGAIN;
            while self.is_plugged(id) && Instant::now() < again {
                thread::sleep(Duration::from_millis(20));
            }
        }
    }

    fn is_plugged(&mut self, id: &str) -> bool {
        let devices = self.run("qom-list", json!({ "path": "/machine/peripheral" }));
        devices.as_array().is_some_and(|all| all.iter().any(|device| device["name"] == id))
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("reading from a monitor");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("monitor: {line:?}: {e}"))
    }

    /// Starts to migrate to the QEMU that waits at `socket`, with a guest that may be stopped as
    /// long as it takes.
    pub fn migrate(&mut self, socket: &Path) {
        let limits = json!({ "downtime-limit": 20_000, "max-bandwidth": 1_u64 << 40 });
        self.run("migrate-set-parameters", limits);
        self.run("migrate", json!({ "uri": format!("unix:{}", socket.display()) }));
    }

    /// The same with a guest that may hardly be stopped. As long as the guest writes to its memory
    /// that does not come to an end; it is sent again and again, at most `bandwidth` bytes a
    /// second, until [`Monitor::let_migration_end`].
    pub fn migrate_without_end(&mut self, socket: &Path, bandwidth: u64) {
        // With 0 QEMU (10.0) ends when it has sent everything once: it does not check again for
        // changes.
        let limits = json!({ "downtime-limit": 1, "max-bandwidth": bandwidth });
        self.run("migrate-set-parameters", limits);
        self.run("migrate", json!({ "uri": format!("unix:{}", socket.display()) }));
    }

    /// Lets it stop the guest, and so end.
    pub fn let_migration_end(&mut self) {
        let limits = json!({ "downtime-limit": 20_000, "max-bandwidth": 1_u64 << 40 });
        self.run("migrate-set-parameters", limits);
    }

    /// Waits until all of memory has been sent once.
    pub fn await_first_pass(&mut self) {
        self.await_state("a second pass", |state| {
            // 1 during the first pass.
            state["ram"]["dirty-sync-count"].as_u64() > Some(1)
        });
    }

    /// Waits until the migration has this status; panics if it fails before. Returns its whole
    /// state.
    pub fn await_status(&mut self, status: &str) -> Value {
        self.await_state(status, |state| state["status"] == status)
    }

    /// Waits until the guest runs: at the destination of a migration a little after its end.
    pub fn await_running(&mut self) {
        self.await_that("query-status", "running", |state| state["running"] == true);
    }

    fn await_state(&mut self, what: &str, reached: impl Fn(&Value) -> bool) -> Value {
        self.await_that("query-migrate", what, reached)
    }

    fn await_that(&mut self, query: &str, what: &str, reached: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + self.timeout;
        loop {
            let state = self.run(query, json!({}));
            if reached(&state) {
                return state;
            }
            assert_ne!(state["status"], "failed", "{query}: {state}");
            assert!(Instant::now() < deadline, "{query}: not {what}: {state}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}
