#!/usr/bin/env python3
"""Makes the golden native files of version 1, from docs/spec/format-native.md alone and apart from the Rust code.

They were made once and must open for ever: a change of the format makes new ones beside them. Run in this directory.
"""
import struct, subprocess, uuid

CAPACITY = (16 << 30) // 4096
DURABLE, LIVE = 8192, 8192 + CAPACITY
DATA = -(-(LIVE + CAPACITY) // (1 << 20)) * (1 << 20)
OWN = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff").bytes
BOOT = uuid.UUID("f0e0d0c0-b0a0-9080-7060-504030201000").bytes
LOWER = uuid.UUID("12345678-9abc-def0-0fed-cba987654321").bytes

def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF

JOURNAL = LIVE + CAPACITY
EPOCH = uuid.UUID("0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9").bytes

def header(generation, size, state=0, content=0, boot=bytes(16), backing=bytes(96), path=b"", compatible=0, journal=bytes(32), witness=b""):
    fixed = struct.pack("<8sIIIIQQQQQQQQQ16s16s", b"\x89COW\r\n\x1a\n", 1, 4096, 0, state, generation, any(journal),
                        compatible, size, DURABLE, LIVE, CAPACITY, DATA, content, OWN, boot)
    page = bytearray((fixed + backing + journal + witness).ljust(512, b"\0") + path.ljust(3584, b"\0"))
    struct.pack_into("<I", page, 16, crc32c(page))
    return bytes(page)

def image(path, fmt=1, size=1048576, secs=1700000000, nanos=123456789, digest=None):
    return struct.pack("<IIIIQqI4x16xQ32s", fmt, len(path), 1, digest is not None, size, secs, nanos, 0, digest or b"")

def layer(path):
    return struct.pack("<IIIIQqI4x16sQ32s", 3, len(path), 2, 0, 0, 0, 0, LOWER, 7, b"")

def record(sequence, *ranges):
    data = b"".join(content for _, content in ranges)
    data += bytes(-len(data) % 4096)
    head = struct.pack("<8sII16sQI4x", b"COWJRNL\n", 0, 4096 + len(data), EPOCH, sequence, len(ranges))
    for sector, content in ranges:
        head += struct.pack("<QI4x", sector, len(content) // 512)
    whole = bytearray(head.ljust(4096, b"\0") + data)
    struct.pack_into("<I", whole, 8, crc32c(whole))
    return whole

def text(what, sectors=1):
    return what.ljust(16, b".") * 32 * sectors

def write(name, first, second, size, durable=b"", live=b"", sectors=(), journal=b""):
    with open(name, "wb") as file:
        file.truncate(DATA + size)
        for at, data in [(0, first), (4096, second), (DURABLE, durable), (LIVE, live), (JOURNAL, journal)]:
            file.seek(at)
            file.write(data)
        for n in sectors:
            file.seek(DATA + 512 * n)
            file.write(b"G%014d\n" % n * 32)
    subprocess.run(["zstd", "-q", "-19", "-f", "--rm", name], check=True)

MIB = 1048576
base = b"base.img"
write("v1-empty.cow", header(1, MIB), header(2, MIB), MIB)
write("v1-base.cow", header(5, 1000001, 0, 2, backing=image(base, size=1000001, digest=bytes(range(32))), path=base),
      header(4, 1000001, 1, 2, BOOT, image(base, size=1000001), base), 1000001, b"\x05\x00\x80", sectors=(0, 2, 23))
lower = b"/layers/lower.cow"
write("v1-live.cow", header(8, 2 * MIB, 0, 3, backing=layer(lower), path=lower, compatible=0),
      header(9, 2 * MIB, 1, 4, BOOT, layer(lower), lower), 2 * MIB, b"\x01", b"\x02", sectors=(0, 1))
write("v1-frozen.cow", header(3, MIB, 2, 1, backing=image(b"disk.qcow2", 4, MIB, -1, 0), path=b"disk.qcow2"),
      header(4, MIB, 2, 1, backing=image(b"disk.qcow2", 4, MIB, -1, 0), path=b"disk.qcow2", compatible=1 << 63),
      MIB, b"\xff", sectors=range(8))
broken = bytearray(header(11, MIB))
broken[100] ^= 1
write("v1-broken-first.cow", bytes(broken), header(10, MIB, backing=image(base, 2), path=base), MIB)
# In use, in the page cache of a superblock.
write("v1-witness.cow", header(4, MIB), header(5, MIB, 1, 1, BOOT, witness=struct.pack("<I4xQ", 2, 0x010203040506)),
      MIB, b"\x01", b"\x02", sectors=(0, 1))
# Of another boot: two records count, of the third a byte is wrong, and nothing counts after it.
torn = record(2, (5, text(b"torn")))
torn[5000] ^= 1
records = record(0, (3, text(b"older")), (9, text(b"two", 2))) + record(1, (3, text(b"newer"))) + torn + record(3, (6, text(b"late")))
area = struct.pack("<QQ16s", JOURNAL, 65536, EPOCH)
write("v1-journal.cow", header(6, MIB, 1, 3, BOOT), header(7, MIB, 1, 3, BOOT, journal=area), MIB, b"\x01", b"\x3f",
      sectors=(0, 3), journal=bytes(records))
