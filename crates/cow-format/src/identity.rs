//! Whether a backing file is the one that a header records.

use std::fmt;

use uuid::Uuid;

use crate::sample::Sample;

/// No image in use is older than this (2001-09-09): tools that set an older time set it on every
/// file. Nix uses 1, OSTree 0, others the beginning of 1980.
const DATED_SINCE_SECS: i64 = 1_000_000_000;
/// A file created this long (five years) after its mtime may have got the mtime from `touch -r` or
/// SOURCE_DATE_EPOCH.
const LATE_SECS: i64 = 5 * 365 * 86_400;

/// A time of modification: seconds since 1970-01-01 00:00:00 UTC and nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    secs: i64,
    nanos: u32,
}

impl Timestamp {
    /// `None` if `nanos` is a second or more.
    pub const fn new(secs: i64, nanos: u32) -> Option<Self> {
        if nanos < 1_000_000_000 { Some(Self { secs, nanos }) } else { None }
    }

    /// Whole seconds; negative before 1970.
    pub const fn secs(self) -> i64 {
        self.secs
    }

    /// Nanoseconds on top of the seconds, below 10^9.
    pub const fn nanos(self) -> u32 {
        self.nanos
    }
}

impl fmt::Display for Timestamp {
    /// As `2023-11-14 22:13:20.000000000 UTC`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, rest) = (self.secs.div_euclid(86400), self.secs.rem_euclid(86400));
        let (year, month, day) = civil(days);
        let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
        write!(
            f,
            "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{:09} UTC",
            self.nanos
        )
    }
}

/// The Gregorian date of a day counted from 1970-01-01, reckoned in 400-year eras of years that
/// begin in March.
fn civil(days: i64) -> (i64, i64, i64) {
    const ERA_DAYS: i64 = 146_097;
    let days = days + 719_468; // since 0000-03-01
    let (era, day) = (days.div_euclid(ERA_DAYS), days.rem_euclid(ERA_DAYS));
    let year = (day - day / 1460 + day / 36_524 - day / (ERA_DAYS - 1)) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // 0 is March
    let (day, month) = (day - (153 * month + 2) / 5 + 1, (month + 2) % 12 + 1);
    (era * 400 + year + i64::from(month <= 2), month, day)
}

/// How a header identifies its backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingIdentity {
    /// UML: size and mtime in whole seconds.
    ImageSeconds {
        /// In bytes.
        size: u64,
        /// Since 1970.
        mtime_secs: u32,
    },
    /// Native, an image: size and exact mtime.
    Image {
        /// In bytes.
        size: u64,
        /// To the nanosecond.
        mtime: Timestamp,
        /// What distinguishes it from another image of the same size and mtime.
        witness: Witness,
    },
    /// Native, a frozen layer.
    Layer {
        /// The layer's UUID.
        uuid: Uuid,
        /// The layer's content generation.
        content_generation: u64,
    },
}

/// An inode: a file that replaces another never has both the same number and the same time of
/// birth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// In its file system.
    pub number: u64,
    /// Its time of birth.
    pub born: Timestamp,
}

/// What distinguishes an image from another of the same size and mtime. Absent parts are not
/// compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Witness {
    /// The inode that it had; a block device has none that lasts.
    pub inode: Option<Inode>,
    /// The sample of its content.
    pub sample: Option<Sample>,
}

impl Witness {
    /// Nothing is recorded.
    pub const NONE: Self = Self { inode: None, sample: None };
}

/// What a backing file is found to be, as an image and, if it has a native header, as a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActualIdentity {
    /// The length of the file in bytes.
    pub size: u64,
    /// The time of its last modification.
    pub mtime: Timestamp,
    /// It is a block device: the time is that of its node, which each boot and each udev event
    /// sets.
    pub device: bool,
    /// Its inode, where the file system knows the time of birth.
    pub inode: Option<Inode>,
    /// UUID and content generation of a native header.
    pub layer: Option<(Uuid, u64)>,
}

/// The result for a file without a mismatch so far: what is still to be compared, and what to warn
/// about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Verdict {
    /// The inode differs or is unknown, so the sample of the file's content must be this one: see
    /// [`Verdict::decide`].
    pub sample: Option<Sample>,
    /// Why the comparison proves less than it should.
    pub doubt: Option<Doubt>,
}

impl Verdict {
    const SAME: Self = Self { sample: None, doubt: None };

    /// Compares the sample of the file with the one that [`Verdict::sample`] asks for.
    pub fn decide(&self, found: Sample) -> Result<(), IdentityError> {
        match self.sample {
            Some(stored) if stored != found => {
                Err(IdentityError::Replaced { stored, actual: found })
            }
            _ => Ok(()),
        }
    }
}

/// Why a backing file that matches may still be a different one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Doubt {
    /// A block device, whose mtime proves nothing, and the header has no sample.
    #[error(
        "is a block device identified by its size alone; a replacement of the same size is not noticed"
    )]
    SizeAlone,
    /// One of the two times has no nanoseconds.
    #[error(
        "mtime agrees in whole seconds only: the header says {stored}, the file has {actual}, as after a copy that \
         drops nanoseconds"
    )]
    WholeSeconds {
        /// In the header.
        stored: Timestamp,
        /// Of the file.
        actual: Timestamp,
    },
    /// The mtime is one that other files are likely to have as well.
    #[error(
        "its mtime {mtime} does not identify it: other images can have the same; {}",
        if *sampled {
            "a replacement of the same size is noticed only by a sample of its content"
        } else {
            "a replacement of the same size is not noticed"
        }
    )]
    Mtime {
        /// Of the file.
        mtime: Timestamp,
        /// The header has a sample.
        sampled: bool,
    },
}

impl BackingIdentity {
    /// Compares with the file that was found, without its content.
    pub fn verify(&self, actual: &ActualIdentity) -> Result<Verdict, IdentityError> {
        match *self {
            Self::ImageSeconds { size, mtime_secs } => {
                verify_size(size, actual)?;
                let stored = Timestamp { secs: mtime_secs.into(), nanos: 0 };
                if !actual.device && actual.mtime.secs != stored.secs {
                    return Err(IdentityError::Mtime { stored, actual: actual.mtime });
                }
                Ok(Verdict { sample: None, doubt: actual.doubt(stored, false, false) })
            }
            Self::Image { size, mtime, witness } => {
                verify_size(size, actual)?;
                verify_image(mtime, &witness, actual)
            }
            Self::Layer { uuid, content_generation } => {
                verify_layer(uuid, content_generation, actual.layer)?;
                Ok(Verdict::SAME)
            }
        }
    }

    /// What the header should record of a file that was verified; the sample stays.
    pub fn renewed(&self, actual: &ActualIdentity) -> Self {
        match *self {
            Self::Image { size, mtime, witness } => Self::Image {
                size,
                mtime: if actual.device { mtime } else { actual.mtime },
                witness: Witness { inode: actual.inode, ..witness },
            },
            other => other,
        }
    }
}

impl ActualIdentity {
    /// The identity of the file as an image.
    pub fn image(&self, sample: Sample) -> BackingIdentity {
        let witness = Witness { inode: self.inode, sample: Some(sample) };
        BackingIdentity::Image { size: self.size, mtime: self.mtime, witness }
    }

    fn doubt(&self, stored: Timestamp, exact: bool, sampled: bool) -> Option<Doubt> {
        if self.device {
            return (!sampled).then_some(Doubt::SizeAlone);
        }
        if exact && self.mtime != stored {
            return Some(Doubt::WholeSeconds { stored, actual: self.mtime });
        }
        let late = self
            .inode
            .is_some_and(|inode| inode.born.secs.saturating_sub(self.mtime.secs) > LATE_SECS);
        (late || self.mtime.secs < DATED_SINCE_SECS)
            .then_some(Doubt::Mtime { mtime: self.mtime, sampled })
    }
}

fn verify_size(stored: u64, actual: &ActualIdentity) -> Result<(), IdentityError> {
    match stored == actual.size {
        true => Ok(()),
        false => Err(IdentityError::Size { stored, actual: actual.size }),
    }
}

/// For a file whose size agrees. The inode is proof only together with the exact mtime: a write
/// changes the mtime.
fn verify_image(
    stored: Timestamp,
    witness: &Witness,
    actual: &ActualIdentity,
) -> Result<Verdict, IdentityError> {
    let exact = stored == actual.mtime;
    if !actual.device && !exact && !same_without_nanos(stored, actual.mtime) {
        return Err(IdentityError::Mtime { stored, actual: actual.mtime });
    }
    let same_inode = witness.inode.is_some() && witness.inode == actual.inode;
    let sample = witness.sample.filter(|_| actual.device || !(exact && same_inode));
    let doubt = actual.doubt(stored, true, witness.sample.is_some());
    Ok(Verdict { sample, doubt })
}

/// Archives and many file systems keep whole seconds only.
fn same_without_nanos(one: Timestamp, other: Timestamp) -> bool {
    one.secs == other.secs && (one.nanos == 0 || other.nanos == 0)
}

fn verify_layer(
    stored: Uuid,
    content_generation: u64,
    actual: Option<(Uuid, u64)>,
) -> Result<(), IdentityError> {
    let Some((uuid, generation)) = actual else { return Err(IdentityError::NotALayer { stored }) };
    if stored != uuid {
        return Err(IdentityError::Uuid { stored, actual: uuid });
    }
    if content_generation != generation {
        return Err(IdentityError::Generation { stored: content_generation, actual: generation });
    }
    Ok(())
}

/// The backing file is not the one that the header records: reading through it would mix two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The sizes differ.
    #[error(
        "size of the backing file does not match: the header says {stored} bytes, the file has {actual}; \
         name the right backing file, or restore this one"
    )]
    Size {
        /// In the header, bytes.
        stored: u64,
        /// Of the file, bytes.
        actual: u64,
    },
    /// The mtimes differ.
    #[error(
        "mtime of the backing file does not match: the header says {stored} ({}), the file has {actual} ({}); \
         over other content this disk would be garbage",
        stored.secs(), actual.secs()
    )]
    Mtime {
        /// In the header.
        stored: Timestamp,
        /// Of the file.
        actual: Timestamp,
    },
    /// Size and mtime agree, but the content does not. The samples are not shown: the author of the
    /// header may have no permission to read the file.
    #[error(
        "it was replaced by another of the same size and time: a sample of its content differs from the header's"
    )]
    Replaced {
        /// In the header.
        stored: Sample,
        /// Of the file.
        actual: Sample,
    },
    /// The backing file has no native header.
    #[error(
        "the backing file is not the layer that the header records: expected UUID {stored}, found no native header"
    )]
    NotALayer {
        /// In the header.
        stored: Uuid,
    },
    /// Another layer.
    #[error(
        "UUID of the backing layer does not match: the header says {stored}, the file has {actual}; \
         name the right layer"
    )]
    Uuid {
        /// In the header.
        stored: Uuid,
        /// Of the file.
        actual: Uuid,
    },
    /// The same layer, written again or restored from an older copy.
    #[error(
        "content generation of the backing layer does not match: the header says {stored}, the file has {actual}; \
         it was {} this disk was made on it: restore that state of the layer",
        if stored < actual { "written after" } else { "replaced by a state from before" }
    )]
    Generation {
        /// In the header.
        stored: u64,
        /// Of the file.
        actual: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_as_dates() {
        let text = |secs, nanos| Timestamp::new(secs, nanos).unwrap().to_string();
        assert_eq!(text(1_700_000_000, 5), "2023-11-14 22:13:20.000000005 UTC");
        assert_eq!(text(0, 0), "1970-01-01 00:00:00.000000000 UTC");
        assert_eq!(text(-1, 0), "1969-12-31 23:59:59.000000000 UTC");
        assert_eq!(text(951_782_400, 0), "2000-02-29 00:00:00.000000000 UTC");
        assert!(Timestamp::new(0, 1_000_000_000).is_none());
        // Any time that a hostile header holds can be shown.
        text(i64::MIN, 0);
        text(i64::MAX, 999_999_999);
    }

    #[test]
    fn a_mismatch_says_which_and_both_values() {
        let stored = BackingIdentity::ImageSeconds { size: 10, mtime_secs: 1_700_000_000 };
        let time = |secs, nanos| Timestamp::new(secs, nanos).unwrap();
        let actual =
            |size, mtime| ActualIdentity { size, mtime, device: false, inode: None, layer: None };
        assert_eq!(stored.verify(&actual(10, time(1_700_000_000, 999))), Ok(Verdict::SAME));
        let text = stored.verify(&actual(11, time(1, 0))).unwrap_err().to_string();
        assert!(
            text.contains("size") && text.contains("10 bytes") && text.contains("has 11"),
            "{text}"
        );
        let text = stored.verify(&actual(10, time(1_700_000_001, 0))).unwrap_err().to_string();
        assert!(
            text.contains("mtime") && text.contains("1700000000") && text.contains("1700000001"),
            "{text}"
        );

        let mtime = time(1_700_000_000, 6);
        let exact = BackingIdentity::Image { size: 10, mtime, witness: Witness::NONE };
        assert_eq!(exact.verify(&actual(10, mtime)), Ok(Verdict::SAME));
        let other = exact.verify(&actual(10, time(1_700_000_000, 7)));
        assert!(matches!(other, Err(IdentityError::Mtime { .. })));
    }

    #[test]
    fn a_layer_is_known_by_uuid_and_generation() {
        let (uuid, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let stored = BackingIdentity::Layer { uuid, content_generation: 3 };
        let mtime = Timestamp::new(0, 0).unwrap();
        let (device, inode) = (false, None);
        let verify =
            |layer| stored.verify(&ActualIdentity { size: 0, mtime, device, inode, layer });
        assert_eq!(verify(Some((uuid, 3))), Ok(Verdict::SAME));
        assert_eq!(verify(None), Err(IdentityError::NotALayer { stored: uuid }));
        assert_eq!(
            verify(Some((other, 3))),
            Err(IdentityError::Uuid { stored: uuid, actual: other })
        );
        assert!(verify(Some((uuid, 4))).unwrap_err().to_string().contains("written after"));
        assert!(verify(Some((uuid, 2))).unwrap_err().to_string().contains("before"));
    }

    const TIME: Timestamp = Timestamp { secs: 1_700_000_000, nanos: 6 };
    const INODE: Inode = Inode { number: 5, born: TIME };
    const SAMPLE: Sample = Sample::from_bytes([1; 32]);
    const FOUND: ActualIdentity =
        ActualIdentity { size: 10, mtime: TIME, device: false, inode: Some(INODE), layer: None };

    fn stored(witness: Witness) -> BackingIdentity {
        BackingIdentity::Image { size: 10, mtime: TIME, witness }
    }

    #[test]
    fn another_inode_is_read_and_the_same_is_not() {
        let stored = stored(Witness { inode: Some(INODE), sample: Some(SAMPLE) });
        let verdict = Verdict { sample: Some(SAMPLE), doubt: None };
        let sampled = Ok(verdict);
        assert_eq!(stored.verify(&FOUND), Ok(Verdict::SAME));
        let other = |inode| stored.verify(&ActualIdentity { inode, ..FOUND });
        assert_eq!(other(Some(Inode { number: 6, ..INODE })), sampled);
        let born = Timestamp { nanos: 7, ..TIME };
        assert_eq!(other(Some(Inode { born, ..INODE })), sampled);
        assert_eq!(other(None), sampled);
        assert_eq!(verdict.decide(SAMPLE), Ok(()));
        let replaced = verdict.decide(Sample::from_bytes([2; 32])).unwrap_err();
        assert!(replaced.to_string().contains("replaced by another of the same size and time"));
        // Nothing of it saves a file of another size or time.
        assert!(stored.verify(&ActualIdentity { size: 11, ..FOUND }).is_err());
        let mtime = Timestamp { nanos: 7, ..TIME };
        assert!(stored.verify(&ActualIdentity { mtime, ..FOUND }).is_err());
    }

    #[test]
    fn the_time_of_a_block_device_is_not_compared() {
        let mtime = Timestamp { secs: 5, nanos: 5 };
        let device = ActualIdentity { mtime, device: true, inode: None, ..FOUND };
        let sampled = stored(Witness { inode: None, sample: Some(SAMPLE) });
        let read = Ok(Verdict { sample: Some(SAMPLE), doubt: None });
        assert_eq!(sampled.verify(&device), read);
        let alone = Ok(Verdict { sample: None, doubt: Some(Doubt::SizeAlone) });
        assert_eq!(stored(Witness::NONE).verify(&device), alone);
        let uml = BackingIdentity::ImageSeconds { size: 10, mtime_secs: 1 };
        assert_eq!(uml.verify(&device), alone);
        assert!(sampled.verify(&ActualIdentity { size: 11, ..device }).is_err());
        // It would have to be rewritten at each boot.
        assert_eq!(sampled.renewed(&device), sampled);
    }

    #[test]
    fn lost_nanoseconds_are_taken_and_the_sample_decides() {
        let lost = ActualIdentity { mtime: Timestamp { nanos: 0, ..TIME }, ..FOUND };
        let doubt = Some(Doubt::WholeSeconds { stored: TIME, actual: lost.mtime });
        let sampled = stored(Witness { inode: Some(INODE), sample: Some(SAMPLE) });
        // Even in the same inode: the time was set explicitly.
        assert_eq!(sampled.verify(&lost), Ok(Verdict { sample: Some(SAMPLE), doubt }));
        assert_eq!(stored(Witness::NONE).verify(&lost), Ok(Verdict { sample: None, doubt }));
        let whole = BackingIdentity::Image { size: 10, mtime: lost.mtime, witness: Witness::NONE };
        assert!(whole.verify(&FOUND).is_ok_and(|verdict| verdict.doubt.is_some()));
        let second = Timestamp { secs: TIME.secs + 1, nanos: 0 };
        assert!(sampled.verify(&ActualIdentity { mtime: second, ..FOUND }).is_err());
        assert_eq!(sampled.renewed(&lost).verify(&lost), Ok(Verdict::SAME));
    }

    #[test]
    fn a_time_that_many_files_have_is_said() {
        let at = |secs| Timestamp { secs, nanos: 0 };
        let doubt = |mtime, born: Timestamp| {
            let inode = Some(Inode { number: 5, born });
            let witness = Witness { inode, sample: Some(SAMPLE) };
            let stored = BackingIdentity::Image { size: 10, mtime, witness };
            let found = stored.verify(&ActualIdentity { mtime, inode, ..FOUND }).unwrap();
            assert_eq!(found.sample, None);
            found.doubt
        };
        let now = at(1_790_000_000);
        for secs in [0, 1, 315_532_800, 1_600_000_000] {
            let mtime = at(secs);
            assert_eq!(doubt(mtime, now), Some(Doubt::Mtime { mtime, sampled: true }), "{secs}");
        }
        assert_eq!(doubt(at(1_700_000_000), now), None);
        assert_eq!(doubt(now, at(1_700_000_000)), None);
        let uml = BackingIdentity::ImageSeconds { size: 10, mtime_secs: 1 };
        let found = uml.verify(&ActualIdentity { mtime: at(1), ..FOUND }).unwrap();
        let text = found.doubt.unwrap().to_string();
        assert!(text.contains("is not noticed"), "{text}");
    }
}
