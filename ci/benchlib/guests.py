"""fio inside real guests: the same jobs over this daemon, over qemu-storage-daemon, and over UML's own driver."""

import contextlib

from . import servers
from .cases import Aim
from .special import Special

# The jobs: name, fio's options, the field of fio's terse output (version 3, counted from 1) that is the figure, and by
# what it is divided. The first half of the disk is for the writes that are not flushed, the second for those that are.
JOBS = (
    ("read_d32", "--rw=randread --bs=4k --ioengine=libaio --iodepth=32", 8, 1),
    ("read_d1", "--rw=randread --bs=4k --ioengine=psync", 8, 1),
    ("read_1m", "--rw=read --bs=1M --ioengine=libaio --iodepth=4", 7, 1000),
    ("write_d32", "--rw=randwrite --bs=4k --ioengine=libaio --iodepth=32 --size=50%", 49, 1),
    ("rewrite_d32", "--rw=randwrite --bs=4k --ioengine=libaio --iodepth=32 --size=32M --io_size=1T", 49, 1),
    ("write_fsync", "--rw=randwrite --bs=4k --ioengine=psync --fsync=1 --offset=50%", 49, 1),
)
METRICS = (
    ("read_d32", "random reads, depth 32", "IOPS", "more"),
    ("read_d1", "random reads, depth 1", "IOPS", "more"),
    ("read_1m", "1 MiB reads, depth 4", "MB/s", "more"),
    ("write_d32", "first writes, depth 32", "IOPS", "more"),
    ("rewrite_d32", "rewrites, depth 32", "IOPS", "more"),
    ("write_fsync", "first writes with fsync", "IOPS", "more"),
)
# None may be slower than over qcow2.
AIMS = tuple(Aim(key, 1, "qcow2") for key, *_ in METRICS)


def script(disk, seconds):
    """What the guest runs. A job that fails ends it, and with it the measurement."""
    # qemu-storage-daemon says that its cache is written through, and so is never told to sync, though it does not sync by
    # itself: an fsync would be nothing there.
    cache = f"/sys/block/{disk.removeprefix('/dev/')}/cache_type"
    lines = [f"if [ -e {cache} ]; then echo 'write back' >{cache}; fi"]
    for name, options, field, divisor in JOBS:
        lines.append(
            f"fio --name={name} --filename={disk} --direct=1 --time_based --runtime={seconds} --ramp_time=0.5 "
            f"--output-format=terse --terse-version=3 {options} >/tmp/{name}"
        )
        # What this job leaves unwritten is not for the next one to write.
        lines.append(f"fsync {disk}")
        lines.append(f"result {name} $(tail -n 1 /tmp/{name} | awk -F';' '{{print ${field} / {divisor}}}')")
    return "\n".join(lines) + "\n"


def fio(kernel):
    """Measures all jobs in one boot of a guest."""

    def measure(context, server):
        directory = context.fresh_directory()
        with disk_of(context, server, directory) as disk:
            device = "/dev/ubda" if server.name == "ubd" else "/dev/vda"
            text = directory / "script"
            text.write_text(script(device, context.seconds))
            console = context.tools.run([context.tools.guest, kernel, disk, text])
        found = dict(line[2:].split("=", 1) for line in console.splitlines() if line.startswith("@@"))
        return {key: float(found[key]) for key, *_ in METRICS}

    return measure


@contextlib.contextmanager
def disk_of(context, server, directory):
    """What the guest is attached to: a daemon's socket, or the files themselves."""
    if server.name == "ubd":
        yield f"{server.image(directory)},{context.base}"
        return
    server.create(context.tools, directory, context.base, context.size)
    running = server.start(context.tools, directory, context.base, queues=1)
    try:
        yield running.socket
    finally:
        running.kill()


class Ubd(servers.Server):
    """UML's own driver: the guest's kernel does it all, there is no daemon."""

    def __init__(self):
        super().__init__("ubd", "UML's ubd", "peer", "ubd0=COW,BASE in the guest's own kernel")


ABOUT = "fio with direct I/O in a guest with one CPU and one queue; the kernel runs "
PEERS = ("ours", "ours-sleep", "ours-uml", "raw", "qcow2", "qcow2-poll", "sub")

GUESTS = [
    Special(
        "guest-qemu", "fio in a QEMU guest", ABOUT + "under TCG where there is no KVM: then the guest is most of the time.",
        METRICS, fio("qemu"), AIMS, only=PEERS,
    ),
    Special("guest-uml", "fio in a UML guest", ABOUT + "as a process of the host.", METRICS, fio("uml"), AIMS, only=(*PEERS, "ubd")),
]
