//! Which tokens are held out: whole blocks, spread evenly over the text.
//!
//! The blocks are cut out of the token stream before samples exist: training and held-out tokens
//! lie in two files. So no training sample, its last label included, holds a held-out token,
//! whatever the sequence length.

use std::ops::Range;

use crate::{Error, Result};

/// Tokens of a held-out block, where there are enough: long beside any sequence, so that few
/// samples straddle two blocks, and short enough that the blocks see all of the text.
pub const BLOCK_TOKENS: u64 = 8192;

/// The held-out ranges of a stream of `tokens` tokens, ascending and apart: about `share` of it.
/// Every other token is for training.
pub fn held_out(tokens: u64, share: f64) -> Result<Vec<Range<u64>>> {
    if !(0.0..=0.5).contains(&share) {
        return Err(Error::Option {
            key: "held_out",
            found: share.to_string(),
            allowed: "from 0 to 0.5".into(),
        });
    }
    let wanted = (tokens as f64 * share).round() as u64;
    if wanted == 0 {
        return Ok(Vec::new());
    }
    let block = wanted.min(BLOCK_TOKENS);
    let blocks = wanted / block;
    // One block in the middle of each of `blocks` equal parts; at most half of the stream is held
    // out, so a part is at least two blocks long and neighbours never touch.
    let part = |i: u64| (u128::from(tokens) * u128::from(i) / u128::from(blocks)) as u64;
    let middle = |i: u64| {
        let (start, end) = (part(i), part(i + 1));
        let first = start + (end - start - block) / 2;
        first..first + block
    };
    Ok((0..blocks).map(middle).collect())
}

/// What `ranges` (ascending, apart) leaves of `0..tokens`.
pub fn complement(tokens: u64, ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let starts = std::iter::once(0).chain(ranges.iter().map(|range| range.end));
    let ends = ranges.iter().map(|range| range.start).chain(std::iter::once(tokens));
    starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_token_is_in_exactly_one_part(tokens in 0u64..3_000_000, share in 0.0f64..=0.5) {
            let held = held_out(tokens, share).unwrap();
            let train = complement(tokens, &held);
            let mut all = [held.clone(), train].concat();
            all.sort_by_key(|range| range.start);
            let mut next = 0;
            for range in all {
                prop_assert_eq!(range.start, next);
                prop_assert!(range.end > range.start);
                next = range.end;
            }
            prop_assert_eq!(next, tokens);
            let sum: u64 = held.iter().map(|range| range.end - range.start).sum();
            let wanted = (tokens as f64 * share).round() as u64;
            prop_assert!(sum <= wanted && wanted - sum < BLOCK_TOKENS, "{} of {}", sum, wanted);
        }
    }

    #[test]
    fn blocks_are_spread_over_the_text() {
        let held = held_out(10_000_000, 0.01).unwrap();
        assert_eq!(held.len(), 12);
        assert!(held[0].start < 1_000_000 && held[11].end > 9_000_000, "{held:?}");
        assert_eq!(held_out(100, 0.1).unwrap(), vec![45..55]);
    }

    #[test]
    fn a_share_outside_of_its_range_is_refused() {
        for share in [-0.1, 0.6, f64::NAN] {
            assert!(matches!(held_out(10, share), Err(Error::Option { key: "held_out", .. })));
        }
    }
}
