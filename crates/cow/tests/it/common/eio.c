// Lets reads of a file fail with EIO: preloaded into `cow` by tests/unreadable.rs.
// EIO_FILE: what the path of the file ends with. EIO_AT: the first byte that cannot be read.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int unreadable(int fd, off_t at, size_t len) {
    const char *end = getenv("EIO_FILE"), *from = getenv("EIO_AT");
    char link[64], path[4096];
    if (!end || !from || at + (off_t)len <= (off_t)atoll(from)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path);
    size_t want = strlen(end);
    if (n < (ssize_t)want || memcmp(path + n - want, end, want)) return 0;
    errno = EIO;
    return 1;
}

static size_t total(const struct iovec *iov, int count) {
    size_t len = 0;
    for (int i = 0; i < count; i++) len += iov[i].iov_len;
    return len;
}

#define PREAD(name)                                                            \
    ssize_t name(int fd, void *buf, size_t len, off_t at) {                    \
        ssize_t (*next)(int, void *, size_t, off_t) = dlsym(RTLD_NEXT, #name); \
        return unreadable(fd, at, len) ? -1 : next(fd, buf, len, at);          \
    }
#define PREADV(name)                                                                      \
    ssize_t name(int fd, const struct iovec *iov, int count, off_t at) {                  \
        ssize_t (*next)(int, const struct iovec *, int, off_t) = dlsym(RTLD_NEXT, #name); \
        return unreadable(fd, at, total(iov, count)) ? -1 : next(fd, iov, count, at);     \
    }

PREAD(pread)
PREAD(pread64)
PREADV(preadv)
PREADV(preadv64)
