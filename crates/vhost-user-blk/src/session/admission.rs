//! Which descriptors a message may have.

use std::os::fd::OwnedFd;

use vhost::vhost_user::message::FrontendReq;

use crate::process::descriptor::{Foreign, Kind};

/// Why a message may not have its descriptor.
#[derive(Debug, thiserror::Error)]
#[error("its descriptor is {found}; expected {expected}")]
pub(crate) struct Unfit {
    found: Kind,
    expected: &'static str,
}

/// Checks that a message of this type may have a descriptor of this kind. What the `vhost` crate
/// refuses by itself only has to be closed, so any kind will do that closes at once.
///
/// `any_file`: memory may be in files of any file system (`--allow-file-memory`).
fn check(request: u32, kind: Kind, any_file: bool) -> Result<(), Unfit> {
    use FrontendReq as Req;
    let event = matches!(kind, Kind::Eventfd | Kind::Pipe | Kind::Socket);
    let memory = matches!(kind, Kind::SharedMemory | Kind::Dax | Kind::DiskFile)
        || any_file && kind == Kind::OtherFile;
    let (fits, expected) = match Req::try_from(request) {
        Ok(Req::SET_VRING_KICK | Req::SET_VRING_CALL | Req::SET_VRING_ERR | Req::SET_LOG_FD) => {
            (event, "an eventfd, a pipe or a unix socket")
        }
        Ok(Req::SET_DEVICE_STATE_FD) => (event && kind != Kind::Eventfd, "a pipe or a unix socket"),
        Ok(Req::SET_BACKEND_REQ_FD) => (kind == Kind::Socket, "a unix socket"),
        Ok(
            Req::SET_MEM_TABLE
            | Req::ADD_MEM_REG
            | Req::REM_MEM_REG
            | Req::SET_LOG_BASE
            | Req::SET_INFLIGHT_FD,
        ) => (
            memory,
            "a memfd, or a file of tmpfs, hugetlbfs or a file system on a block device, or a DAX \
             device; with --allow-file-memory any file is taken",
        ),
        _ => (event || memory, "none"),
    };
    if fits { Ok(()) } else { Err(Unfit { found: kind, expected }) }
}

/// The descriptors of a message of this type, if it may have them.
///
/// # Errors
/// What the first one is that it may not have.
pub(crate) fn admit(fds: Foreign, request: u32, any_file: bool) -> Result<Vec<OwnedFd>, Unfit> {
    fds.kinds().try_for_each(|kind| check(request, kind, any_file))?;
    Ok(fds.admitted())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_gets_what_it_is_for() {
        let file = || Kind::OtherFile;
        for (request, kind, fits) in [
            (FrontendReq::SET_VRING_KICK, Kind::Eventfd, true),
            (FrontendReq::SET_VRING_CALL, Kind::Pipe, true),
            (FrontendReq::SET_VRING_ERR, Kind::Socket, true),
            (FrontendReq::SET_LOG_FD, Kind::SharedMemory, false),
            (FrontendReq::SET_VRING_KICK, Kind::Unknown("/dev/null".into()), false),
            (FrontendReq::SET_MEM_TABLE, Kind::SharedMemory, true),
            (FrontendReq::ADD_MEM_REG, Kind::Dax, true),
            (FrontendReq::SET_LOG_BASE, Kind::DiskFile, true),
            (FrontendReq::SET_INFLIGHT_FD, file(), false),
            (FrontendReq::SET_MEM_TABLE, Kind::Unknown("/dev/zero".into()), false),
            (FrontendReq::SET_DEVICE_STATE_FD, Kind::Pipe, true),
            (FrontendReq::SET_DEVICE_STATE_FD, Kind::Eventfd, false),
            (FrontendReq::SET_DEVICE_STATE_FD, file(), false),
            (FrontendReq::SET_BACKEND_REQ_FD, Kind::Pipe, false),
            // It has none, as the crate will say.
            (FrontendReq::GET_FEATURES, Kind::Eventfd, true),
            (FrontendReq::GET_FEATURES, file(), false),
        ] {
            assert_eq!(check(request.into(), kind.clone(), false).is_ok(), fits, "{kind:?}");
        }
        check(FrontendReq::SET_MEM_TABLE.into(), file(), true).unwrap();
        check(FrontendReq::SET_VRING_KICK.into(), file(), true).unwrap_err();
        check(12345, file(), false).unwrap_err();
    }
}
