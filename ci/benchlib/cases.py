"""The cases of docs/performance/results.md's table: one load each, run by blk-bench against every server."""

import dataclasses
import json

# What every load case measures: key, label, unit, which way is better, and where blk-bench's report has it.
LOAD_METRICS = {
    "iops": ("throughput", "IOPS", "more"),
    "gb_s": ("throughput", "GB/s", "more"),
    "p50": ("latency, median", "µs", "less"),
    "p99": ("latency, 99th percentile", "µs", "less"),
    "cpu": ("server CPU per request", "µs", "less"),
    # Not RSS: pages of a mapped image are the page cache's, and go when the host wants them.
    "anon": ("server memory of its own after the run", "MiB", "less"),
}


@dataclasses.dataclass(frozen=True)
class Aim:
    """How much better than a peer ours shall be; `peer` None: than the best of them. Or an absolute limit."""

    metric: str
    factor: float
    peer: str | None = None
    at_most: float | None = None
    server: str = "ours"

    def as_dict(self):
        return dataclasses.asdict(self)


def describe(case, metrics, **more):
    """What the report says of a case before its figures; a metric is key, label, unit, and which way is better."""
    return {
        "name": case.name,
        "title": case.title,
        "about": case.about,
        "primary": case.primary,
        "metrics": [dict(zip(("key", "label", "unit", "better"), metric)) for metric in metrics],
        "aims": [aim.as_dict() for aim in case.aims],
        **more,
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """One load."""

    name: str
    title: str
    about: str
    args: tuple
    primary: str
    op: str
    aims: tuple = ()
    queues: int = 1
    # A load put on before, not measured: args for blk-bench.
    prefill: tuple = ()
    # Ends by itself after touching everything once, or after the time, whichever is first.
    once: bool = False
    writes: bool = False

    @property
    def metrics(self):
        keys = [self.primary] + [key for key in ("p50", "p99", "cpu", "anon") if key != self.primary]
        if self.primary == "p50":
            keys.insert(1, "iops")
        return keys

    def describe(self):
        metrics = [(key, *LOAD_METRICS[key]) for key in self.metrics]
        return describe(self, metrics, command="blk-bench run " + " ".join(self.args))

    def run(self, context, server):
        """One run on a fresh image; gives the figures."""
        directory = context.fresh_directory()
        if self.writes or server.name not in READS_BASE:
            server.create(context.tools, directory, context.base, context.size)
        running = server.start(context.tools, directory, context.base)
        try:
            if self.prefill:
                context.bench(running, [*self.prefill])
            seconds = context.seconds
            time_args = [f"--runtime={seconds}s"] + ([] if self.once else ["--warmup=300ms"])
            report = context.bench(running, [*self.args, *time_args])
        finally:
            # Not stopped: the flush at the end is not measured, and what it would write is about to be removed.
            running.kill()
        return {"values": self.values(report), "report": report}

    def values(self, report):
        op = next(entry for entry in report["ops"] if entry["op"] == self.op)
        # Of a mix or of write and flush, the throughput is what the whole run did, or the named operation's alone.
        iops = report["iops"] if self.name.startswith("mixed") else op["iops"]
        server = report["server"]
        return {
            "iops": iops,
            "gb_s": op["bytes_per_s"] / 1e9,
            "p50": op["latency_us"]["p50"],
            "p99": op["latency_us"]["p99"],
            "cpu": server["cpu_s"] * 1e6 / max(1, sum(entry["requests"] for entry in report["ops"])),
            "anon": server["memory_after"]["anon_kib"] / 1024,
        }


# They need no image of their own for a load that only reads.
READS_BASE = {"raw", "raw-direct", "ours-raw"}
REWRITTEN = "--region=256M"
PREFILL = ("--ops=write", "--pattern=sequential", "--block-size=1M", "--depth=8", "--once", REWRITTEN, "--runtime=60s")


def read(depth, *more):
    return (f"--depth={depth}", *more)


CASES = [
    Case(
        "read-d32", "Random reads of the base, depth 32",
        "4 KiB, base in the page cache; the client sleeps on its eventfd, as a guest's interrupt would wake it.",
        read(32), "iops", "read",
        (Aim("iops", 3.5, "qcow2"), Aim("cpu", 4, "qcow2"), Aim("iops", 3.5, "chain", server="ours-chain")),
    ),
    Case(
        "read-d32-poll", "Random reads of the base, depth 32, polling client",
        "4 KiB, base in the page cache; the client looks at the used ring all the time.",
        read(32, "--completion=poll"), "iops", "read", (Aim("iops", 8, "qcow2"), Aim("cpu", 8, "qcow2")),
    ),
    Case(
        "read-d1", "Random reads of the base, depth 1",
        "4 KiB, base in the page cache; one request at a time, the client sleeps on its eventfd.",
        read(1), "p50", "read", (Aim("p50", 3, "qcow2"),),
    ),
    Case(
        "read-d1-poll", "Random reads of the base, depth 1, polling client",
        "4 KiB, base in the page cache; one request at a time, nobody sleeps.",
        read(1, "--completion=poll"), "p50", "read", (Aim("p50", 3, "qcow2"),),
    ),
    Case(
        "read-2q", "Random reads of the base, 2 queues, depth 32 each",
        "4 KiB, base in the page cache; on 2 CPUs four busy threads share them.",
        read(32, "--queues=2"), "iops", "read", (Aim("iops", 4, "qcow2"),), queues=2,
    ),
    Case(
        "read-1m", "Large reads of the base, depth 8",
        "1 MiB, sequential, base in the page cache.",
        ("--depth=8", "--block-size=1M", "--pattern=sequential"), "gb_s", "read", (Aim("gb_s", 1.2),),
    ),
    Case(
        "write-d32", "First writes, depth 32",
        "4 KiB, random, each block once, into a fresh overlay (the raw ones: into a sparse file).",
        ("--ops=write", "--once", "--depth=32"), "iops", "write",
        (Aim("iops", 2, "sub"), Aim("iops", 10, "qcow2")), once=True, writes=True,
    ),
    Case(
        "write-d1", "First writes, depth 1",
        "4 KiB, random, each block once, one at a time.",
        ("--ops=write", "--once", "--depth=1"), "p50", "write", (Aim("p50", 4, "sub"),), once=True, writes=True,
    ),
    Case(
        "write-d1-poll", "First writes, depth 1, polling client",
        "4 KiB, random, each block once, one at a time, nobody sleeps.",
        ("--ops=write", "--once", "--depth=1", "--completion=poll"), "p50", "write", (Aim("p50", 4, "sub"),), once=True, writes=True,
    ),
    Case(
        "rewrite-d32", "Rewrites, depth 32",
        "4 KiB, random, in 256 MiB that were written before.",
        ("--ops=write", "--depth=32", REWRITTEN), "iops", "write", (Aim("iops", 1, "raw"),),
        prefill=PREFILL, writes=True,
    ),
    Case(
        "write-flush", "First writes, each followed by a flush",
        "4 KiB, random, each block once, one at a time; IOPS are writes.",
        ("--ops=write", "--once", "--depth=1", "--flush-every=1"), "iops", "write",
        (Aim("iops", 2, "qcow2"),), once=True, writes=True,
    ),
    Case(
        "write-flush-8", "First writes, a flush after every eighth, depth 8",
        "4 KiB, random, each block once, as a guest's file system commits; IOPS are writes.",
        ("--ops=write", "--once", "--depth=8", "--flush-every=8"), "iops", "write",
        (Aim("iops", 1, "qcow2"),), once=True, writes=True,
    ),
    Case(
        "rewrite-flush", "Rewrites, each followed by a flush",
        "4 KiB, random, in 256 MiB that were written before; IOPS are writes.",
        ("--ops=write", "--depth=1", "--flush-every=1", REWRITTEN), "iops", "write",
        (Aim("iops", 1, "raw"),), prefill=PREFILL, writes=True,
    ),
    Case(
        "mixed-d32", "Mixed, 70 % reads and 30 % writes, depth 32",
        "4 KiB, random, over a fresh overlay; IOPS are both together, latencies the reads'.",
        ("--ops=read:70,write:30", "--depth=32"), "iops", "read", (Aim("iops", 2, "sub"),), writes=True,
    ),
]


def parse_report(text):
    """blk-bench's JSON, without what is the same in every run."""
    report = json.loads(text)
    report.pop("target", None)
    return report
