//! The subcommands: options in, reports out.

use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use blk_bench::config::{Config, RangeLimits};
use blk_bench::driver::device::{Device, Options};
use blk_bench::driver::queue::{SECTOR_SIZE, Wait};
use blk_bench::error::Error;
use blk_bench::load::job::Job;
use blk_bench::load::model::{Base, Expectation, Expected};
use blk_bench::load::region::Region;
use blk_bench::load::{self, Outcome, RunError};
use blk_bench::null;
use blk_bench::report::{Report, ServerReport, Target, Verification};
use blk_bench::server::Server;

use crate::cli::{Completion, ConnectArgs, NullArgs, Order, Output, Refusable, RunArgs, Switch};

/// Length of a run that has no other end.
const DEFAULT_RUNTIME: Duration = Duration::from_secs(5);
/// Reads of a read-back are at least this long.
const READ_BACK_LEN: u64 = 64 << 10;

/// How the process ends if not well.
pub enum Failure {
    /// The options make no sense: status 2.
    Usage(String),
    /// The run failed: status 1.
    Failed(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Options(_) | Error::TooMany { .. } => Self::Usage(error.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::Usage(message.into())
}

/// `blk-bench run`
pub fn run(args: &RunArgs) -> Result<(), Failure> {
    let seed = args.seed.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::from(now.subsec_nanos()) << 32 | now.as_secs() & 0xffff_ffff
    });
    check_options(args)?;
    let base = args.base.as_deref().map(Base::open).transpose()?;
    let mut device = Device::connect(&options(args))?;
    let job = job(args, device.config(), seed)?;
    if let Some(switch) = args.write_cache {
        device.set_write_cache(switch == Switch::On)?;
    }
    let server = find_server(&args.connect, &device);
    let memory_before = server.map(|server| server.memory());
    let expectation = Expectation { base, seed };
    let failed = |error: RunError| Failure::Failed(format!("{error} (seed {seed})"));
    let mut outcome =
        load::run(device.take_queues(), &job, &expectation, server).map_err(failed)?;
    let memory_after = server.map(|server| server.memory());

    let mut report = Report::new(target(&args.connect, &device), describe(args, &job), &outcome);
    if let (Some(server), Some(before), Some(after)) = (server, memory_before, memory_after) {
        report.server = ServerReport::new(server, &outcome, before, after);
    }
    if args.verify {
        let verified = verify(args, &job, &mut outcome, expectation, device.config());
        report.verification = Some(verified.map_err(|failure| match failure {
            Failure::Failed(text) => Failure::Failed(format!("{text} (seed {seed})")),
            usage @ Failure::Usage(_) => usage,
        })?);
    }
    device.stop()?;
    print(args.connect.output, &report)
}

/// Checks that need no device.
fn check_options(args: &RunArgs) -> Result<(), Failure> {
    let ranged = args.block_size.0 != args.block_size.1;
    if ranged && (args.once || args.pattern == Order::Sequential) {
        return Err(usage("--once and --pattern=sequential need one --block-size, not a range"));
    }
    if !args.warmup.is_zero() && (args.once || args.count.is_some()) {
        return Err(usage("--warmup goes with --runtime, not with --once or --count"));
    }
    if !args.offset.is_multiple_of(SECTOR_SIZE as u64) {
        return Err(usage("--offset must be a multiple of 512"));
    }
    if args.segment_size.is_some_and(|size| size == 0 || size > u64::from(u32::MAX)) {
        return Err(usage("--segment-size must be 1 to 4G-1"));
    }
    if let (Some(base), Some(expected)) = (&args.base, &args.write_expected)
        && let (Ok(base), Ok(expected)) = (base.canonicalize(), expected.canonicalize())
        && base == expected
    {
        let file = base.display();
        return Err(usage(format!(
            "--base and --write-expected are one file, {file}: name another"
        )));
    }
    Ok(())
}

fn options(args: &RunArgs) -> Options {
    let max = if args.read_back { args.block_size.1.max(READ_BACK_LEN) } else { args.block_size.1 };
    let refused = args.refuse.iter().map(|feature| {
        1 << match feature {
            Refusable::EventIdx => VIRTIO_RING_F_EVENT_IDX,
            Refusable::Indirect => VIRTIO_RING_F_INDIRECT_DESC,
            Refusable::Flush => VIRTIO_BLK_F_FLUSH,
            Refusable::ConfigWce => VIRTIO_BLK_F_CONFIG_WCE,
            Refusable::Discard => VIRTIO_BLK_F_DISCARD,
            Refusable::WriteZeroes => VIRTIO_BLK_F_WRITE_ZEROES,
        }
    });
    Options {
        socket: args.connect.socket_path.clone(),
        connect_for: args.connect.connect_for,
        queues: args.queues,
        depth: args.depth,
        queue_size: args.queue_size,
        max_data: usize::try_from(max).expect("at most 64M"),
        segment: args.segment_size.map(|size| usize::try_from(size).expect("less than 4G")),
        refuse_features: refused.fold(0, |all, bit: u64| all | bit),
        hugepages: args.hugepages,
        stall_after: args.stall_after,
        inflight: false,
    }
}

fn job(args: &RunArgs, config: &Config, seed: u64) -> Result<Job, Failure> {
    if args.ops.changes() && config.read_only {
        return Err(usage("the disk is read-only"));
    }
    for (weight, limits, name) in [
        (args.ops.discard, config.discard, "discard"),
        (args.ops.write_zeroes.max(args.ops.unmap_zeroes), config.write_zeroes, "write-zeroes"),
    ] {
        let granule = u32::try_from(args.block_size.1 / SECTOR_SIZE as u64).unwrap_or(u32::MAX);
        match limits {
            None if weight > 0 => return Err(usage(format!("the device does not offer {name}"))),
            Some(limits) if weight > 0 && limits.max_sectors < granule => {
                return Err(usage(format!(
                    "the device takes at most {} sectors in a {name}",
                    limits.max_sectors
                )));
            }
            _ => {}
        }
    }
    let wait = match args.completion {
        Completion::Eventfd => Wait::Eventfd,
        Completion::Poll => Wait::Poll,
        Completion::Adaptive => Wait::Adaptive(args.poll_time),
    };
    let endless = args.count.is_none() && !args.once;
    Ok(Job {
        pattern: args.pattern.into(),
        mix: args.ops,
        min_sectors: sectors(args.block_size.0)?,
        partitioned: args.verify || args.once,
        once: args.once,
        flush_every: args.flush_every,
        runtime: args.runtime.or(endless.then_some(DEFAULT_RUNTIME)),
        warmup: args.warmup,
        count: args.count,
        wait,
        seed,
        verify: args.verify,
        discard_zeroes: args.discard_zeroes,
        tolerate_errors: args.tolerate_errors,
        check_used_len: args.check_used_len,
        ..Job::new(region(args, config)?)
    })
}

fn sectors(bytes: u64) -> Result<u32, Failure> {
    u32::try_from(bytes / SECTOR_SIZE as u64).map_err(|_| usage("the block size is too large"))
}

fn region(args: &RunArgs, config: &Config) -> Result<Region, Failure> {
    let unit = SECTOR_SIZE as u64;
    let start = args.offset / unit;
    let rest = config.capacity.checked_sub(start).ok_or_else(|| {
        usage(format!(
            "--offset is past the end of the disk, which has {} bytes",
            config.capacity * unit
        ))
    })?;
    let wanted = args.region.map_or(rest, |bytes| bytes / unit);
    if wanted > rest {
        return Err(usage(format!(
            "--region ends past the end of the disk, {} bytes are left",
            rest * unit
        )));
    }
    let granule = sectors(args.block_size.1)?;
    let region =
        Region { start, granule, granules: wanted / u64::from(granule), queues: args.queues };
    if region.granules < u64::from(args.queues) {
        return Err(usage(format!(
            "{} blocks of {} bytes are too few for {} queues",
            region.granules, args.block_size.1, args.queues
        )));
    }
    Ok(region)
}

/// What comes after a verifying run. Read-back covers the rest of the region that is shorter than a
/// block, too.
fn verify(
    args: &RunArgs,
    job: &Job,
    outcome: &mut Outcome,
    expectation: Expectation,
    config: &Config,
) -> Result<Verification, Failure> {
    let failed = |error: RunError| Failure::Failed(error.to_string());
    let models = std::mem::take(&mut outcome.models);
    let expected = Expected { region: job.region, models, expectation };
    let end =
        args.region.map_or(config.capacity, |bytes| job.region.start + bytes / SECTOR_SIZE as u64);
    let range = job.region.start..end;
    let sectors_read_back = args
        .read_back
        .then(|| load::read_back(&mut outcome.queues, &expected, range, job.wait))
        .transpose()
        .map_err(failed)?;
    if let Some(path) = &args.write_expected {
        expected.write_image(path, config.capacity)?;
    }
    Ok(Verification {
        sectors_checked: outcome.sectors_checked(),
        sectors_read_back,
        expected_image: args.write_expected.as_ref().map(|path| path.display().to_string()),
    })
}

fn find_server(args: &ConnectArgs, device: &Device) -> Option<Server> {
    Server::new(args.pid.unwrap_or(device.pid()))
}

fn target(args: &ConnectArgs, device: &Device) -> Target {
    Target {
        socket: args.socket_path.display().to_string(),
        config: *device.config(),
        features_offered: format!("{:#x}", device.offered_features()),
        features: format!("{:#x}", device.features()),
    }
}

fn describe(args: &RunArgs, job: &Job) -> serde_json::Value {
    json!({
        "pattern": format!("{:?}", job.pattern).to_lowercase(),
        "ops": {
            "read": job.mix.read, "write": job.mix.write, "discard": job.mix.discard,
            "write_zeroes": job.mix.write_zeroes, "unmap_zeroes": job.mix.unmap_zeroes,
        },
        "block_size": [args.block_size.0, args.block_size.1],
        "depth": args.depth,
        "queues": args.queues,
        "flush_every": args.flush_every,
        "offset": args.offset,
        "region": job.region.sectors() * SECTOR_SIZE as u64,
        "once": args.once,
        "runtime_s": job.runtime.map(|time| time.as_secs_f64()),
        "count": args.count,
        "completion": format!("{:?}", args.completion).to_lowercase(),
        "verify": args.verify,
        "seed": job.seed,
    })
}

fn print(output: Output, report: &Report) -> Result<(), Failure> {
    put(&match output {
        Output::Human => report.to_string(),
        Output::Json => to_json(report)? + "\n",
    })
}

fn put(text: &str) -> Result<(), Failure> {
    let written = std::io::stdout().write_all(text.as_bytes());
    written.map_err(|error| Failure::Failed(format!("write to stdout: {error}")))
}

fn to_json(value: &impl serde::Serialize) -> Result<String, Failure> {
    serde_json::to_string_pretty(value).map_err(|error| Failure::Failed(error.to_string()))
}

/// `blk-bench info`
pub fn info(args: &ConnectArgs) -> Result<(), Failure> {
    let options = Options { connect_for: args.connect_for, ..Options::new(&args.socket_path) };
    let mut device = Device::connect(&options)?;
    let server = find_server(args, &device);
    let value = json!({
        "target": target(args, &device),
        "protocol_features": format!("{:#x}", device.protocol_features()),
        "pid": device.pid(),
        "program": server.map(|server| server.name()),
        "memory": server.map(|server| server.memory()),
    });
    device.stop()?;
    put(&match args.output {
        Output::Json => to_json(&value)? + "\n",
        Output::Human => describe_device(&device, server),
    })
}

fn describe_device(device: &Device, server: Option<Server>) -> String {
    let config = device.config();
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "not offered".into());
    let limits = |limits: Option<RangeLimits>| {
        or_none(limits.map(|l| format!("{} sectors, {} ranges", l.max_sectors, l.max_segments)))
    };
    let server = server.map(|server| {
        let memory = server.memory();
        let (name, pid) = (server.name(), server.pid);
        format!("{name} ({pid}), RSS {} KiB, PSS {} KiB", memory.rss_kib, memory.pss_kib)
    });
    let bytes = config.capacity * SECTOR_SIZE as u64;
    let lines = [
        ("capacity", format!("{} sectors ({bytes} bytes)", config.capacity)),
        ("read-only", if config.read_only { "yes" } else { "no" }.into()),
        ("queues", config.num_queues.to_string()),
        ("data segments", or_none(config.seg_max.map(|n| format!("at most {n}")))),
        ("logical block", or_none(config.block_size.map(|n| format!("{n} bytes")))),
        ("discard", limits(config.discard)),
        ("write zeroes", limits(config.write_zeroes)),
        (
            "features",
            format!("{:#x} offered, {:#x} used", device.offered_features(), device.features()),
        ),
        ("protocol", format!("{:#x} used", device.protocol_features())),
        ("server", server.unwrap_or_else(|| "not visible from here".into())),
    ];
    lines.iter().map(|(name, value)| format!("{:<15} {value}\n", format!("{name}:"))).collect()
}

/// `blk-bench null-backend`
pub fn null_backend(args: &NullArgs) -> Result<(), Failure> {
    let options = null::Options {
        sectors: args.size / SECTOR_SIZE as u64,
        queues: args.queues,
        ram: args.ram,
        poll_time: args.poll_time,
        fault: None,
    };
    let content = null::Content::new(&options)?;
    let listener = null::listen(&args.socket_path)?;
    eprintln!("blk-bench: null backend on {}", args.socket_path.display());
    loop {
        null::serve_one(&listener, &options, &content)?;
    }
}
