"""What is measured: this project's daemon and qemu-storage-daemon, each in several configurations.

A server makes a fresh image for every run, serves it on a socket, and is stopped after it.
"""

import os
import pathlib
import signal
import subprocess
import time

# How long a daemon may take to listen, and to end after SIGTERM.
START_SECONDS_MAX = 30
STOP_SECONDS_MAX = 60
# Overlays in the configuration with a chain, and scattered 4 KiB writes in each of them.
CHAIN_DEPTH = 8
CHAIN_WRITES = 1000


class ServerFailed(Exception):
    """A daemon or a tool ended in a way that makes the run worthless."""


class Tools:
    """Where the programs are."""

    def __init__(self, target):
        self.daemon = target / "vhost-user-blk"
        self.bench = target / "blk-bench"
        self.cow = target / "cow"
        self.guest = target / "examples" / "guest"

    def run(self, argv):
        """Runs a program to its end; gives what it printed."""
        done = subprocess.run([str(arg) for arg in argv], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ServerFailed(f"{' '.join(map(str, argv))}: {done.stderr.strip() or done.returncode}")
        return done.stdout


class Server:
    """A configuration of a daemon. Subclasses say how to make an image and how to serve it."""

    def __init__(self, name, label, group, detail):
        self.name, self.label, self.group, self.detail = name, label, group, detail

    def create(self, tools, directory, base, size):
        """Makes the image to be served in `directory`, over `base` (a raw file of `size` bytes)."""
        raise NotImplementedError

    def argv(self, tools, directory, base, socket, queues):
        """The command that serves it."""
        raise NotImplementedError

    def image(self, directory):
        """The file that is written to."""
        return directory / "top"

    def start(self, tools, directory, base, queues=2, more=()):
        """Starts it in `directory`, with further arguments."""
        argv = self.argv(tools, directory, base, directory / "socket", queues)
        return Running(self, [*argv, *more], directory)


class Running:
    """A daemon that listens."""

    def __init__(self, server, argv, directory):
        self.server, self.directory, self.socket = server, directory, directory / "socket"
        self.log = directory / "log"
        started = time.monotonic()
        while not self.try_start([str(arg) for arg in argv]):
            # A daemon that was killed holds its locks until the kernel has torn down its rings.
            text = self.log.read_text(errors="replace")
            if "lock" not in text or time.monotonic() - started > START_SECONDS_MAX:
                raise ServerFailed(f"{server.name} did not start: {text[-500:]}")
            time.sleep(0.005)

    def try_start(self, argv):
        """Starts the process and waits for its socket; false if it ended."""
        self.socket.unlink(missing_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        started = time.monotonic()
        while not self.socket.exists():
            if self.process.poll() is not None:
                return False
            if time.monotonic() - started > START_SECONDS_MAX:
                self.kill()
                raise ServerFailed(f"{self.server.name} does not listen after {START_SECONDS_MAX} s")
            time.sleep(0.0005)
        return True

    @property
    def pid(self):
        return self.process.pid

    def stop(self):
        """SIGTERM: the daemon flushes and ends."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerFailed(f"{self.server.name} did not end after SIGTERM") from None

    def kill(self):
        """SIGKILL: as if it had crashed."""
        self.process.kill()
        self.process.wait()

    def io(self, field):
        """A counter of /proc/PID/io."""
        for line in pathlib.Path(f"/proc/{self.pid}/io").read_text().splitlines():
            name, value = line.split(": ")
            if name == field:
                return int(value)
        return 0

    def memory(self):
        """Resident memory in MiB: all of it, the anonymous part, and the proportional share."""
        fields = {}
        for source in ("status", "smaps_rollup"):
            for line in pathlib.Path(f"/proc/{self.pid}/{source}").read_text().splitlines():
                parts = line.split()
                if len(parts) >= 2 and parts[0].endswith(":") and parts[1].isdigit():
                    fields.setdefault(parts[0][:-1], int(parts[1]) / 1024)
        return {"rss": fields["VmRSS"], "anon": fields["RssAnon"], "pss": fields["Pss"]}


class Ours(Server):
    """This project's daemon over a COW file."""

    def __init__(self, name, label, detail, options=(), image_format="native"):
        super().__init__(name, label, "ours", detail)
        self.options, self.format = list(options), image_format

    def create(self, tools, directory, base, size):
        # The daemon makes the file when it starts over a base without one.
        disk = f"{self.image(directory)},{base}"
        argv = [tools.daemon, f"--socket-path={directory / 'socket'}", f"--format={self.format}", disk]
        running = Running(self, argv, directory)
        try:
            running.stop()
        finally:
            running.kill()

    def argv(self, tools, directory, base, socket, queues):
        argv = [tools.daemon, f"--socket-path={socket}", f"--num-queues={queues}", "--log-level=error"]
        return argv + self.options + [below(base), self.image(directory)]


def below(base):
    """Lets the header of a COW file name the base, and what is kept beside it."""
    return f"--backing-dir={base.parent}"


class OursChain(Ours):
    """This project's daemon over frozen layers with scattered writes."""

    def create(self, tools, directory, base, size):
        last = self.prepared(tools, directory, base, size)
        tools.run([tools.cow, "create", "--quiet", below(base), "-b", last, "-F", "native", self.image(directory)])

    def prepared(self, tools, directory, base, size):
        """All layers but the top one, made once and kept beside the runs' directories; gives the last."""
        kept = directory.parent / f"chain-{self.name}-{size}"
        layers = [kept / f"{depth}.cow" for depth in range(1, CHAIN_DEPTH + 1)]
        # The last of these only makes the one before it frozen.
        if layers[-1].exists():
            return layers[-2]
        remove_tree(kept)
        kept.mkdir()
        tools.run([tools.cow, "create", "--quiet", "-b", base, "-F", "raw", layers[0]])
        for seed, (layer, above) in enumerate(zip(layers, layers[1:]), start=1):
            argv = [tools.daemon, f"--socket-path={kept / 'socket'}", below(base), layer]
            scatter(self, tools, argv, kept, seed)
            tools.run([tools.cow, "snapshot", "--quiet", below(base), layer, above])
        return layers[-2]


class OursRaw(Server):
    """This project's daemon over a raw file: sparse where it is written to, the base where it is only read."""

    def __init__(self, name, label, detail):
        super().__init__(name, label, "ours", detail)

    def create(self, tools, directory, base, size):
        sparse(self.image(directory), size)

    def argv(self, tools, directory, base, socket, queues):
        image = raw_image(self, directory, base)
        argv = [tools.daemon, f"--socket-path={socket}", f"--num-queues={queues}", "--log-level=error"]
        argv += [f"--blk-file={image}", "--format=raw"]
        return argv + (["--read-only"] if image == base else [])


class Qsd(Server):
    """qemu-storage-daemon with an iothread and io_uring, which is its best."""

    def __init__(self, name, label, detail, image_format="qcow2", create=(), direct=False, chain=False, iothread=()):
        super().__init__(name, label, "peer", detail)
        self.format, self.create_options, self.direct, self.chain = image_format, create, direct, chain
        self.iothread = ",".join(("iothread,id=io0", *iothread))

    def create(self, tools, directory, base, size):
        if self.format == "raw":
            sparse(self.image(directory), size)
            return
        below = prepared_chain(self, tools, directory, base, size) if self.chain else base
        self.layer(tools, self.image(directory), below, size)

    def layer(self, tools, path, below, size):
        options = ",".join(("preallocation=off", *self.create_options))
        below_format = "qcow2" if below.suffix == ".layer" else "raw"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F", below_format]
        tools.run([*argv, path, str(size)])

    def argv(self, tools, directory, base, socket, queues):
        image = raw_image(self, directory, base) if self.format == "raw" else self.image(directory)
        return self.command(image, socket, queues, image != base)

    def command(self, image, socket, queues, writable):
        cache = "cache.direct=on" if self.direct else "cache.direct=off"
        read_only = "off" if writable else "on"
        file = f"driver=file,node-name=file,filename={image},aio=io_uring,{cache},discard=unmap"
        disk = f"driver={self.format},node-name=disk,file=file,{cache},discard=unmap"
        export = f"type=vhost-user-blk,id=export,addr.type=unix,addr.path={socket},node-name=disk"
        export += f",writable={'on' if writable else 'off'},num-queues={queues},iothread=io0"
        argv = ["qemu-storage-daemon", "--object", self.iothread]
        argv += ["--blockdev", f"{file},read-only={read_only}", "--blockdev", f"{disk},read-only={read_only}"]
        return [*argv, "--export", export]


def raw_image(server, directory, base):
    """A raw server reads the base itself, unless the case writes."""
    return server.image(directory) if server.image(directory).exists() else base


def sparse(path, size):
    with open(path, "wb") as file:
        file.truncate(size)


def prepared_chain(server, tools, directory, base, size):
    """All overlays of a chain but the top one, made once and kept beside the runs' directories."""
    kept = directory.parent / f"chain-{server.name}-{size}"
    last = kept / f"{CHAIN_DEPTH - 1}.layer"
    if last.exists():
        return last
    remove_tree(kept)
    kept.mkdir()
    below = base
    for depth in range(1, CHAIN_DEPTH):
        layer = kept / f"{depth}.layer"
        server.layer(tools, layer, below, size)
        scatter(server, tools, server.command(layer, kept / "socket", 1, True), kept, depth)
        below = layer
    return last


def scatter(server, tools, argv, directory, seed):
    """Writes to a layer of a chain."""
    running = Running(server, argv, directory)
    try:
        fill = ["--ops=write", f"--count={CHAIN_WRITES}", "--depth=32", f"--seed={seed}"]
        tools.run([tools.bench, "run", f"--socket-path={running.socket}", *fill])
        running.stop()
    finally:
        running.kill()


def remove_tree(path):
    """Removes a directory of files, if it is there."""
    if path.exists():
        for entry in path.iterdir():
            entry.unlink()
        path.rmdir()


def allocated_bytes(path):
    """What a file really takes on the disk."""
    return os.stat(path).st_blocks * 512


SUB = ("cluster_size=128k", "extended_l2=on")

SERVERS = [
    Ours("ours", "vhost-user-blk", "native COW file over the base, both buffered: the defaults"),
    Ours("ours-direct", "vhost-user-blk, direct", "as ours, with --cow-cache=direct", ["--cow-cache=direct"]),
    Ours("ours-uml", "vhost-user-blk, UML", "as ours, in UML's format", image_format="uml"),
    Ours("ours-sleep", "vhost-user-blk, no polling", "as ours, with --poll-us=0", ["--poll-us=0"]),
    Ours("ours-open", "vhost-user-blk, no sandbox", "as ours, with --sandbox=off", ["--sandbox=off"]),
    OursChain("ours-chain", "vhost-user-blk, chain", f"as ours, {CHAIN_DEPTH} COW files deep"),
    OursRaw("ours-raw", "vhost-user-blk, raw", "a raw file without copy-on-write"),
    Qsd("raw", "QSD raw", "a raw file, buffered; sparse where it is written to", image_format="raw"),
    Qsd("raw-direct", "QSD raw direct", "as raw, with cache.direct=on", image_format="raw", direct=True),
    Qsd("qcow2", "QSD qcow2", "overlay with 64 KiB clusters, buffered"),
    Qsd("qcow2-poll", "QSD qcow2, polling", "as qcow2, its iothread polls up to 200 µs as ours does", iothread=("poll-max-ns=200000",)),
    Qsd("sub", "QSD qcow2 sub", "overlay with extended_l2: 4 KiB subclusters", create=SUB),
    Qsd("qcow2-direct", "QSD qcow2 direct", "as qcow2, with cache.direct=on", direct=True),
    Qsd("chain", "QSD qcow2 chain", f"as qcow2, {CHAIN_DEPTH} overlays deep", chain=True),
]
