"""Cases that are more than one load: large disks, a cold base, many daemons, space, opening."""

import contextlib
import dataclasses
import os
import re
import subprocess
import time

from . import servers
from .cases import READS_BASE, Aim, describe

TIB = 1 << 40
# Scattered writes of 4 KiB before a 1 TiB overlay is opened: 1 GiB, or with --full 1 % of the disk.
SCATTERED = (1 << 30) // 4096
SCATTERED_FULL = TIB // 100 // 4096
# The memory case: 1 GiB in writes of 4 KiB on a disk of 100 GiB.
MEMORY_DISK, MEMORY_WRITES = 100 << 30, (1 << 30) // 4096
# A flush of all that takes its time.
PATIENCE = "--stall-after=600s"
# Why some cases keep their images in memory: what scattered writes cost on a disk is mostly the host's file system. ext4
# took 100 s to sync 1 GiB in 262,144 extents all over a sparse file of 1 TiB, and, mounted with discard, 5 minutes to
# remove it.
IN_MEMORY = "The images are in memory (tmpfs), so that the daemon's share is seen."
# Writes of the space case.
SPACE_WRITES = 10_000


@dataclasses.dataclass(frozen=True)
class Special:
    """A case whose `measure` gives the figures of one server in one round."""

    name: str
    title: str
    about: str
    metrics: tuple
    measure: object
    aims: tuple = ()
    only: tuple = ("ours", "qcow2", "sub")

    @property
    def primary(self):
        return self.metrics[0][0]

    def describe(self):
        return describe(self, self.metrics)

    def run(self, context, server):
        return {"values": self.measure(context, server)}


def timed_start(context, server, directory, base):
    """Starts a server; gives it and the milliseconds until its first answer to a request."""
    started = time.monotonic()
    running = server.start(context.tools, directory, base)
    try:
        context.bench(running, ["--count=1"])
    except BaseException:
        running.kill()
        raise
    return running, (time.monotonic() - started) * 1000


def idle(context, server):
    """Memory of a daemon that has a frontend and no load; and how long a start takes."""
    directory = context.fresh_directory()
    server.create(context.tools, directory, context.base, context.size)
    running = server.start(context.tools, directory, context.base)
    try:
        memory = context.info(running)["memory"]
        running.stop()
        running, start_ms = timed_start(context, server, directory, context.base)
        running.stop()
    finally:
        running.kill()
    values = {key: memory[f"{key}_kib"] / 1024 for key in ("rss", "anon", "pss")}
    return {**values, "start": start_ms}


def sparse_base(context, size):
    """A base without data, shared by the rounds."""
    base = context.scratch / f"base-{size >> 30}G"
    if not base.exists():
        servers.sparse(base, size)
    return base


def memory(context, server):
    """Memory with 1 GiB of scattered writes on a disk of 100 GiB."""
    base = sparse_base(context, MEMORY_DISK)
    directory = context.fresh_directory(scratch=True)
    server.create(context.tools, directory, base, MEMORY_DISK)
    running = server.start(context.tools, directory, base)
    try:
        context.bench(running, ["--ops=write", "--depth=32", f"--count={MEMORY_WRITES}", "--seed=1"])
        after = running.memory()
    finally:
        running.kill()
    return {"rss": after["rss"], "anon": after["anon"]}


def large_disk(context, server):
    """A disk of 1 TiB: start, reads of holes, scattered first writes, memory."""
    base = sparse_base(context, TIB)
    directory = context.fresh_directory(scratch=True)
    server.create(context.tools, directory, base, TIB)
    running, start_ms = timed_start(context, server, directory, base)
    try:
        rss_open = running.memory()["rss"]
        limit = f"--runtime={context.seconds}s"
        reads = context.bench(running, ["--depth=32", limit])
        writes = context.bench(running, ["--ops=write", "--depth=32", limit])
        rss_after = running.memory()["rss"]
    finally:
        running.kill()
    return {
        "write_iops": writes["iops"],
        "read_iops": reads["iops"],
        "start": start_ms,
        "rss_open": rss_open,
        # What the run's writes added to the memory, for each of them: the write speeds differ.
        "bytes_per_write": max(0, rss_after - rss_open) * (1 << 20) / max(1, writes["requests"]),
    }


def forget(path):
    """Drops a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def cold_base(context, server):
    """Reads of a base that is not in the page cache."""
    directory = context.fresh_directory()
    if server.name not in READS_BASE:
        server.create(context.tools, directory, context.base, context.size)
    values = {}
    loads = {
        "random": ["--depth=32"],
        "sequential": ["--depth=4", "--pattern=sequential", "--block-size=128k"],
        "one": ["--depth=1", "--pattern=sequential", "--block-size=64k"],
        "large": ["--depth=8", "--pattern=sequential", "--block-size=1M"],
    }
    for name, load in loads.items():
        forget(context.base)
        running = server.start(context.tools, directory, context.base)
        try:
            # --once: a second visit would be warm.
            report = context.bench(running, [*load, "--once", f"--runtime={context.seconds}s"])
        finally:
            running.kill()
        values[name] = report["iops"] if name == "random" else report["bytes_per_s"] / 1e6
        values[f"{name}_cpu"] = report["server"]["cpu_us_per_io"]
    context.warm_base()
    return values


def page_cache_bytes(paths):
    """What the page cache holds of files."""
    argv = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, paths)]
    return sum(map(int, subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()))


def fleet(context, server):
    """Many daemons on one base: start, memory in total, and whether the page cache holds the base once."""
    count, read_mib = context.fleet, 64
    directories = [context.fresh_directory(f"fleet-{number}") for number in range(count)]
    for directory in directories:
        server.create(context.tools, directory, context.base, context.size)
    forget(context.base)
    running = []
    try:
        started = time.monotonic()
        for directory in directories:
            running.append(server.start(context.tools, directory, context.base))
        for each in running:
            context.info(each)
        start_ms = (time.monotonic() - started) * 1000
        idle_pss = sum(each.memory()["pss"] for each in running)
        for each in running:
            read = ["--pattern=sequential", "--block-size=1M", "--once", f"--region={read_mib}M"]
            context.bench(each, read)
        files = [context.base, *(server.image(directory) for directory in directories)]
        cached = page_cache_bytes(files)
        pss = sum(each.memory()["pss"] for each in running)
        for each in running:
            each.stop()
    finally:
        for each in running:
            each.kill()
        for directory in directories:
            servers.remove_tree(directory)
    context.warm_base()
    return {"pss": idle_pss / count, "pss_after": pss / count, "cached": cached / (read_mib << 20), "start": start_ms / count}


def space(context, server):
    """The same random writes into every format: what they take on the disk, and what was written for them."""
    directory = context.fresh_directory()
    server.create(context.tools, directory, context.base, context.size)
    running = server.start(context.tools, directory, context.base)
    try:
        load = ["--ops=write", "--once", "--depth=32", f"--count={SPACE_WRITES}", f"--flush-every={SPACE_WRITES}"]
        context.bench(running, [*load, "--seed=1"])
        written = running.io("write_bytes")
        running.stop()
    finally:
        running.kill()
    payload = SPACE_WRITES * 4096
    return {"disk": servers.allocated_bytes(server.image(directory)) / payload, "written": written / payload}


def opening(context, server):
    """Opening a 1 TiB overlay with scattered writes, after a clean end and after SIGKILL."""
    base = sparse_base(context, TIB)
    directory = context.fresh_directory(scratch=True)
    server.create(context.tools, directory, base, TIB)
    count = SCATTERED_FULL if context.full else SCATTERED
    running = server.start(context.tools, directory, base)
    values = {}
    try:
        load = ["--ops=write", "--depth=64", f"--count={count}", f"--flush-every={count}", "--seed=1"]
        context.bench(running, [*load, PATIENCE])
        values["rss_written"] = running.memory()["rss"]
        running.stop()
        running, values["clean"] = timed_start(context, server, directory, base)
        values["rss"] = running.memory()["rss"]
        context.bench(running, ["--ops=write", "--depth=64", "--count=10000", "--seed=2"])
        running.kill()
        running, values["killed"] = timed_start(context, server, directory, base)
        running.stop()
    finally:
        running.kill()
    values["disk"] = servers.allocated_bytes(server.image(directory)) / (count * 4096)
    return values


@contextlib.contextmanager
def under_load(context, running):
    """Random writes, for as long as the body takes and the daemon lives."""
    argv = [context.tools.bench, "run", f"--socket-path={running.socket}", "--ops=write", "--depth=32", "--runtime=60s"]
    load = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(context.seconds / 2)
        yield
    finally:
        load.kill()
        load.wait()


@contextlib.contextmanager
def serving_under_load(context, server, *more):
    """A daemon, started with further arguments, and random writes for as long as the body takes."""
    directory = context.fresh_directory()
    server.create(context.tools, directory, context.base, context.size)
    running = server.start(context.tools, directory, context.base, more=[arg.format(directory) for arg in more])
    try:
        with under_load(context, running):
            yield running
    finally:
        running.kill()


def recovery(context, server):
    """From SIGKILL, under a load of writes, to the first request that the next daemon has completed."""
    with serving_under_load(context, server) as first:
        killed = time.monotonic()
        # Returns when the process is gone, as a supervisor would notice. What the kernel still does for it is not over.
        first.kill()
        second, _ = timed_start(context, server, first.directory, context.base)
        recovered = time.monotonic()
        second.kill()
    return {"recovery": (recovered - killed) * 1000}


def upgrade(context, server):
    """How long the guest waits while the daemon goes on as another program."""
    with serving_under_load(context, server, "--control={}/control") as running:
        told = context.tools.run([context.tools.daemon, "upgrade", f"--control={running.directory}/control"])
    return {"pause": float(re.search(r"([0-9.]+) ms", told).group(1))}


SPECIALS = [
    Special(
        "idle", "Idle", "A daemon with a frontend and no load; the time from its start to its first answer.",
        (
            ("rss", "memory (RSS)", "MiB", "less"),
            ("anon", "of it anonymous", "MiB", "less"),
            ("pss", "proportional share (PSS)", "MiB", "less"),
            ("start", "start to first answer", "ms", "less"),
        ),
        idle, (Aim("rss", 1, at_most=4),), only=("ours", "ours-raw", "raw", "qcow2", "sub", "chain"),
    ),
    Special(
        "disk-1t", "A sparse disk of 1 TiB", f"4 KiB at depth 32 all over the disk, over an empty sparse base. {IN_MEMORY}",
        (
            ("write_iops", "first writes", "IOPS", "more"),
            ("read_iops", "reads of holes", "IOPS", "more"),
            ("start", "start to first answer", "ms", "less"),
            ("rss_open", "memory when opened", "MiB", "less"),
            ("bytes_per_write", "memory per scattered write", "bytes", "less"),
        ),
        large_disk, (Aim("write_iops", 1, "qcow2"), Aim("read_iops", 1, "qcow2"), Aim("start", 1, "qcow2")),
    ),
    Special(
        "memory-100g", "Memory for scattered writes", f"1 GiB of random 4 KiB writes on a sparse disk of 100 GiB. {IN_MEMORY}",
        (("rss", "memory (RSS) after the writes", "MiB", "less"), ("anon", "of it anonymous", "MiB", "less")),
        memory, (Aim("rss", 1, at_most=16),), only=("ours", "ours-uml", "sub"),
    ),
    Special(
        "cold", "A base that is not in the page cache", "Each block once, so that none is read twice.",
        (
            ("random", "random 4 KiB, depth 32", "IOPS", "more"),
            ("sequential", "sequential 128 KiB, depth 4", "MB/s", "more"),
            ("one", "sequential 64 KiB, depth 1", "MB/s", "more"),
            ("large", "sequential 1 MiB, depth 8", "MB/s", "more"),
            ("random_cpu", "server CPU per random read", "µs", "less"),
            ("sequential_cpu", "server CPU per sequential read", "µs", "less"),
        ),
        cold_base, tuple(Aim(metric, 1, "qcow2") for metric in ("random", "sequential", "one", "large")), only=("ours", "ours-raw", "raw", "raw-direct", "qcow2", "sub"),
    ),
    Special(
        "fleet", "Many daemons on one base", "Per daemon; then each reads the same 64 MiB of the base.",
        (
            ("pss", "memory (PSS) when started", "MiB", "less"),
            ("pss_after", "memory (PSS) after the reads", "MiB", "less"),
            ("cached", "times that the page cache holds what is read", "×", "less"),
            ("start", "start to first answer, each", "ms", "less"),
        ),
        fleet, (Aim("pss", 1, "qcow2"), Aim("cached", 1, at_most=1.5)),
    ),
    Special(
        "space", "Space and write amplification", f"{SPACE_WRITES} random first writes of 4 KiB and a flush; 1 is ideal.",
        (
            ("disk", "disk space per byte written", "×", "less"),
            ("written", "bytes sent to the file system per byte written", "×", "less"),
        ),
        space, (Aim("disk", 1, "sub"), Aim("written", 1, "sub")), only=("ours", "ours-uml", "ours-direct", "qcow2", "sub"),
    ),
    Special(
        "open-1t", "Opening a 1 TiB overlay with scattered writes",
        f"1 GiB of random 4 KiB writes (with --full 1 % of the disk); from start to first answer. {IN_MEMORY}",
        (
            ("clean", "after a clean end", "ms", "less"),
            ("killed", "after SIGKILL with unflushed writes", "ms", "less"),
            ("rss", "memory after opening", "MiB", "less"),
            ("rss_written", "memory after the writes", "MiB", "less"),
            ("disk", "disk space per byte written", "×", "less"),
        ),
        opening, (Aim("clean", 1, "sub"), Aim("killed", 1, "sub")), only=("ours", "sub"),
    ),
    Special(
        "recovery", "Recovery from SIGKILL",
        "A daemon is killed under random writes; until the next one, started at once, has completed a request. Ours goes on "
        "with every acknowledged write; a peer without those that were not flushed, and without its guest.",
        (("recovery", "from SIGKILL to the first answer", "ms", "less"),),
        recovery, only=("ours", "ours-uml", "ours-direct", "raw", "qcow2", "sub"),
    ),
    Special(
        "upgrade", "Upgrade of a running daemon", "Under random writes; the guest keeps its connection.",
        (("pause", "pause that the guest sees", "ms", "less"),), upgrade, only=("ours", "ours-uml", "ours-direct"),
    ),
]
