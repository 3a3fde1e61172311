/*
 * Preloaded into a daemon, it leaves out every mark in the dirty log: the daemon gets a copy of the
 * log that is its own, so that QEMU, whose memory file has the name below, sees none of them.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int is_log(int fd)
{
    static const char log[] = "/memfd:vhost-log";
    char path[32], file[sizeof log - 1];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return readlink(path, file, sizeof file) == sizeof file && memcmp(file, log, sizeof file) == 0;
}

void *mmap(void *at, size_t len, int prot, int flags, int fd, off_t offset)
{
    if (fd >= 0 && (flags & MAP_SHARED) && is_log(fd)) {
        flags = (flags & ~MAP_SHARED) | MAP_PRIVATE;
        dprintf(STDERR_FILENO, "marks are left out\n");
    }
    return (void *)syscall(SYS_mmap, at, len, prot, flags, fd, offset);
}

void *mmap64(void *at, size_t len, int prot, int flags, int fd, off64_t offset)
{
    return mmap(at, len, prot, flags, fd, offset);
}
