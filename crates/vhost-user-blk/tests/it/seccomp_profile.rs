//! The seccomp profile for containers (docs/guide/seccomp-io-uring.json): a daemon under it lacks
//! nothing. The tests are stricter than the profile: a system call that is not in it ends the
//! daemon.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::errno::Errno;
use testkit::frontend::{F_FLUSH, F_PROTOCOL_FEATURES, F_VERSION_1};
use testkit::request::FLUSH;
use testkit::ring::running;

use crate::common::{Daemon, PROGRAM, image, sector, upgrade_ok};

const PROFILE: &str = include_str!("../../../../docs/guide/seccomp-io-uring.json");

macro_rules! numbers {
    ($($name:ident)*) => { &[$((stringify!($name), libc::$name)),*] };
}

/// The system calls in the profile, by name.
const NUMBERS: &[(&str, libc::c_long)] = numbers!(
    SYS_accept4 SYS_access SYS_arch_prctl SYS_bind SYS_brk SYS_capget SYS_capset SYS_chdir
    SYS_clock_getres SYS_clock_gettime SYS_clock_nanosleep SYS_clone SYS_clone3 SYS_close
    SYS_close_range SYS_connect SYS_copy_file_range SYS_dup SYS_dup2 SYS_dup3 SYS_epoll_create1
    SYS_epoll_ctl SYS_epoll_pwait SYS_epoll_wait SYS_eventfd2 SYS_execve SYS_exit SYS_exit_group
    SYS_faccessat SYS_faccessat2 SYS_fadvise64 SYS_fallocate SYS_fchdir SYS_fchmod SYS_fcntl
    SYS_fdatasync SYS_flock SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate SYS_futex SYS_getcpu
    SYS_getcwd SYS_getdents64 SYS_getegid SYS_geteuid SYS_getgid SYS_getgroups SYS_getpeername
    SYS_getpgid SYS_getpgrp SYS_getpid SYS_getppid SYS_getrandom SYS_getresgid SYS_getresuid
    SYS_getrusage SYS_getsockname SYS_getsockopt SYS_gettid SYS_gettimeofday SYS_getuid
    SYS_inotify_add_watch SYS_inotify_init1 SYS_inotify_rm_watch SYS_io_uring_enter
    SYS_io_uring_register SYS_io_uring_setup SYS_ioctl SYS_kill SYS_landlock_add_rule
    SYS_landlock_create_ruleset SYS_landlock_restrict_self SYS_linkat SYS_listen SYS_lseek
    SYS_lstat SYS_madvise SYS_membarrier SYS_memfd_create SYS_mincore SYS_mmap SYS_mprotect
    SYS_mremap SYS_munmap SYS_nanosleep SYS_newfstatat SYS_open SYS_openat SYS_pipe SYS_pipe2
    SYS_poll SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv SYS_preadv2 SYS_prlimit64 SYS_pwrite64
    SYS_pwritev SYS_pwritev2 SYS_read SYS_readlink SYS_readlinkat SYS_readv SYS_recvfrom
    SYS_recvmsg SYS_rename SYS_renameat SYS_renameat2 SYS_restart_syscall SYS_rseq
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sched_getaffinity SYS_sched_yield
    SYS_seccomp SYS_sendmsg SYS_sendto SYS_set_robust_list SYS_set_tid_address SYS_setfsgid
    SYS_setfsuid SYS_setgid SYS_setgroups SYS_setpgid SYS_setresgid SYS_setresuid SYS_setsockopt
    SYS_setuid SYS_shutdown SYS_sigaltstack SYS_signalfd4 SYS_socket SYS_socketpair SYS_stat
    SYS_statfs SYS_statx SYS_sync_file_range SYS_sysinfo SYS_tgkill SYS_time SYS_timerfd_create
    SYS_timerfd_settime SYS_umask SYS_uname SYS_unlink SYS_unlinkat SYS_vfork SYS_wait4
    SYS_waitid SYS_write SYS_writev
);

/// What the profile does with each system call that it names: `None` allows it, else the error.
fn rules() -> Vec<(u32, Option<u32>)> {
    let profile: serde_json::Value = serde_json::from_str(PROFILE).unwrap();
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    let mut rules = Vec::new();
    for group in profile["syscalls"].as_array().unwrap() {
        let error = group.get("errnoRet").map(|errno| errno.as_u64().unwrap().try_into().unwrap());
        let action = if error.is_none() { "SCMP_ACT_ALLOW" } else { "SCMP_ACT_ERRNO" };
        assert_eq!(group["action"], action);
        for name in group["names"].as_array().unwrap() {
            let known = |it: &&(&str, _)| it.0.strip_prefix("SYS_") == name.as_str();
            let (_, number) = NUMBERS.iter().find(known).expect("a known name");
            rules.push((u32::try_from(*number).unwrap(), error));
        }
    }
    rules
}

/// `command` under the profile, whose conditions on arguments are left out.
fn confined(mut command: Command) -> Command {
    let op = |code: u32, k: u32, jf: u8| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: 0,
        jf,
        k,
    };
    // The system call's number is the first field of what is filtered.
    let mut program = vec![op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for (number, error) in rules() {
        let action = error.map_or(libc::SECCOMP_RET_ALLOW, |errno| libc::SECCOMP_RET_ERRNO | errno);
        program.push(op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number, 1));
        program.push(op(libc::BPF_RET | libc::BPF_K, action, 0));
    }
    program.push(op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_KILL_PROCESS, 0));
    let install = move || {
        nix::sys::prctl::set_no_new_privs()?;
        let len = u16::try_from(program.len()).unwrap_or(0);
        let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
        // SAFETY: the program is valid and outlives the call, which copies it.
        let result = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter)
        };
        Ok(Errno::result(result).map(|_| ())?)
    };
    // SAFETY: prctl is async-signal-safe, and nothing is allocated.
    unsafe { command.pre_exec(install) };
    command
}

fn serves_under_the_profile(directory: &Path, args: &[&str]) {
    let at = directory.display();
    let mut command = Command::new(PROGRAM);
    command.arg(format!("--socket-path={at}/socket")).arg(format!("--control={at}/control"));
    command.arg(format!("{at}/cow,{}", image(directory).display())).args(args);
    let mut daemon = Daemon::spawn_as_is(confined(command), directory.join("socket"));
    assert!(daemon.listens(), "{}", daemon.said());
    for round in 0..2 {
        let features = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH;
        let (_frontend, memory, mut ring) = running(daemon.connect(), features);
        assert_eq!(ring.read_sector(&memory, 5), sector(5));
        ring.write_sector(&memory, 20 + round, &sector(77));
        ring.submit(&memory, FLUSH, 0, &[]);
        ring.kick();
        assert_eq!(ring.wait::<0>(&memory).0, 0);
        upgrade_ok(directory);
        assert_eq!(ring.read_sector(&memory, 20 + round), sector(77));
    }
    let log = daemon.terminate();
    assert!(!log.contains("WARN"), "{log}");
}

#[test]
fn a_daemon_serves_and_is_upgraded_under_the_profile_for_containers() {
    let cases = [
        &["--io-engine=io_uring"][..],
        &["--io-engine=sync", "--format=uml"],
        &["--cow-cache=direct", "--base-cache=direct"],
    ];
    for args in cases {
        serves_under_the_profile(tempfile::tempdir().unwrap().path(), args);
    }
}

#[test]
fn the_profile_refuses_what_a_daemon_has_no_use_for() {
    let allowed: Vec<u32> = rules()
        .into_iter()
        .filter(|(_, error)| error.is_none())
        .map(|(number, _)| number)
        .collect();
    for number in [
        libc::SYS_ptrace,
        libc::SYS_mount,
        libc::SYS_bpf,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_clone3,
        libc::SYS_kexec_load,
        libc::SYS_init_module,
        libc::SYS_process_vm_readv,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_perf_event_open,
    ] {
        assert!(!allowed.contains(&u32::try_from(number).unwrap()), "{number}");
    }
}
