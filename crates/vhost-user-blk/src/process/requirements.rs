//! What the host must offer. This is checked before the daemon listens: otherwise it would only
//! show when the first ring starts, and the guest would wait for ever.

use std::io;
use std::sync::OnceLock;

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
}

impl Engine {
    /// The engine that was asked for. Without one, io_uring if it is available, else threads.
    pub fn choose(asked_for: Option<IoEngine>) -> Result<Self, RequirementError> {
        let said = OnceLock::new();
        if let Some(engine) = asked_for {
            engine
                .probe()
                .map_err(|source| RequirementError::Engine { hint: hint(&source), source })?;
            return Ok(Engine { use_now: engine, asked_for: true, refused: None, said });
        }
        let refused = IoEngine::IoUring.probe().err();
        let use_now = if refused.is_none() { IoEngine::IoUring } else { IoEngine::Sync };
        Ok(Engine { use_now, asked_for: false, refused, said })
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

    /// An io_uring for the calling thread. `None`: its rings use threads, because they were chosen,
    /// or because io_uring is no longer available and was not asked for.
    ///
    /// # Errors
    /// io_uring is no longer available, and was asked for.
    pub fn uring(&self, depth: usize) -> io::Result<Option<Uring>> {
        if self.use_now == IoEngine::Sync {
            return Ok(None);
        }
        let made = DisabledUring::new(depth).map_err(io::Error::other);
        match made.and_then(DisabledUring::enable) {
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
        let engine = Engine::choose(Some(IoEngine::Sync)).unwrap();
        assert_eq!((engine.use_now, engine.refused.is_none()), (IoEngine::Sync, true));
    }
}
