//! The command line.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block_io::ring::IoEngine;
use clap::builder::{PathBufValueParser, RangedU64ValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{ArgGroup, CommandFactory, FromArgMatches, Parser, ValueEnum};
use log::LevelFilter;

use crate::datapath::spin;
use crate::process::control::{Request, Upgrade};
use crate::process::socket::Endpoint;
use crate::process::systemd::{self, Passed};
use crate::virtio::device_queue::QUEUE_SIZE_MAX;
use crate::virtio::request::ID_LEN;

/// Most queues: a message that passes a queue's descriptor names the queue in eight bits.
const QUEUES_MAX: u16 = 256;
/// Fewest queues offered unless `--num-queues` says otherwise. QEMU refuses a backend that has
/// fewer than the guest has CPUs, and a queue that no guest sets up costs hardly anything: an
/// io_uring that is not mapped.
const QUEUES_DEFAULT_MIN: u16 = 4;
/// Most queues offered unless `--num-queues` says otherwise: crosvm sets up all there are.
const QUEUES_DEFAULT_MAX: u16 = 64;
/// Smallest limit for a ring: header, data and status, to the next power of two.
const QUEUE_SIZE_MIN: u16 = 4;

/// The first argument of a program that takes over from its predecessor begins like this. Not an
/// option: only the predecessor passes it.
pub(crate) const TAKEOVER: &str = "--takeover=";

/// What `--print-capabilities` prints (QEMU, docs/interop/vhost-user.json).
const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

const ABOUT: &str = "\
Serves one disk to one virtual machine over the vhost-user protocol.

The disk is a copy-on-write file over a shared base image: the guest's writes go to the COW file, \
and everything else is read from the base, which is never written. Many daemons can share a base.

The daemon stays in the foreground and logs to standard error. When the frontend disconnects it keeps \
the disk and waits for the next one. SIGTERM, SIGINT or SIGHUP ends it: it completes the requests in \
flight, flushes the disk and removes the socket. SIGINT and SIGHUP stay ignored if they were ignored \
at the start (nohup, background jobs of a shell). Exit status: 0 after a clean end, 1 after a failure, \
2 for a wrong command line.";

const EXAMPLES: &str = "\
Examples:
  A new disk for a guest, from a base image (vm1.cow is created if it does not exist):
    vhost-user-blk --socket-path=/run/vm1.sock vm1.cow,debian.img

  The same disk again; the COW file names its base:
    vhost-user-blk --socket-path=/run/vm1.sock vm1.cow

  A raw image without copy-on-write, read-only:
    vhost-user-blk --socket-path=/run/cd.sock --blk-file=cd.iso --format=raw --read-only

  A guest for it:
    qemu-system-x86_64 -m 512 -object memory-backend-memfd,id=mem,size=512M,share=on \\
      -machine q35,memory-backend=mem \\
      -chardev socket,id=c0,path=/run/vm1.sock,reconnect-ms=1000 \\
      -device vhost-user-blk-pci,chardev=c0";

/// Arguments as clap reads them.
#[derive(Parser, Debug)]
#[command(
    name = "vhost-user-blk",
    version,
    about = "Serves a copy-on-write disk to a virtual machine over vhost-user",
    long_about = ABOUT,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    disable_help_subcommand = true,
    subcommand_help_heading = "Commands for a running daemon",
    group(ArgGroup::new("endpoint").required(true).args(["socket_path", "fd"])),
    group(ArgGroup::new("disk").required(true).args(["image", "blk_file", "cow_fd"])),
)]
struct Args {
    #[command(subcommand)]
    command: Option<Subcommand>,

    /// COW file, and the files below it
    ///
    /// The text is split at its commas. A COW file that does not exist is created over BASE. For an
    /// existing one the files below it may be left out, if they are where its header may name them
    /// (see --backing-dir). If given, they must be all that the disk consists of, the nearest first
    /// (COW,LAYER,...,BASE), and each must be the one that the header above it was made for. If a
    /// name contains a comma, use --blk-file and --base.
    #[arg(value_name = "COW[,BASE]")]
    image: Option<OsString>,

    /// Let the header of a COW file name files in DIR; may be repeated
    ///
    /// A header can have been written by anybody, so what it names is opened only if it is in the
    /// directory of the COW file, or in DIR. If the files below the COW file are given, it is only
    /// DIR, for files that are not given.
    #[arg(long, value_name = "DIR")]
    backing_dir: Vec<PathBuf>,

    /// With --blk-file: the next file below it; may be repeated, down to the base
    #[arg(long, value_name = "PATH", requires = "blk_file", conflicts_with = "image")]
    base: Vec<PathBuf>,

    /// Serve this open file, a native COW file (or a raw image with --format=raw), and open no path
    ///
    /// It must be open for reading and writing (with --read-only, for reading), and only this daemon
    /// may have it. systemd can pass it as well: OpenFile=PATH:cow. An upgrade passes it on.
    #[arg(long, value_name = "FDNUM")]
    cow_fd: Option<RawFd>,

    /// The same file once more, open with O_DIRECT; needed for --cow-cache=direct (systemd: cow-direct)
    #[arg(long, value_name = "FDNUM", requires = "cow_fd", conflicts_with_all = ["image", "blk_file"])]
    cow_direct_fd: Option<RawFd>,

    /// The files below it, the nearest first, each open for reading only (systemd: base)
    #[arg(long, value_name = "FDNUM", value_delimiter = ',', requires = "cow_fd", conflicts_with_all = ["image", "blk_file"])]
    base_fd: Vec<RawFd>,

    /// Create this socket and listen on it
    ///
    /// A stale socket file, on which no process listens, is replaced. The daemon's user and group
    /// can connect to the socket.
    #[arg(long, value_name = "PATH")]
    socket_path: Option<PathBuf>,

    /// Use this open descriptor, a listening or connected unix stream socket
    ///
    /// With a connected socket the daemon ends when the frontend disconnects. Neither this nor
    /// --socket-path is needed if systemd passes the socket (LISTEN_FDS=1).
    #[arg(long, value_name = "FDNUM")]
    fd: Option<RawFd>,

    /// Serve only frontends of these users (names or numbers)
    ///
    /// The user is that of the process that connects. Of --allow-uid and --allow-gid one that
    /// applies is enough. The permissions of the socket must let the frontend connect, too.
    #[arg(long, value_name = "USER,...", value_delimiter = ',')]
    allow_uid: Vec<String>,

    /// Serve only frontends of these groups, also if it is one of several (names or numbers)
    #[arg(long, value_name = "GROUP,...", value_delimiter = ',')]
    allow_gid: Vec<String>,

    /// Create this socket and take commands from it; see `vhost-user-blk upgrade --help`
    ///
    /// Only the daemon's user and root can connect to it.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Let `upgrade --program` run the programs in this directory
    ///
    /// Without it an upgrade runs only the file that the daemon was started from. A program must be
    /// directly in the directory, and nobody but root and the daemon's user may have write
    /// permission for it or for any directory above it.
    #[arg(long, value_name = "DIR", requires = "control", value_parser = PathBufValueParser::new().try_map(std::path::absolute))]
    upgrade_dir: Option<PathBuf>,

    /// Serve this file: a COW file, or with --format=raw a raw image (the name may contain commas)
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,

    /// Format of the file; for a new COW file, the format to create
    ///
    /// A COW file is recognised by its first bytes, so only a raw image needs this option. A raw
    /// image is never guessed, because a guest could write a COW header into one. A new COW file is
    /// native unless this is uml.
    #[arg(long, value_enum)]
    format: Option<Format>,

    /// Allow the guest only to read; no file is changed
    #[arg(long)]
    read_only: bool,

    /// Write to the disk even if its file system has no locks
    ///
    /// Some network file systems have none. Without locks nothing prevents a second daemon or a
    /// tool from writing to the same file, which destroys it. And when a daemon dies, its successor
    /// cannot tell when the dead daemon's I/O has ended, so an old write may overwrite a newer one.
    /// Without this option such a disk is refused. Files that are only read need no lock.
    #[arg(long)]
    allow_unlocked: bool,

    /// Take guest memory in files of any file system
    ///
    /// Without this option it must be in a memfd or a file of tmpfs or hugetlbfs, on a DAX device,
    /// or in a file of a file system on a block device (as ext4 and XFS are). Other file systems,
    /// FUSE and those over a network above all, may answer late or never, and a thread that touches
    /// such memory can then not even be killed. The same holds for the in-flight area and the dirty
    /// log.
    #[arg(long)]
    allow_file_memory: bool,

    /// Wait for a guest that is being migrated here: open the disk only when the guest starts to
    /// use it
    ///
    /// Until then another daemon has the disk open; this one reads only its size, and serves a
    /// frontend that waits for the guest. If the disk cannot be opened when the guest arrives, for
    /// example because the other daemon does not release it within five seconds, the connection is
    /// closed; the next connection tries again. The disk must exist.
    #[arg(long)]
    incoming: bool,

    /// Queues to offer, 1 to 256 [default: the number of host CPUs, at least 4 and at most 64]
    ///
    /// QEMU and cloud-hypervisor refuse a backend that offers fewer than they are configured for
    /// (QEMU: one for each CPU of the guest); crosvm sets up all that are offered. Each queue that
    /// the guest sets up gets a thread.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u16>::new().range(1..=QUEUES_MAX.into()))]
    num_queues: Option<u16>,

    /// Largest ring to accept, in descriptors: a power of two, 4 to 32768
    ///
    /// This limit itself costs nothing: memory is allocated for the rings that a frontend sets up.
    #[arg(long, value_name = "N", default_value_t = QUEUE_SIZE_MAX, value_parser = queue_size_parser())]
    queue_size: u16,

    /// Serial number that the guest sees, up to 20 characters
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, value_parser = parse_serial)]
    serial: Serial,

    /// How to read the base: through the host's page cache, which all guests share, or with direct
    /// I/O
    #[arg(long, value_enum, default_value_t = Cache::Buffered, value_name = "MODE")]
    base_cache: Cache,

    /// How to read and write the COW file (or the raw image)
    #[arg(long, value_enum, default_value_t = Cache::Buffered, value_name = "MODE")]
    cow_cache: Cache,

    /// How to do the I/O: with io_uring, or with threads that make plain system calls [default:
    /// io_uring if the host has it, else sync]
    ///
    /// Containers, some sysctls and kernels before 5.13 refuse io_uring. By default the daemon then
    /// warns and uses threads, which are as safe but slower; with `io_uring` it refuses to start.
    #[arg(long, value_enum, value_name = "ENGINE")]
    io_engine: Option<Engine>,

    /// Longest time in microseconds that a queue of a fast guest polls for new requests before it
    /// sleeps; 0 never polls
    #[arg(long, value_name = "US", default_value_t = spin::POLL_US, value_parser = clap::value_parser!(u32).range(0..=POLL_US_MAX.into()))]
    poll_us: u32,

    /// Become this user (name or number) when everything is open
    ///
    /// New files and sockets belong to the user. An upgrade and a migration open the disk's files
    /// again, which the user must then be allowed to do. Only root can use this.
    #[arg(long, value_name = "USER")]
    user: Option<String>,

    /// The only group of --user [default: the user's own]
    #[arg(long, value_name = "GROUP", requires = "user")]
    group: Option<String>,

    /// Whether the daemon gives up what it does not need
    #[arg(long, value_enum, default_value_t = Sandbox::On, value_name = "MODE")]
    sandbox: Sandbox,

    /// Lowest severity of the messages to log
    #[arg(long, value_enum, default_value_t = Level::Info, value_name = "LEVEL")]
    log_level: Level,

    /// Print the program's capabilities as JSON, ignore everything else, and exit
    // Handled before clap sees the command line; here for --help.
    #[arg(long)]
    print_capabilities: bool,
}

const UPGRADE_ABOUT: &str = "\
Makes a running daemon continue as another program: the file that it was started from, as that file is \
now, or --program.

The guest keeps its disk. It waits for some milliseconds, with any frontend, and nothing reconnects. \
The process keeps its id, its locks and its sockets. The new program gets the command line of the old \
one. It is tried out first, while the old program still serves: if the new one cannot be started, \
refuses, or does not answer in time, the old one continues.

Exit status: 0 if the daemon was upgraded, 1 if it was not, 2 for a wrong command line.";

/// Commands for a running daemon, through its control socket.
#[derive(clap::Subcommand, Debug)]
enum Subcommand {
    #[command(about = "Makes a running daemon continue as another program", long_about = UPGRADE_ABOUT)]
    Upgrade(UpgradeArgs),
}

/// Arguments of `vhost-user-blk upgrade`.
#[derive(clap::Args, Debug)]
struct UpgradeArgs {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH")]
    control: PathBuf,

    /// The new program, in the daemon's --upgrade-dir [default: the file that the daemon was started
    /// from, as it is now]
    // Absolute, because the daemon may run in another directory.
    #[arg(long, value_name = "PATH", value_parser = PathBufValueParser::new().try_map(std::path::absolute))]
    program: Option<PathBuf>,

    /// Seconds that the new program has to prove itself
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=600))]
    timeout: u16,
}

/// Longest busy wait. A longer one costs more than it saves.
const POLL_US_MAX: u32 = 10_000;

/// Format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Sectors and nothing else
    Raw,
    /// COW file of User Mode Linux, version 3 (1 and 2 are read)
    Uml,
    /// COW file of this project
    Native,
}

/// Whether the daemon uses the host's page cache for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Through the page cache
    Buffered,
    /// With direct I/O (`O_DIRECT`)
    Direct,
}

/// `--sandbox`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// It drops its capabilities and cannot gain privileges, be inspected by other processes of its
    /// user, or dump core. It can open only its own files (Landlock), and each thread can make only
    /// the system calls that it needs (seccomp)
    On,
    /// As on, but files are not confined, and other system calls are allowed and logged by the
    /// kernel
    Log,
    /// It stays as it was started, for example to debug it
    Off,
}

/// `--io-engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    /// Linux 5.13 and later, unless the host forbids it
    #[value(name = "io_uring")]
    IoUring,
    /// A few threads for each queue
    Sync,
}

impl From<Engine> for IoEngine {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::IoUring => IoEngine::IoUring,
            Engine::Sync => IoEngine::Sync,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => LevelFilter::Error,
            Level::Warn => LevelFilter::Warn,
            Level::Info => LevelFilter::Info,
            Level::Debug => LevelFilter::Debug,
            Level::Trace => LevelFilter::Trace,
        }
    }
}

/// Serial number, padded with NUL.
pub type Serial = [u8; ID_LEN];

/// What the command line asks for, checked as far as it can be without looking at files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The socket for frontends.
    pub endpoint: Endpoint,
    /// `--allow-uid`: the users whose frontends are served; all if this and the next are empty.
    pub allow_uid: Vec<String>,
    /// `--allow-gid`: the groups.
    pub allow_gid: Vec<String>,
    /// `--control`: the socket for commands.
    pub control: Option<PathBuf>,
    /// `--upgrade-dir`: where other programs for an upgrade may be, absolute.
    pub upgrade_dir: Option<PathBuf>,
    /// The descriptor of the handover, if this program takes over from its predecessor.
    pub takeover: Option<RawFd>,
    /// What is served.
    pub image: Image,
    /// `--backing-dir`.
    pub backing_dirs: Vec<PathBuf>,
    /// The guest cannot write.
    pub read_only: bool,
    /// The disk's file system may have no locks.
    pub allow_unlocked: bool,
    /// Guest memory may be in files of any file system.
    pub allow_file_memory: bool,
    /// The disk is opened when a ring starts.
    pub incoming: bool,
    /// Queues offered.
    pub num_queues: u16,
    /// Largest ring accepted, in descriptors.
    pub queue_size_max: u16,
    /// For GET_ID.
    pub serial: Serial,
    /// Cache policy of everything below the top file.
    pub base_cache: Cache,
    /// Cache policy of the top file.
    pub cow_cache: Cache,
    /// `--io-engine`, if given.
    pub io_engine: Option<IoEngine>,
    /// Longest busy wait in microseconds.
    pub poll_us: u32,
    /// `--user`.
    pub user: Option<String>,
    /// `--group`, only with a user.
    pub group: Option<String>,
    /// `--sandbox`.
    pub sandbox: Sandbox,
    /// Log filter.
    pub log_level: LevelFilter,
}

/// What is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// `COW[,LAYER...][,BASE]`.
    Cow {
        /// The COW file, to be created over the first of `below` if it does not exist.
        cow: PathBuf,
        /// The files below it, nearest first, if named.
        below: Vec<PathBuf>,
        /// Its format, if named; one of the COW formats.
        format: Option<Format>,
    },
    /// `--blk-file`: an existing file.
    File {
        /// Its path.
        path: PathBuf,
        /// Its format, if named. Without it the file must be recognisable.
        format: Option<Format>,
    },
    /// `--cow-fd`: files that are open already.
    Fds(DiskFds),
}

impl Image {
    /// The path of the top, if it has one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Image::Cow { cow: path, .. } | Image::File { path, .. } => Some(path),
            Image::Fds(_) => None,
        }
    }
}

/// The descriptors of a disk. They stay open under these numbers, for the successor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFds {
    /// The top.
    pub cow: RawFd,
    /// The top, open with `O_DIRECT`.
    pub direct: Option<RawFd>,
    /// The files below it, nearest first.
    pub below: Vec<RawFd>,
    /// The top is a raw image.
    pub raw: bool,
}

/// What to do.
#[derive(Debug)]
pub enum Command {
    /// Print this to standard output and end with status 0.
    Print(String),
    /// Serve.
    Serve(Box<Options>),
    /// Send this request to the daemon behind this control socket.
    Control(PathBuf, Request),
}

/// Reads the command line, the program's name first.
///
/// # Errors
/// clap's error, which knows its exit status (2, or 0 for `--help` and `--version`) and where to
/// print itself.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    let args: Vec<OsString> = args.into_iter().collect();
    if args.iter().skip(1).any(|arg| arg == "--print-capabilities") {
        return Ok(Command::Print(format!("{CAPABILITIES}\n")));
    }
    let (takeover, args) = predecessor(args);
    // A predecessor hands its socket over, whichever option that came from.
    let passed = systemd::passed(takeover.is_some());
    let required = takeover.is_none() && passed.socket.is_none();
    let command = Args::command()
        .mut_group("endpoint", |group| group.required(required))
        .mut_group("disk", |group| group.required(passed.cow.is_none()));
    let mut args = Args::from_arg_matches(&command.try_get_matches_from(args)?)?;
    if let Some(subcommand) = args.command.take() {
        let (socket, request) = subcommand.request();
        return Ok(Command::Control(socket, request));
    }
    if args.control.as_deref().is_some_and(|path| path.as_os_str().is_empty()) {
        return Err(usage(ErrorKind::InvalidValue, "--control: the path is empty"));
    }
    let image = image(&args, &passed)?;
    let endpoint = match (args.socket_path, args.fd) {
        (Some(path), _) if path.as_os_str().is_empty() => {
            return Err(usage(ErrorKind::InvalidValue, "--socket-path: the path is empty"));
        }
        (Some(path), None) => Endpoint::Path(path),
        (None, Some(fd)) => Endpoint::Fd(fd),
        // The predecessor hands the socket over; it had it by `LISTEN_FDS`.
        (None, None) if takeover.is_some() => Endpoint::Fd(systemd::LISTEN_FDS_START),
        (None, None) => {
            let missing =
                || usage(ErrorKind::MissingRequiredArgument, "give --socket-path or --fd");
            Endpoint::Fd(passed.socket.ok_or_else(missing)?)
        }
        (Some(_), Some(_)) => {
            return Err(usage(ErrorKind::ArgumentConflict, "give --socket-path or --fd, not both"));
        }
    };
    Ok(Command::Serve(Box::new(Options {
        endpoint,
        allow_uid: args.allow_uid,
        allow_gid: args.allow_gid,
        control: args.control,
        upgrade_dir: args.upgrade_dir,
        takeover,
        image,
        backing_dirs: args.backing_dir,
        read_only: args.read_only,
        allow_unlocked: args.allow_unlocked,
        allow_file_memory: args.allow_file_memory,
        incoming: args.incoming,
        num_queues: args.num_queues.unwrap_or_else(default_queues),
        queue_size_max: args.queue_size,
        serial: args.serial,
        base_cache: args.base_cache,
        cow_cache: args.cow_cache,
        io_engine: args.io_engine.map(IoEngine::from),
        poll_us: args.poll_us,
        user: args.user,
        group: args.group,
        sandbox: args.sandbox,
        log_level: args.log_level.into(),
    })))
}

/// Separates the argument that a predecessor has put in front from the others.
fn predecessor(mut args: Vec<OsString>) -> (Option<RawFd>, Vec<OsString>) {
    let fd = args.get(1).and_then(|arg| arg.to_str()?.strip_prefix(TAKEOVER)?.parse().ok());
    if fd.is_some() {
        args.remove(1);
    }
    (fd, args)
}

impl Subcommand {
    /// The control socket to connect to, and what to send to it.
    fn request(self) -> (PathBuf, Request) {
        match self {
            Subcommand::Upgrade(UpgradeArgs { control, program, timeout }) => {
                let time = Duration::from_secs(timeout.into());
                (control, Request::Upgrade(Upgrade { program, time }))
            }
        }
    }
}

fn usage(kind: ErrorKind, message: &str) -> clap::Error {
    Args::command().error(kind, message)
}

fn image(args: &Args, passed: &Passed) -> Result<Image, clap::Error> {
    let fds = match (args.cow_fd, passed.cow) {
        (Some(cow), None) => Some((cow, args.cow_direct_fd, &args.base_fd)),
        (None, Some(cow)) => Some((cow, passed.cow_direct, &passed.bases)),
        (None, None) => None,
        (Some(_), Some(_)) => return Err(given_twice()),
    };
    match (&args.image, &args.blk_file, fds) {
        (Some(text), None, None) => {
            if args.format == Some(Format::Raw) {
                return Err(usage(
                    ErrorKind::ArgumentConflict,
                    "--format=raw: COW[,BASE] names a COW file; serve a raw image with \
                     --blk-file=PATH --format=raw",
                ));
            }
            let mut names = text.as_bytes().split(|&byte| byte == b',').map(OsStr::from_bytes);
            let cow = names.next().unwrap_or_default();
            let below: Vec<_> = names.map(PathBuf::from).collect();
            if cow.is_empty() {
                return Err(usage(ErrorKind::InvalidValue, "COW[,BASE]: the COW file has no name"));
            }
            if below.iter().any(|name| name.as_os_str().is_empty()) {
                return Err(usage(
                    ErrorKind::InvalidValue,
                    "COW[,BASE]: nothing follows a comma; leave it out, or use --blk-file and --base \
                     for files whose names have commas",
                ));
            }
            Ok(Image::Cow { cow: cow.into(), below, format: args.format })
        }
        (None, Some(path), None) if args.base.is_empty() => {
            Ok(Image::File { path: path.clone(), format: args.format })
        }
        (None, Some(cow), None) => {
            let (cow, below) = (cow.clone(), args.base.clone());
            if args.format == Some(Format::Raw) {
                let why = "--format=raw: a raw image has no base; leave --base out";
                return Err(usage(ErrorKind::ArgumentConflict, why));
            }
            Ok(Image::Cow { cow, below, format: args.format })
        }
        (None, None, Some((cow, direct, below))) => {
            let below = below.clone();
            let fds = DiskFds { cow, direct, below, raw: args.format == Some(Format::Raw) };
            check_fds(&fds, args)?;
            Ok(Image::Fds(fds))
        }
        (_, _, Some(_)) => Err(given_twice()),
        _ => Err(usage(ErrorKind::MissingRequiredArgument, "give COW[,BASE] or --blk-file")),
    }
}

fn given_twice() -> clap::Error {
    let why =
        "systemd passes the disk (OpenFile= with the name cow), and the command line names one";
    usage(ErrorKind::ArgumentConflict, why)
}

/// Refuses what cannot be had without opening a path.
fn check_fds(fds: &DiskFds, args: &Args) -> Result<(), clap::Error> {
    let refuse = |why| Err(usage(ErrorKind::ArgumentConflict, why));
    if args.format == Some(Format::Uml) {
        return refuse("--format=uml: a UML COW file needs the file beside it; give its path");
    }
    if fds.raw && !fds.below.is_empty() {
        return refuse("--format=raw: a raw image has no base; leave --base-fd out");
    }
    if !args.backing_dir.is_empty() {
        return refuse("--backing-dir: with --cow-fd nothing that a header names is opened");
    }
    if args.base_cache == Cache::Direct {
        return refuse("--base-cache=direct: not with --cow-fd; give the disk's path");
    }
    if (args.cow_cache == Cache::Direct) != fds.direct.is_some() {
        return refuse("--cow-cache=direct: needs --cow-direct-fd, and that needs it");
    }
    Ok(())
}

fn default_queues() -> u16 {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(cpus).unwrap_or(u16::MAX).clamp(QUEUES_DEFAULT_MIN, QUEUES_DEFAULT_MAX)
}

fn queue_size_parser() -> impl TypedValueParser<Value = u16> {
    let range = u64::from(QUEUE_SIZE_MIN)..=u64::from(QUEUE_SIZE_MAX);
    RangedU64ValueParser::<u16>::new().range(range).try_map(|size| {
        if size.is_power_of_two() { Ok(size) } else { Err("the size must be a power of two") }
    })
}

fn parse_serial(text: &str) -> Result<Serial, String> {
    // Control characters would end up in the guest's udev rules and device names.
    if let Some(bad) = text.chars().find(|c| !c.is_ascii_graphic() && *c != ' ') {
        return Err(format!("{bad:?} is not allowed; use printable ASCII characters"));
    }
    let mut serial = [0; ID_LEN];
    let Some(place) = serial.get_mut(..text.len()) else {
        return Err(format!("{} characters; at most {ID_LEN} are allowed", text.len()));
    };
    place.copy_from_slice(text.as_bytes());
    Ok(serial)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Command, clap::Error> {
        parse(std::iter::once("vhost-user-blk").chain(args.iter().copied()).map(OsString::from))
    }

    fn serve(args: &[&str]) -> Options {
        match run(args).unwrap() {
            Command::Serve(options) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn clap_accepts_its_own_definition() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_first_comma_separates_cow_from_base() {
        let cow = |text: &str| serve(&["--fd=3", text]).image;
        assert_eq!(cow("a"), Image::Cow { cow: "a".into(), below: Vec::new(), format: None });
        let below = vec!["b".into(), "c".into()];
        let both = Image::Cow { cow: "a".into(), below, format: None };
        assert_eq!(cow("a,b,c"), both);
        let named = serve(&["--fd=3", "--blk-file=a,b", "--base=c,d", "--base=e"]).image;
        let below = vec!["c,d".into(), "e".into()];
        assert_eq!(named, Image::Cow { cow: "a,b".into(), below, format: None });
        let fds = serve(&[
            "--fd=3",
            "--cow-fd=4",
            "--cow-direct-fd=5",
            "--cow-cache=direct",
            "--base-fd=6,7",
        ]);
        let expected = DiskFds { cow: 4, direct: Some(5), below: vec![6, 7], raw: false };
        assert_eq!(fds.image, Image::Fds(expected));
        let options = serve(&["--fd=3", "--blk-file=a,b"]);
        assert_eq!(options.image, Image::File { path: "a,b".into(), format: None });
    }

    #[test]
    fn options_reach_the_daemon() {
        let options = serve(&[
            "--socket-path=s",
            "--control=c",
            "--upgrade-dir=/u",
            "--allow-uid=qemu,1000",
            "--allow-gid=kvm",
            "a,b",
            "--format=uml",
            "--read-only",
            "--incoming",
            "--num-queues=2",
            "--queue-size=256",
            "--serial=disk 1",
            "--base-cache=direct",
            "--cow-cache=buffered",
            "--io-engine=sync",
            "--poll-us=0",
            "--user=u",
            "--group=g",
            "--sandbox=off",
            "--allow-file-memory",
            "--log-level=debug",
        ]);
        let mut serial = [0; ID_LEN];
        serial[..6].copy_from_slice(b"disk 1");
        assert_eq!(
            options,
            Options {
                endpoint: Endpoint::Path("s".into()),
                allow_uid: vec!["qemu".to_owned(), "1000".to_owned()],
                allow_gid: vec!["kvm".to_owned()],
                control: Some("c".into()),
                upgrade_dir: Some("/u".into()),
                takeover: None,
                image: Image::Cow {
                    cow: "a".into(),
                    below: vec!["b".into()],
                    format: Some(Format::Uml)
                },
                backing_dirs: Vec::new(),
                read_only: true,
                allow_unlocked: false,
                allow_file_memory: true,
                incoming: true,
                num_queues: 2,
                queue_size_max: 256,
                serial,
                base_cache: Cache::Direct,
                cow_cache: Cache::Buffered,
                io_engine: Some(IoEngine::Sync),
                poll_us: 0,
                user: Some("u".to_owned()),
                group: Some("g".to_owned()),
                sandbox: Sandbox::Off,
                log_level: LevelFilter::Debug,
            }
        );
    }

    #[test]
    fn a_successor_needs_no_socket_of_its_own() {
        let options = serve(&["--takeover=7", "a"]);
        assert_eq!(options.takeover, Some(7));
        assert!(run(&["a", "--takeover=7", "--fd=3"]).is_err());
    }

    #[test]
    fn an_upgrade_names_its_program_absolutely() {
        let Command::Control(socket, Request::Upgrade(upgrade)) =
            run(&["upgrade", "--control=c", "--program=a/b"]).unwrap()
        else {
            panic!("no upgrade");
        };
        assert_eq!((socket, upgrade.time), ("c".into(), Duration::from_secs(10)));
        assert_eq!(upgrade.program, Some(std::env::current_dir().unwrap().join("a/b")));
        // It is a command as the first argument only, and never in the form `./upgrade`.
        for name in ["upgrade", "./upgrade"] {
            let image = serve(&["--fd=3", name]).image;
            assert_eq!(image, Image::Cow { cow: name.into(), below: Vec::new(), format: None });
        }
    }

    #[test]
    fn wrong_usage_has_status_2_and_names_the_option() {
        let cases: &[(&[&str], &str)] = &[
            (&[], "--socket-path"),
            (&["a"], "--socket-path"),
            (&["--socket-path=s"], "--blk-file"),
            (&["--socket-path=s", "--fd=3", "a"], "--fd"),
            (&["--socket-path=s", "a", "--blk-file=b"], "--blk-file"),
            (&["--socket-path=", "a"], "--socket-path"),
            (&["--socket-path=s", "--control=", "a"], "--control"),
            (&["--socket-path=s", "--upgrade-dir=u", "a"], "--control"),
            (&["upgrade"], "--control"),
            (&["upgrade", "--control=c", "a"], "'a'"),
            (&["--fd=3", "a", "upgrade"], "upgrade"),
            (&["upgrade", "--control=c", "--timeout=0"], "--timeout"),
            (&["--fd=x", "a"], "--fd"),
            (&["--fd=3", ",b"], "COW"),
            (&["--fd=3", "a,"], "comma"),
            (&["--fd=3", "a", "--format=raw"], "--blk-file=PATH"),
            (&["--fd=3", "a", "--format=qcow2"], "--format"),
            (&["--fd=3", "a", "--num-queues=0"], "--num-queues"),
            (&["--fd=3", "a", "--num-queues=257"], "--num-queues"),
            (&["--fd=3", "a", "--queue-size=3"], "--queue-size"),
            (&["--fd=3", "a", "--queue-size=48"], "power of two"),
            (&["--fd=3", "a", "--queue-size=65536"], "--queue-size"),
            (&["--fd=3", "a", "--serial=123456789012345678901"], "at most 20"),
            (&["--fd=3", "a", "--serial=\u{1b}[2J"], "--serial"),
            (&["--fd=3", "a", "--base-cache=maybe"], "--base-cache"),
            (&["--fd=3", "a", "--io-engine=aio"], "--io-engine"),
            (&["--fd=3", "a", "--poll-us=1000001"], "--poll-us"),
            (&["--fd=3", "a", "--group=g"], "--user"),
            (&["--fd=3", "a", "--sandbox=maybe"], "--sandbox"),
            (&["--fd=3", "a", "--log-level=loud"], "--log-level"),
            (&["--fd=3", "a", "--no-such-option"], "--no-such-option"),
            (&["--fd=3", "a,b,,c"], "comma"),
            (&["--fd=3", "a", "--base=b"], "--base"),
            (&["--fd=3", "--blk-file=a", "--base=b", "--format=raw"], "--base"),
            (&["--fd=3", "a", "--cow-fd=4"], "--cow-fd"),
            (&["--fd=3", "a", "--base-fd=4"], "--base-fd"),
            (&["--fd=3", "--base-fd=4"], "--cow-fd"),
            (&["--fd=3", "--cow-fd=4", "--base-fd=5,x"], "--base-fd"),
            (&["--fd=3", "--cow-fd=4", "--format=uml"], "--format=uml"),
            (&["--fd=3", "--cow-fd=4", "--base-fd=5", "--format=raw"], "--base-fd"),
            (&["--fd=3", "--cow-fd=4", "--cow-cache=direct"], "--cow-direct-fd"),
            (&["--fd=3", "--cow-fd=4", "--cow-direct-fd=5"], "--cow-cache=direct"),
            (&["--fd=3", "--cow-fd=4", "--base-cache=direct"], "--base-cache=direct"),
            (&["--fd=3", "--cow-fd=4", "--backing-dir=/"], "--backing-dir"),
        ];
        for (args, expected) in cases {
            let error = run(args).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{args:?}: {error}");
            let message = error.to_string();
            assert!(message.contains(expected), "{args:?}: {message}");
        }
    }

    #[test]
    fn print_capabilities_ignores_everything_else() {
        for args in [&["--print-capabilities"][..], &["--nonsense", "--print-capabilities", "x,y"]]
        {
            match run(args).unwrap() {
                Command::Print(text) => assert_eq!(text.trim_end(), CAPABILITIES),
                other => panic!("{other:?}"),
            }
        }
    }
}
