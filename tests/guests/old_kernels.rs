//! The daemon on kernels that lack what io_uring has learned since.

use std::path::Path;
use std::time::Duration;

use system_tests::{
    Backend, CowDisk, Guest, Kernel, TestDir, blk_bench, compile_c, patterned, require, run_ok,
    vhost_user_blk,
};

/// In a guest of 5.10: the daemon's files on ext4 in a file, a load that knows what each sector
/// must hold, and an upgrade.
const SCRIPT: &str = r#"
result kernel $(uname -r | cut -d. -f1,2)
dd if=/dev/zero of=/tmp/ext4 bs=1M count=0 seek=200 2>/dev/null
mkfs.ext4 -q -F /tmp/ext4
mount -o loop -t ext4 /tmp/ext4 /mnt
dd if=/dev/urandom of=/mnt/base bs=1M count=16 2>/dev/null

# start OPTION...
start() {
    rm -f /run/socket
    vhost-user-blk --socket-path=/run/socket --control=/run/control --log-level=debug "$@" /mnt/cow,/mnt/base 2>>/run/log &
    daemon=$!
    until [ -S /run/socket ]; do
        kill -0 $daemon || { cat /run/log; return 1; }
        sleep 0.1
    done
}

# load OPTION...: what it reads must be what it wrote, or the base's.
load() {
    blk-bench run --socket-path=/run/socket --verify --discard-zeroes --stall-after=200s \
        --block-size=512..64k --queues=2 --depth=8 --seed=$seed --output=json "$@" >/run/json
}
ops=--ops=read:4,write:4,discard:1,write-zeroes:1

for name in io_uring sync direct; do
    options=--io-engine=$name
    [ $name != direct ] || options=--cow-cache=direct
    rm -f /mnt/cow /mnt/cow.* /run/log
    seed=7
    start $options
    check load-$name load $ops --base=/mnt/base --flush-every=50 --count=2000 --read-back
    check upgrade-$name vhost-user-blk upgrade --control=/run/control --timeout=200
    check read-$name load --ops=read --count=200 --tolerate-errors
    kill $daemon
    check end-$name wait $daemon
    # The daemon's own, and its successor's.
    result engine-$name $(sed -n 's/.*I.O engine: //p' /run/log | tr '\n' ' ')
    # Landlock came with Linux 5.13, which the daemon says.
    result bad-$name $(grep -E 'WARN|ERROR' /run/log | grep -vc 'this kernel has no Landlock')
    cat /run/log
done
"#;

/// Debian's 5.10 has the io_uring of 5.15, as all of 5.10.162 and later, without what came after
/// that: the ring is made with none of the flags of 5.18 to 6.1.
#[test]
fn linux_5_10_serves_with_both_engines() {
    require!(Kernel::Bullseye.available());
    let programs = [vhost_user_blk(), blk_bench()];
    let guest = programs.iter().fold(Guest::new(Kernel::Bullseye, SCRIPT), |guest, command| {
        guest.with_program(Path::new(command.get_program()))
    });
    let console = guest.with_time(Duration::from_secs(240)).run(&TestDir::new(), "bullseye");
    console.expect("kernel", "5.10");
    let engines =
        [("io_uring", "io_uring io_uring"), ("sync", "sync sync"), ("direct", "io_uring io_uring")];
    for (name, engine) in engines {
        for step in ["load", "upgrade", "read", "end"] {
            console.expect(&format!("{step}-{name}"), "ok");
        }
        console.expect(&format!("engine-{name}"), engine);
        console.expect(&format!("bad-{name}"), "0");
    }
}

/// A kernel whose io_uring is refused, or older than 5.13 and so without multishot polls, or than
/// 5.6 and so without a way to ask it what it does: `OLD` says which.
const OLD_KERNEL: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
static struct io_uring_sqe *entries;
static size_t count;
static int is(const char *what) {
    return !strcmp(getenv("OLD"), what);
}
static long refuse(int why) {
    errno = why;
    return -1;
}
long syscall(long number, ...) {
    long (*real)(long, ...) = dlsym(RTLD_NEXT, "syscall");
    va_list list;
    va_start(list, number);
    long a[6];
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_io_uring_setup) {
        if (is("refused")) return refuse(EPERM);
        if (is("absent")) return refuse(ENOSYS);
        unsigned known = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP | IORING_SETUP_R_DISABLED;
        if (((struct io_uring_params *)a[1])->flags & ~known) return refuse(EINVAL);
    }
    if (number == SYS_io_uring_register && a[1] == IORING_REGISTER_PROBE && is("5.5"))
        return refuse(EINVAL);
    if (number == SYS_io_uring_enter && is("5.12"))
        for (size_t i = 0; i < count; i++)
            if (entries[i].opcode == IORING_OP_POLL_ADD && entries[i].len == IORING_POLL_ADD_MULTI)
                // A flag that no kernel knows gives the same answer.
                entries[i].len = 1u << 31;
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
void *mmap(void *at, size_t len, int protection, int flags, int fd, off_t offset) {
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap");
    void *map = real(at, len, protection, flags, fd, offset);
    if (offset == IORING_OFF_SQES) {
        entries = map;
        count = len / sizeof(struct io_uring_sqe);
    }
    return map;
}
"#;

#[test]
fn a_kernel_too_old_for_the_ring_is_noticed_before_a_request_waits() {
    let disk = CowDisk::over(&patterned(8 << 20, 9));
    let daemon = disk.serve(&[]);
    if daemon.output().contains("io_uring cannot be used") {
        println!("skipped: no io_uring here");
        return;
    }
    daemon.stop();
    let library = disk.dir.path("old.so");
    compile_c(OLD_KERNEL, &["-shared", "-fPIC", "-ldl"], &library);
    let cases = [
        ("refused", "Operation not permitted", true),
        ("absent", "Function not implemented", true),
        ("5.5", "Linux 5.13", true),
        ("5.12", "Linux 5.13", true),
        // The ring does without the flags that it does not know.
        ("6.0", "io_uring cannot", false),
    ];
    for (old, why, falls_back) in cases {
        let socket = disk.dir.path("socket");
        let mut command = vhost_user_blk();
        command.env("LD_PRELOAD", &library).env("OLD", old);
        command.arg("--socket-path").arg(&socket).arg(disk.spec());
        let daemon = Backend::start(&format!("daemon on {old}"), command, &socket);
        let mut load = blk_bench();
        load.arg("run").arg("--socket-path").arg(&socket).args(["--verify", "--read-back"]);
        load.args(["--ops=read:1,write:2", "--block-size=512..64k", "--depth=8", "--count=1000"]);
        run_ok(load);
        let said = daemon.output();
        assert_eq!(said.contains(why), falls_back, "{old}: {said}");
        assert!(!said.contains("ERROR"), "{old}: {said}");
        daemon.stop();
    }
}
