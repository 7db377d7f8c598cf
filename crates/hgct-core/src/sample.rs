//! The order of samples, from (seed, step) alone.
//!
//! The batch of step `s` is `permutation[s·B .. (s+1)·B)` over the endless sequence of epochs, so
//! the cursor derives from the committed step and changing the plan never changes what is learnt.

use crate::init::mix;

/// The order in which a run sees its samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleOrder {
    seed: u64,
    num_samples: u64,
    global_batch: u64,
}

impl SampleOrder {
    /// Order over `num_samples` samples with `global_batch` samples a step; both at least 1.
    pub fn new(seed: u64, num_samples: u64, global_batch: u64) -> Self {
        assert!(num_samples > 0 && global_batch > 0, "an order needs samples and a batch");
        Self { seed, num_samples, global_batch }
    }

    /// Sample of position `index` (in `0..global_batch`) in the batch of `step` (from 0).
    pub fn sample(&self, step: u64, index: u64) -> u64 {
        debug_assert!(index < self.global_batch, "index {index} is outside of the batch");
        let position = step * self.global_batch + index;
        let (epoch, within) = (position / self.num_samples, position % self.num_samples);
        permute(mix(self.seed, epoch), self.num_samples, within)
    }

    /// Samples of positions `range` in the batch of `step`.
    pub fn samples(&self, step: u64, range: std::ops::Range<u64>) -> Vec<u64> {
        range.map(|index| self.sample(step, index)).collect()
    }
}

/// A keyed bijection of `0..n`: four Feistel rounds over the next even power of two, walked until
/// the result lies inside (cycle walking, Black and Rogaway 2002). Fewer than four walks expected.
fn permute(key: u64, n: u64, index: u64) -> u64 {
    let bits = (u64::BITS - (n - 1).leading_zeros()).max(2).next_multiple_of(2);
    let half = bits / 2;
    let mask = (1u64 << half) - 1;
    let mut value = index;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(key.wrapping_add(round), right) & mask));
        }
        value = (left << half) | right;
        if value < n {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_epoch_sees_every_sample_once(seed: u64, n in 1u64..700, batch in 1u64..40) {
            let order = SampleOrder::new(seed, n, batch);
            for epoch in 0..2 {
                let mut seen: Vec<u64> = (epoch * n..(epoch + 1) * n)
                    .map(|position| order.sample(position / batch, position % batch))
                    .collect();
                seen.sort_unstable();
                prop_assert_eq!(seen, (0..n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn epochs_differ() {
        let order = SampleOrder::new(3, 100, 100);
        assert_ne!(order.samples(0, 0..100), order.samples(1, 0..100));
    }
}
