//! Sizes as people write them (`10G`) and as they read them (`1.5 GiB`).

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use crate::error::CowError;

/// The suffixes and their powers of two, smallest first.
const SUFFIXES: [(char, u32); 6] =
    [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];
/// The most digits after the point: enough for one byte of an exbibyte (2^60 < 10^19).
const FRACTION_DIGITS_MAX: usize = 18;

/// A number of bytes from the command line: digits, maybe a fraction, maybe a suffix K, M, G, T, P
/// or E (powers of 1024, as in qemu-img; either case; `B` for bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not digits with a suffix.
    #[error(
        "expected a number of bytes, maybe with a suffix K, M, G, T, P or E (as in 512M or 1.5G)"
    )]
    NotANumber,
    /// 2^63 or more.
    #[error("a file cannot have 8 EiB or more")]
    TooLarge,
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let (number, shift) = split_suffix(text);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let fractional = number.len() != whole.len();
        if whole.is_empty() || (fractional && (fraction.is_empty() || shift == 0)) {
            return Err(SizeError::NotANumber);
        }
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(fraction) || fraction.len() > FRACTION_DIGITS_MAX {
            return Err(SizeError::NotANumber);
        }
        let whole: u64 = whole.parse().map_err(|_| SizeError::TooLarge)?;
        let bytes = (u128::from(whole) << shift) + fraction_bytes(fraction, shift);
        match i64::try_from(bytes) {
            Ok(bytes) => Ok(Size(bytes.unsigned_abs())),
            Err(_) => Err(SizeError::TooLarge),
        }
    }
}

/// The bytes of `0.fraction` of 2^`shift`, rounded down. `fraction`: at most 18 digits.
fn fraction_bytes(fraction: &str, shift: u32) -> u128 {
    let parts: u128 = fraction.parse().unwrap_or(0);
    let scale = fraction.bytes().fold(1u128, |scale, _| scale * 10);
    (parts << shift) / scale
}

/// The text before the suffix, and the suffix's power of two.
fn split_suffix(text: &str) -> (&str, u32) {
    let Some(last) = text.chars().next_back() else { return (text, 0) };
    let letter = last.to_ascii_uppercase();
    let shift = SUFFIXES.iter().find(|(suffix, _)| *suffix == letter).map(|(_, shift)| *shift);
    match shift {
        Some(shift) => (&text[..text.len() - 1], shift),
        None if letter == 'B' => (&text[..text.len() - 1], 0),
        None => (text, 0),
    }
}

/// The largest disk that a command imports.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct MaxSize {
    /// Refuse a disk that is larger
    ///
    /// It is refused before anything is written. Use it for disks from strangers: a small file can
    /// hold a disk of 256 TiB, the limit otherwise.
    #[arg(long, value_name = "SIZE")]
    max_size: Option<Size>,
}

impl MaxSize {
    /// Refuses the disk in `path` if its size, in bytes, is larger.
    pub fn check(self, path: &Path, size: u64) -> Result<(), CowError> {
        match self.max_size {
            Some(Size(max)) if size > max => {
                Err(CowError::TooLarge { path: path.to_owned(), size, max })
            }
            _ => Ok(()),
        }
    }
}

/// A change of size: to a size, or by one (`+1G`, `-512M`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeChange {
    /// To this size.
    To(u64),
    /// By so many bytes more.
    Grow(u64),
    /// By so many bytes fewer.
    Shrink(u64),
}

impl SizeChange {
    /// The size after the change; `None` below 0 or above 2^63.
    pub fn apply(self, from: u64) -> Option<u64> {
        match self {
            SizeChange::To(size) => Some(size),
            SizeChange::Grow(by) => {
                from.checked_add(by).filter(|size| i64::try_from(*size).is_ok())
            }
            SizeChange::Shrink(by) => from.checked_sub(by),
        }
    }
}

impl FromStr for SizeChange {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let size = |text: &str| text.parse().map(|Size(bytes)| bytes);
        match text.as_bytes().first() {
            Some(b'+') => size(&text[1..]).map(SizeChange::Grow),
            Some(b'-') => size(&text[1..]).map(SizeChange::Shrink),
            _ => size(text).map(SizeChange::To),
        }
    }
}

/// Shows a number of bytes for people: `512 B`, `1 MiB`, `1.5 GiB`.
pub struct Human(pub u64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((suffix, shift)) = SUFFIXES.iter().rev().find(|(_, shift)| self.0 >> shift > 0)
        else {
            return write!(f, "{} B", self.0);
        };
        // Tenths, rounded to the nearest: 60 bits of size, 4 more for the factor, so u128.
        let tenths = ((u128::from(self.0) * 10) + (1 << (shift - 1))) >> shift;
        match (tenths / 10, tenths % 10) {
            (whole, 0) => write!(f, "{whole} {suffix}iB"),
            (whole, tenth) => write!(f, "{whole}.{tenth} {suffix}iB"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(text: &str) -> Result<u64, SizeError> {
        text.parse().map(|Size(bytes)| bytes)
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("1k", 1024),
            ("3M", 3 << 20),
            ("10G", 10 << 30),
            ("1.5G", 3 << 29),
            ("0.001K", 1),
            ("2T", 2 << 40),
            ("7E", 7 << 60),
            ("9223372036854775807", i64::MAX.unsigned_abs()),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", "G", ".5G", "1.G", "1.5", "-1", "+1", "1 G", "0x10", "1GiB", "ten", "1e9", "½K",
            "1.5.5M",
        ] {
            assert_eq!(size(text), Err(SizeError::NotANumber), "{text}");
        }
        for text in ["8E", "9223372036854775808", "99999999999999999999", "16777216T"] {
            assert_eq!(size(text), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn changes_go_up_and_down() {
        let apply = |text: &str, from| text.parse::<SizeChange>().unwrap().apply(from);
        assert_eq!(apply("1G", 5), Some(1 << 30));
        assert_eq!(apply("+1K", 5), Some(1029));
        assert_eq!(apply("-5", 5), Some(0));
        assert_eq!(apply("-6", 5), None);
        assert_eq!(apply("+7E", 2 << 60), None);
    }

    #[test]
    fn people_read_tenths() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            (i64::MAX.unsigned_abs(), "8 EiB"),
        ] {
            assert_eq!(Human(bytes).to_string(), text);
        }
    }
}
