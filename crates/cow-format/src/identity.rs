//! Whether a backing file is the one that a header means.

use std::fmt;

use uuid::Uuid;

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

/// The Gregorian date of a day counted from 1970-01-01, reckoned in 400-year eras of years that begin in March.
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

/// What a header says its backing file is.
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
    },
    /// Native, a frozen layer.
    Layer {
        /// The layer's UUID.
        uuid: Uuid,
        /// The layer's content generation.
        content_generation: u64,
    },
}

/// What a backing file is found to be, as an image and, if it has a native header, as a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActualIdentity {
    /// The length of the file in bytes.
    pub size: u64,
    /// The time of its last modification.
    pub mtime: Timestamp,
    /// UUID and content generation of a native header.
    pub layer: Option<(Uuid, u64)>,
}

impl BackingIdentity {
    /// Compares with the file that was found.
    pub fn verify(&self, actual: &ActualIdentity) -> Result<(), IdentityError> {
        match *self {
            Self::ImageSeconds { size, mtime_secs } => {
                let same = actual.mtime.secs() == i64::from(mtime_secs);
                let stored = Timestamp { secs: mtime_secs.into(), nanos: 0 };
                verify_image(size, stored, same, actual)
            }
            Self::Image { size, mtime } => verify_image(size, mtime, mtime == actual.mtime, actual),
            Self::Layer { uuid, content_generation } => {
                verify_layer(uuid, content_generation, actual.layer)
            }
        }
    }
}

fn verify_image(
    stored: u64,
    stored_mtime: Timestamp,
    same_mtime: bool,
    actual: &ActualIdentity,
) -> Result<(), IdentityError> {
    if stored != actual.size {
        return Err(IdentityError::Size { stored, actual: actual.size });
    }
    if !same_mtime {
        return Err(IdentityError::Mtime { stored: stored_mtime, actual: actual.mtime });
    }
    Ok(())
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

/// The backing file is not the one that the header means: reading through it would mix two disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
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
         if its content is unchanged, `cow rebind` takes it (or set its time back: touch -d @{}), \
         else restore it: this disk is worth nothing over other content",
        stored.secs(), actual.secs(), seconds(stored)
    )]
    Mtime {
        /// In the header.
        stored: Timestamp,
        /// Of the file.
        actual: Timestamp,
    },
    /// The backing file has no native header.
    #[error(
        "the backing file is not the layer that the header means: expected UUID {stored}, found no native header"
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

/// The time as `touch -d @` takes it.
fn seconds(time: &Timestamp) -> String {
    if time.nanos == 0 { time.secs.to_string() } else { format!("{}.{:09}", time.secs, time.nanos) }
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
        let actual = |size, mtime| ActualIdentity { size, mtime, layer: None };
        assert_eq!(stored.verify(&actual(10, time(1_700_000_000, 999))), Ok(()));
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

        let exact = BackingIdentity::Image { size: 10, mtime: time(5, 6) };
        assert_eq!(exact.verify(&actual(10, time(5, 6))), Ok(()));
        assert!(matches!(exact.verify(&actual(10, time(5, 7))), Err(IdentityError::Mtime { .. })));
    }

    #[test]
    fn a_layer_is_known_by_uuid_and_generation() {
        let (uuid, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let stored = BackingIdentity::Layer { uuid, content_generation: 3 };
        let mtime = Timestamp::new(0, 0).unwrap();
        let verify = |layer| stored.verify(&ActualIdentity { size: 0, mtime, layer });
        assert_eq!(verify(Some((uuid, 3))), Ok(()));
        assert_eq!(verify(None), Err(IdentityError::NotALayer { stored: uuid }));
        assert_eq!(
            verify(Some((other, 3))),
            Err(IdentityError::Uuid { stored: uuid, actual: other })
        );
        assert!(verify(Some((uuid, 4))).unwrap_err().to_string().contains("written after"));
        assert!(verify(Some((uuid, 2))).unwrap_err().to_string().contains("before"));
    }
}
