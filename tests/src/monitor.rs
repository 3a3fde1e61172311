//! QEMU's monitor (QMP): commands and answers, a line of JSON each.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

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
        let request = json!({ "execute": command, "arguments": arguments });
        let line = format!("{request}\n");
        self.lines.get_mut().write_all(line.as_bytes()).expect("writing to a monitor");
        loop {
            let mut answer = self.line();
            if let Some(error) = answer.get("error") {
                panic!("{request}: {error}");
            }
            // Anything else is an event.
            if let Some(result) = answer.get_mut("return") {
                return result.take();
            }
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("reading from a monitor");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("monitor: {line:?}: {e}"))
    }

    /// Starts to migrate to the QEMU that waits at `socket`, with a guest that may be stopped as long as
    /// it takes.
    pub fn migrate(&mut self, socket: &Path) {
        let limits = json!({ "downtime-limit": 20_000, "max-bandwidth": 1_u64 << 40 });
        self.run("migrate-set-parameters", limits);
        self.run("migrate", json!({ "uri": format!("unix:{}", socket.display()) }));
    }

    /// Waits until the migration has this status; panics if it fails before. Gives all that is known of
    /// it.
    pub fn await_status(&mut self, status: &str) -> Value {
        let deadline = Instant::now() + self.timeout;
        loop {
            let state = self.run("query-migrate", json!({}));
            if state["status"] == status {
                return state;
            }
            assert_ne!(state["status"], "failed", "migration: {state}");
            assert!(Instant::now() < deadline, "migration: not {status}: {state}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}
