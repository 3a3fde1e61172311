//! Users and groups, by name or by number.

use std::io;

use caps::{CapSet, errors::CapsError};
use nix::unistd::{Gid, Group, Uid, User, setfsgid, setfsuid, setgroups, setresgid, setresuid};

/// A user or group that an option names and that does not exist, or no other can be used.
#[derive(Debug, thiserror::Error)]
#[error("{option}={name}: {why}")]
pub struct UserError {
    option: &'static str,
    name: String,
    why: String,
}

/// The number of the user that `option` names.
pub fn uid(option: &'static str, name: &str) -> Result<u32, UserError> {
    let find = |name: &str| Ok(User::from_name(name)?.map(|user| user.uid.as_raw()));
    number(option, name, "no such user", find)
}

/// The number of the group that `option` names.
pub fn gid(option: &'static str, name: &str) -> Result<u32, UserError> {
    let find = |name: &str| Ok(Group::from_name(name)?.map(|group| group.gid.as_raw()));
    number(option, name, "no such group", find)
}

fn number(
    option: &'static str,
    name: &str,
    none: &str,
    find: impl Fn(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, UserError> {
    let error = |why: String| UserError { option, name: name.to_owned(), why };
    match name.parse() {
        // The system calls take it for "as it is".
        Ok(u32::MAX) => Err(error(none.to_owned())),
        Ok(number) => Ok(number),
        Err(_) => match find(name) {
            Ok(found) => found.ok_or_else(|| error(none.to_owned())),
            Err(e) => Err(error(e.to_string())),
        },
    }
}

/// The user that a daemon becomes, with one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    uid: Uid,
    gid: Gid,
}

impl Account {
    /// By `--user` and `--group`. Without a group it is the user's own.
    pub fn find(user: &str, group: Option<&str>) -> Result<Self, UserError> {
        let uid = Uid::from_raw(uid("--user", user)?);
        if let Some(group) = group {
            return Ok(Account { uid, gid: Gid::from_raw(gid("--group", group)?) });
        }
        let error = |why| UserError { option: "--user", name: user.to_owned(), why };
        match User::from_uid(uid) {
            Ok(Some(user)) => Ok(Account { uid, gid: user.gid }),
            Ok(None) => Err(error("its group is not known; add --group".to_owned())),
            Err(e) => Err(error(e.to_string())),
        }
    }

    /// Its user.
    pub fn uid(&self) -> u32 {
        self.uid.as_raw()
    }

    /// From now on files and sockets that this thread makes belong to the account. What it may open
    /// stays the same.
    pub fn own_new_files(&self) -> io::Result<()> {
        // With the ID of root go the capabilities that concern files.
        let effective = caps::read(None, CapSet::Effective).map_err(failed)?;
        setfsgid(self.gid);
        setfsuid(self.uid);
        // The call itself never says that it failed.
        let now = (setfsuid(Uid::from_raw(u32::MAX)), setfsgid(Gid::from_raw(u32::MAX)));
        if now != (self.uid, self.gid) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        caps::set(None, CapSet::Effective, &effective).map_err(failed)
    }

    /// Becomes this user, in all threads. The way back is closed.
    pub fn become_it(&self) -> io::Result<()> {
        setgroups(&[])?;
        setresgid(self.gid, self.gid, self.gid)?;
        Ok(setresuid(self.uid, self.uid, self.uid)?)
    }
}

/// The error of a system call, which the crate keeps as a text.
pub(crate) fn failed(error: CapsError) -> io::Error {
    io::Error::other(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_found() {
        assert_eq!((uid("--user", "root").unwrap(), gid("--group", "root").unwrap()), (0, 0));
        assert_eq!(uid("--user", "12345678").unwrap(), 12_345_678);
        for name in ["no such user", "", "-1", "4294967295", "4294967296"] {
            let text = uid("--allow-uid", name).unwrap_err().to_string();
            assert!(text.contains("--allow-uid") && text.contains("no such user"), "{text}");
        }
        assert!(gid("--group", "no such group").unwrap_err().to_string().contains("--group"));
    }

    #[test]
    fn an_account_has_the_group_of_its_user_or_another() {
        let root = Account::find("root", None).unwrap();
        assert_eq!(Account::find("0", Some("0")).unwrap(), root);
        assert_eq!(Account::find("root", Some("7")).unwrap().gid.as_raw(), 7);
        let text = Account::find("4000000000", None).unwrap_err().to_string();
        assert!(text.contains("--group"), "{text}");
    }
}
