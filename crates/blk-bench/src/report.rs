//! What is printed at the end, for a person or as JSON.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::config::Config;
use crate::load::Outcome;
use crate::load::stats::{OpSummary, per_second};
use crate::server::Memory;

/// A run's result. Its JSON form is what `--output=json` prints.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was driven.
    pub target: Target,
    /// How it was driven: the options as understood.
    pub job: serde_json::Value,
    /// Length of the measured part in seconds.
    pub elapsed_s: f64,
    /// Requests of all kinds.
    pub requests: u64,
    /// Failed requests.
    pub errors: u64,
    /// Requests of all kinds per second.
    pub iops: f64,
    /// Bytes per second over all kinds.
    pub bytes_per_s: f64,
    /// One entry for each kind of operation that occurred.
    pub ops: Vec<OpSummary>,
    /// The backend's process; `None` if it cannot be seen.
    pub server: Option<ServerReport>,
    /// This process.
    pub client: ClientReport,
    /// What was compared, if the run verified.
    pub verification: Option<Verification>,
}

/// The device.
#[derive(Debug, Serialize)]
pub struct Target {
    /// Its socket.
    pub socket: String,
    /// Configuration space.
    pub config: Config,
    /// Virtio features offered, in hexadecimal.
    pub features_offered: String,
    /// Virtio features used, in hexadecimal.
    pub features: String,
}

/// The backend's process during the run.
#[derive(Debug, Serialize)]
pub struct ServerReport {
    /// Process id.
    pub pid: i32,
    /// Name of its program.
    pub name: String,
    /// CPU time in seconds.
    pub cpu_s: f64,
    /// CPU time in per cent of one processor.
    pub cpu_percent: f64,
    /// CPU time per request in microseconds.
    pub cpu_us_per_io: f64,
    /// Memory when connected, before the first request.
    pub memory_before: Memory,
    /// Memory after the last.
    pub memory_after: Memory,
}

/// The load generator's own cost.
#[derive(Debug, Serialize)]
pub struct ClientReport {
    /// CPU time in seconds.
    pub cpu_s: f64,
    /// CPU time per request in microseconds.
    pub cpu_us_per_io: f64,
    /// Writes to kick eventfds.
    pub kicks: u64,
    /// Returns from sleep.
    pub wakeups: u64,
}

/// What was compared.
#[derive(Debug, Serialize)]
pub struct Verification {
    /// Sectors compared by the reads of the run.
    pub sectors_checked: u64,
    /// Sectors compared by the read-back after it.
    pub sectors_read_back: Option<u64>,
    /// Where the expected image was written.
    pub expected_image: Option<String>,
}

impl Report {
    /// Puts a run's figures together.
    pub fn new(target: Target, job: serde_json::Value, outcome: &Outcome) -> Self {
        let stats = &outcome.stats;
        let requests = stats.requests();
        Self {
            target,
            job,
            elapsed_s: outcome.elapsed.as_secs_f64(),
            requests,
            errors: stats.errors,
            iops: per_second(requests, outcome.elapsed),
            bytes_per_s: per_second(stats.bytes(), outcome.elapsed),
            ops: stats.summaries(outcome.elapsed),
            server: None,
            client: ClientReport {
                cpu_s: outcome.client_cpu.as_secs_f64(),
                cpu_us_per_io: us_per_io(outcome.client_cpu, requests),
                kicks: stats.notifications.kicks,
                wakeups: stats.notifications.wakeups,
            },
            verification: None,
        }
    }
}

impl ServerReport {
    /// Of a process whose CPU time in the run is known.
    pub fn new(
        server: crate::server::Server,
        outcome: &Outcome,
        memory_before: Memory,
        memory_after: Memory,
    ) -> Option<Self> {
        let cpu = outcome.server_cpu?;
        let share = cpu.as_secs_f64() / outcome.elapsed.as_secs_f64().max(f64::MIN_POSITIVE);
        Some(Self {
            pid: server.pid,
            name: server.name(),
            cpu_s: cpu.as_secs_f64(),
            cpu_percent: 100.0 * share,
            cpu_us_per_io: us_per_io(cpu, outcome.requests()),
            memory_before,
            memory_after,
        })
    }
}

fn us_per_io(time: Duration, requests: u64) -> f64 {
    if requests == 0 { 0.0 } else { time.as_secs_f64() * 1e6 / requests as f64 }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} requests in {:.2} s: {:.0} IOPS, {:.1} MB/s{}",
            self.requests,
            self.elapsed_s,
            self.iops,
            self.bytes_per_s / 1e6,
            if self.errors == 0 { String::new() } else { format!(", {} FAILED", self.errors) }
        )?;
        writeln!(
            f,
            "{:<13}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "latency, µs", "IOPS", "mean", "p50", "p90", "p99", "p99.9", "max"
        )?;
        for OpSummary { op, iops, latency_us: l, .. } in &self.ops {
            writeln!(
                f,
                "{op:<13}{iops:>10.0}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}",
                l.mean, l.p50, l.p90, l.p99, l.p999, l.max
            )?;
        }
        match &self.server {
            Some(s) => writeln!(
                f,
                "server: {} ({}): {:.2} µs CPU per request, {:.0} % of a CPU; RSS {} → {} KiB, of it anonymous {} → {}",
                s.name,
                s.pid,
                s.cpu_us_per_io,
                s.cpu_percent,
                s.memory_before.rss_kib,
                s.memory_after.rss_kib,
                s.memory_before.anon_kib,
                s.memory_after.anon_kib
            )?,
            None => writeln!(f, "server: not visible from here (give its --pid)")?,
        }
        let c = &self.client;
        writeln!(
            f,
            "client: {:.2} µs CPU per request, {} kicks, {} wake-ups",
            c.cpu_us_per_io, c.kicks, c.wakeups
        )?;
        if let Some(v) = &self.verification {
            write!(f, "verified: {} sectors during the run", v.sectors_checked)?;
            if let Some(count) = v.sectors_read_back {
                write!(f, ", {count} in the read-back")?;
            }
            writeln!(f, ": all as expected")?;
            if let Some(path) = &v.expected_image {
                writeln!(f, "expected image: {path}")?;
            }
        }
        Ok(())
    }
}
