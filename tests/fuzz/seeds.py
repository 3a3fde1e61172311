#!/usr/bin/env python3
"""Writes the first inputs of each fuzz target, made of the vectors and golden files of cow-format.

usage: seeds.py DIRECTORY       one folder for each target is made in it
"""
import hashlib, os, struct, subprocess, sys

CRATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../crates")
VECTORS = os.path.join(CRATES, "cow-format/tests/vectors")
GOLDEN = os.path.join(CRATES, "cow-format/tests/golden")
COPY = 4096


def unpacked(folder):
    """The bytes of each file of a folder of packed files."""
    for name in sorted(os.listdir(folder)):
        if name.endswith(".zst"):
            path = os.path.join(folder, name)
            yield subprocess.run(["zstd", "-dc", path], check=True, capture_output=True).stdout


def long(data):
    """Bytes as the targets take them, with their length in front and without zeros at the end."""
    data = data.rstrip(b"\0")
    return struct.pack("<H", len(data)) + data


def short(data):
    return bytes([len(data)]) + data


def header_uml():
    for file in unpacked(VECTORS):
        yield struct.pack("<Q", len(file)) + file[: 2 * COPY].rstrip(b"\0")


def header_native():
    for file in unpacked(GOLDEN):
        copies = long(file[:COPY]) + file[COPY : 2 * COPY].rstrip(b"\0")
        yield struct.pack("<BQ", 3, len(file)) + copies


def journal():
    """The records of the golden file, and one with many ranges."""
    for file in unpacked(GOLDEN):
        at, length = struct.unpack_from("<QQ", file, 224)
        records, sectors = b"", struct.unpack_from("<Q", file, 48)[0] // 512
        while length and file[at : at + 8] == b"COWJRNL\n":
            (size,) = struct.unpack_from("<I", file, at + 12)
            records += b"\3" + long(file[at : at + COPY]) + bytes([size // COPY - 1, 7])
            at += size
        if records:
            yield struct.pack("<I", sectors) + records
    head = struct.pack("<40xI4x", 8) + b"".join(struct.pack("<QI4x", 9 * n, n + 1) for n in range(8))
    yield struct.pack("<I", 100) + b"\3" + long(head) + bytes([5, 1])


def bitmap():
    """A small disk: a page from the file, a live one, new sectors, a look, a flush."""
    operations = [b"\1\0\0\0\0\0" + short(b"\x0f\xff\0\x80"), b"\2\0\0\0\2\0" + short(b"\1\2\3")]
    operations += [b"\0\0\7\0\x64\0", b"\3\0\0\0\0\x10\0\0", b"\4\0\0\0\3"]
    yield b"\xff" + struct.pack("<I", 100_000) + b"".join(operations)
    yield b"\0\0" + struct.pack("<I", 40_000_000) + b"".join(operations)


def layer_map():
    size = struct.pack("<IH", 4000, 0)
    layer = size + b"\2" + struct.pack("<H", 3) + short(b"\xff\x01") + struct.pack("<H", 9) + short(b"\x55" * 20)
    look = b"\0" + struct.pack("<HHB", 8, 200, 0) + b"\1" + struct.pack("<HHB", 80, 30, 1)
    for layers in range(3):
        yield bytes([layers]) + layer * (layers + 1) + b"\1" + struct.pack("<I", 900_000) + look * 2


def handover():
    yield b"""vhost-user-blk handover 1
from 0.1.0
rehearsal 3
paused 12000000034
wake 15
listener 4 5 6
control 7 0 0
connection 8
hold 11
hold 12
reply 13
top 9 10
write-cache 1
message 1 -
message 37 00000000000000000100000000000000ffffffffffffffff 14
message 18 0100000001000000
"""


def control():
    yield b"upgrade\0\x001500\0"
    yield b"upgrade\0/usr/bin/vhost-user-blk\x0060000\0"
    yield b"ok done\n"
    yield b"failed the disk is gone\n"


def ring():
    """A read, a write from a table beside the ring, and a discard, in a ring of 16."""
    at = 0x3100

    def descriptor(slot, place, length, flags, following):
        kind = {1: 1, 16: 2, 512: 4, 4096: 5, 128: 8}[length]
        return struct.pack("<BHBBB", slot, place, kind, flags, following)

    read = [(at, 16, 1, 1), (0x4100, 512, 3, 2), (at + 16, 1, 2, 0)]
    write = [(at + 64, 16, 1, 1), (0x4800, 4096, 1, 2), (at + 80, 1, 2, 0)]
    discard = [(at + 128, 16, 1, 8), (at + 160, 16, 1, 9), (at + 192, 1, 2, 0)]
    table = b"".join(descriptor(n, *d) for n, d in enumerate(read))
    table += descriptor(4, 0x3800, 128, 4, 0)
    table += b"".join(descriptor(7 + n, *d) for n, d in enumerate(discard))
    indirect = struct.pack("<HB", 0x3800, 3) + b"".join(descriptor(n, *d) for n, d in enumerate(write))
    headers = b"".join(
        struct.pack("<HB", place, 0) + short(struct.pack("<IIQ", kind, 0, sector))
        for place, kind, sector in [(at + 64, 1, 8), (at + 128, 11, 0)]
    )
    for event_idx in range(2):
        start = bytes([4, event_idx]) + struct.pack("<H", 5)
        heads = bytes([3, 0, 4, 7])
        yield start + bytes([7]) + table + b"\3" + indirect + headers + heads
        yield start + bytes([7]) + table + b"\3" + indirect + headers + heads + b"\0\5\x40\0\4" + table


def inflight():
    """Nothing yet; two requests in flight; a batch that the area does not know of."""
    area = lambda index, offset, data: bytes([index, offset]) + short(data)
    version = area(0, 8, struct.pack("<HHHH", 1, 16, 3, 100))
    marks = area(4, 0, struct.pack("<BxxxxxHQ", 1, 5, 7)) + area(6, 0, struct.pack("<BxxxxxHQ", 1, 0, 8))
    later = b"\x0b" + b"\0\1\0\2\2\2\3\1\0\7\2\3\0"
    for used, parts in [(100, []), (100, [version]), (100, [version, marks]), (102, [version, marks])]:
        start = bytes([0, 15, 0, 4]) + struct.pack("<HH", used, 5)
        yield start + bytes([len(parts) + (marks in parts)]) + b"".join(parts) + later * 2


def vhost_user():
    """A session's beginning alone, and with each kind of message behind it."""
    state = lambda queue, value: struct.pack("<II", queue, value)
    region = struct.pack("<QQQQ", 0x10_0000, 0x1_0000, 0x7F00_0000_0000, 0)
    far = struct.pack("<QQQQ", 0x80_0000, 0x1000, 0x7F10_0000_0000, 0)
    area = struct.pack("<QQHH", 0x240, 0, 2, 16)
    log = struct.pack("<QQ", 0x1000, 0)
    messages = [
        (1, b""), (3, b""), (4, b""), (15, b""), (17, b""), (36, b""), (34, b""),
        (2, struct.pack("<Q", 0x4400_0000)), (16, struct.pack("<Q", 2)),
        (5, struct.pack("<II", 1, 0) + region), (5, struct.pack("<II", 2, 0) + region + far),
        (6, log), (7, b""), (8, state(1, 64)), (9, struct.pack("<IIQQQQ", 0, 1, *[0x7F00_0000_0000] * 3, 0)),
        (10, state(0, 7)), (11, state(0, 0)), (12, bytes(8)), (13, bytes(8)), (14, bytes(8)),
        (12, struct.pack("<Q", 0x100)), (18, state(0, 0)), (21, b""), (24, struct.pack("<III", 0, 60, 0) + bytes(60)),
        (25, struct.pack("<III", 32, 1, 0) + b"\0"), (31, area), (32, area), (37, bytes(8) + far),
        (38, bytes(8) + far), (42, struct.pack("<II", 0, 0)), (43, b""),
    ]
    with_descriptor = {5, 6, 7, 12, 13, 14, 21, 32, 37, 42}
    # A read that is in the ring when it starts.
    chain = [(0x10_3000, 16, 1, 1), (0x10_4000, 512, 3, 2), (0x10_3010, 1, 2, 0)]
    memory = [(0, b"".join(struct.pack("<QIHH", *d) for d in chain)), (0x1000, struct.pack("<HHH", 0, 1, 0))]
    start = bytes([0xFF, len(memory)]) + b"".join(struct.pack("<H", at) + short(data) for at, data in memory)
    for changes in [b"", b"\x11\0\x10\2\0\0\0" * 3, b"\x10\0\x10\0\0\0\0"]:
        yield start + short(changes)
    whole = b""
    for request, body in messages:
        descriptors = 1 if request in with_descriptor and body[1:2] != b"\1" else 0
        kind = 0 if request in {5, 6, 32, 37} else 2
        sent = bytes([request, 1 | descriptors << 3]) + short(body) + bytes([0, kind] * descriptors)
        yield start + b"\0" + sent
        whole += sent
    yield start + b"\0" + whole


OPERATIONS = b"\2\1\7" + b"\5\5\7\x11" + b"\7\x21\3" + b"\x08" + b"\6\5\1" + b"\x0a" + b"\0" + b"\2\1\x3f"
CHECKS = b"\x0f\0" + b"\x0f\1" + b"\x0f\2" + b"\0" + b"\2\2\7"


def pieces(file):
    """Where a sparse file has anything: offset and bytes."""
    at, runs = 0, []
    while at < len(file):
        block = file[at : at + 512]
        if block.strip(b"\0"):
            if runs and runs[-1][0] + len(runs[-1][1]) == at:
                runs[-1] = (runs[-1][0], runs[-1][1] + block)
            else:
                runs.append((at, block))
        at += 512
    return [(at, data[:4096].rstrip(b"\0")) for at, data in runs][:14]


def image():
    """Each template as it is and cut off; the vectors and golden files as they are."""
    templates = 16
    for template in range(templates):
        for later in (OPERATIONS, OPERATIONS + b"\x0b" + CHECKS, OPERATIONS + b"\x0c\5" + CHECKS + OPERATIONS):
            yield bytes([template, 0, 0]) + later
        seal = b"\1\x40" + struct.pack("<H", 36) + short(b"\0\1")
        yield bytes([template]) + seal + b"\0" + OPERATIONS + CHECKS
    for folder in (VECTORS, GOLDEN):
        for file in unpacked(folder):
            changes = [struct.pack("<BQH", 0x38, at, len(data)) + data for at, data in pieces(file)]
            changes.append(struct.pack("<BQ", 0x1C, len(file)))
            yield bytes([templates, len(changes)]) + b"".join(changes) + b"\1" + b"\2\1\7" + CHECKS + OPERATIONS


def side_file():
    for flags in (1, 0, 0x11, 0x1B, 0x41):
        bits = struct.pack("<H", 0) + short(b"\xff\0\x0f") if flags & 0x30 else b""
        change = b"\x20" + short(b"\0\0\1") if flags & 6 else b""
        length = struct.pack("<Q", 4100) if flags & 0x40 else b""
        for later in (OPERATIONS, OPERATIONS + b"\x0c\5" + CHECKS + OPERATIONS):
            yield bytes([flags]) + change + bits + length + b"\0" + later


def delta():
    """Parts of a stream: without a base, of an image, of a layer; and something that is none."""
    yield b"\0COWDELTA" + bytes(60)
    records = struct.pack("<BBHBB", 1, 0, 1, 2, 7) + struct.pack("<BBHB", 2, 0, 8, 200)
    for kind, digest in [(0, 0), (1, 1), (2, 0)]:
        header = struct.pack("<8sIIQIIQqQ16sII32s", b"", 1, 0, 1 << 20, kind, 5, 1 << 20, 1700000000, 9,
                             b"u" * 16, digest, 0, b"d" * 32)
        yield b"\1" + header + records
        yield b"\1" + header + records + struct.pack("<BBHQ", 2, 3, 600, 1 << 40)


def qcow2():
    """An image of 1 MiB with 64 KiB clusters: two of data, one of zeros, one compressed."""
    cluster = 1 << 16

    def image(version, size, backing=b""):
        head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 112 if backing else 0, len(backing), 16, size, 0,
                           1, 3 * cluster, cluster, 1, 0, 0)
        if version == 3:
            head += struct.pack(">QQQII", 0, 0, 0, 4, 104) + bytes(8)
        pieces = [(0, head), (112, backing)] if backing else [(0, head)]
        pieces += [(cluster, struct.pack(">Q", 2 * cluster)), (2 * cluster, struct.pack(">8H", *[1] * 8))]
        pieces += [(3 * cluster, struct.pack(">Q", 4 * cluster | 1 << 63))]
        entries = [5 * cluster | 1 << 63, 6 * cluster | 1 << 63, version & 1, 1 << 62 | 7 * cluster]
        pieces += [(4 * cluster, struct.pack(">4Q", *entries))]
        pieces += [(5 * cluster, b"data" * 20), (7 * cluster, bytes.fromhex("edc1010d000000c2a0f74f6d0e37a0"))]
        return bytes([128]) + b"".join(struct.pack("<H", at // 8) + short(data) for at, data in pieces)

    yield image(2, 1 << 20)
    yield image(3, 1 << 20)
    yield image(3, 1000 * 512, b"/dev/null")
    yield image(3, 1 << 20, b"json:{\"driver\":\"raw\"}")


TARGETS = [
    bitmap, control, delta, handover, header_native, header_uml, image, inflight, journal, layer_map, qcow2,
    ring, side_file, vhost_user,
]


def main(directory):
    for target in TARGETS:
        folder = os.path.join(directory, target.__name__)
        os.makedirs(folder, exist_ok=True)
        for seed in target():
            with open(os.path.join(folder, hashlib.sha1(seed).hexdigest()), "wb") as file:
                file.write(seed)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
