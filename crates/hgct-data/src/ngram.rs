//! What a model must beat: unigram and bigram cross-entropy on the held-out tokens.
//!
//! The bigram is the best of several smoothed ones: Witten and Bell (1991) with a scaled number of
//! followers, and absolute discounting (Ney, Essen and Kneser 1994), each backing off to unigrams or
//! to Kneser and Ney's (1995) continuation counts. Which one is picked on the end of the training
//! tokens, never on the held-out ones.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Result, TokenFile};

/// Vocabulary up to which pairs are counted in a dense table (64 MiB at most).
const DENSE_VOCABULARY: u32 = 4096;

/// One in this many training tokens, at the end, picks the smoothing.
const PICK_SHARE: usize = 20;

/// Most tokens that pick the smoothing.
const MOST_PICK: usize = 200_000;

/// Cross-entropies of simple models on the held-out tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Baselines {
    /// Nats a token of the unigram model.
    pub unigram_nats: f64,
    /// Nats a token of the bigram model.
    pub bigram_nats: f64,
    /// Tokens that were predicted.
    pub labels: u64,
    /// How the bigram was smoothed, for the report.
    pub smoothing: String,
}

/// Baselines for two token files of one vocabulary, over the labels of all samples of `seq_len`
/// tokens in `held_out`: the very tokens that a model predicts there. Takes memory for all pairs;
/// belongs into a child process.
pub fn baselines(train: &TokenFile, held_out: &TokenFile, seq_len: u32) -> Result<Baselines> {
    let labels = held_out.samples(seq_len)?.len() * u64::from(seq_len);
    let vocab = train.header().vocab_size;
    let held_out = held_out.iter().take(labels as usize + 1);
    bigram_cross_entropy(train.iter(), held_out, vocab)
}

/// Fits on `train` and predicts every token of `held_out` but the first from the one before it.
/// All tokens must be below `vocab`, and each side must have at least two.
pub fn bigram_cross_entropy(
    train: impl ExactSizeIterator<Item = u32> + Clone,
    held_out: impl ExactSizeIterator<Item = u32> + Clone,
    vocab: u32,
) -> Result<Baselines> {
    for (what, tokens) in [("training text", train.len()), ("held-out text", held_out.len())] {
        if tokens < 2 {
            let what = format!("the {what} of the baselines");
            return Err(Error::TooFewTokens { what, tokens: tokens as u64, needed: 2 });
        }
    }
    if let Some(token) = train.clone().chain(held_out.clone()).find(|&token| token >= vocab) {
        return Err(Error::Option {
            key: "token",
            found: token.to_string(),
            allowed: format!("below the vocabulary of {vocab}"),
        });
    }
    let pick = (train.len() / PICK_SHARE).min(MOST_PICK);
    let fit = train.len() - pick;
    let mut counts = Counts::new(vocab);
    counts.add(train.clone().take(fit));
    let smoothing = if pick < 2 {
        Smoothing::CANDIDATES[0]
    } else {
        let pick = train.clone().skip(fit);
        let nats = |smoothing: &Smoothing| counts.cross_entropy(pick.clone(), *smoothing);
        let tried = Smoothing::CANDIDATES.iter().map(|smoothing| (nats(smoothing), *smoothing));
        // Of equals the first.
        let best = tried.min_by(|a, b| a.0.total_cmp(&b.0));
        best.map_or(Smoothing::CANDIDATES[0], |(_, smoothing)| smoothing)
    };
    counts.add(train.skip(fit - 1));
    Ok(Baselines {
        unigram_nats: counts.cross_entropy(held_out.clone(), Smoothing::Unigram),
        labels: held_out.len() as u64 - 1,
        bigram_nats: counts.cross_entropy(held_out, smoothing),
        smoothing: smoothing.to_string(),
    })
}

/// How an unseen pair gets its share.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Smoothing {
    /// No context at all.
    Unigram,
    /// Followers seen, times a factor, go to the back-off.
    WittenBell { factor: f64, back_off: BackOff },
    /// Each pair seen gives this much of its count to the back-off.
    Discount { amount: f64, back_off: BackOff },
}

/// What is said about a token when the context says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BackOff {
    /// How often it occurs.
    Unigram,
    /// After how many different tokens it occurs.
    Continuation,
}

impl Smoothing {
    const CANDIDATES: &[Self] = &{
        use BackOff::{Continuation, Unigram};
        use Smoothing::{Discount, WittenBell};
        [
            WittenBell { factor: 1.0, back_off: Unigram },
            WittenBell { factor: 0.5, back_off: Unigram },
            WittenBell { factor: 2.0, back_off: Unigram },
            Discount { amount: 0.5, back_off: Unigram },
            Discount { amount: 0.75, back_off: Unigram },
            Discount { amount: 0.9, back_off: Unigram },
            Discount { amount: 0.5, back_off: Continuation },
            Discount { amount: 0.75, back_off: Continuation },
            Discount { amount: 0.9, back_off: Continuation },
        ]
    };
}

impl std::fmt::Display for Smoothing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = |back_off: &BackOff| match back_off {
            BackOff::Unigram => "unigram",
            BackOff::Continuation => "continuation",
        };
        match self {
            Self::Unigram => write!(f, "unigram"),
            Self::WittenBell { factor, back_off } => {
                write!(f, "Witten-Bell x {factor}, {} back-off", name(back_off))
            }
            Self::Discount { amount, back_off } => {
                write!(f, "absolute discount {amount}, {} back-off", name(back_off))
            }
        }
    }
}

/// Counts of tokens and pairs.
struct Counts {
    vocab: u32,
    tokens: u64,
    unigram: Vec<u64>,
    /// Pairs that begin with a token, and how many different ones.
    begins: Vec<u64>,
    followers: Vec<u32>,
    /// Different pairs that end with a token, and altogether.
    precursors: Vec<u32>,
    distinct: u64,
    pairs: Pairs,
}

/// How often each pair occurs.
enum Pairs {
    Dense(Vec<u32>),
    Sparse(HashMap<(u32, u32), u32>),
}

impl Counts {
    fn new(vocab: u32) -> Self {
        let n = vocab as usize;
        let pairs = if vocab <= DENSE_VOCABULARY {
            Pairs::Dense(vec![0; n * n])
        } else {
            Pairs::Sparse(HashMap::new())
        };
        Self {
            vocab,
            tokens: 0,
            unigram: vec![0; n],
            begins: vec![0; n],
            followers: vec![0; n],
            precursors: vec![0; n],
            distinct: 0,
            pairs,
        }
    }

    /// Counts all pairs of `tokens`, and all tokens that end one: the first token of a stream has
    /// been counted by what came before, or is one of millions.
    fn add(&mut self, mut tokens: impl Iterator<Item = u32>) {
        let Some(mut before) = tokens.next() else { return };
        for token in tokens {
            self.tokens += 1;
            self.unigram[token as usize] += 1;
            self.begins[before as usize] += 1;
            let count = match &mut self.pairs {
                Pairs::Dense(counts) => &mut counts[before as usize * self.vocab as usize + token as usize],
                Pairs::Sparse(counts) => counts.entry((before, token)).or_default(),
            };
            if *count == 0 {
                self.followers[before as usize] += 1;
                self.precursors[token as usize] += 1;
                self.distinct += 1;
            }
            *count = count.saturating_add(1);
            before = token;
        }
    }

    fn pair(&self, before: u32, token: u32) -> f64 {
        f64::from(match &self.pairs {
            Pairs::Dense(counts) => counts[before as usize * self.vocab as usize + token as usize],
            Pairs::Sparse(counts) => counts.get(&(before, token)).copied().unwrap_or(0),
        })
    }

    /// Probability without context; a tenth of a count for every token, so that none is impossible.
    fn back_off(&self, token: u32, back_off: BackOff) -> f64 {
        let (count, of) = match back_off {
            BackOff::Unigram => (self.unigram[token as usize] as f64, self.tokens as f64),
            BackOff::Continuation => (f64::from(self.precursors[token as usize]), self.distinct as f64),
        };
        (count + 0.1) / (of + 0.1 * f64::from(self.vocab))
    }

    fn probability(&self, before: u32, token: u32, smoothing: Smoothing) -> f64 {
        let begins = self.begins[before as usize] as f64;
        let followers = f64::from(self.followers[before as usize]);
        match smoothing {
            Smoothing::Unigram => self.back_off(token, BackOff::Unigram),
            Smoothing::WittenBell { back_off, .. } | Smoothing::Discount { back_off, .. }
                if begins == 0.0 =>
            {
                self.back_off(token, back_off)
            }
            Smoothing::WittenBell { factor, back_off } => {
                let given = factor * followers;
                let seen = self.pair(before, token);
                (seen + given * self.back_off(token, back_off)) / (begins + given)
            }
            Smoothing::Discount { amount, back_off } => {
                let seen = (self.pair(before, token) - amount).max(0.0);
                let given = amount * followers;
                (seen + given * self.back_off(token, back_off)) / begins
            }
        }
    }

    /// Mean nats of every token but the first; at least two tokens.
    fn cross_entropy(&self, mut tokens: impl Iterator<Item = u32>, smoothing: Smoothing) -> f64 {
        let Some(mut before) = tokens.next() else { return 0.0 };
        let (mut nats, mut labels) = (0.0, 0u64);
        for token in tokens {
            nats -= self.probability(before, token, smoothing).ln();
            labels += 1;
            before = token;
        }
        nats / labels.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A stream in which every token but one in `noise` follows from the one before it.
    fn stream(vocab: u32, len: usize, noise: u64, seed: u64) -> Vec<u32> {
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 33
        };
        let mut token = 0;
        let next = |draw: &mut dyn FnMut() -> u64, token: u32| {
            if draw().is_multiple_of(noise) {
                (draw() % u64::from(vocab)) as u32
            } else {
                (token + 1) % vocab
            }
        };
        (0..len)
            .map(|_| {
                token = next(&mut draw, token);
                token
            })
            .collect()
    }

    #[test]
    fn a_bigram_sees_what_a_unigram_cannot() {
        let vocab = 50;
        let train = stream(vocab, 200_000, 10, 1);
        let held_out = stream(vocab, 20_000, 10, 2);
        let found = bigram_cross_entropy(train.into_iter(), held_out.iter().copied(), vocab).unwrap();
        // The source itself: one successor with 0.9 + 0.1/50, 49 others with 0.1/50 each.
        let likely = held_out.windows(2).filter(|pair| pair[1] == (pair[0] + 1) % vocab).count();
        let nats = likely as f64 * 0.902f64.ln() + (19_999 - likely) as f64 * 0.002f64.ln();
        let excess = found.bigram_nats + nats / 19_999.0;
        assert!((-0.002..0.01).contains(&excess), "{found:?}, {excess} above the source");
        assert!((found.unigram_nats - f64::from(vocab).ln()).abs() < 0.01, "{found:?}");
        assert_eq!(found.labels, 19_999);
    }

    #[test]
    fn dense_and_sparse_counts_agree() {
        let (train, held_out) = (stream(60, 5_000, 3, 1), stream(60, 500, 3, 2));
        let nats = |vocab| {
            let mut counts = Counts::new(vocab);
            counts.vocab = 60;
            counts.add(train.iter().copied());
            counts.cross_entropy(held_out.iter().copied(), Smoothing::CANDIDATES[7])
        };
        assert_eq!(nats(60).to_bits(), nats(DENSE_VOCABULARY + 1).to_bits());
    }

    #[test]
    fn too_little_text_and_foreign_tokens_are_refused() {
        let few = bigram_cross_entropy([1].into_iter(), [1, 2].into_iter(), 3);
        assert!(matches!(few, Err(Error::TooFewTokens { .. })));
        let foreign = bigram_cross_entropy([1, 2].into_iter(), [1, 3].into_iter(), 3);
        assert!(matches!(foreign, Err(Error::Option { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn probabilities_sum_to_one(seed: u64, vocab in 2u32..20, len in 2usize..300) {
            let mut counts = Counts::new(vocab);
            counts.add(stream(vocab, len, 2, seed).into_iter());
            for smoothing in Smoothing::CANDIDATES.iter().chain([&Smoothing::Unigram]) {
                for before in 0..vocab {
                    let sum: f64 =
                        (0..vocab).map(|token| counts.probability(before, token, *smoothing)).sum();
                    prop_assert!((sum - 1.0).abs() < 1e-9, "{:?}: {}", smoothing, sum);
                }
            }
        }
    }
}
