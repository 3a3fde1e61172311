//! What the host must offer. This is checked before the daemon listens: otherwise it would only
//! show when the first ring starts, and the guest would wait for ever.

use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};

use block_io::ring::{DisabledUring, IoEngine, NoUring, Uring};
use nix::unistd::{SysconfVar, sysconf};

use crate::guest_memory::PAGE_SIZE;

/// What the host lacks.
#[derive(Debug, thiserror::Error)]
pub enum RequirementError {
    /// Alignments and mappings assume one page size.
    #[error(
        "the host's page size is {found} bytes, expected {PAGE_SIZE}; this program supports x86-64 only"
    )]
    PageSize {
        /// Bytes; 0 if the system does not report it.
        found: u64,
    },
    /// The I/O engine on the command line is not available.
    #[error(
        "--io-engine=io_uring: {source} ({hint}); use --io-engine=sync, or leave the option out"
    )]
    Engine {
        /// The usual reason.
        hint: &'static str,
        /// What was refused.
        source: NoUring,
    },
}

/// Refuses a host with pages of another size than this program is written for.
pub fn check_page_size() -> Result<(), RequirementError> {
    check_page(sysconf(SysconfVar::PAGE_SIZE).ok().flatten())
}

fn check_page(found: Option<libc::c_long>) -> Result<(), RequirementError> {
    match found.map(u64::try_from) {
        Some(Ok(PAGE_SIZE)) => Ok(()),
        Some(Ok(found)) => Err(RequirementError::PageSize { found }),
        // POSIX requires a system to report it.
        _ => Err(RequirementError::PageSize { found: 0 }),
    }
}

/// The I/O engine of the queues.
#[derive(Debug)]
pub struct Engine {
    use_now: IoEngine,
    /// It is the one on the command line, so no other may be used.
    asked_for: bool,
    /// Why io_uring, the default, is not used.
    refused: Option<NoUring>,
    /// Set once a later failure of io_uring has been logged.
    said: OnceLock<()>,
    /// One for each queue that has no thread yet. They are made at the start, so that nobody needs
    /// to be able to make one later.
    urings: Mutex<Vec<DisabledUring>>,
}

impl Engine {
    /// The engine that was asked for, for so many queues of at most so many requests at a time.
    /// Without one, io_uring if it is available, else threads.
    pub fn choose(
        asked_for: Option<IoEngine>,
        queues: u16,
        depth: u16,
    ) -> Result<Self, RequirementError> {
        let engine = asked_for.unwrap_or(IoEngine::IoUring);
        let (use_now, urings, refused) = match prepare(engine, queues, depth) {
            Ok(urings) => (engine, urings, None),
            Err(source) if asked_for.is_some() => {
                return Err(RequirementError::Engine { hint: hint(&source), source });
            }
            Err(source) => (IoEngine::Sync, Vec::new(), Some(source)),
        };
        let (asked_for, said) = (asked_for.is_some(), OnceLock::new());
        Ok(Engine { use_now, asked_for, refused, said, urings: Mutex::new(urings) })
    }

    /// Logs the choice.
    pub fn report(&self) {
        match &self.refused {
            None => log::debug!("I/O engine: {}", self.use_now),
            Some(why) => log::warn!(
                "io_uring cannot be used: {why} ({}); using threads (--io-engine=sync), which are as \
                 safe, but slower for data that is not in the page cache",
                hint(why)
            ),
        }
    }

    /// The io_uring of the calling thread, which is that of a queue. `None`: its rings use threads,
    /// because they were chosen, or because the io_uring cannot be enabled and was not asked for.
    ///
    /// # Errors
    /// It cannot be enabled, and was asked for.
    pub fn uring(&self) -> io::Result<Option<Uring>> {
        if self.use_now == IoEngine::Sync {
            return Ok(None);
        }
        let next = self.urings.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let next = next.ok_or_else(|| io::Error::other("none is left for this queue"));
        match next.and_then(DisabledUring::enable) {
            Ok(uring) => Ok(Some(uring)),
            Err(e) if self.asked_for => Err(e),
            Err(e) => {
                if self.said.set(()).is_ok() {
                    log::warn!("io_uring cannot be used any more: {e}; using threads");
                }
                Ok(None)
            }
        }
    }
}

/// Tries the engine, and makes what it needs for so many queues.
fn prepare(engine: IoEngine, queues: u16, depth: u16) -> Result<Vec<DisabledUring>, NoUring> {
    engine.probe()?;
    match engine {
        IoEngine::Sync => Ok(Vec::new()),
        IoEngine::IoUring => (0..queues).map(|_| DisabledUring::new(depth.into())).collect(),
    }
}

/// The usual reason.
fn hint(why: &NoUring) -> &'static str {
    match (why, why.errno()) {
        (_, Some(libc::EPERM | libc::EACCES)) => {
            "a container's seccomp filter, SELinux, or the sysctl kernel.io_uring_disabled forbids it"
        }
        (_, Some(libc::ENOSYS)) => {
            "a container's seccomp filter forbids it, or the kernel was built without it"
        }
        (_, Some(libc::EINVAL)) | (NoUring::Operation(_), _) => {
            "it needs Linux 5.13 or later, or 5.10.162 and later of the 5.10 series"
        }
        (_, Some(libc::ENOMEM)) => {
            "memory is short, or the limit of locked memory is too low: ulimit -l, LimitMEMLOCK="
        }
        (_, Some(libc::EMFILE | libc::ENFILE)) => "too many files are open: ulimit -n",
        _ => "the kernel's reason",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_another_size_are_refused() {
        check_page_size().unwrap();
        check_page(Some(4096)).unwrap();
        for found in [16384, 65536] {
            let text = check_page(Some(found)).unwrap_err().to_string();
            assert!(text.contains(&found.to_string()) && text.contains("4096"), "{text}");
        }
        assert!(check_page(None).is_err() && check_page(Some(-1)).is_err());
    }

    #[test]
    fn the_engine_that_was_asked_for_is_used() {
        let engine = Engine::choose(Some(IoEngine::Sync), 1, 16).unwrap();
        assert_eq!((engine.use_now, engine.refused.is_none()), (IoEngine::Sync, true));
    }

    #[test]
    fn a_queue_that_gets_no_io_uring_uses_threads_unless_it_was_asked_for() {
        let engine = |asked_for| Engine {
            use_now: IoEngine::IoUring,
            asked_for,
            refused: None,
            said: OnceLock::new(),
            urings: Mutex::default(),
        };
        assert!(engine(true).uring().is_err());
        let other = engine(false);
        assert!(other.uring().unwrap().is_none());
        assert!(other.said.get().is_some());
    }
}
