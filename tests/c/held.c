/*
 * held DEVICE MIB: a buffer of guest memory that only the device writes, for a test that has its
 * guest migrated meanwhile (tests/guests/migration.rs).
 *
 * It is filled from the device's beginning, and after a line on /dev/ttyS1 from what follows there,
 * by O_DIRECT both times, so that no store of this or of any program changes it again. After another
 * line it is compared with what the device holds (`patterned` in tests/src/files.rs with the seed 7),
 * which is computed: by then the disk may well not answer.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, CHUNK = 256 << 10, SEED = 7 };

static uint64_t word(uint64_t index)
{
    uint64_t mixed = (index + ((uint64_t)SEED << 32)) * 0x9E3779B97F4A7C15u;
    return mixed ^ mixed >> 29;
}

static void fill(int device, char *buffer, size_t len, off_t from)
{
    for (size_t at = 0; at < len; at += CHUNK)
        if (pread(device, buffer + at, CHUNK, from + at) != CHUNK) {
            perror("held: pread");
            exit(1);
        }
}

/* How many of the pages do not hold what the device has from byte `from` on. */
static size_t wrong_pages(const uint64_t *buffer, size_t len, off_t from)
{
    size_t words = PAGE / sizeof *buffer, wrong = 0;
    for (size_t page = 0; page < len / PAGE; page++)
        for (size_t at = page * words; at < (page + 1) * words; at++)
            if (buffer[at] != word(from / sizeof *buffer + at)) {
                wrong++;
                break;
            }
    return wrong;
}

static void await_line(FILE *control)
{
    char line[64];
    if (!fgets(line, sizeof line, control)) {
        perror("held: /dev/ttyS1");
        exit(1);
    }
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int device = open(argv[1], O_RDONLY | O_DIRECT);
    FILE *control = fopen("/dev/ttyS1", "r");
    size_t len = (size_t)atoi(argv[2]) << 20;
    char *buffer = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (device < 0 || !control || buffer == MAP_FAILED || mlock(buffer, len) != 0) {
        perror("held");
        return 1;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    fill(device, buffer, len, 0);
    printf("\n@@held=first\n");
    await_line(control);
    fill(device, buffer, len, len);
    printf("\n@@held=second\n");
    await_line(control);
    printf("\n@@pages=%zu\n@@wrong=%zu\n", len / PAGE, wrong_pages((uint64_t *)buffer, len, len));
    return 0;
}
