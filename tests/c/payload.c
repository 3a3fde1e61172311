/*
 * A guest without an operating system that tries a virtio-blk disk, by virtio-pci or virtio-mmio,
 * without interrupts. It runs where no stock kernel can be had. Each thing it tries is a line "ok WHAT"
 * or "FAIL WHAT" on the first serial port; the last line is "payload: ok N fail N".
 *
 * Options on the command line: mmio=1 (no PCI), queues=N, load=REQUESTS.
 *
 * The disk holds word w of sector s as pattern(s, w). Memory is used as it is, without allocation:
 * 16 MiB and up to 40 MiB must be there.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define READ8(at) (*(volatile u8 *)(u64)(at))
#define READ16(at) (*(volatile u16 *)(u64)(at))
#define READ32(at) (*(volatile u32 *)(u64)(at))
#define READ64(at) (*(volatile u64 *)(u64)(at))
/* x86 keeps stores in order; the compiler has to as well. */
#define BARRIER() __asm__ volatile("" ::: "memory")

enum { QUEUES_MAX = 4, SECTOR = 512, PAGE = 4096 };

/* Memory. */
enum {
    QUEUE_MEMORY = 0x1000000, /* 1 MiB for each queue */
    QUEUE_LEN = 0x100000,
    AVAIL = 0x80000,
    USED = 0xa0000,
    HEADERS = 0x2000000, /* headers, each with its status byte behind it */
    TABLE = 0x2008000,   /* an indirect table */
    LOAD_HEADERS = 0x2010000,
    SEGMENTS = 0x2020000, /* of a discard or write-zeroes */
    DATA = 0x2100000,
    LOAD_DATA = 0x2200000,
};

/* virtio 1.3, 2.7 and 5.2. */
enum { NEXT = 1, WRITE = 2, INDIRECT = 4, NO_INTERRUPT = 1 };
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2, S_NONE = 0xee, S_TIMEOUT = 0xfe };
enum {
    F_SEG_MAX = 1 << 2,
    F_RO = 1 << 5,
    F_BLK_SIZE = 1 << 6,
    F_FLUSH = 1 << 9,
    F_MQ = 1 << 12,
    F_DISCARD = 1 << 13,
    F_WRITE_ZEROES = 1 << 14,
    F_INDIRECT = 1 << 28,
    F_EVENT_IDX = 1 << 29,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };

/* So many looks at the used ring are patience enough for one request. */
enum { PATIENCE = 200000000 };

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static void out16(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static u32 in32(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* --- what is said --- */

static void say(const char *text)
{
    while (*text)
        out8(0x3f8, *text++);
}

static void say_number(const char *before, u32 value)
{
    char digits[11];
    int at = sizeof digits - 1;
    digits[at] = 0;
    do
        digits[--at] = '0' + value % 10;
    while (value /= 10);
    say(before);
    say(digits + at);
}

static u32 passed, failed;

static void result(const char *what, int ok)
{
    say(ok ? "ok " : "FAIL ");
    say(what);
    say("\n");
    if (ok)
        passed++;
    else
        failed++;
}

/* --- the device --- */

static int is_pci;
/* virtio-pci: the common configuration, the notifications; virtio-mmio: the registers. */
static u64 common, notify, mmio;
static u32 notify_multiplier;
static u64 device_config;

static u32 pci_read(u32 device, u32 offset)
{
    out32(0xcf8, 0x80000000u | device << 11 | (offset & 0xfc));
    return in32(0xcfc);
}

static void pci_write(u32 device, u32 offset, u32 value)
{
    out32(0xcf8, 0x80000000u | device << 11 | (offset & 0xfc));
    out32(0xcfc, value);
}

static u8 pci_read8(u32 device, u32 offset)
{
    return pci_read(device, offset) >> (offset & 3) * 8;
}

/* Has 8 MiB at `address`, above 4 GiB, appear at 0xd0000000, of which nothing is used otherwise. */
static u64 window(u64 address)
{
    enum { WINDOW = 0xd0000000u, DIRECTORY = 0x305000, LARGE_PAGE = 0x200000 };
    u64 start = address & ~(u64)(LARGE_PAGE - 1);
    for (u32 i = 0; i < 4; i++)
        READ64(DIRECTORY + ((WINDOW >> 21 & 511) + i) * 8) = (start + i * (u64)LARGE_PAGE) | 0x83;
    __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" ::: "rax", "memory");
    return WINDOW + (address - start);
}

static u64 bar(u32 device, u32 number)
{
    u32 low = pci_read(device, 0x10 + number * 4);
    if ((low & 6) != 4)
        return low & ~15u;
    u64 high = pci_read(device, 0x14 + number * 4);
    u64 address = high << 32 | (low & ~15u);
    return high ? window(address) : address;
}

/* One of virtio's capabilities (virtio 1.3, 4.1.4). */
static void take_capability(u32 device, u8 at)
{
    u8 type = pci_read8(device, at + 3);
    if (type != 1 && type != 2 && type != 4)
        return;
    u64 place = bar(device, pci_read8(device, at + 4)) + pci_read(device, at + 8);
    if (type == 1)
        common = place;
    if (type == 2) {
        notify = place;
        notify_multiplier = pci_read(device, at + 16);
    }
    if (type == 4)
        device_config = place;
}

static int find_pci(void)
{
    for (u32 device = 0; device < 32 && !common; device++) {
        u32 id = pci_read(device, 0);
        if (id != 0x10421af4 && id != 0x10011af4)
            continue;
        /* Memory space and bus mastering. */
        pci_write(device, 4, (pci_read(device, 4) & 0xffff) | 6);
        for (u8 at = pci_read8(device, 0x34); at; at = pci_read8(device, at + 1))
            if (pci_read8(device, at) == 9)
                take_capability(device, at);
    }
    is_pci = common != 0;
    return is_pci;
}

static int find_mmio(void)
{
    /* Where Firecracker puts them. */
    for (u64 at = 0xc0000000u; at < 0xc0008000u; at += 0x1000)
        if (READ32(at) == 0x74726976 && READ32(at + 8) == 2 && !mmio)
            mmio = at;
    device_config = mmio + 0x100;
    return mmio != 0;
}

static u8 status(void) { return is_pci ? READ8(common + 20) : READ32(mmio + 0x70); }

static void set_status(u8 value)
{
    if (is_pci)
        READ8(common + 20) = value;
    else
        READ32(mmio + 0x70) = value;
}

static u32 offered(u32 half)
{
    READ32(is_pci ? common : mmio + 0x14) = half;
    return READ32(is_pci ? common + 4 : mmio + 0x10);
}

static void accept(u32 half, u32 features)
{
    READ32(is_pci ? common + 8 : mmio + 0x24) = half;
    READ32(is_pci ? common + 12 : mmio + 0x20) = features;
}

/* --- queues --- */

struct queue {
    u32 desc, avail, used, size;
    u64 notify;
    u16 offered, taken;
};
static struct queue queues[QUEUES_MAX];
static u32 features;
static u32 used_len;

static void clear(u32 at, u32 len)
{
    for (u32 i = 0; i < len; i += 2)
        READ16(at + i) = 0;
}

/* Sets up a queue as large as the device has it; 0: it has none. */
static int set_up(u32 number)
{
    struct queue *queue = &queues[number];
    u32 base = QUEUE_MEMORY + number * QUEUE_LEN;
    *queue = (struct queue){ .desc = base, .avail = base + AVAIL, .used = base + USED };
    if (is_pci)
        READ16(common + 22) = number;
    else
        READ32(mmio + 0x30) = number;
    queue->size = is_pci ? READ16(common + 24) : READ32(mmio + 0x34);
    if (!queue->size)
        return 0;
    clear(queue->avail, 6 + 2 * queue->size);
    clear(queue->used, 6 + 8 * queue->size);
    /* With EVENT_IDX it must be 0; there the device stays silent because used_event stays where it is. */
    READ16(queue->avail) = features & F_EVENT_IDX ? 0 : NO_INTERRUPT;
    u32 parts[3] = { queue->desc, queue->avail, queue->used };
    if (is_pci) {
        READ16(common + 24) = queue->size;
        for (u32 i = 0; i < 3; i++) {
            READ32(common + 32 + 8 * i) = parts[i];
            READ32(common + 36 + 8 * i) = 0;
        }
        queue->notify = notify + READ16(common + 30) * notify_multiplier;
        READ16(common + 28) = 1;
    } else {
        READ32(mmio + 0x38) = queue->size;
        for (u32 i = 0; i < 3; i++) {
            READ32(mmio + 0x80 + 0x10 * i) = parts[i];
            READ32(mmio + 0x84 + 0x10 * i) = 0;
        }
        queue->notify = mmio + 0x50;
        READ32(mmio + 0x44) = 1;
    }
    return 1;
}

static void kick(u32 number)
{
    BARRIER();
    if (is_pci)
        READ16(queues[number].notify) = number;
    else
        READ32(queues[number].notify) = number;
}

static void describe(u32 table, u32 place, u32 address, u32 len, u16 flags)
{
    u32 at = table + place * 16;
    READ64(at) = address;
    READ32(at + 8) = len;
    READ16(at + 12) = flags;
    READ16(at + 14) = flags & NEXT ? place + 1 : 0;
}

static void offer(struct queue *queue, u16 head)
{
    READ16(queue->avail + 4 + (queue->offered & (queue->size - 1)) * 2) = head;
    BARRIER();
    READ16(queue->avail + 2) = ++queue->offered;
}

/* The head of the next answer, or -1. */
static int answered(struct queue *queue)
{
    if (READ16(queue->used + 2) == queue->taken)
        return -1;
    BARRIER();
    u32 at = queue->used + 4 + (queue->taken++ & (queue->size - 1)) * 8;
    used_len = READ32(at + 4);
    return READ32(at);
}

static void write_header(u32 at, u32 type, u32 sector)
{
    READ32(at) = type;
    READ32(at + 4) = 0;
    READ64(at + 8) = sector;
    READ8(at + 16) = S_NONE;
}

/* A whole request: header, `count` buffers of `len` bytes from `data` on, status. */
static void describe_all(u32 table, u32 first, u32 header, u32 data, u32 len, u32 count)
{
    u32 type = READ32(header);
    u16 flags = type == T_IN || type == T_GET_ID ? NEXT | WRITE : NEXT;
    describe(table, first, header, 16, NEXT);
    for (u32 i = 0; i < count; i++)
        describe(table, first + 1 + i, data + i * len, len, flags);
    describe(table, first + 1 + count, header + 16, 1, WRITE);
}

/* Makes a request and waits for its answer: the status, or S_TIMEOUT. */
static u8 request(u32 number, u32 type, u32 sector, u32 data, u32 len, u32 count, int indirect)
{
    struct queue *queue = &queues[number];
    u32 header = HEADERS + number * 0x1000;
    write_header(header, type, sector);
    if (indirect) {
        describe_all(TABLE, 0, header, data, len, count);
        describe(queue->desc, 0, TABLE, 16 * (count + 2), INDIRECT);
    } else {
        describe_all(queue->desc, 0, header, data, len, count);
    }
    offer(queue, 0);
    kick(number);
    for (u32 looks = 0; looks < PATIENCE; looks++) {
        int head = answered(queue);
        if (head >= 0)
            return head == 0 ? READ8(header + 16) : S_TIMEOUT;
    }
    return S_TIMEOUT;
}

/* --- what is tried --- */

static u32 pattern(u32 sector, u32 word) { return sector * 0x9e3779b9u + word; }

static int is_base(u32 at, u32 sector, u32 count)
{
    for (u32 i = 0; i < count * SECTOR; i += 4)
        if (READ32(at + i) != pattern(sector + i / SECTOR, i % SECTOR / 4))
            return 0;
    return 1;
}

static void fill(u32 at, u32 seed)
{
    for (u32 i = 0; i < PAGE; i += 4)
        READ32(at + i) = seed + i;
}

/* Whether a page is as `fill` has left it, but for zeros in the sectors from `from` to `to`. */
static int is_filled(u32 at, u32 seed, u32 from, u32 to)
{
    for (u32 i = 0; i < PAGE; i += 4) {
        int zero = i / SECTOR >= from && i / SECTOR < to;
        if (READ32(at + i) != (zero ? 0 : seed + i))
            return 0;
    }
    return 1;
}

static u32 capacity;

static int reads_base(u32 queue, u32 sector, u32 count)
{
    return request(queue, T_IN, sector, DATA, count * SECTOR, 1, 0) == S_OK &&
           is_base(DATA, sector, count);
}

/* Writes a page in one shape and reads it in another. */
static int keeps(u32 queue, u32 sector, u32 seed, u32 pieces, int indirect)
{
    fill(DATA, seed);
    if (request(queue, T_OUT, sector, DATA, PAGE / pieces, pieces, indirect) != S_OK)
        return 0;
    fill(DATA, 0);
    u32 read = pieces > 1 ? pieces / 2 : 1;
    return request(queue, T_IN, sector, DATA, PAGE / read, read, indirect) == S_OK &&
           is_filled(DATA, seed, 0, 0);
}

static u8 segment(u32 queue, u32 type, u32 sector, u32 count)
{
    READ64(SEGMENTS) = sector;
    READ32(SEGMENTS + 8) = count;
    READ32(SEGMENTS + 12) = 0;
    return request(queue, type, 0, SEGMENTS, 16, 1, 0);
}

static void try_queue(u32 queue)
{
    u32 sector = 1000 + queue * 1000, seed = 0xc0de0000u + (queue << 12);
    say_number("queue ", queue);
    say_number(", entries ", queues[queue].size);
    say("\n");
    result("serial number", request(queue, T_GET_ID, 0, DATA, 20, 1, 0) == S_OK);
    result("read", reads_base(queue, 0, 8) && used_len == PAGE + 1);
    result("read of the last sector", reads_base(queue, capacity - 1, 1));
    if (features & F_RO) {
        result("write is refused", request(queue, T_OUT, sector, DATA, SECTOR, 1, 0) == S_IOERR);
        return;
    }
    result("write and read", keeps(queue, sector, seed, 1, 0));
    result("the sectors before", reads_base(queue, sector - 8, 8));
    result("the sectors behind", reads_base(queue, sector + 8, 8));
    if (features & F_FLUSH)
        result("flush", request(queue, T_FLUSH, 0, DATA, 0, 0, 0) == S_OK);
    result("several buffers", keeps(queue, sector + 64, seed + 0x100000, 8, 0));
    if (features & F_INDIRECT)
        result("indirect", keeps(queue, sector + 128, seed + 0x200000, 8, 1));
    if (features & F_WRITE_ZEROES) {
        result("zeroes", segment(queue, T_WRITE_ZEROES, sector + 2, 3) == S_OK);
        result("zeroes and their neighbours",
               request(queue, T_IN, sector, DATA, PAGE, 1, 0) == S_OK &&
                   is_filled(DATA, seed, 2, 5));
    }
    if (features & F_DISCARD)
        result("discard", segment(queue, T_DISCARD, sector + 64, 8) == S_OK);
    result("read past the end", request(queue, T_IN, capacity, DATA, SECTOR, 1, 0) == S_IOERR);
    result("unknown request", request(queue, 99, 0, DATA, SECTOR, 1, 0) == S_UNSUPP);
    result("read after all that", reads_base(queue, 0, 8));
}

/* --- load: so many requests in flight in each queue; each slot writes a page, then reads it --- */

enum { DEPTH = 8 };
struct slot {
    u32 version;
    u8 reads, in_flight;
};
static struct slot slots[QUEUES_MAX][DEPTH];
/* Of each page a word every so many bytes tells its version: some machines are slow at this. */
enum { STRIDE = 128 };
static u32 issued, done, errors, wrong, unknown;

static u32 slot_header(u32 queue, u32 slot) { return LOAD_HEADERS + (queue * DEPTH + slot) * 32; }
static u32 slot_data(u32 queue, u32 slot) { return LOAD_DATA + (queue * DEPTH + slot) * PAGE; }
static u32 slot_seed(u32 version, u32 slot) { return (version << 13) + slot * 0x1000000; }

static void mark(u32 page, u32 seed)
{
    for (u32 i = 0; i < PAGE; i += STRIDE)
        READ32(page + i) = seed + i;
}

static int is_marked(u32 page, u32 seed)
{
    for (u32 i = 0; i < PAGE; i += STRIDE)
        if (READ32(page + i) != seed + i)
            return 0;
    return 1;
}

static void issue(u32 queue, u32 number)
{
    struct slot *slot = &slots[queue][number];
    u32 header = slot_header(queue, number), data = slot_data(queue, number);
    if (!slot->reads)
        slot->version++;
    mark(data, slot->reads ? 0 : slot_seed(slot->version, number));
    write_header(header, slot->reads ? T_IN : T_OUT, 8192 + (queue * DEPTH + number) * 8);
    describe_all(queues[queue].desc, number * 3, header, data, PAGE, 1);
    offer(&queues[queue], number * 3);
    slot->in_flight = 1;
    issued++;
}

static void take(u32 queue, u32 head)
{
    u32 number = head / 3;
    if (head % 3 || number >= DEPTH || !slots[queue][number].in_flight) {
        unknown++;
        return;
    }
    struct slot *slot = &slots[queue][number];
    slot->in_flight = 0;
    done++;
    errors += READ8(slot_header(queue, number) + 16) != S_OK;
    u32 seed = slot_seed(slot->version, number);
    wrong += slot->reads && !is_marked(slot_data(queue, number), seed);
    slot->reads ^= 1;
}

/* One round over a queue; whether anything was answered. */
static int turn(u32 queue, u32 requests)
{
    u32 before = issued;
    for (u32 number = 0; number < DEPTH && issued < requests; number++)
        if (!slots[queue][number].in_flight)
            issue(queue, number);
    if (issued != before)
        kick(queue);
    int head, any = 0;
    while ((head = answered(&queues[queue])) >= 0) {
        take(queue, head);
        any = 1;
    }
    return any;
}

static void load(u32 count, u32 requests)
{
    for (u32 idle = 0; done < requests && idle < PATIENCE;) {
        int any = 0;
        for (u32 queue = 0; queue < count; queue++)
            any |= turn(queue, requests);
        idle = any ? 0 : idle + 1;
    }
    say_number("load: answered ", done);
    say_number(", errors ", errors);
    say_number(", wrong ", wrong);
    say_number(", answers to nothing ", unknown);
    say("\n");
    result("load", done == requests && !errors && !wrong && !unknown);
}

/* --- the whole --- */

/* The number behind "NAME=" on the command line, or `otherwise`. */
static u32 option(const char *line, const char *name, u32 otherwise)
{
    for (const char *word = line; word && *word; word++) {
        const char *at = word, *wanted = name;
        while (*wanted && *at == *wanted)
            at++, wanted++;
        if (*wanted || *at++ != '=')
            continue;
        u32 value = 0;
        for (; *at >= '0' && *at <= '9'; at++)
            value = value * 10 + (*at - '0');
        return value;
    }
    return otherwise;
}

static int negotiate(void)
{
    set_status(0);
    for (u32 looks = 0; status() && looks < PATIENCE; looks++)
        ;
    set_status(ACKNOWLEDGE);
    set_status(ACKNOWLEDGE | DRIVER);
    features = offered(0) & (F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_MQ | F_DISCARD |
                             F_WRITE_ZEROES | F_INDIRECT | F_EVENT_IDX);
    accept(0, features);
    /* VERSION_1 */
    accept(1, offered(1) & 1);
    set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    return (status() & FEATURES_OK) != 0;
}

static void try_disk(const char *line)
{
    result("disk found", option(line, "mmio", 0) ? find_mmio() : find_pci());
    if (failed)
        return;
    result("features", negotiate());
    capacity = READ32(device_config);
    u32 count = 0, wanted = option(line, "queues", 1);
    while (count < wanted && count < QUEUES_MAX && set_up(count))
        count++;
    result("queues", count == wanted);
    set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    for (u32 queue = 0; queue < count; queue++)
        try_queue(queue);
    u32 requests = option(line, "load", 0);
    if (requests && !(features & F_RO))
        load(count, requests);
    set_status(0);
    result("reset", status() == 0);
}

/* The ways in which virtual machines are switched off. */
static void power_off(void)
{
    out8(0x600, 0x34);    /* cloud-hypervisor */
    out16(0x604, 0x2000); /* QEMU's q35 */
    out8(0x64, 0xfe);     /* the keyboard controller's reset: Firecracker, crosvm */
}

void payload(u64 information, u32 is_pvh)
{
    u64 line = is_pvh ? READ64(information + 24) : READ32(information + 0x228);
    try_disk((const char *)line);
    say_number("payload: ok ", passed);
    say_number(" fail ", failed);
    say("\n");
    power_off();
}
