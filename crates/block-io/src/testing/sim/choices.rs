//! Decides what survives a crash.

/// Decides what survives.
#[derive(Clone, Debug)]
pub struct Choices(Source);

#[derive(Clone, Debug)]
enum Source {
    Seeded(u64),
    Oldest,
    Newest,
    /// The choices so far, each with its number of options, and the position in them.
    Enumerated {
        path: Vec<(usize, usize)>,
        at: usize,
    },
}

impl Choices {
    /// Choices from a seed.
    pub fn seeded(seed: u64) -> Self {
        Choices(Source::Seeded(seed))
    }

    /// Only what must survive survives.
    pub fn oldest() -> Self {
        Choices(Source::Oldest)
    }

    /// Everything survives.
    pub fn newest() -> Self {
        Choices(Source::Newest)
    }

    /// The first of all combinations; [`Choices::advance`] goes to the next.
    pub fn enumerated() -> Self {
        Choices(Source::Enumerated { path: Vec::new(), at: 0 })
    }

    /// One of `0..options`, older states first; `options` is at least 1.
    pub fn choose(&mut self, options: usize) -> usize {
        match &mut self.0 {
            Source::Seeded(state) => {
                let limit = options as u64;
                usize::try_from(split_mix(state) % limit).unwrap_or(0)
            }
            Source::Oldest => 0,
            Source::Newest => options - 1,
            Source::Enumerated { path, at } => {
                if *at == path.len() {
                    path.push((0, options));
                }
                *at += 1;
                path[*at - 1].0
            }
        }
    }

    /// Goes to the next combination of an enumeration; false when that was the last one.
    pub fn advance(&mut self) -> bool {
        let Source::Enumerated { path, at } = &mut self.0 else { return false };
        *at = 0;
        while let Some((chosen, options)) = path.pop() {
            if chosen + 1 < options {
                path.push((chosen + 1, options));
                return true;
            }
        }
        false
    }
}

/// SplitMix64: a small generator whose sequence never changes.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
