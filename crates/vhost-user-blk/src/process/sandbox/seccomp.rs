//! Which system calls each thread may make (seccomp).
//!
//! A filter is passed on to the threads and programs that a thread starts, and can only be added
//! to. So the main thread's filter allows what any thread needs, and each thread then narrows
//! itself.
//!
//! Which thread may do what in words: docs/architecture.md, "The sandbox".
//!
//! The kernel remembers which calls a filter allows whatever their arguments are (Linux 5.11), and
//! does not run it for those. So the calls of the path of a request have no conditions.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use block_io::ring::IoEngine;
use libc::{c_int, c_long};
use seccompiler::{
    BackendError, BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, apply_filter,
};

// What libc has with another type for each C library, or not at all.
const F_SETSIG: c_int = 10;
const F_SETOWN_EX: c_int = 15;
const REGISTER_FILES_UPDATE: u64 = 6;
const REGISTER_ENABLE_RINGS: u64 = 12;
const TCGETS: u64 = 0x5401;
const FIONREAD: u64 = 0x541b;
const FIONBIO: u64 = 0x5421;
const FIOCLEX: u64 = 0x5451;
const BLKSSZGET: u64 = 0x1268;
const FS_IOC_GETFSSYSFSPATH: u64 = 0x8081_1501;
const BTRFS_IOC_FS_INFO: u64 = 0x8400_941f;

/// A group of threads with the same system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The main thread, and with it the process.
    Main {
        /// Another program can take over (`--control`).
        upgrades: bool,
    },
    /// A queue's, when its ring is ready.
    Queue {
        /// What its ring uses.
        engine: IoEngine,
    },
    /// One that makes the system calls of a ring without io_uring.
    Operations,
    /// One that writes the disk's metadata and syncs it.
    Metadata,
    /// The one that watches the files below the top.
    BaseWatch,
    /// One that closes descriptors which may take their time.
    Closer,
}

/// Confines the calling thread, and all that it starts. `refused` is what happens to a system call
/// that is not allowed.
pub fn confine(thread: Thread, refused: SeccompAction) -> Result<(), Error> {
    let mut allowed = Rules::default();
    thread.allow(&mut allowed)?;
    apply_filter(&program(allowed, refused, SeccompAction::Allow)?)?;
    // The kernel takes the stricter action of two filters, and to fail is less strict than to be
    // refused. So the calls that fail are allowed above.
    let enosys = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let fails = thread.fails().iter().map(|&call| (call, Vec::new())).collect();
    apply_filter(&program(fails, SeccompAction::Allow, enosys)?)
}

/// The rules for each system call, of which one must hold. No rules: it does not depend on the
/// arguments.
type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

fn program(
    rules: Rules,
    others: SeccompAction,
    these: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    SeccompFilter::new(rules, others, these, std::env::consts::ARCH.try_into()?)?.try_into()
}

/// Allows calls with any arguments.
fn allow(rules: &mut Rules, calls: &[c_long]) {
    rules.extend(calls.iter().map(|&call| (call, Vec::new())));
}

/// Allows a call if its argument number `argument` (from 0) has one of these values.
fn allow_if(
    rules: &mut Rules,
    call: c_long,
    argument: u8,
    values: &[u64],
) -> Result<(), BackendError> {
    values.iter().try_for_each(|&value| add(rules, call, argument, SeccompCmpOp::Eq, value))
}

/// Allows a call if those bits of its argument that are in `mask` are `value`.
fn allow_masked(
    rules: &mut Rules,
    call: c_long,
    argument: u8,
    mask: c_int,
    value: c_int,
) -> Result<(), BackendError> {
    let mask = SeccompCmpOp::MaskedEq(mask.unsigned_abs().into());
    add(rules, call, argument, mask, value.unsigned_abs().into())
}

fn add(
    rules: &mut Rules,
    call: c_long,
    argument: u8,
    op: SeccompCmpOp,
    value: u64,
) -> Result<(), BackendError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)?;
    let rule = SeccompRule::new(vec![condition])?;
    match rules.entry(call) {
        Entry::Vacant(place) => _ = place.insert(vec![rule]),
        // Without rules it is allowed anyway.
        Entry::Occupied(mut there) if !there.get().is_empty() => there.get_mut().push(rule),
        Entry::Occupied(_) => {}
    }
    Ok(())
}

impl Thread {
    fn allow(self, rules: &mut Rules) -> Result<(), BackendError> {
        all(rules)?;
        match self {
            Thread::Main { upgrades } => {
                queue(rules)?;
                queue_of_threads(rules)?;
                metadata(rules);
                base_watch(rules)?;
                main(rules)?;
                files(rules)?;
                if upgrades {
                    new_program(rules)?;
                }
            }
            Thread::Queue { engine } => {
                queue(rules)?;
                if engine == IoEngine::Sync {
                    queue_of_threads(rules)?;
                }
            }
            Thread::Operations => transfer(rules),
            Thread::Metadata => metadata(rules),
            Thread::BaseWatch => base_watch(rules)?,
            Thread::Closer => {}
        }
        Ok(())
    }

    /// What fails with ENOSYS, because the C library has another way then: it allocates memory
    /// without asking the system for the number of its processors, and starts a thread by clone(2),
    /// whose arguments are not in memory, where a filter does not see them.
    fn fails(self) -> &'static [c_long] {
        match self {
            Thread::Main { .. } => &[libc::SYS_clone3],
            _ => &[libc::SYS_clone3, libc::SYS_openat],
        }
    }
}

/// For every thread: its life, its memory, and what is open.
fn all(rules: &mut Rules) -> Result<(), BackendError> {
    allow(
        rules,
        &[
            libc::SYS_read,
            libc::SYS_write,
            libc::SYS_writev,
            libc::SYS_close,
            libc::SYS_futex,
            libc::SYS_clock_gettime,
            libc::SYS_clock_nanosleep,
            libc::SYS_nanosleep,
            libc::SYS_gettimeofday,
            libc::SYS_getrandom,
            libc::SYS_getcpu,
            libc::SYS_sched_getaffinity,
            libc::SYS_sched_yield,
            libc::SYS_membarrier,
            libc::SYS_munmap,
            libc::SYS_mremap,
            libc::SYS_brk,
            libc::SYS_rt_sigprocmask,
            libc::SYS_rt_sigreturn,
            libc::SYS_sigaltstack,
            libc::SYS_restart_syscall,
            libc::SYS_ppoll,
            libc::SYS_getpid,
            libc::SYS_gettid,
            libc::SYS_exit,
            libc::SYS_exit_group,
            // See `Thread::fails`.
            libc::SYS_clone3,
            libc::SYS_openat,
        ],
    );
    #[cfg(target_arch = "x86_64")]
    allow(rules, &[libc::SYS_poll]);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        allow_masked(rules, call, 2, libc::PROT_EXEC, 0)?;
    }
    let advice = [
        libc::MADV_DONTNEED,
        libc::MADV_FREE,
        libc::MADV_RANDOM,
        libc::MADV_DONTDUMP,
        // By the C library's tunables.
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
    ];
    allow_if(rules, libc::SYS_madvise, 2, &advice.map(number))?;
    let names = [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA, libc::PR_SET_NO_NEW_PRIVS];
    allow_if(rules, libc::SYS_prctl, 0, &names.map(number))?;
    // To add a filter.
    allow_if(rules, libc::SYS_seccomp, 0, &[libc::SECCOMP_SET_MODE_FILTER.into()])?;
    // Of a descriptor, not of a path.
    allow_masked(rules, libc::SYS_newfstatat, 3, libc::AT_EMPTY_PATH, libc::AT_EMPTY_PATH)?;
    allow_masked(rules, libc::SYS_statx, 2, libc::AT_EMPTY_PATH, libc::AT_EMPTY_PATH)?;
    allow(rules, &[libc::SYS_fstat]);
    allow_if(rules, libc::SYS_fcntl, 1, &[libc::F_GETFD, libc::F_GETFL].map(number))?;
    // abort(3); the handlers of SIGBUS and of refused calls.
    allow_if(rules, libc::SYS_tgkill, 0, &[std::process::id().into()])?;
    allow_if(rules, libc::SYS_rt_sigaction, 0, &[libc::SIGABRT, libc::SIGBUS].map(number))
}

/// Descriptors are read and written at a place.
fn transfer(rules: &mut Rules) {
    allow(
        rules,
        &[
            libc::SYS_pread64,
            libc::SYS_pwrite64,
            libc::SYS_preadv,
            libc::SYS_pwritev,
            libc::SYS_preadv2,
            libc::SYS_pwritev2,
            libc::SYS_fallocate,
        ],
    );
}

fn metadata(rules: &mut Rules) {
    transfer(rules);
    allow(
        rules,
        &[
            libc::SYS_fdatasync,
            libc::SYS_fsync,
            libc::SYS_sync_file_range,
            libc::SYS_lseek,
            libc::SYS_ftruncate,
            libc::SYS_fstatfs,
        ],
    );
}

fn queue(rules: &mut Rules) -> Result<(), BackendError> {
    transfer(rules);
    allow(
        rules,
        &[
            libc::SYS_io_uring_enter,
            libc::SYS_mincore,
            libc::SYS_lseek,
            libc::SYS_fstatfs,
            libc::SYS_sendto,
            libc::SYS_recvfrom,
            libc::SYS_timerfd_create,
            libc::SYS_timerfd_settime,
            // What is to be waited for is tried with it.
            libc::SYS_epoll_create1,
            libc::SYS_epoll_ctl,
        ],
    );
    allow_if(rules, libc::SYS_io_uring_register, 1, &[REGISTER_FILES_UPDATE])
}

/// A queue whose ring is served by threads.
fn queue_of_threads(rules: &mut Rules) -> Result<(), BackendError> {
    start_thread(rules)?;
    allow(rules, &[libc::SYS_eventfd2, libc::SYS_epoll_pwait]);
    #[cfg(target_arch = "x86_64")]
    allow(rules, &[libc::SYS_epoll_wait]);
    Ok(())
}

fn base_watch(rules: &mut Rules) -> Result<(), BackendError> {
    let leases = [libc::F_SETLEASE, libc::F_GETLEASE, F_SETSIG, F_SETOWN_EX];
    allow_if(rules, libc::SYS_fcntl, 1, &leases.map(number))
}

fn start_thread(rules: &mut Rules) -> Result<(), BackendError> {
    allow(rules, &[libc::SYS_set_robust_list, libc::SYS_rseq]);
    allow_masked(rules, libc::SYS_clone, 0, libc::CLONE_THREAD, libc::CLONE_THREAD)
}

fn main(rules: &mut Rules) -> Result<(), BackendError> {
    allow(
        rules,
        &[
            libc::SYS_accept4,
            libc::SYS_recvmsg,
            libc::SYS_sendmsg,
            libc::SYS_shutdown,
            libc::SYS_getsockopt,
            libc::SYS_getsockname,
            libc::SYS_getpeername,
            libc::SYS_dup3,
            libc::SYS_memfd_create,
            libc::SYS_geteuid,
            // Sockets' files are examined and removed; devices are looked up in /sys.
            libc::SYS_readlinkat,
            libc::SYS_newfstatat,
            libc::SYS_statx,
            libc::SYS_unlinkat,
        ],
    );
    #[cfg(target_arch = "x86_64")]
    allow(rules, &[libc::SYS_unlink, libc::SYS_readlink]);
    // A queue's thread enables its io_uring before it narrows itself.
    allow_if(rules, libc::SYS_io_uring_register, 1, &[REGISTER_ENABLE_RINGS])?;
    // The C library's own, SIGCANCEL and SIGSETXID, with the first thread; `signals::interrupt`.
    allow_if(rules, libc::SYS_rt_sigaction, 0, &[32, 33, number(libc::SIGURG)])?;
    let level = [number(libc::SOL_SOCKET)];
    allow_if(rules, libc::SYS_setsockopt, 1, &level)?;
    allow_if(rules, libc::SYS_socketpair, 0, &[number(libc::AF_UNIX)])?;
    allow_if(rules, libc::SYS_ioctl, 1, &[FIONREAD, FIONBIO])?;
    let commands = [
        libc::F_SETFD,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
        libc::F_ADD_SEALS,
        libc::F_GET_SEALS,
        libc::F_OFD_SETLK,
        libc::F_OFD_GETLK,
    ];
    allow_if(rules, libc::SYS_fcntl, 1, &commands.map(number))
}

/// The disk is opened again, when its guest arrives or comes back. Landlock says what is opened.
fn files(rules: &mut Rules) -> Result<(), BackendError> {
    allow(
        rules,
        &[
            libc::SYS_openat2,
            libc::SYS_faccessat,
            libc::SYS_faccessat2,
            libc::SYS_getcwd,
            libc::SYS_fadvise64,
            libc::SYS_signalfd4,
            libc::SYS_inotify_init1,
            libc::SYS_inotify_add_watch,
            libc::SYS_fchmod,
            libc::SYS_linkat,
            libc::SYS_renameat,
            libc::SYS_renameat2,
        ],
    );
    #[cfg(target_arch = "x86_64")]
    allow(rules, &[libc::SYS_open, libc::SYS_access, libc::SYS_rename]);
    allow_if(rules, libc::SYS_ioctl, 1, &[BLKSSZGET, FS_IOC_GETFSSYSFSPATH, BTRFS_IOC_FS_INFO])
}

/// A program is started, and runs under this filter: in a child, then in the place of this one.
/// That the next version may need more is why there is more here than this one needs.
fn new_program(rules: &mut Rules) -> Result<(), BackendError> {
    allow(
        rules,
        &[
            libc::SYS_execve,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
            libc::SYS_wait4,
            libc::SYS_waitid,
            libc::SYS_setpgid,
            libc::SYS_getpgid,
            libc::SYS_getppid,
            libc::SYS_getuid,
            libc::SYS_getgid,
            libc::SYS_getegid,
            libc::SYS_getgroups,
            libc::SYS_getresuid,
            libc::SYS_getresgid,
            libc::SYS_capget,
            libc::SYS_capset,
            libc::SYS_umask,
            libc::SYS_uname,
            libc::SYS_sysinfo,
            libc::SYS_getrusage,
            libc::SYS_prlimit64,
            libc::SYS_set_tid_address,
            libc::SYS_sched_getparam,
            libc::SYS_sched_getscheduler,
            libc::SYS_clock_getres,
            libc::SYS_mmap,
            libc::SYS_mprotect,
            libc::SYS_mlock,
            libc::SYS_munlock,
            libc::SYS_rt_sigaction,
            libc::SYS_rt_sigtimedwait,
            libc::SYS_tgkill,
            libc::SYS_dup,
            libc::SYS_pipe2,
            libc::SYS_readv,
            libc::SYS_pselect6,
            libc::SYS_getdents64,
            libc::SYS_flock,
            libc::SYS_statfs,
            libc::SYS_inotify_rm_watch,
            libc::SYS_copy_file_range,
            libc::SYS_close_range,
            libc::SYS_landlock_create_ruleset,
            libc::SYS_landlock_add_rule,
            libc::SYS_landlock_restrict_self,
        ],
    );
    #[cfg(target_arch = "x86_64")]
    allow(
        rules,
        &[
            libc::SYS_arch_prctl,
            libc::SYS_stat,
            libc::SYS_lstat,
            libc::SYS_dup2,
            libc::SYS_pipe,
            libc::SYS_select,
            libc::SYS_time,
            libc::SYS_vfork,
            libc::SYS_getpgrp,
        ],
    );
    // In no new namespace.
    let new = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    allow_masked(rules, libc::SYS_clone, 0, new, 0)?;
    // The service manager is notified without a connection.
    allow_if(rules, libc::SYS_socket, 0, &[number(libc::AF_UNIX)])?;
    // Landlock says to whom.
    allow_if(rules, libc::SYS_kill, 1, &[0, number(libc::SIGKILL)])?;
    let advice = [
        libc::MADV_NORMAL,
        libc::MADV_SEQUENTIAL,
        libc::MADV_WILLNEED,
        libc::MADV_DONTFORK,
        libc::MADV_COLD,
        libc::MADV_PAGEOUT,
        libc::MADV_POPULATE_READ,
        libc::MADV_POPULATE_WRITE,
    ];
    allow_if(rules, libc::SYS_madvise, 2, &advice.map(number))?;
    let process = [
        libc::PR_SET_PDEATHSIG,
        libc::PR_GET_DUMPABLE,
        libc::PR_SET_DUMPABLE,
        libc::PR_GET_NO_NEW_PRIVS,
        libc::PR_CAPBSET_READ,
        libc::PR_CAPBSET_DROP,
        libc::PR_CAP_AMBIENT,
        libc::PR_GET_SECCOMP,
    ];
    allow_if(rules, libc::SYS_prctl, 0, &process.map(number))?;
    allow_if(rules, libc::SYS_fcntl, 1, &[number(libc::F_DUPFD)])?;
    // isatty(3).
    allow_if(rules, libc::SYS_ioctl, 1, &[TCGETS, FIOCLEX])
}

fn number(value: c_int) -> u64 {
    value.unsigned_abs().into()
}
