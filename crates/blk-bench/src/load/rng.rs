//! Random numbers that stay the same for the same seed, whatever versions of crates are in use.

/// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A stream of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The high half of the product; its bias is less than limit / 2^64.
        let product = u128::from(self.next_u64()) * u128::from(limit);
        u64::try_from(product >> 64).expect("less than limit")
    }
}

/// The finaliser of SplitMix64: a bijection that scatters.
pub fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ bits >> 31
}

/// A random order of 0 .. `len`: a Feistel network over the next power of four, walked until it
/// falls inside.
#[derive(Clone, Debug)]
pub struct Permutation {
    len: u64,
    half_bits: u32,
    seed: u64,
}

impl Permutation {
    /// The order that belongs to `seed`.
    pub fn new(len: u64, seed: u64) -> Self {
        let bits = 64 - len.saturating_sub(1).leading_zeros();
        Self { len, half_bits: bits.div_ceil(2).max(1), seed }
    }

    /// The number at `position`, which must be less than `len`.
    pub fn at(&self, position: u64) -> u64 {
        assert!(position < self.len);
        let mut value = self.round_trip(position);
        while value >= self.len {
            value = self.round_trip(value);
        }
        value
    }

    fn round_trip(&self, value: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..4 {
            let scattered = mix(right ^ self.seed.rotate_left(16 * round)) & mask;
            (left, right) = (right, left ^ scattered);
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permutation_takes_each_number_once() {
        for len in [1, 2, 3, 5, 64, 100, 1000, 4097] {
            let order = Permutation::new(len, 7);
            let mut seen: Vec<u64> = (0..len).map(|i| order.at(i)).collect();
            seen.sort_unstable();
            assert!(seen.iter().copied().eq(0..len), "length {len}");
        }
    }

    #[test]
    fn below_reaches_both_ends() {
        let mut rng = Rng::new(1);
        let drawn: Vec<u64> = (0..200).map(|_| rng.below(4)).collect();
        assert!((0..4).all(|value| drawn.contains(&value)));
        assert!(drawn.iter().all(|&value| value < 4));
    }
}
