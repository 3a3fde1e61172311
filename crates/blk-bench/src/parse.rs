//! Values of options.

use std::time::Duration;

use blk_bench::load::job::Mix;

/// A size in bytes: a number, and k, M, G or T for powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write for example 4096, 4k, 1M, 10G or 1T");
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'M')) => (&text[..at], 20),
        Some((at, 'G')) => (&text[..at], 30),
        Some((at, 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// One size, or two with `..` between them; multiples of 512, the second of the first.
pub fn sizes(text: &str) -> Result<(u64, u64), String> {
    let (min, max) = text.split_once("..").unwrap_or((text, text));
    let (min, max) = (size(min)?, size(max)?);
    if min == 0 || min % 512 != 0 || max % min != 0 || max < min {
        return Err("must be a multiple of 512, and the upper end a multiple of the lower".into());
    }
    if max > 64 << 20 {
        return Err("at most 64M".into());
    }
    Ok((min, max))
}

/// A time: a number and us, ms, s or m.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time; write for example 500us, 20ms, 5s or 2m");
    let unit = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..unit].parse().map_err(|_| wrong())?;
    let seconds = match &text[unit..] {
        "us" | "µs" => number / 1e6,
        "ms" => number / 1e3,
        "s" | "" => number,
        "m" => number * 60.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

/// `read:70,write:30`; a weight that is left out is 1.
pub fn mix(text: &str) -> Result<Mix, String> {
    let mut mix = Mix::default();
    for part in text.split(',') {
        let (name, weight) = part.split_once(':').unwrap_or((part, "1"));
        let weight = weight.parse().ok().filter(|&weight: &u32| weight <= 1_000_000);
        let weight =
            weight.ok_or_else(|| format!("{part:?}: the weight must be a number up to 1000000"))?;
        match name {
            "read" => mix.read = weight,
            "write" => mix.write = weight,
            "discard" => mix.discard = weight,
            "write-zeroes" => mix.write_zeroes = weight,
            "unmap-zeroes" => mix.unmap_zeroes = weight,
            _ => {
                return Err(format!(
                    "{name:?} is none of read, write, discard, write-zeroes, unmap-zeroes"
                ));
            }
        }
    }
    if mix.total() == 0 {
        return Err("all weights are 0".into());
    }
    Ok(mix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_understood() {
        assert_eq!(size("4k"), Ok(4096));
        assert_eq!(size("1T"), Ok(1 << 40));
        assert!(
            size("99999999T").is_err()
                && size("k").is_err()
                && size("4x").is_err()
                && size("").is_err()
        );
        assert_eq!(sizes("512..64k"), Ok((512, 65536)));
        assert!(
            sizes("500").is_err()
                && sizes("4k..6k").is_err()
                && sizes("0").is_err()
                && sizes("1G").is_err()
        );
        assert_eq!(duration("50us"), Ok(Duration::from_micros(50)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert!(duration("s").is_err() && duration("5h").is_err() && duration("-1s").is_err());
    }

    #[test]
    fn a_mix_names_its_operations() {
        assert_eq!(mix("read:70,write:30"), Ok(Mix { read: 70, write: 30, ..Mix::default() }));
        assert_eq!(mix("discard"), Ok(Mix { discard: 1, ..Mix::default() }));
        assert!(mix("trim").is_err() && mix("read:x").is_err() && mix("read:0").is_err());
    }
}
