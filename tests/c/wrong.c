/*
 * Hosts that are wrong on purpose, as a library that is loaded before others (tests/src/powercut). WRONG=nosync: no sync does
 * anything; nodsync: durable writes are ordinary ones; half: every other fdatasync is left out.
 */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int is(const char *wrong)
{
    const char *asked = getenv("WRONG");
    return asked && !strcmp(asked, wrong);
}

int fdatasync(int fd)
{
    static atomic_int calls;
    if (is("nosync") || (is("half") && atomic_fetch_add(&calls, 1) % 2 == 0))
        return 0;
    return syscall(SYS_fdatasync, fd);
}

int fsync(int fd)
{
    return is("nosync") ? 0 : syscall(SYS_fsync, fd);
}

ssize_t pwritev2(int fd, const struct iovec *buffers, int count, off_t at, int flags)
{
    if (is("nosync") || is("nodsync"))
        flags &= ~RWF_DSYNC;
    return syscall(SYS_pwritev2, fd, buffers, count, at, 0L, flags);
}

ssize_t pwritev64v2(int fd, const struct iovec *buffers, int count, off_t at, int flags)
{
    return pwritev2(fd, buffers, count, at, flags);
}
