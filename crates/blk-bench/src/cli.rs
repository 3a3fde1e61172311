//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::parse::{duration, mix, size, sizes};
use blk_bench::load::job::{Mix, Pattern};

/// A vhost-user-blk load generator: a frontend without a guest.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Sizes take the suffixes k, M, G and T (powers of 1024), times ms, s and m.\n\
        Exit status: 0 if all went well, 1 if the run or its verification failed, 2 for wrong options."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Put load on a backend and report the result.
    #[command(after_help = "Examples:\n  \
        blk-bench run -s /tmp/disk.sock --depth=32 --runtime=10s\n  \
        blk-bench run -s /tmp/disk.sock --ops=write --once --flush-every=1\n  \
        blk-bench run -s /tmp/disk.sock --queues=4 --depth=16 --ops=read:50,write:45,discard:5 \\\n      \
        --block-size=512..64k --count=100000 --verify --base=base.img --read-back --write-expected=expected.img")]
    Run(Box<RunArgs>),
    /// Show what a backend offers: size, limits, features, memory.
    Info(ConnectArgs),
    /// Be a backend that answers at once without doing anything: what is measured against it is
    /// blk-bench itself.
    NullBackend(NullArgs),
}

#[derive(Debug, Args)]
pub struct ConnectArgs {
    /// The backend's socket.
    #[arg(short, long, value_name = "PATH")]
    pub socket_path: PathBuf,
    /// Keep trying to connect for so long, for a backend that is still starting.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = duration)]
    pub connect_for: Duration,
    /// Process whose CPU time and memory are the server's; default: the one that listens on the
    /// socket.
    #[arg(long)]
    pub pid: Option<i32>,
    /// Print JSON, or text for a person.
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Human,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Completion {
    /// Sleep on the eventfd, as a guest's interrupt would wake it.
    Eventfd,
    /// Poll the used ring all the time, with interrupts off.
    Poll,
    /// Poll for --poll-time, then sleep.
    Adaptive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    Random,
    Sequential,
}

impl From<Order> for Pattern {
    fn from(order: Order) -> Self {
        match order {
            Order::Random => Self::Random,
            Order::Sequential => Self::Sequential,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Refusable {
    EventIdx,
    Indirect,
    Flush,
    ConfigWce,
    Discard,
    WriteZeroes,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub connect: ConnectArgs,

    /// Operations and their weights: read, write, discard, write-zeroes, unmap-zeroes.
    #[arg(long, value_name = "OP[:N],…", default_value = "read", value_parser = mix, help_heading = "Load")]
    pub ops: Mix,
    /// Where the next request goes.
    #[arg(long, value_enum, default_value = "random", help_heading = "Load")]
    pub pattern: Order,
    /// Bytes in a request; with a range, random multiples of the smaller one.
    #[arg(long, value_name = "SIZE[..SIZE]", default_value = "4k", value_parser = sizes, help_heading = "Load")]
    pub block_size: (u64, u64),
    /// Requests in flight in each queue.
    #[arg(long, default_value_t = 1, help_heading = "Load")]
    pub depth: u16,
    /// Queues, one thread each.
    #[arg(long, default_value_t = 1, help_heading = "Load")]
    pub queues: u16,
    /// Flush after every N requests of a queue that change the disk.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Load")]
    pub flush_every: Option<u64>,
    /// First byte to touch.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size, help_heading = "Load")]
    pub offset: u64,
    /// Bytes to touch from there on; default: up to the end of the disk.
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Load")]
    pub region: Option<u64>,
    /// Touch each block once, then end.
    #[arg(long, help_heading = "Load")]
    pub once: bool,
    /// End after this time [default: 5s, without --count and --once]
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Load")]
    pub runtime: Option<Duration>,
    /// End after this many requests, over all queues, flushes not counted.
    #[arg(long, value_name = "N", help_heading = "Load")]
    pub count: Option<u64>,
    /// Put on the load for so long before measuring.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = duration, help_heading = "Load")]
    pub warmup: Duration,
    /// Seed of the random numbers; default: from the clock. It is printed with every failure.
    #[arg(long, help_heading = "Load")]
    pub seed: Option<u64>,

    /// How completions are noticed.
    #[arg(long, value_enum, default_value = "eventfd", help_heading = "Driver")]
    pub completion: Completion,
    /// How long --completion=adaptive polls before it sleeps.
    #[arg(long, value_name = "TIME", default_value = "50us", value_parser = duration, help_heading = "Driver")]
    pub poll_time: Duration,
    /// Ring entries; default: what the depth needs, at least 128.
    #[arg(long, value_name = "N", help_heading = "Driver")]
    pub queue_size: Option<u16>,
    /// Cut data into descriptors of at most this size.
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Driver")]
    pub segment_size: Option<u64>,
    /// Do not accept these features.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "FEATURE",
        help_heading = "Driver"
    )]
    pub refuse: Vec<Refusable>,
    /// Switch the device's write cache before the run.
    #[arg(long, value_enum, help_heading = "Driver")]
    pub write_cache: Option<Switch>,
    /// Share memory from the pool of reserved huge pages.
    #[arg(long, help_heading = "Driver")]
    pub hugepages: bool,
    /// Give up if nothing is completed for this long.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration, help_heading = "Driver")]
    pub stall_after: Duration,

    /// Stamp every written sector, and check every sector that is read.
    #[arg(long, help_heading = "Verification")]
    pub verify: bool,
    /// Raw image of what the disk held before, zeros after its end (/dev/null: all zeros). Without
    /// it, sectors that the run has not written are not checked.
    #[arg(long, value_name = "FILE", requires = "verify", help_heading = "Verification")]
    pub base: Option<PathBuf>,
    /// After the run read the whole region through all queues and check it.
    #[arg(long, requires = "verify", help_heading = "Verification")]
    pub read_back: bool,
    /// After the run write to FILE what the disk must hold now, for a comparison byte by byte.
    #[arg(long, value_name = "FILE", requires = "base", help_heading = "Verification")]
    pub write_expected: Option<PathBuf>,
    /// Discarded sectors must read as zeros; virtio leaves it open.
    #[arg(long, requires = "verify", help_heading = "Verification")]
    pub discard_zeroes: bool,
    /// The used ring must give exactly the number of bytes that were written.
    #[arg(long, help_heading = "Verification")]
    pub check_used_len: bool,
    /// Count failed requests instead of ending.
    #[arg(long, help_heading = "Verification")]
    pub tolerate_errors: bool,
}

#[derive(Debug, Args)]
pub struct NullArgs {
    /// Where to listen.
    #[arg(short, long, value_name = "PATH")]
    pub socket_path: PathBuf,
    /// Size of the disk.
    #[arg(long, default_value = "1G", value_parser = size)]
    pub size: u64,
    /// Queues that are offered.
    #[arg(long, default_value_t = 4)]
    pub queues: u16,
    /// Keep what is written, in memory, and read it back: a RAM disk.
    #[arg(long)]
    pub ram: bool,
    /// Poll for work for this long before sleeping.
    #[arg(long, value_name = "TIME", default_value = "50us", value_parser = duration)]
    pub poll_time: Duration,
}
