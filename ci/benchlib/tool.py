"""Cases of the tool `cow`: the same work on the same content, beside qemu-img."""

import os
import random
import resource
import shutil
import subprocess
import time

from . import servers
from .cases import Aim
from .special import Special, forget

# 10 % of the disk are written, in pieces of this size.
PIECE = 64 << 10
BLOCK = 16 << 20
METRICS = (("wall", "time, output synced", "s", "less"), ("cpu", "CPU time", "s", "less"))


class Program:
    """What does the work: not a daemon, but it has its place in the report as one."""

    def __init__(self, name, label, group, detail, direct=False):
        self.name, self.label, self.group, self.detail, self.direct = name, label, group, detail, direct


PROGRAMS = [
    Program("cow", "cow", "ours", "the tool, with its defaults"),
    Program("qemu-img", "qemu-img", "peer", "with its defaults; its output is synced by the benchmark"),
    Program("qemu-direct", "qemu-img -t none", "peer", "with direct I/O: -t none for outputs, compare with -T none", direct=True),
]
NAMES = tuple(program.name for program in PROGRAMS)


def run(argv):
    done = subprocess.run([str(arg) for arg in argv], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise servers.ServerFailed(f"{' '.join(map(str, argv))}: {done.stderr.strip() or done.returncode}")


def images(context):
    """A directory with base.img, without any pattern; new.img, the same with 10 % written; both as overlay and alone, native
    and qcow2. Made once for each size."""
    directory = context.work / f"tool-{context.tool_mib}M"
    if (directory / "done").exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    base, new, block = directory / "base.img", directory / "new.img", os.urandom(BLOCK)
    blocks = context.tool_mib * (1 << 20) // BLOCK
    with open(base, "wb") as file:
        for number in range(blocks):
            # No two pieces alike, and none all zeros.
            file.write(number.to_bytes(8, "little") + block[8:])
    run(["cp", "--sparse=never", base, new])
    pieces = blocks * BLOCK // PIECE
    with open(new, "r+b") as file:
        for piece in random.Random(1).sample(range(pieces), pieces // 10):
            file.seek(piece * PIECE)
            file.write(block[:PIECE])
        os.fsync(file.fileno())
    cow, qemu = [context.tools.cow, "convert", "-f", "raw"], ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
    run([*cow, "-b", base, new, directory / "over.cow"])
    run([*cow, new, directory / "alone.cow"])
    run([*qemu, "-B", base, "-F", "raw", new, directory / "over.qcow2"])
    run([*qemu, new, directory / "alone.qcow2"])
    (directory / "done").touch()
    return directory


class Work:
    """One command of each: `ours` and `theirs` are its words, with `{over}` and `{alone}` for the images and `{out}` for what
    is made. `cold`: nothing that is read is in the page cache before."""

    def __init__(self, ours, theirs, cold=False):
        self.ours, self.theirs, self.cold = ours.split(), theirs.split(), cold

    def __call__(self, context, program):
        directory = images(context)
        out = directory / "out"
        out.unlink(missing_ok=True)
        argv = self.argv(context, program, directory, out)
        self.prepare(directory)
        os.sync()
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        run(argv)
        if out.exists():
            with open(out, "rb") as file:
                os.fsync(file.fileno())
        wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        out.unlink(missing_ok=True)
        return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}

    def argv(self, context, program, directory, out):
        ours = program.name == "cow"
        words, kind = (self.ours, "cow") if ours else (self.theirs, "qcow2")
        command = [context.tools.cow if ours else "qemu-img", words[0]]
        if program.direct:
            command += ["-T" if words[0] == "compare" else "-t", "none"]
        names = {"over": directory / f"over.{kind}", "alone": directory / f"alone.{kind}", "out": out}
        names.update(base=directory / "base.img", new=directory / "new.img")
        return command + [word.format(**names) for word in words[1:]]

    def prepare(self, directory):
        """Brings what may be read into the page cache, or out of it."""
        for path in directory.glob("*.*"):
            if self.cold:
                forget(path)
            else:
                with open(path, "rb", buffering=0) as file:
                    while file.read(8 << 20):
                        pass


def case(name, title, about, *words, only=NAMES, **options):
    aims = (Aim("wall", 1, server="cow"),)
    return Special(f"tool-{name}", f"cow: {title}", about, METRICS, Work(*words, **options), aims, only=only)


MERGE = ("merge {over} {out}", "convert -f qcow2 -O raw {over} {out}")
COMPARE = ("compare -F raw {over} {new}", "compare -f qcow2 -F raw {over} {new}")
TEN = "10 % written in pieces of 64 KiB"

TOOL_CASES = [
    case("merge", "merge to a new raw image", f"An overlay with {TEN}; all in the page cache.", *MERGE),
    case("merge-cold", "merge to a new raw image, cold", f"An overlay with {TEN}; nothing in the page cache.", *MERGE, cold=True),
    case(
        "to-native", "convert raw to native, or to qcow2", "All in the page cache.",
        "convert -f raw {new} {out}", "convert -f raw -O qcow2 {new} {out}",
    ),
    case(
        "to-raw", "convert native, or qcow2, to raw", "All in the page cache.",
        "convert -O raw {alone} {out}", "convert -f qcow2 -O raw {alone} {out}",
    ),
    case(
        "diff", "make an overlay of what differs from the base", f"{TEN}; all in the page cache.",
        "convert -f raw -b {base} {new} {out}", "convert -f raw -O qcow2 -B {base} -F raw {new} {out}",
    ),
    case("compare", "compare an overlay with a raw image", f"{TEN}; all in the page cache.", *COMPARE),
    case("compare-cold", "compare an overlay with a raw image, cold", f"{TEN}; nothing in the page cache.", *COMPARE, cold=True),
    case("check", "check an overlay", f"{TEN}.", "check {over}", "check -f qcow2 {over}", only=("cow", "qemu-img")),
]
