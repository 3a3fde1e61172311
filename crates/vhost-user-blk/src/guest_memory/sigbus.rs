//! SIGBUS in mapped files: a fault becomes a flag on the mapping instead of the death of the
//! process.
//!
//! Guest memory and image files are mapped files that somebody else can shorten. Touching a page
//! past the new end raises SIGBUS. The one handler of this process looks the address up in a fixed
//! table of registered mappings. If it finds it, it marks the mapping as poisoned, puts a zero page
//! under the address and returns, so that the interrupted access goes on. Whoever uses the mapping
//! asks [`Registration::poisoned`] before it publishes anything derived from it. A fault anywhere
//! else gets what it got before this handler was there.
//!
//! Kernel accesses (io_uring, `preadv`) to such a page fail with EFAULT and never raise the signal.

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Mappings that can be registered at one time: the memory regions of one session (509) twice,
/// because a new snapshot is built before the old one goes, and the files of a chain of layers.
pub(crate) const MAPPINGS_MAX: usize = 2048;

/// Why a mapping was not registered.
#[derive(Debug, thiserror::Error)]
pub enum SigbusError {
    /// The table is full.
    #[error(
        "{MAPPINGS_MAX} mappings are watched for SIGBUS already; close some images or memory regions first"
    )]
    TableFull,
    /// `sigaction` failed.
    #[error("cannot install the SIGBUS handler: {0}")]
    Install(#[source] io::Error),
}

/// One registered mapping. The handler may look at any moment: `start` is written last when a slot
/// is filled and zeroed first when it is given back, and the handler reads it again after the other
/// fields.
struct Slot {
    taken: AtomicBool,
    /// First byte; 0 means that the slot does not count.
    start: AtomicUsize,
    /// First byte behind the mapping.
    end: AtomicUsize,
    /// Size in bytes of the pages behind the mapping (huge pages cannot be replaced in part).
    page: AtomicUsize,
    poisoned: AtomicBool,
}

impl Slot {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
        }
    }

    /// The page size, if the mapping in this slot holds `address`.
    fn page_of(&self, address: usize) -> Option<usize> {
        let start = self.start.load(Ordering::Acquire);
        let end = self.end.load(Ordering::Acquire);
        let page = self.page.load(Ordering::Acquire);
        let stable = self.start.load(Ordering::Acquire) == start;
        (start != 0 && stable && (start..end).contains(&address)).then_some(page)
    }
}

static SLOTS: [Slot; MAPPINGS_MAX] = [const { Slot::new() }; MAPPINGS_MAX];
/// Slots at and above this index were never used, so the handler need not look there.
static SLOTS_USED: AtomicUsize = AtomicUsize::new(0);
/// Set with the first poisoned mapping and never cleared: the common "nothing ever happened" is one
/// load.
static ANY_POISONED: AtomicBool = AtomicBool::new(false);
/// What SIGBUS did before this module.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// A mapping that the handler knows. Dropping it takes the mapping out; do so before the memory is
/// unmapped.
#[derive(Debug)]
pub(crate) struct Registration {
    slot: usize,
}

impl Registration {
    /// Registers `len` bytes of mapped file at `start`, both multiples of `page` bytes, the size of
    /// its pages.
    ///
    /// # Safety
    /// The range must be a mapping of a file that this process made and that stays until the
    /// `Registration` is dropped; nothing else may rely on what its pages hold after they were lost
    /// to a shortened file.
    pub(crate) unsafe fn new(start: *mut u8, len: usize, page: usize) -> Result<Self, SigbusError> {
        install()?;
        let free = |slot: &Slot| {
            slot.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let slot = SLOTS.iter().position(free).ok_or(SigbusError::TableFull)?;
        let entry = &SLOTS[slot];
        entry.poisoned.store(false, Ordering::Relaxed);
        entry.page.store(page, Ordering::Release);
        entry.end.store(start as usize + len, Ordering::Release);
        SLOTS_USED.fetch_max(slot + 1, Ordering::Release);
        entry.start.store(start as usize, Ordering::Release);
        Ok(Self { slot })
    }

    /// Whether a page of the mapping was lost, so that what was read from it may be zeros and what
    /// was written to it may have gone nowhere. Stays true.
    #[inline]
    pub(crate) fn poisoned(&self) -> bool {
        ANY_POISONED.load(Ordering::Acquire) && SLOTS[self.slot].poisoned.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let entry = &SLOTS[self.slot];
        entry.start.store(0, Ordering::SeqCst);
        entry.taken.store(false, Ordering::Release);
    }
}

/// Installs the handler, once in the life of the process.
fn install() -> Result<(), SigbusError> {
    let result = INSTALLED.get_or_init(|| {
        // SAFETY: plain sigaction calls; the structs are valid, zero is a valid value for each
        // field, and the handler only does what is async-signal-safe.
        unsafe {
            let mut previous: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, ptr::null(), &mut previous) != 0 {
                return Err(errno());
            }
            // Stored before the handler can run for the first time.
            PREVIOUS.get_or_init(|| previous);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            // The alternate stack that std gives each thread: the fault may have come on a nearly
            // full one.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            if libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) != 0 {
                return Err(errno());
            }
        }
        Ok(())
    });
    result.map_err(|errno| SigbusError::Install(io::Error::from_raw_os_error(errno)))
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)
}

/// The handler. Async-signal-safe: atomics, `mmap`, `sigaction` and `raise` only; no allocation, no
/// lock.
extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands a SA_SIGINFO handler a valid siginfo; si_addr is meaningful for the
    // positive si_code of a fault, and is not used otherwise. errno is this thread's own.
    let (code, address, saved_errno) =
        unsafe { ((*info).si_code, (*info).si_addr() as usize, *libc::__errno_location()) };
    // Memory that the machine has lost and that nobody is accessing: the process may go on, and its
    // next access faults.
    if code == libc::BUS_MCEERR_AO {
        poison(address);
        return;
    }
    let fault = code > 0;
    if !(is_access(code) && replace_page(address)) {
        let previous = PREVIOUS.get().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: `previous` is what sigaction gave, or null, which changes nothing.
        unsafe { libc::sigaction(signal, previous, ptr::null_mut()) };
        if !fault {
            // Sent by kill(2): unlike a fault it does not come again by itself.
            // SAFETY: no memory involved.
            unsafe { libc::raise(signal) };
        }
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = saved_errno };
}

/// Whether the kernel reports an access of this thread: past the end of a file, or of memory that
/// the machine has lost. `BUS_ADRALN` and what the kernel sends unasked are none.
const fn is_access(code: i32) -> bool {
    matches!(code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR)
}

/// Marks the mapping around `address` as lost, if it is a registered one; its page
/// size in bytes.
fn poison(address: usize) -> Option<usize> {
    let used = SLOTS_USED.load(Ordering::Acquire);
    let (slot, page) =
        SLOTS[..used].iter().find_map(|slot| Some((slot, slot.page_of(address)?)))?;
    slot.poisoned.store(true, Ordering::SeqCst);
    ANY_POISONED.store(true, Ordering::SeqCst);
    Some(page)
}

/// Puts a zero page under `address` if it is in a registered mapping. False: it is not, or the page
/// could not be had.
fn replace_page(address: usize) -> bool {
    // Before the page changes: another thread that meets the zeros must find the flag set.
    let Some(page) = poison(address) else { return false };
    // SAFETY: the page lies in a mapping whose owner agreed to this when it was registered and that
    // is still mapped, since this thread is in the middle of an access to it; its start and length
    // are multiples of the page size.
    let mapped = unsafe {
        libc::mmap(
            (address & !(page - 1)) as *mut libc::c_void,
            page,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};

    use super::*;

    const PAGE: usize = 4096;

    struct Mapped {
        registration: Registration,
        start: *mut u8,
        file: File,
    }

    /// A registered shared mapping of a new memfd of `pages` pages, each filled with 0x5a.
    fn mapped(pages: usize) -> Mapped {
        // SAFETY: fresh fd, owned by the File; the mapping is new and covers the whole file.
        unsafe {
            let fd = libc::memfd_create(c"sigbus".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            let file = File::from_raw_fd(fd);
            file.set_len((pages * PAGE) as u64).unwrap();
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let start = libc::mmap(
                ptr::null_mut(),
                pages * PAGE,
                prot,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(start, libc::MAP_FAILED);
            let start = start.cast::<u8>();
            start.write_bytes(0x5a, pages * PAGE);
            let registration = Registration::new(start, pages * PAGE, PAGE).unwrap();
            Mapped { registration, start, file }
        }
    }

    fn read(mapped: &Mapped, offset: usize) -> u8 {
        // SAFETY: inside the mapping; a lost page is replaced by the handler.
        unsafe { mapped.start.add(offset).read_volatile() }
    }

    #[test]
    fn shortened_file_poisons_its_mapping_and_nothing_else() {
        let (lost, kept) = (mapped(4), mapped(4));
        assert_eq!(read(&lost, 2 * PAGE), 0x5a);
        assert!(!lost.registration.poisoned());
        lost.file.set_len(PAGE as u64).unwrap();
        assert_eq!(read(&lost, PAGE - 1), 0x5a, "the page that is left still reads");
        assert!(
            !lost.registration.poisoned(),
            "nothing was lost until a page past the end was touched"
        );

        assert_eq!(read(&lost, 2 * PAGE + 7), 0);
        assert!(lost.registration.poisoned());
        assert_eq!(read(&kept, 2 * PAGE + 7), 0x5a);
        assert!(!kept.registration.poisoned());

        // Writes to a lost page, and to further ones, go to the zero page.
        // SAFETY: inside the mapping.
        unsafe { lost.start.add(3 * PAGE + 1).write_volatile(1) };
        assert_eq!(read(&lost, 3 * PAGE + 1), 1);
    }

    #[test]
    fn errno_survives_the_handler() {
        let lost = mapped(1);
        lost.file.set_len(0).unwrap();
        // SAFETY: errno of this thread.
        unsafe { *libc::__errno_location() = libc::EXDEV };
        assert_eq!(read(&lost, 0), 0);
        // SAFETY: as above.
        assert_eq!(unsafe { *libc::__errno_location() }, libc::EXDEV);
    }

    #[test]
    fn a_slot_is_clean_when_it_is_used_again() {
        let lost = mapped(1);
        lost.file.set_len(0).unwrap();
        read(&lost, 0);
        assert!(lost.registration.poisoned());
        let slot = lost.registration.slot;
        drop(lost);
        // Other tests may take the slot in between, so the claim is about any registration made
        // from now on.
        let fresh: Vec<Mapped> = (0..8).map(|_| mapped(1)).collect();
        assert!(fresh.iter().all(|mapped| !mapped.registration.poisoned()), "slot {slot}");
    }

    /// Runs `child` in a forked process and gives the signal that killed it, if one did.
    fn killed_by(child: impl FnOnce()) -> Option<i32> {
        // SAFETY: the child runs the closure, which allocates nothing and takes no lock, and leaves
        // by _exit.
        unsafe {
            let pid = libc::fork();
            assert!(pid >= 0);
            if pid == 0 {
                child();
                libc::_exit(0);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
            libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status))
        }
    }

    #[test]
    fn other_faults_and_sent_signals_still_kill() {
        let Mapped { registration, start, file } = mapped(1);
        file.set_len(0).unwrap();
        let address = start as usize;
        let touch = || {
            // SAFETY: mapped, though its page is lost.
            unsafe { ptr::with_exposed_provenance::<u8>(address).read_volatile() };
        };
        assert_eq!(killed_by(touch), None, "registered: survives");
        drop(registration);
        assert_eq!(killed_by(touch), Some(libc::SIGBUS), "no longer registered: dies");
        // Twice: on the first one the handler that std had installed puts the default back and
        // returns, as it does without this module.
        // SAFETY: no memory involved.
        let send = || unsafe {
            libc::kill(libc::getpid(), libc::SIGBUS);
            libc::kill(libc::getpid(), libc::SIGBUS);
        };
        assert_eq!(killed_by(send), Some(libc::SIGBUS));
    }

    /// Memory that the machine has lost and nobody is accessing (early kill): marked, not replaced.
    #[test]
    fn lost_memory_that_nobody_accesses_is_only_marked() {
        let lost = mapped(2);
        // SAFETY: zero is a valid siginfo; the fields set are those of SIGBUS.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        info.si_signo = libc::SIGBUS;
        info.si_code = libc::BUS_MCEERR_AO;
        // SAFETY: si_addr is at byte 16 of a siginfo on x86-64 and aarch64, which has 128.
        unsafe {
            (&raw mut info).cast::<usize>().add(2).write(lost.start as usize + PAGE);
        }
        on_sigbus(libc::SIGBUS, &raw mut info, ptr::null_mut());
        assert!(lost.registration.poisoned());
        assert_eq!(read(&lost, PAGE), 0x5a, "the page is the frontend's still");
    }
}
