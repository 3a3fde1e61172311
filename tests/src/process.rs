//! Child processes that never outlive their test.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// What a process has written so far, to stdout and stderr together.
#[derive(Default)]
struct Output {
    state: Mutex<OutputState>,
    changed: Condvar,
}

#[derive(Default)]
struct OutputState {
    bytes: Vec<u8>,
    /// The process and all that share its output have closed it.
    closed: bool,
}

/// A running child in a process group of its own. Dropping it kills the group; in a test that is
/// failing it also prints what the child wrote.
pub struct Process {
    name: String,
    child: Child,
    group: Pid,
    output: Arc<Output>,
}

impl Process {
    /// Starts `command` with an empty stdin, and both outputs collected. `name` is used in
    /// messages.
    pub fn spawn(name: &str, mut command: Command) -> Self {
        let (mut reader, writer) = std::io::pipe().expect("a pipe for the output");
        command
            .stdin(Stdio::null())
            .stdout(writer.try_clone().expect("a second descriptor of the pipe"))
            .stderr(writer)
            .process_group(0);
        // SAFETY: between fork and exec the closure makes one system call, and allocates nothing.
        unsafe {
            // The test program itself may be killed: then no destructors run.
            command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGKILL)?));
        }
        let child = command.spawn().unwrap_or_else(|e| panic!("{name}: starting {command:?}: {e}"));
        // It holds the write ends of the pipe, without which the reader sees the end.
        drop(command);
        let group = Pid::from_raw(i32::try_from(child.id()).expect("a process id fits its type"));
        let output = Arc::new(Output::default());
        let collected = Arc::clone(&output);
        thread::spawn(move || collected.collect(&mut reader));
        Self { name: name.to_owned(), child, group, output }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything written so far.
    pub fn output(&self) -> String {
        self.output.text()
    }

    /// Waits until the output contains `text`. Panics if the process ends or `timeout` passes
    /// before.
    pub fn wait_for(&self, text: &str, timeout: Duration) {
        self.wait_for_times(text, 1, timeout);
    }

    /// The same until it contains `text` this many times.
    pub fn wait_for_times(&self, text: &str, times: usize, timeout: Duration) {
        let arrived = |state: &OutputState| {
            let matches = state.bytes.windows(text.len()).filter(|found| *found == text.as_bytes());
            matches.count() >= times
        };
        if !self.output.wait_until(timeout, |state| state.closed || arrived(state)) {
            panic!("{}: no {text:?} ({times}) within {timeout:?}", self.name);
        }
        let ended = || format!("{}: ended without {text:?} ({times})", self.name);
        assert!(self.output.text().matches(text).count() >= times, "{}", ended());
    }

    /// Waits for the end; panics if `timeout` passes before.
    pub fn wait(mut self, timeout: Duration) -> (ExitStatus, String) {
        if !self.output.wait_until(timeout, |state| state.closed) {
            panic!("{}: has not ended within {timeout:?}", self.name);
        }
        let status = self.child.wait().expect("waiting for a child");
        (status, self.output.text())
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("asking after a child")
    }

    /// Sends `signal` to the process (not to its group).
    pub fn signal(&self, signal: Signal) {
        kill(self.group, signal).unwrap_or_else(|e| panic!("{}: {signal}: {e}", self.name));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let running = !matches!(self.child.try_wait(), Ok(Some(_)));
        // The group may live on without its first member.
        let _ = killpg(self.group, Signal::SIGKILL);
        if running {
            let _ = self.child.wait();
        }
        if thread::panicking() {
            let end = if running { "killed" } else { "ended" };
            println!("---- output of {} ({end}):\n{}\n----", self.name, self.output.text());
        }
    }
}

impl Output {
    fn collect(&self, reader: &mut impl Read) {
        let mut buffer = [0; 4096];
        loop {
            let count = reader.read(&mut buffer).unwrap_or(0);
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.bytes.extend_from_slice(&buffer[..count]);
            state.closed = count == 0;
            self.changed.notify_all();
            if state.closed {
                return;
            }
        }
    }

    /// Waits until `done` holds; false if `timeout` passes before.
    fn wait_until(&self, timeout: Duration, done: impl Fn(&OutputState) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let woken = self.changed.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn text(&self) -> String {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&state.bytes).into_owned()
    }
}
