//! What code can do that has taken a thread of the daemon over: a test plants a system call in the
//! place of such code (`fault::foreign_code`).

use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use crate::common::{Daemon, PROGRAM, SECTORS, has_landlock};
use tempfile::TempDir;
use testkit::frontend::{F_PROTOCOL_FEATURES, F_VERSION_1, PROTOCOL_FEATURES, RawFrontend};
use testkit::memory::Memory;
use testkit::ring::Ring;

/// A system call, and its arguments as `fault::foreign_code` takes them.
#[derive(Clone, Copy)]
struct Call(&'static str, libc::c_long, &'static str);

/// What no thread of any daemon may do, with or without `--control`.
const NEVER: &[Call] = &[
    Call("a network socket", libc::SYS_socket, "2 1 0"),
    Call("connect", libc::SYS_connect, "0 0 0"),
    Call("bind", libc::SYS_bind, "0 0 0"),
    Call("listen", libc::SYS_listen, "0 0"),
    Call("execveat", libc::SYS_execveat, "-100 =/bin/true 0 0 0"),
    Call("ptrace", libc::SYS_ptrace, "16 1 0 0"),
    Call("process_vm_readv", libc::SYS_process_vm_readv, "1 0 0 0 0 0"),
    Call("process_vm_writev", libc::SYS_process_vm_writev, "1 0 0 0 0 0"),
    Call("pidfd_open", libc::SYS_pidfd_open, "1 0"),
    Call("pidfd_getfd", libc::SYS_pidfd_getfd, "0 0 0"),
    Call("kcmp", libc::SYS_kcmp, "1 1 0 0 0"),
    Call("mount", libc::SYS_mount, "=none =/mnt =tmpfs 0 0"),
    Call("umount2", libc::SYS_umount2, "=/mnt 0"),
    Call("open_tree", libc::SYS_open_tree, "-100 =/ 1"),
    Call("pivot_root", libc::SYS_pivot_root, "=/ =/"),
    Call("chroot", libc::SYS_chroot, "=/"),
    Call("unshare", libc::SYS_unshare, "268435456"),
    Call("setns", libc::SYS_setns, "0 0"),
    Call("clone into a user namespace", libc::SYS_clone, "268435456 0 0 0 0"),
    Call("clone3", libc::SYS_clone3, "0 0"),
    Call("bpf", libc::SYS_bpf, "0 0 0"),
    Call("userfaultfd", libc::SYS_userfaultfd, "0"),
    Call("perf_event_open", libc::SYS_perf_event_open, "0 0 0 0 0"),
    Call("keyctl", libc::SYS_keyctl, "0 0 0 0 0"),
    Call("add_key", libc::SYS_add_key, "0 0 0 0 0"),
    Call("finit_module", libc::SYS_finit_module, "0 0 0"),
    Call("kexec_load", libc::SYS_kexec_load, "0 0 0 0"),
    Call("reboot", libc::SYS_reboot, "0 0 0 0"),
    Call("open_by_handle_at", libc::SYS_open_by_handle_at, "0 0 0"),
    Call("name_to_handle_at", libc::SYS_name_to_handle_at, "-100 =/ 0 0 0"),
    Call("fanotify_init", libc::SYS_fanotify_init, "0 0"),
    Call("setresuid", libc::SYS_setresuid, "0 0 0"),
    Call("setgroups", libc::SYS_setgroups, "0 0"),
    Call("fchmodat", libc::SYS_fchmodat, "-100 =/tmp 0"),
    Call("fchownat", libc::SYS_fchownat, "-100 =/tmp 0 0 0"),
    Call("mknodat", libc::SYS_mknodat, "-100 =/tmp/node 0 0"),
    Call("mkdirat", libc::SYS_mkdirat, "-100 =/tmp/directory 0"),
    Call("symlinkat", libc::SYS_symlinkat, "=/ -100 =/tmp/link"),
    Call("personality", libc::SYS_personality, "0"),
    Call("process_madvise", libc::SYS_process_madvise, "0 0 0 0 0"),
    Call("memory that others may poison", libc::SYS_madvise, "0 4096 100"),
    Call("settimeofday", libc::SYS_settimeofday, "0 0"),
    Call("typing into a terminal", libc::SYS_ioctl, "0 21522 =x"),
];

/// What only the main thread may do, if another program can take over (`--control`).
const OF_A_NEW_PROGRAM: &[Call] = &[
    Call("execve", libc::SYS_execve, "=/bin/true 0 0"),
    Call("fork", libc::SYS_clone, "17 0 0 0 0"),
    Call("kill", libc::SYS_kill, "1 0"),
    Call("tgkill of another process", libc::SYS_tgkill, "1 1 0"),
    Call("a unix socket", libc::SYS_socket, "1 1 0"),
    Call("executable memory", libc::SYS_mmap, "0 4096 5 34 -1 0"),
    Call("memory made executable", libc::SYS_mprotect, "0 0 5"),
    Call("prlimit64", libc::SYS_prlimit64, "0 0 0 0"),
    Call("io_uring_setup", libc::SYS_io_uring_setup, "1 0"),
    Call("io_uring_register of a probe", libc::SYS_io_uring_register, "0 8 0 0"),
    Call("prctl(PR_SET_DUMPABLE)", libc::SYS_prctl, "4 1"),
];

/// What only the main thread may do.
const OF_THE_MAIN_THREAD: &[Call] = &[
    Call("openat2", libc::SYS_openat2, "-100 =/etc/passwd 0 0"),
    Call("unlinkat", libc::SYS_unlinkat, "-100 =/none 0"),
    Call("renameat2", libc::SYS_renameat2, "-100 =/none -100 =/none 0"),
    Call("linkat", libc::SYS_linkat, "-100 =/none -100 =/none 0"),
    Call("stat of a path", libc::SYS_newfstatat, "-100 =/etc/passwd 0 0"),
    Call("readlinkat", libc::SYS_readlinkat, "-100 =/proc/self/exe 0 0"),
    Call("memfd_create", libc::SYS_memfd_create, "=x 0"),
    Call("accept4", libc::SYS_accept4, "0 0 0 0"),
    Call("sendmsg", libc::SYS_sendmsg, "0 0 0"),
    Call("recvmsg", libc::SYS_recvmsg, "0 0 0"),
    Call("socketpair", libc::SYS_socketpair, "1 1 0 0"),
    Call("dup3", libc::SYS_dup3, "0 0 0"),
    Call("inotify_init1", libc::SYS_inotify_init1, "0"),
];

const OPENS: Call = Call("openat", libc::SYS_openat, "-100 =/etc/passwd 0 0");

/// Threads with filters of their own.
const THREADS: [&str; 3] = ["queue-0", "committer", "base-watch"];

/// A daemon on a COW file, in whose `thread` this is planted, and its directory.
fn planted(thread: &str, plan: &str, args: &[&str]) -> (Daemon, TempDir) {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path();
    let file = |name: &str| directory.join(name).display().to_string();
    std::fs::write(file("base"), vec![0; usize::try_from(SECTORS).unwrap() * 512]).unwrap();
    let mut command = Command::new(PROGRAM);
    command.env("VHOST_USER_BLK_CALL", format!("{thread} {plan}"));
    command.args(["--socket-path", &file("socket"), "--num-queues=1"]);
    command.arg(file("cow") + "," + &file("base"));
    if args.contains(&"--control") {
        command.args(["--control", &file("control")]);
    }
    command.args(args.iter().filter(|arg| **arg != "--control"));
    let mut daemon = Daemon::spawn(command, directory.join("socket"));
    if ["queue-0", "block-io"].contains(&thread) {
        daemon.wait_line("listening");
        start_ring(&daemon);
    }
    (daemon, temporary)
}

/// What came of the call in `thread`: the last line of the log, and the signal that has ended the
/// daemon.
fn outcome(thread: &str, Call(_, call, arguments): Call, args: &[&str]) -> (String, Option<i32>) {
    let (mut daemon, _directory) = planted(thread, &format!("{call} {arguments}"), args);
    let line = daemon.wait_line("system call");
    let signal = line.contains("refused").then(|| daemon.reap().signal()).flatten();
    (line, signal)
}

/// Starts a ring; the daemon ends meanwhile.
fn start_ring(daemon: &Daemon) {
    let mut frontend = RawFrontend::new(daemon.connect());
    frontend.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES, PROTOCOL_FEATURES);
    let memory = Memory::default();
    memory.set(&mut frontend);
    frontend.need_reply = false;
    let mut ring = Ring::new(0);
    ring.set_up(&mut frontend);
    ring.enable(&mut frontend, true);
    ring.submit(&memory, testkit::request::IN, 0, &[0; 512]);
    ring.kick();
}

/// The call ends the daemon, or (what the C library has another way for) fails.
fn refused(thread: &str, call: Call, args: &[&str]) {
    let (line, signal) = outcome(thread, call, args);
    let ended = line.contains(&format!("system call {} ", call.1))
        && line.contains(&format!("refused in thread {}", name(thread)))
        && signal == Some(libc::SIGSYS);
    let fails = line.contains("returned -1: Function not implemented");
    assert!(ended || fails, "{} in {thread}: {line} {signal:?}", call.0);
}

fn allowed(thread: &str, call: Call, args: &[&str]) -> String {
    let (line, signal) = outcome(thread, call, args);
    assert_eq!(signal, None, "{} in {thread}: {line}", call.0);
    line
}

/// The kernel's name of the main thread is the program's, and has up to 15 bytes.
fn name(thread: &str) -> &str {
    if thread == "main" { "vhost-user-blk" } else { thread }
}

fn in_parallel(work: &[(&str, Call, &[&str])]) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some((thread, call, args)) =
                    work.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                {
                    refused(thread, *call, args);
                }
            });
        }
    });
}

#[test]
fn what_no_thread_may_do_ends_the_daemon() {
    let mut work: Vec<(&str, Call, &[&str])> = Vec::new();
    for call in NEVER {
        work.push(("main", *call, &["--control"]));
        work.extend(THREADS.map(|thread| (thread, *call, &[][..])));
    }
    in_parallel(&work);
}

#[test]
fn a_daemon_that_is_not_upgraded_cannot_start_a_program() {
    let mut work: Vec<(&str, Call, &[&str])> = Vec::new();
    for call in OF_A_NEW_PROGRAM {
        work.push(("main", *call, &[]));
        work.extend(THREADS.map(|thread| (thread, *call, &["--control"][..])));
    }
    in_parallel(&work);
}

#[test]
fn only_the_main_thread_opens_removes_and_receives() {
    let calls = OF_THE_MAIN_THREAD.iter().chain([&OPENS]);
    let work: Vec<_> =
        calls.flat_map(|call| THREADS.map(|thread| (thread, *call, &["--control"][..]))).collect();
    in_parallel(&work);
}

#[test]
fn the_threads_of_the_other_engine_are_no_freer() {
    let calls = NEVER.iter().chain(OF_A_NEW_PROGRAM).chain(OF_THE_MAIN_THREAD).chain([&OPENS]);
    let work: Vec<_> = calls
        .flat_map(|call| {
            ["queue-0", "block-io"].map(|thread| (thread, *call, &["--io-engine=sync"][..]))
        })
        .collect();
    in_parallel(&work);
}

#[test]
fn the_main_thread_opens_only_the_disks_files() {
    if !has_landlock() {
        return;
    }
    for args in [&[][..], &["--control"]] {
        let line = allowed("main", OPENS, args);
        assert!(line.contains("returned -1: Permission denied"), "{line}");
    }
    let boot_id = Call("openat", libc::SYS_openat, "-100 =/proc/sys/kernel/random/boot_id 0 0");
    let line = allowed("main", boot_id, &[]);
    assert!(!line.contains("returned -1"), "{line}");
}

#[test]
fn other_processes_get_no_signal() {
    // The first process may always get one from root, and is outside.
    let line = allowed("main", Call("kill", libc::SYS_kill, "1 0"), &["--control"]);
    assert!(line.contains("returned -1: Operation not permitted"), "{line}");
}

#[test]
fn without_the_sandbox_all_of_it_is_possible() {
    let call = Call("personality", libc::SYS_personality, "4294967295");
    for (mode, threads) in [
        ("--sandbox=off", &["main", "queue-0"][..]),
        ("--sandbox=log", &["main", "queue-0", "committer"]),
    ] {
        for thread in threads {
            let line = allowed(thread, call, &[mode]);
            assert!(line.contains("returned 0"), "{line}");
        }
    }
}

#[test]
fn a_panic_is_still_printed_and_an_abort_ends_the_daemon() {
    for thread in ["main", "committer"] {
        let (mut daemon, _directory) = planted(thread, "panic", &[]);
        daemon.wait_line("a planted panic");
        let (mut daemon, _directory) = planted(thread, "abort", &[]);
        assert_eq!(daemon.reap().signal(), Some(libc::SIGABRT), "{thread}");
    }
}
