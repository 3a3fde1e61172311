//! Counts and latencies.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::driver::queue::{Notifications, Op, Request, SECTOR_SIZE};

/// Longer latencies count as this.
const LATENCY_MAX_NS: u64 = 3_600_000_000_000;
/// Kinds of operations that are counted apart.
const KINDS: usize = 5;
/// Their names, in the order of `kind`.
const NAMES: [&str; KINDS] = ["read", "write", "flush", "discard", "write_zeroes"];

fn kind(op: Op) -> usize {
    match op {
        Op::Read | Op::GetId => 0,
        Op::Write => 1,
        Op::Flush => 2,
        Op::Discard => 3,
        Op::WriteZeroes { .. } => 4,
    }
}

#[derive(Clone, Debug)]
struct Counter {
    latency_ns: Histogram<u64>,
    bytes: u64,
}

/// What the requests of one or several queues came to.
#[derive(Clone, Debug)]
pub(crate) struct Stats {
    counters: Vec<Counter>,
    pub errors: u64,
    pub checked_sectors: u64,
    pub notifications: Notifications,
}

impl Default for Stats {
    fn default() -> Self {
        let latency_ns = Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).expect("valid bounds");
        let counters = vec![Counter { latency_ns, bytes: 0 }; KINDS];
        Self { counters, errors: 0, checked_sectors: 0, notifications: Notifications::default() }
    }
}

impl Stats {
    pub fn record(&mut self, request: &Request, latency: Duration) {
        let counter = &mut self.counters[kind(request.op)];
        counter.latency_ns.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
        counter.bytes += u64::from(request.sectors) * SECTOR_SIZE as u64;
    }

    pub fn merge(&mut self, other: &Self) {
        for (counter, other) in self.counters.iter_mut().zip(&other.counters) {
            counter.latency_ns.add(&other.latency_ns).expect("same bounds");
            counter.bytes += other.bytes;
        }
        self.errors += other.errors;
        self.checked_sectors += other.checked_sectors;
        self.notifications.kicks += other.notifications.kicks;
        self.notifications.wakeups += other.notifications.wakeups;
    }

    /// Requests of all kinds.
    pub fn requests(&self) -> u64 {
        self.counters.iter().map(|counter| counter.latency_ns.len()).sum()
    }

    pub fn bytes(&self) -> u64 {
        self.counters.iter().map(|counter| counter.bytes).sum()
    }

    pub fn summaries(&self, elapsed: Duration) -> Vec<OpSummary> {
        let used =
            self.counters.iter().zip(NAMES).filter(|(counter, _)| !counter.latency_ns.is_empty());
        used.map(|(counter, op)| OpSummary {
            op,
            requests: counter.latency_ns.len(),
            bytes: counter.bytes,
            iops: per_second(counter.latency_ns.len(), elapsed),
            bytes_per_s: per_second(counter.bytes, elapsed),
            latency_us: Latency::new(&counter.latency_ns),
        })
        .collect()
    }
}

/// A rate; 0 for no time.
pub(crate) fn per_second(count: u64, elapsed: Duration) -> f64 {
    if elapsed.is_zero() { 0.0 } else { count as f64 / elapsed.as_secs_f64() }
}

/// One kind of operation.
#[derive(Clone, Debug, Serialize)]
pub struct OpSummary {
    /// read, write, flush, discard or write_zeroes.
    pub op: &'static str,
    /// Completed requests.
    pub requests: u64,
    /// Bytes of disk that they covered.
    pub bytes: u64,
    /// Requests per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_s: f64,
    /// From the store of `avail.idx` to the load of `used.idx` that found it.
    pub latency_us: Latency,
}

/// Latency in microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Latency {
    /// Shortest.
    pub min: f64,
    /// Mean.
    pub mean: f64,
    /// Half were shorter.
    pub p50: f64,
    /// Nine in ten were shorter.
    pub p90: f64,
    /// All but one in a hundred.
    pub p99: f64,
    /// All but one in a thousand.
    pub p999: f64,
    /// Longest.
    pub max: f64,
}

impl Latency {
    fn new(histogram: &Histogram<u64>) -> Self {
        let us = |ns: u64| ns as f64 / 1000.0;
        let at = |quantile| us(histogram.value_at_quantile(quantile));
        Self {
            min: us(histogram.min()),
            mean: histogram.mean() / 1000.0,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: us(histogram.max()),
        }
    }
}
