//! The server that gives a [`VolatileDisk`] to QEMU: the network block device protocol
//! (NetworkBlockDevice/nbd: doc/proto.md), fixed newstyle negotiation, on a unix socket.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use blk_bench::driver::queue::SECTOR_SIZE;
use blk_bench::load::rng::Rng;

use super::disk::{Survives, VolatileDisk};
use crate::flushed::program::chance;

const INIT_MAGIC: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// NBD_FLAG_FIXED_NEWSTYLE and NBD_FLAG_NO_ZEROES.
const HANDSHAKE_FLAGS: u16 = 1 | 1 << 1;
const CLIENT_NO_ZEROES: u32 = 1 << 1;
/// NBD_FLAG_HAS_FLAGS, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 1 << 31 | 1;
const INFO_EXPORT: u16 = 0;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_FLAG_FUA: u16 = 1;
const EINVAL: u32 = 22;

/// Longest option and longest request that are taken; QEMU's requests have at most 32 MiB.
const MAX_LEN: u32 = 64 << 20;

/// How long the requests of a QEMU that was killed may take to be read to their end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

struct State {
    disk: VolatileDisk,
    rng: Rng,
    /// Requests since the last cut.
    requests: u64,
    freeze_at: Option<u64>,
    frozen: bool,
    connections: usize,
    stopped: bool,
    /// Longest time that a flush takes.
    flush_delay: Duration,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` holds; false if `timeout` passes before.
    fn wait(&self, timeout: Duration, done: impl Fn(&State) -> bool) -> bool {
        let waits = |state: &mut State| !done(state);
        let result = self.changed.wait_timeout_while(self.lock(), timeout, waits);
        !result.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// The running server. Dropping it ends it.
pub struct Server {
    shared: Arc<Shared>,
    socket: PathBuf,
}

impl Server {
    /// Serves `disk` on `socket`.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(socket: &Path, disk: VolatileDisk, seed: u64) -> io::Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let state = State {
            disk,
            rng: Rng::new(seed),
            requests: 0,
            freeze_at: None,
            frozen: false,
            connections: 0,
            stopped: false,
            flush_delay: Duration::ZERO,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, &accepting));
        Ok(Self { shared, socket: socket.to_owned() })
    }

    /// Where QEMU connects.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Has flushes take a random time up to this.
    pub fn delay_flushes(&self, longest: Duration) {
        self.shared.lock().flush_delay = longest;
    }

    /// A lie: the next cuts undo this many of the last flushes.
    pub fn take_back_flushes(&self, count: usize) {
        self.shared.lock().disk.flushes_taken_back = count;
    }

    /// Makes the disk stop answering from its `count`th write or flush from now on; waits for that.
    pub fn freeze_after(&self, count: u64, timeout: Duration) -> bool {
        let mut state = self.shared.lock();
        state.freeze_at = Some(state.requests + count);
        drop(state);
        self.shared.wait(timeout, |state| state.frozen)
    }

    /// Cuts the power, after QEMU was killed. Returns what was lost.
    ///
    /// # Panics
    /// If a connection is still there, or the image cannot be written.
    pub fn cut(&self, survives: Survives, seed: u64) -> String {
        // What QEMU had sent when it was killed is still read and written.
        let drained = self.shared.wait(DRAIN_TIMEOUT, |state| state.connections == 0);
        assert!(drained, "QEMU was killed and its connection is still there");
        let mut state = self.shared.lock();
        let cut = state.disk.cut(survives, &mut Rng::new(seed));
        let (open, kept) = cut.expect("the disk's image can be written");
        let (requests, frozen) = (state.requests, state.frozen);
        (state.requests, state.freeze_at, state.frozen) = (0, None, false);
        format!("{requests} requests, frozen {frozen}, {open} sectors not flushed, {kept} written")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        // Wakes the thread that accepts connections; if that fails the thread stays until the
        // program ends.
        let _ = UnixStream::connect(&self.socket);
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for stream in listener.incoming().flatten() {
        let mut state = shared.lock();
        if state.stopped {
            return;
        }
        state.connections += 1;
        drop(state);
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            if let Err(error) = serve(stream, &shared)
                && error.kind() != io::ErrorKind::UnexpectedEof
                && error.kind() != io::ErrorKind::BrokenPipe
                && error.kind() != io::ErrorKind::ConnectionReset
            {
                println!("nbd server: {error}");
            }
            shared.lock().connections -= 1;
            shared.changed.notify_all();
        });
    }
}

fn serve(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    if !negotiate(&mut stream, shared.lock().disk.bytes())? {
        return Ok(());
    }
    loop {
        let Some(request) = Request::receive(&mut stream)? else { return Ok(()) };
        if let Some(reply) = answer(request, shared)? {
            stream.write_all(&reply)?;
        }
    }
}

/// Whether the client continues to the transmission phase.
fn negotiate(stream: &mut UnixStream, len: u64) -> io::Result<bool> {
    stream.write_all(INIT_MAGIC)?;
    stream.write_all(&HANDSHAKE_FLAGS.to_be_bytes())?;
    let client_flags = u32::from_be_bytes(receive(stream)?);
    loop {
        let _magic: [u8; 8] = receive(stream)?;
        let option = u32::from_be_bytes(receive(stream)?);
        let _data = receive_bytes(stream)?;
        let mut export = len.to_be_bytes().to_vec();
        export.extend(TRANSMISSION_FLAGS.to_be_bytes());
        match option {
            OPT_EXPORT_NAME => {
                if client_flags & CLIENT_NO_ZEROES == 0 {
                    export.extend([0; 124]);
                }
                stream.write_all(&export)?;
                return Ok(true);
            }
            OPT_INFO | OPT_GO => {
                let info = [INFO_EXPORT.to_be_bytes().as_slice(), &export].concat();
                reply_option(stream, option, REP_INFO, &info)?;
                reply_option(stream, option, REP_ACK, &[])?;
                if option == OPT_GO {
                    return Ok(true);
                }
            }
            OPT_ABORT => {
                reply_option(stream, option, REP_ACK, &[])?;
                return Ok(false);
            }
            _ => reply_option(stream, option, REP_ERR_UNSUP, &[])?,
        }
    }
}

fn reply_option(stream: &mut UnixStream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut reply = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    reply.extend(option.to_be_bytes());
    reply.extend(kind.to_be_bytes());
    reply.extend(u32::try_from(data.len()).expect("a short reply").to_be_bytes());
    reply.extend(data);
    stream.write_all(&reply)
}

fn receive<const LEN: usize>(stream: &mut UnixStream) -> io::Result<[u8; LEN]> {
    let mut bytes = [0; LEN];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A length, and that many bytes.
fn receive_bytes(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let len = u32::from_be_bytes(receive(stream)?);
    sized(stream, len)
}

fn sized(stream: &mut UnixStream, len: u32) -> io::Result<Vec<u8>> {
    if len > MAX_LEN {
        return Err(io::Error::other(format!("{len} bytes of data; at most {MAX_LEN}")));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok(data)
}

struct Request {
    flags: u16,
    command: u16,
    handle: [u8; 8],
    sector: u64,
    len: u32,
    data: Vec<u8>,
}

impl Request {
    /// None where the client takes its leave.
    fn receive(stream: &mut UnixStream) -> io::Result<Option<Self>> {
        let magic = u32::from_be_bytes(receive(stream)?);
        if magic != REQUEST_MAGIC {
            return Err(io::Error::other(format!("request magic {magic:#x}")));
        }
        let flags = u16::from_be_bytes(receive(stream)?);
        let command = u16::from_be_bytes(receive(stream)?);
        let handle = receive(stream)?;
        let offset = u64::from_be_bytes(receive(stream)?);
        let len = u32::from_be_bytes(receive(stream)?);
        if command == CMD_DISC {
            return Ok(None);
        }
        let data = if command == CMD_WRITE { sized(stream, len)? } else { vec![] };
        let sector_size = SECTOR_SIZE as u64;
        if !offset.is_multiple_of(sector_size) || !u64::from(len).is_multiple_of(sector_size) {
            return Err(io::Error::other(format!("{len} bytes at {offset}: no whole sectors")));
        }
        Ok(Some(Self { flags, command, handle, sector: offset / sector_size, len, data }))
    }
}

/// The answer; none from a disk that is frozen.
fn answer(request: Request, shared: &Shared) -> io::Result<Option<Vec<u8>>> {
    let Request { flags, command, handle, sector, len, data } = request;
    let mut state = shared.lock();
    if state.freezes(command) {
        // The request at which it stops may be in the cache, or not have come.
        if command == CMD_WRITE && chance(&mut state.rng, 50) {
            state.disk.write(sector, data);
        }
        shared.changed.notify_all();
        return Ok(None);
    }
    if state.frozen {
        return Ok(None);
    }
    let mut error = 0_u32;
    let mut content = vec![];
    let mut pause = Duration::ZERO;
    match command {
        CMD_READ => {
            content.resize(len.min(MAX_LEN) as usize, 0);
            state.disk.read(sector, &mut content)?;
        }
        CMD_WRITE => {
            state.disk.write(sector, data);
            if flags & CMD_FLAG_FUA != 0 {
                state.disk.flush()?; // more than was asked for
            }
        }
        CMD_FLUSH => {
            pause = state.flush_pause();
            state.disk.flush()?;
        }
        _ => error = EINVAL,
    }
    drop(state);
    thread::sleep(pause);
    let mut reply = REPLY_MAGIC.to_be_bytes().to_vec();
    reply.extend(error.to_be_bytes());
    reply.extend(handle);
    reply.extend(content);
    Ok(Some(reply))
}

impl State {
    /// Counts a request; whether the disk freezes with it.
    fn freezes(&mut self, command: u16) -> bool {
        if self.frozen {
            return false;
        }
        self.requests += 1;
        let reached = self.freeze_at.is_some_and(|at| self.requests >= at);
        self.frozen = reached && command != CMD_READ;
        self.frozen
    }

    fn flush_pause(&mut self) -> Duration {
        let longest = u64::try_from(self.flush_delay.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(if longest == 0 { 0 } else { self.rng.below(longest) })
    }
}

/// Waits until `condition` holds, checking it often; false if `timeout` passes before.
pub fn wait_until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !condition() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(5));
    }
    true
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::files::TestDir;
    use crate::programs::{available, run, run_ok};
    use crate::require;

    fn qemu_io(server: &Server, commands: &[&str]) -> Command {
        let mut qemu_io = Command::new("qemu-io");
        // Without -t it makes each write durable.
        qemu_io.args(["-t", "writeback", "-f", "raw"]);
        for command in commands {
            qemu_io.args(["-c", command]);
        }
        qemu_io.arg(format!("nbd+unix:///?socket={}", server.socket().display()));
        qemu_io
    }

    #[test]
    fn qemu_reads_what_it_has_written_and_after_a_cut_what_it_has_flushed() {
        require!(available(&["qemu-io"]));
        let dir = TestDir::new();
        let image = std::fs::File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path("image"))
            .expect("a file");
        image.set_len(1 << 20).expect("a length");
        let disk = VolatileDisk::new(image).expect("a disk");
        let server = Server::start(&dir.path("nbd"), disk, 1).expect("a server");
        let write = ["write -P 1 0 8k", "flush", "write -P 2 4k 8k", "read -P 2 4k 8k"];
        // Killed before it flushes what it has, as it does when it ends.
        let mut killed = qemu_io(&server, &write);
        killed.args(["-c", "sigraise 9"]);
        assert_eq!(run(killed).code, None);
        server.cut(Survives::Nothing, 1);
        let read = ["read -P 1 0 8k", "read -P 0 8k 4k"];
        let output = run_ok(qemu_io(&server, &read));
        assert!(!output.contains("verification failed"), "{output}");
        assert!(server.shared.lock().disk.flushes > 0);
    }

    #[test]
    fn a_frozen_disk_answers_nothing_more() {
        require!(available(&["qemu-io"]));
        let dir = TestDir::new();
        let image = tempfile::tempfile().expect("a file");
        image.set_len(1 << 20).expect("a length");
        let disk = VolatileDisk::new(image).expect("a disk");
        let server = Server::start(&dir.path("nbd"), disk, 1).expect("a server");
        server.shared.lock().freeze_at = Some(2);
        let writes = qemu_io(&server, &["write 0 4k", "write 0 4k", "write 0 4k"]);
        let writes = crate::process::Process::spawn("qemu-io", writes);
        assert!(server.shared.wait(Duration::from_secs(60), |state| state.frozen));
        drop(writes);
        server.cut(Survives::All, 1);
        assert!(server.shared.lock().disk.writes < 3);
    }
}
