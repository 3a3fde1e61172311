//! What the backend's process costs: CPU time and memory, from /proc.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

/// CPU time and memory of a process at one moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Run time by thread, in nanoseconds (schedstat); empty if the kernel does not keep it.
    threads_ns: HashMap<i32, u64>,
    /// User and system time, threads that have ended included, in clock ticks (stat).
    ticks: u64,
    /// Memory.
    pub memory: Memory,
}

/// Resident memory of a process in KiB.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Memory {
    /// Resident set.
    pub rss_kib: u64,
    /// … of it anonymous memory: what the process alone is to blame for.
    pub anon_kib: u64,
    /// … of it shared memory: the part of the guest's memory that it has touched.
    pub shmem_kib: u64,
    /// Proportional share; 0 where /proc/PID/smaps_rollup cannot be read.
    pub pss_kib: u64,
}

/// A process under observation.
#[derive(Clone, Copy, Debug)]
pub struct Server {
    /// Its process id.
    pub pid: i32,
}

impl Server {
    /// `None` if there is no such process to be seen.
    pub fn new(pid: i32) -> Option<Self> {
        (pid > 0 && fs::exists(format!("/proc/{pid}/stat")).unwrap_or(false))
            .then_some(Self { pid })
    }

    fn path(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.pid).into()
    }

    /// Name of its program.
    pub fn name(&self) -> String {
        fs::read_to_string(self.path("comm")).unwrap_or_default().trim_end().to_owned()
    }

    /// CPU time so far, and memory. What cannot be read (the process has gone) is 0.
    pub fn sample(&self) -> Sample {
        let threads = fs::read_dir(self.path("task")).into_iter().flatten().flatten();
        let run_time = |tid: i32| -> Option<(i32, u64)> {
            let text = fs::read_to_string(self.path(&format!("task/{tid}/schedstat"))).ok()?;
            Some((tid, text.split(' ').next()?.parse().ok()?))
        };
        let threads_ns = threads
            .filter_map(|entry| run_time(entry.file_name().to_str()?.parse().ok()?))
            .collect();
        Sample { threads_ns, ticks: self.ticks().unwrap_or(0), memory: self.memory() }
    }

    fn ticks(&self) -> Option<u64> {
        let stat = fs::read_to_string(self.path("stat")).ok()?;
        // Fields 14 and 15; the name in parentheses may hold spaces.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    }

    /// Resident memory now.
    pub fn memory(&self) -> Memory {
        let status = fs::read_to_string(self.path("status")).unwrap_or_default();
        let smaps = fs::read_to_string(self.path("smaps_rollup")).unwrap_or_default();
        Memory {
            rss_kib: kib(&status, "VmRSS:"),
            anon_kib: kib(&status, "RssAnon:"),
            shmem_kib: kib(&status, "RssShmem:"),
            pss_kib: kib(&smaps, "Pss:"),
        }
    }
}

fn kib(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// CPU time between two samples.
///
/// The scheduler's figures are exact, but a thread that has ended takes its own with it; then the
/// ticks of the process (10 ms) are more, and are taken.
pub fn cpu_between(before: &Sample, after: &Sample) -> Duration {
    let exact: u64 = after
        .threads_ns
        .iter()
        .map(|(tid, ns)| ns.saturating_sub(before.threads_ns.get(tid).copied().unwrap_or(0)))
        .sum();
    // SAFETY: sysconf has no preconditions.
    let per_second =
        u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
    let tick_ns = 1_000_000_000 / per_second;
    let ticks = after.ticks.saturating_sub(before.ticks);
    // Two ticks for what is rounded at either end.
    if ticks.saturating_sub(2) * tick_ns > exact + exact / 4 {
        return Duration::from_nanos(ticks * tick_ns);
    }
    Duration::from_nanos(exact)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen_to_work() {
        let server = Server::new(i32::try_from(std::process::id()).unwrap()).unwrap();
        let before = server.sample();
        assert!(before.memory.rss_kib > 0);
        let mut work = 0_u64;
        while cpu_between(&before, &server.sample()) < Duration::from_millis(5) {
            work = std::hint::black_box(work.wrapping_add(1));
        }
    }

    #[test]
    fn a_thread_that_has_ended_is_not_lost() {
        let sample = |ns: &[(i32, u64)], ticks| Sample {
            threads_ns: ns.iter().copied().collect(),
            ticks,
            memory: Memory::default(),
        };
        let before = sample(&[(1, 1000), (2, 5000)], 10);
        assert_eq!(
            cpu_between(&before, &sample(&[(1, 4000), (2, 6000)], 11)),
            Duration::from_nanos(4000)
        );
        assert_eq!(cpu_between(&before, &sample(&[(1, 2000)], 60)), Duration::from_millis(500));
    }
}
